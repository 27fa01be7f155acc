"""How much memory rows may take: a file of 1 MB can unpack to gigabytes, and be read until the machine stands still."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from preparing.problems import DataError

SHARE = 0.5  # of the free memory, for all rows of a source
# For the bytes of a text file: decoded, it has up to 4 bytes for each of them, and its rows come on top.
TEXT = 1 / 8
ROWS = 1000  # between two looks at the memory


class MemoryRoom:
    """The memory that is free when reading begins, and how much of it this process may take."""

    def __init__(self) -> None:
        self.process: Any = None
        self.free = 2**62
        with contextlib.suppress(ModuleNotFoundError):  # a Python without the workspace's packages reads rows too
            import psutil

            self.process = psutil.Process()
            self.free = max(min(psutil.virtual_memory().available, container_limit() - self.taken()), 0)
        self.before = self.taken()

    def taken(self) -> int:
        """Return the bytes of memory that this process takes."""
        return int(self.process.memory_info().rss) if self.process else 0

    def check_rows(self, where: str) -> None:
        """Raise DataError if what was read takes more than its share."""
        if self.taken() - self.before > self.free * SHARE:
            raise too_much(where, self.free)

    def check_text(self, text: bytearray, file: str) -> None:
        """Raise DataError if a text is so long that its rows would take more than their share."""
        if len(text) > self.free * TEXT:
            lines = text.count(b"\n") + 1
            raise too_much(f"{file}, line {lines}", self.free)


def too_much(where: str, free: int) -> DataError:
    """Return the error for rows that need too much memory."""
    return DataError(
        f"{where}: the rows up to here need more than half of the {free / 2**30:.1f} GiB of free memory: take fewer "
        "rows, or a machine with more memory."
    )


def container_limit() -> int:
    """Return the container's memory limit in bytes; without one, more than any machine has."""
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if Path(name).is_file() and (limit := Path(name).read_text().strip()).isdigit():
            return int(limit)
    return 2**62
