"""What a prompt and its answer cost: time, in pieces after which an answer can be stopped, and memory."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from engine import ChatError

SECONDS = 0.1  # of a piece
CGROUP = Path("/sys/fs/cgroup")


class Pieces:
    """Cuts prompts into pieces, each as long as the model reads in SECONDS: it is tried out and remembered."""

    def __init__(self, least: int) -> None:
        """Begin with the least tokens: fewer would cost more than they gain, as each piece reads all weights."""
        self.size = self.least = least

    def of(self, tokens: list[int]) -> Iterator[list[int]]:
        """Yield the pieces; each is as long as the time permits that passed with the one before."""
        start = 0
        while start < len(tokens):
            end = start + self.size
            if len(tokens) - end < 2:  # a single token would be rounded otherwise than several together
                end = len(tokens)
            began = time.monotonic()
            yield tokens[start:end]
            faster = SECONDS / max(time.monotonic() - began, 1e-6)
            if end - start >= self.size or faster < 1:  # not if a short rest was read fast
                self.size = max(self.least, int((end - start) * min(faster, 4)))
            start = end


def same_start(one: list[int], other: list[int]) -> int:
    """Return how many tokens both begin with."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (left, right) in pairs if left != right), min(len(one), len(other)))


def refuse_too_large(tokens: int, token_bytes: int, free: int) -> None:
    """Raise ChatError if so many tokens more need more memory than is free. Windows of attention are not counted."""
    if (needed := tokens * token_bytes) > free:
        raise ChatError(
            f"The conversation and an answer of the length asked for need {needed / 2**30:.1f} GiB of memory, and "
            f"{free / 2**30:.1f} are free: ask for a shorter answer (max_tokens, or Longest answer on the page), or "
            "leave out old messages."
        )


def free_memory() -> int:
    """Return the memory in bytes that is available here: of the machine, or of the container if it has less."""
    import psutil

    free = int(psutil.virtual_memory().available)
    try:
        limit = int((CGROUP / "memory.max").read_text())
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
        return min(free, limit - used + int(cached))
    except (OSError, ValueError, KeyError):  # no container, or none with a limit
        return free
