"""All rows of a source → conversations. Unusable rows are rejected and listed in a file next to the data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

from preparing.data_files import data_files
from preparing.formats import bad_example, to_messages, unused
from preparing.memory_room import ROWS, MemoryRoom
from preparing.problems import DataError, one_line, short
from preparing.rejected import Rejected, write_rejected
from preparing.rows import Row, file_rows, hub_rows
from preparing.turns import Message


class Conversation(list[Message]):
    """The messages of one row, and where the row is: in a file or a hub dataset, at a line or as a number."""

    def __init__(
        self, messages: Iterable[Message] = (), source: str = "a row", number: int = 0, is_from_hub: bool = False
    ) -> None:
        super().__init__(messages)
        self.source, self.number, self.is_from_hub = source, number, is_from_hub

    @property
    def place(self) -> str:
        """The row's place in the data, as in `dataset/mine.jsonl, line 7`."""
        return f"{self.source}, {unit(self.source, self.is_from_hub)} {self.number}" if self.number else self.source

    def having(self, messages: Iterable[Message]) -> Conversation:
        """Return other messages of the same row."""
        return Conversation(messages, self.source, self.number, self.is_from_hub)


def read(
    train_file: str | list[str] | None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    prompt_template: str | None = None,
    completion_template: str | None = None,
    max_bad_rows: float = 0.05,
    encoding: str | None = None,
) -> list[Conversation]:
    """Read local files, or a Hugging Face dataset if one is given, as conversations to train on.

    Rejected rows are written to a file next to the data and their number is printed. Raises DataError if they are more
    than the share `max_bad_rows` of all rows, or if a source cannot be read.
    """
    if type(max_bad_rows) not in (int, float) or not 0 <= max_bad_rows <= 1:
        raise DataError(f"max_bad_rows is {max_bad_rows!r}: write a share from 0 to 1 in olive-config.yaml.")
    is_from_hub, read_as = bool(dataset_name), (dataset_format, prompt_template, completion_template)
    if not train_file and not dataset_name:
        raise DataError("There is no data: set train_file or dataset_name in olive-config.yaml.")
    sources = [str(dataset_name)] if is_from_hub else data_files(train_file or [])
    good: list[Conversation] = []
    bad: list[Rejected] = []
    not_used: dict[str, set[str]] = {source: set() for source in sources}
    counted, room = Counter[str](), MemoryRoom()
    for source, row in all_rows(sources, dataset_split, encoding, is_from_hub):
        counted[source] += 1
        if counted[source] % ROWS == 0:
            room.check_rows(f"{source}, {unit(source, is_from_hub)} {row.number}")
        if column := bad_example(row.value, dataset_format, prompt_template):
            raise DataError(
                f"{source}, {unit(source, is_from_hub)} {row.number}: the column {column} marks the answer as a bad "
                "example, as in KTO's rows, and this run would learn it like a good one: take these rows out."
            )
        try:
            if row.problem:
                raise DataError(row.problem)
            messages = to_messages(row.value, *read_as)
        except (DataError, RecursionError) as error:
            reason = str(error) if isinstance(error, DataError) else "it is nested too deeply."
            bad.append({"file": source, "line": row.number, "reason": reason, "row": row.value})
        else:
            good.append(Conversation(messages, source, row.number, is_from_hub))
            not_used[source] |= unused(row.value, *read_as)
    if not good and not bad:
        raise DataError(
            f"{sources[0]}, {unit(sources[0], is_from_hub)} 1: there are no rows. Put some there, or name another file."
        )
    count = f"{len(bad)} of {len(good) + len(bad)} rows"
    if bad and (len(bad) > max_bad_rows * (len(good) + len(bad)) or not good):
        place = Conversation((), bad[0]["file"], bad[0]["line"], is_from_hub).place
        if not good:  # then max_bad_rows cannot help, and it is often a setting that is wrong, not the rows
            raise DataError(f"{place}: {bad[0]['reason']} None of the {len(bad)} rows can be used.")
        raise DataError(
            f"{place}: {bad[0]['reason']} In all, {count} cannot be used (max_bad_rows allows a share of "
            f"{max_bad_rows:g}): repair them, or raise max_bad_rows in olive-config.yaml to skip them."
        )
    for source in sources:
        report(source, [row for row in bad if row["file"] == source], counted[source], is_from_hub)
        if not_used[source]:
            print_once(f"{source}: columns {short(', '.join(sorted(not_used[source])), 300)} are not used.")
    return good


def shared_system_prompt(rows: Sequence[list[Message]]) -> str:
    """Return the system prompt that all rows begin with; "" if there is none, or they have several."""
    prompts = {row[0]["content"] if row[0]["role"] == "system" else "" for row in rows}
    return prompts.pop() if len(prompts) == 1 else ""


def report(source: str, bad: list[Rejected], rows: int, is_from_hub: bool) -> None:
    """Write the rejected rows of a source to a file next to it, and print how many they are."""
    rejected_file = write_rejected(source, bad, is_from_hub)
    if bad:
        first = f"{unit(source, is_from_hub)} {bad[0]['line']}: {bad[0]['reason']}"
        print_once(
            f"{len(bad)} of {rows} rows of {source} were rejected, see {rejected_file.as_posix()}; the first is {first}"
        )


def all_rows(
    sources: list[str], dataset_split: str, encoding: str | None, is_from_hub: bool
) -> Iterator[tuple[str, Row]]:
    """Yield each source with each of its rows."""
    for source in sources:
        if is_from_hub:
            rows = hub_rows(source, dataset_split)
        else:
            rows = file_rows(source, dataset_split, encoding, print_once)
        yield from ((source, row) for row in rows)


def unit(source: str, is_from_hub: bool) -> str:
    """Return how the rows of a source are counted."""
    return "row" if is_from_hub or source.lower().endswith(".parquet") or Path(source).is_dir() else "line"


@cache
def print_once(text: str) -> None:
    """Print a line only once: the check, the training and the evaluation of a run read the same rows."""
    print(one_line(text))
