"""All rows of a source → conversations. Unusable rows are rejected and listed in a file next to the data."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from preparing.formats import Message, to_messages, used_columns
from preparing.rows import REJECTED, DataError, file_rows, hub_rows, one_line, short
from preparing.workspace import ROOT


class Conversation(list[Message]):
    """The messages of one row, {role, content} each, and the row's place in the data."""

    def __init__(self, messages: Iterable[Message] = (), place: str = "a row") -> None:
        super().__init__(messages)
        self.place = place


def read(
    file: str | None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    prompt_template: str | None = None,
    completion_template: str | None = None,
    max_bad_rows: float = 0.05,
) -> list[Conversation]:
    """Read a local file, or a Hugging Face dataset if one is given, as conversations to train on.

    Rejected rows are written to a file next to the data and their number is printed. Raises DataError if they are more
    than the share `max_bad_rows` of all rows, or if the source cannot be read.
    """
    if type(max_bad_rows) not in (int, float) or not 0 <= max_bad_rows <= 1:
        raise DataError(f"max_bad_rows is {max_bad_rows!r}: write a share from 0 to 1 in olive-config.yaml.")
    source = dataset_name or str(file)
    unit = "row" if dataset_name or source.lower().endswith(".parquet") else "line"
    good: list[Conversation] = []
    bad: list[dict[str, Any]] = []
    unused: set[str] = set()
    for row in hub_rows(source, dataset_split) if dataset_name else file_rows(source):
        try:
            if row.problem:
                raise DataError(row.problem)
            messages = to_messages(row.value, dataset_format, prompt_template, completion_template)
        except (DataError, RecursionError) as error:
            reason = str(error) if isinstance(error, DataError) else "it is nested too deeply."
            bad.append({"file": source, "line": row.number, "reason": reason, "row": row.value})
        else:
            good.append(Conversation(messages, f"{source}, {unit} {row.number}"))
            if isinstance(row.value, dict):
                unused |= row.value.keys() - used_columns(
                    row.value, dataset_format, prompt_template, completion_template
                )
    if not good and not bad:
        raise DataError(f"{source}, {unit} 1: there are no rows. Put some there, or name another file.")
    first = f"{unit} {bad[0]['line']}: {bad[0]['reason']}" if bad else ""
    count = f"{len(bad)} of {len(good) + len(bad)} rows"
    if bad and (len(bad) > max_bad_rows * (len(good) + len(bad)) or not good):
        raise DataError(
            f"{source}, {first} In all, {count} cannot be used (max_bad_rows allows a share of {max_bad_rows:g}): "
            "repair them, or raise max_bad_rows in olive-config.yaml to skip them."
        )
    rejected_file = write_rejected(source, bad, bool(dataset_name))
    if bad:
        print_once(f"{count} of {source} were rejected, see {rejected_file.as_posix()}; the first is {first}")
    if unused:
        print_once(f"{source}: columns {short(', '.join(sorted(unused)), 300)} are not used.")
    return good


def write_rejected(source: str, bad: list[dict[str, Any]], is_from_hub: bool) -> Path:
    """Write the rejected rows to a file next to the data; if there are none, remove the file of an earlier run."""
    name = re.sub(r"\W+", "-", source).strip("-") if is_from_hub else Path(Path(source).name.removesuffix(".gz")).stem
    target = (ROOT / "dataset" if is_from_hub else Path(source).parent) / (name + REJECTED)
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


def is_rejected_list(target: Path, source: str) -> bool:
    """Return whether a file contains the rejected rows of this source."""
    try:
        with target.open("rb") as file:
            first = json.loads(file.readline())
        return bool(first.keys() == {"file", "line", "reason", "row"} and Path(first["file"]).name == Path(source).name)
    except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def to_line(rejected: dict[str, Any]) -> bytes:
    """Return a line of JSON; characters that UTF-8 cannot encode are escaped."""
    try:
        text = json.dumps(rejected, ensure_ascii=False, default=str)
    except RecursionError:
        text = json.dumps({**rejected, "row": None}, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


@cache
def print_once(text: str) -> None:
    """Print a line only once: the check, the training and the evaluation of a run read the same rows."""
    print(one_line(text))
