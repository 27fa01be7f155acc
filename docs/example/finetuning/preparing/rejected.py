"""The list of rejected rows, in a file next to the data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict

from preparing.data_files import REJECTED
from preparing.problems import DataError, visible
from preparing.workspace import ROOT


class Rejected(TypedDict):
    """A line of the list."""

    file: str
    line: int
    reason: str
    row: Any


def write_rejected(source: str, bad: list[Rejected], is_from_hub: bool) -> Path:
    """Write the rejected rows to a file next to the data; if there are none, remove the file of an earlier run."""
    target = rejected_file(source, is_from_hub)
    try:
        if target.is_file() and is_rejected_list(target, source):
            if not bad:
                target.unlink(missing_ok=True)
        elif target.is_file() and bad:
            raise DataError(f"{target}, line 1: not the rows rejected from {source}. Move it away: it would be lost.")
        if bad:
            unfinished = target.with_name(f".{target.name}.{os.getpid()}")
            unfinished.write_bytes(b"".join(map(to_line, bad)))
            unfinished.replace(target)
    except OSError as error:
        raise DataError(f"{target}, line 1: the rejected rows cannot be written there: {error.strerror}.") from error
    return target


def add_rejected(source: str, bad: list[Rejected], is_from_hub: bool) -> Path:
    """Add rows that a later step rejects to the list that write_rejected began."""
    target = rejected_file(source, is_from_hub)
    known: list[Rejected] = []
    if target.is_file() and is_rejected_list(target, source):
        known = [json.loads(line) for line in target.read_bytes().splitlines()]
    lines = {row["line"] for row in known}
    return write_rejected(source, [*known, *(row for row in bad if row["line"] not in lines)], is_from_hub)


def count_rejected(sources: Mapping[str, bool]) -> int:
    """Count the rows on the lists of these sources; the value of a source is whether it is from the hub."""
    found = {rejected_file(source, is_from_hub): source for source, is_from_hub in sources.items()}
    lists = [file for file, source in found.items() if is_rejected_list(file, source)]
    return sum(file.read_bytes().count(b"\n") for file in lists)


def rejected_file(source: str, is_from_hub: bool) -> Path:
    """Return the path of the list for a source."""
    name = re.sub(r"\W+", "-", source).strip("-") if is_from_hub else Path(Path(source).name.removesuffix(".gz")).stem
    return (ROOT / "dataset" if is_from_hub else Path(source).parent) / (name + REJECTED)


def is_rejected_list(target: Path, source: str) -> bool:
    """Return whether a file contains the rejected rows of this source."""
    try:
        with target.open("rb") as file:
            first = json.loads(file.readline())
        return bool(first.keys() == {"file", "line", "reason", "row"} and Path(first["file"]).name == Path(source).name)
    except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def to_line(rejected: Rejected) -> bytes:
    """Return a line of JSON; characters that UTF-8 cannot encode are escaped."""
    try:
        text = json.dumps(rejected, ensure_ascii=False, default=str)
    except RecursionError:
        text = json.dumps({**rejected, "row": None}, ensure_ascii=False)
    return (visible(text) + "\n").encode()  # visible writes escapes as JSON does
