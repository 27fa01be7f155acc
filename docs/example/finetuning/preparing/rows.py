"""Files and hub datasets → raw rows, each with its line number.

Text files are read with the standard library: it gives the line of every row, and allows rows of different shapes.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from preparing.workspace import MODELS

ENDINGS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
REJECTED = ".rejected.jsonl"


class DataError(Exception):
    """What is wrong with the data, where, and what to do: always one line, whatever the data contains."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


class Row(NamedTuple):
    """A row as in its source: the line where it starts (or its number), and why it cannot be read."""

    number: int
    value: Any
    problem: str = ""


def one_line(text: str) -> str:
    """Return the text without line breaks and other control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def short(value: Any, longest: int = 60) -> str:
    """Return a value as text that fits into a sentence."""
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"


def file_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a local file. Raises DataError if it is missing, damaged or of an unknown kind."""
    name = file.lower().removesuffix(".gz")
    if not Path(file).is_file():
        raise DataError(f"The dataset {file} is not there: put it there, or change the path in olive-config.yaml.")
    if name.endswith(REJECTED):
        raise DataError(f"{file}, line 1: these rows were rejected. Repair them in the file that they come from.")
    if not name.endswith(ENDINGS) or file.lower().endswith(".parquet.gz"):
        raise DataError(f"{file} has an unknown ending: use {', '.join(ENDINGS)}; all but .parquet also with .gz.")
    if name.endswith(".parquet"):
        return parquet_rows(file)
    text = file_text(file)
    if name.endswith(".csv"):
        return csv_rows(file, text)
    if name.endswith(".txt"):
        return (Row(number, {"text": line}) for number, line in lines(text))
    return array_rows(file, text) if name.endswith(".json") and text.lstrip().startswith("[") else json_rows(text)


def file_text(file: str) -> str:
    """Return the text of a file, unpacked and decoded."""
    raw = bytearray()
    try:
        with gzip.open(file) if file.lower().endswith(".gz") else Path(file).open("rb") as stream:
            while piece := stream.read1(2**20):
                raw += piece
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        line = raw.count(b"\n") + 1
        raise DataError(f"{file}, line {line}: the gzip file is damaged or not gzip ({error}). Replace it.") from error
    except OSError as error:
        raise DataError(f"{file}, line 1: it cannot be read: {error.strerror}. Repair or replace it.") from error
    encoding = "UTF-16" if raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) else "UTF-8"
    nul = raw.find(0, 0, 8000) if encoding == "UTF-8" else -1  # git detects binary files the same way
    if nul >= 0:
        line = raw.count(b"\n", 0, nul) + 1
        raise DataError(f"{file}, line {line}: not text, or UTF-16 without its mark: save it as UTF-8.")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode(encoding)
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(encoding, "ignore").count("\n") + 1
        raise DataError(f"{file}, line {line}: byte {error.start + 1} is not {encoding}: save it as UTF-8.") from error


def lines(text: str) -> Iterator[tuple[int, str]]:
    """Yield the non-blank lines with their numbers. str.splitlines would also split at other characters."""
    for number, line in enumerate(io.StringIO(text, newline=None), start=1):
        if line.strip():
            yield number, line.removesuffix("\n")


def json_rows(text: str) -> Iterator[Row]:
    """Yield the rows of a file with one JSON value per line."""
    for number, line in lines(text):
        try:
            yield Row(number, json.loads(line))
        except RecursionError:
            yield Row(number, line, "it is nested too deeply.")
        except ValueError as error:
            reason = f"{error.msg}, column {error.colno}" if isinstance(error, json.JSONDecodeError) else str(error)
            hint = (
                " Write one row a line, or an array into a file that ends in .json." if len(line.strip()) == 1 else ""
            )
            yield Row(number, line, f"it is not JSON ({reason}).{hint}")


def array_rows(file: str, text: str) -> Iterator[Row]:
    """Yield the elements of a file that is one JSON array. Raises DataError: rows after a mistake cannot be found."""
    space, decoder = re.compile(r"[ \t\r\n]*"), json.JSONDecoder()

    def skip(position: int) -> int:
        match = space.match(text, position)
        return match.end() if match else position

    line = 1
    counted, position = 0, skip(text.index("[") + 1)
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
        if text[position + 1 :].strip():
            raise json.JSONDecodeError("Extra data after the array", text, skip(position + 1))
    except json.JSONDecodeError as error:
        raise DataError(f"{file}, line {error.lineno}: it is damaged or not JSON ({error.msg}). Repair it.") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"{file}, line {line}: it is not JSON that can be read ({error}). Repair it.") from error


def csv_rows(file: str, text: str) -> Iterator[Row]:
    """Yield the records of a CSV file; its first line has the column names and determines the separator."""
    csv.field_size_limit(2**31 - 1)
    stream = io.StringIO(text, newline="")
    first = stream.readline()
    separator = max(",;\t", key=lambda mark: len(next(csv.reader([first], delimiter=mark), [])))
    stream.seek(0)
    reader = csv.reader(stream, delimiter=separator, strict=True)
    header: list[str] = []
    while True:
        number, cells, problem = reader.line_num + 1, [], ""
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
        if not header:
            header = [cell.strip() for cell in cells]
            if len(set(header)) < len(header):
                raise DataError(f"{file}, line {number}: two columns have the same name: {short(header)}.")
        elif problem or len(cells) not in (0, len(header)):
            problem = problem or f"it has {len(cells)} cells, and {len(header)} columns are named in the first line."
            yield Row(number, cells, problem)
        elif cells:
            yield Row(number, dict(zip(header, cells, strict=True)))


def parquet_rows(file: str) -> Iterator[Row]:
    """Yield the rows of a Parquet file."""
    from datasets import load_dataset

    try:  # keep the cache of `datasets` in the workspace
        rows = load_dataset("parquet", data_files=file, split="train", cache_dir=str(MODELS / "cache"))
        yield from (Row(number, row) for number, row in enumerate(rows, start=1))
    except Exception as error:
        cause = (str(error.__cause__ or error).splitlines() or [type(error).__name__])[0]
        raise DataError(f"{file}, row 1: it cannot be read as Parquet: {cause} Repair or replace it.") from error


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
