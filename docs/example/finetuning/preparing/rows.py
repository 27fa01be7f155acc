"""Files and hub datasets → raw rows, each with its line number.

Text files are read with the standard library: it gives the line of every row, and allows rows of different shapes.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from preparing.data_files import ENDINGS, REJECTED, file_text, is_saved
from preparing.problems import DataError, short

ROWS_KEYS = ("train", "data", "rows", "examples", "instances")  # the usual names of the rows in a JSON object
BATCH = 4096  # rows of a Parquet file that are unpacked together
ROW_KEYS = {"messages", "conversations", "conversation", "instruction", "completion", "text", "prompt", "role", "from"}


class Row(NamedTuple):
    """A row as in its source: the line where it starts (or its number), and why it cannot be read."""

    number: int
    value: Any
    problem: str = ""


def file_rows(file: str, split: str, encoding: str | None, notify: Callable[[str], None]) -> Iterator[Row]:
    """Yield the rows of a local file, or of the part `split` of a folder that `save_to_disk` wrote.

    `notify` gets a sentence about what is left out. Raises DataError if the file is damaged or of an unknown kind.
    """
    name = file.lower().removesuffix(".gz")
    if is_saved(Path(file)):
        return saved_rows(file, split)
    if name.endswith(REJECTED):
        raise DataError(f"{file}, line 1: these rows were rejected. Repair them in the file that they come from.")
    if not name.endswith(ENDINGS) or file.lower().endswith(".parquet.gz"):
        raise DataError(f"{file} has an unknown ending: use {', '.join(ENDINGS)}; all but .parquet also with .gz.")
    if name.endswith(".parquet"):
        return parquet_rows(file)
    text = file_text(file, encoding)
    if name.endswith(".csv"):
        return csv_rows(file, text)
    if name.endswith(".txt"):
        return (Row(number, {"text": line}) for number, line in lines(text))
    if name.endswith(".json") and text.lstrip().startswith("["):
        return array_rows(file, text, text.index("["))
    return rows_in_object(file, text, notify) or json_rows(text)


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines with their numbers. str.splitlines would also split at other characters."""
    if "\r" in text:
        text = text.replace("\r\n", "\n").replace("\r", "\n")
    number = start = 0
    while start < len(text):  # not io.StringIO, which takes 4 bytes for each character
        end = text.find("\n", start)
        end = len(text) if end < 0 else end
        line, number, start = text[start:end], number + 1, end + 1
        if line.strip():
            yield number, line


def json_rows(text: str) -> Iterator[Row]:
    """Yield the rows of a file with one JSON value per line; a comma after it, as in an array, does no harm."""
    for number, line in lines(text):
        try:
            yield Row(number, json.loads(line.rstrip().removesuffix(",")))
        except RecursionError:
            yield Row(number, line, "it is nested too deeply.")
        except ValueError as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            hint = (
                " Write one row a line, or an array into a file that ends in .json." if len(line.strip()) == 1 else ""
            )
            yield Row(number, line, f"it is not JSON ({reason}).{hint}")


def rows_in_object(file: str, text: str, notify: Callable[[str], None]) -> Iterator[Row] | None:
    """Return the rows of a file that is one JSON object with the rows under a key; None for any other file.

    Raises DataError if the key cannot be found.
    """
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None  # one object per line, or damaged: json_rows says where
    if not isinstance(value, dict) or value.keys() & ROW_KEYS:
        return None
    lists = [key for key, rows in value.items() if isinstance(rows, list)]
    chosen = [key for key in ROWS_KEYS if key in lists] or lists
    if not chosen or (len(chosen) > 1 and chosen == lists):
        names = short(", ".join(map(repr, value)), 300)
        raise DataError(
            f"{file}, line 1: it is one JSON object with the keys {names}: write the list of the rows alone, or under "
            f"the key {ROWS_KEYS[0]!r}."
        )
    others = [key for key in value if key != chosen[0]]
    unused = f"; {short(', '.join(map(repr, others)), 300)} are not used" if others else ""
    notify(f"{file}: the rows are those under {chosen[0]!r}{unused}.")
    return array_rows(file, text, start_of(text, chosen[0]))


def start_of(text: str, wanted: str) -> int:
    """Return where the value of a key of the outermost JSON object starts. A repeated key counts the last time."""
    space, decoder, found = re.compile(r"[ \t\r\n,:]*"), json.JSONDecoder(), 0
    position = text.index("{") + 1
    while True:
        position = space.match(text, position).end()  # type: ignore[union-attr]
        if text.startswith("}", position):
            return found
        key, position = decoder.raw_decode(text, position)
        position = space.match(text, position).end()  # type: ignore[union-attr]
        found = position if key == wanted else found
        _, position = decoder.raw_decode(text, position)


def array_rows(file: str, text: str, start: int) -> Iterator[Row]:
    """Yield the elements of a JSON array that starts at a position of the text, and is all of it or in an object.

    Raises DataError: rows after a mistake cannot be found.
    """
    space, decoder = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    line = 1
    counted, position = 0, skip(start + 1)
    try:
        while not text.startswith("]", position):
            line += text.count("\n", counted, position)
            counted = position
            value, end = decoder.raw_decode(text, position)
            yield Row(line, value)
            position = skip(end)
            if text.startswith(",", position):
                position = skip(position + 1)
            elif not text.startswith("]", position):
                raise json.JSONDecodeError("Expecting a comma or ]", text, position)
        if text[position + 1 :].strip() and not text.lstrip().startswith("{"):
            raise json.JSONDecodeError("Extra data after the array", text, skip(position + 1))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: it is damaged or not JSON ({error.msg}). Repair it.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}, line {line}: it is not JSON that can be read ({error}). Repair it.") from error


def csv_rows(file: str, text: str) -> Iterator[Row]:
    """Yield the records of a CSV file; its first line has the column names and determines the separator.

    A line `sep=;` before it, as spreadsheets write and read it, names the separator. Records and columns without any
    content are skipped.
    """
    csv.field_size_limit(2**31 - 1)
    stream = io.StringIO(text, newline="")
    named = re.match(r"sep=(.)\r?\n", text, re.IGNORECASE)
    skipped = stream.readline() if named else ""
    first = stream.readline()
    guessed = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    stream.seek(len(skipped))
    reader = csv.reader(stream, delimiter=named[1] if named else guessed, strict=True)
    header: list[str] = []
    while True:
        number, cells, problem = reader.line_num + 1 + bool(named), [], ""
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            if "unexpected end" in str(error):
                raise DataError(
                    f"{file}, line {number}: a quote is opened here and never closed. Repair it."
                ) from error
            if not header:
                raise DataError(f"{file}, line {number}: the names of the columns are no CSV ({error}).") from error
            problem = f"it is not CSV ({error})."
        if problem:
            yield Row(number, cells, problem)
        elif not any(cell.strip() for cell in cells):
            continue
        elif not header:
            header = [cell.strip() for cell in cells]
            if len(set(filter(None, header))) < len([*filter(None, header)]):
                raise DataError(f"{file}, line {number}: two columns have the same name: {short(header)}.")
        else:
            yield record(number, cells, header)


def record(number: int, cells: list[str], header: list[str]) -> Row:
    """Return a record of a CSV file as a row, without blank columns."""
    while len(cells) > len(header) and not cells[-1].strip():
        cells = cells[:-1]
    if len(cells) != len(header):
        return Row(number, cells, f"it has {len(cells)} cells, and {len(header)} columns are named in the first line.")
    for place, (name, cell) in enumerate(zip(header, cells, strict=True), start=1):
        if not name and cell.strip():
            return Row(number, cells, f"cell {place} has content, but its column has no name: name it, or empty it.")
    return Row(number, {name: cell for name, cell in zip(header, cells, strict=True) if name})


def parquet_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    from pyarrow.parquet import ParquetFile

    number = 0
    try:  # a file, not a name: `datasets` would take brackets in it for a pattern
        with Path(file).open("rb") as stream:
            for batch in ParquetFile(stream).iter_batches(BATCH):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(number, value)
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(
            f"{file}, row {number + 1}: it cannot be read as Parquet: {cause}. Repair or replace it."
        ) from error


def saved_rows(folder: str, split: str) -> Iterator[Row]:
    """Yield the rows of a dataset that `save_to_disk` wrote; one with several splits is read at `split`."""
    from datasets import DatasetDict, load_from_disk

    try:
        rows = load_from_disk(folder)
        rows = rows[split] if isinstance(rows, DatasetDict) else rows
        values = [*rows]
    except KeyError as error:
        raise DataError(
            f"{folder} has no split {split}: set dataset_split in olive-config.yaml to one of {', '.join(rows)}."
        ) from error
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")
        raise DataError(f"{folder}: it cannot be read as a saved dataset: {cause}. Save it again.") from error
    return (Row(number, value) for number, value in enumerate(values, start=1))


def hub_rows(dataset_name: str, dataset_split: str) -> Iterator[Row]:
    """Yield the rows of a hub dataset. A private one needs HF_TOKEN or `hf auth login`."""
    from datasets import load_dataset

    try:
        rows = load_dataset(dataset_name, split=dataset_split)
        yield from (Row(number, row) for number, row in enumerate(rows, start=1))
    except Exception as error:
        cause = (str(error).splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"The dataset {dataset_name}, split {dataset_split}, cannot be read: {cause} Correct dataset_name or "
            "dataset_split in olive-config.yaml; a private or gated one needs `hf auth login` or HF_TOKEN."
        ) from error
