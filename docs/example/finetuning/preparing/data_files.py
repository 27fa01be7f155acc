"""`train_file` → the files that it names, and their text."""

from __future__ import annotations

import codecs
import gzip
import zlib
from pathlib import Path

from preparing.memory_room import MemoryRoom
from preparing.problems import DataError, short

ENDINGS = (".jsonl", ".json", ".csv", ".txt", ".parquet")
REJECTED = ".rejected.jsonl"
SAVED = ("dataset_info.json", "dataset_dict.json")  # a folder with one of them was written by `save_to_disk`
PATTERN = "*?["
OFFERED = "cp1252"  # what Windows programs write in Western Europe and America


def data_files(named: str | list[str]) -> list[str]:
    """Return the files that a path, a folder, a pattern or a list of them names. Raises DataError if there are none.

    What exists under its name is never taken for a pattern. A folder written by `save_to_disk` counts as a file.
    """
    if isinstance(named, list):
        if not named:
            raise DataError("train_file is an empty list: name a file in olive-config.yaml.")
        return list(dict.fromkeys(file for one in named for file in data_files(one)))
    path = Path(named)
    if path.is_file() or is_saved(path):
        return [named]
    if path.is_dir():
        if not (files := [file.as_posix() for file in sorted(path.iterdir()) if file.is_file() and is_data(file)]):
            raise DataError(f"The folder {named} has no file that ends in {', '.join(ENDINGS)}: name another one.")
        return files
    if any(mark in named for mark in PATTERN):
        if files := [file.as_posix() for file in matching(path) if is_data(file)]:
            return files
        raise DataError(f"No data file fits the pattern {named}: change train_file in olive-config.yaml.")
    raise DataError(f"The dataset {named} is not there: put it there, or change the path in olive-config.yaml.")


def matching(pattern: Path) -> list[Path]:
    """Return the files that fit a pattern; a folder at its start that exists is taken by its name."""
    start = next(parent for parent in pattern.parents if parent.is_dir() or parent == parent.parent)
    return sorted(file for file in start.glob(str(pattern.relative_to(start))) if file.is_file())


def is_data(file: Path) -> bool:
    """Return whether a file in a folder holds rows."""
    name = file.name.lower()
    return name.removesuffix(".gz").endswith(ENDINGS) and not name.endswith(REJECTED) and not name.startswith(".")


def is_saved(folder: Path) -> bool:
    """Return whether `Dataset.save_to_disk` wrote the folder."""
    return any((folder / name).is_file() for name in SAVED)


def file_text(file: str, encoding: str | None) -> str:
    """Return the text of a file, unpacked and decoded; `encoding` None: UTF-8, or UTF-16 with its mark."""
    raw, room = bytearray(), MemoryRoom()
    try:
        with gzip.open(file) if file.lower().endswith(".gz") else Path(file).open("rb") as stream:
            while piece := stream.read1(2**20):
                raw += piece
                room.check_text(raw, file)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        line = raw.count(b"\n") + 1
        raise DataError(f"{file}, line {line}: the gzip file is damaged or not gzip ({error}). Replace it.") from error
    except OSError as error:
        raise DataError(f"{file}, line 1: it cannot be read: {error.strerror}. Repair or replace it.") from error
    marked = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    chosen = "UTF-16" if marked else "UTF-8" if raw.startswith(codecs.BOM_UTF8) else encoding or "UTF-8"
    nul = raw.find(0, 0, 8000) if chosen == "UTF-8" else -1  # git detects binary files the same way
    if nul >= 0:
        line = raw.count(b"\n", 0, nul) + 1
        raise DataError(f"{file}, line {line}: not text, or UTF-16 without its mark: save it as UTF-8.")
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode(chosen)
    except LookupError as error:
        raise DataError(f"encoding is {encoding!r}, which Python does not know: write utf-8 or {OFFERED}.") from error
    except UnicodeDecodeError as error:
        line = raw[: error.start].decode(chosen, "ignore").count("\n") + 1
        where = f"{file}, line {line}: byte {error.start + 1} is not {chosen}"
        raise DataError(f"{where}: save it as UTF-8{offer(raw, error.start) if chosen == 'UTF-8' else ''}.") from error


def offer(raw: bytearray, position: int) -> str:
    """Return what the line at a byte says if it is read as cp1252, and the setting for it; "" if it is not."""
    line = raw[raw.rfind(b"\n", 0, position) + 1 :].partition(b"\n")[0]
    try:
        text = line.decode(OFFERED)
    except UnicodeDecodeError:
        return ""
    shown = short(text[max(0, position - raw.rfind(b"\n", 0, position) - 15) :].strip(), 30)
    return f", or set encoding: {OFFERED} in olive-config.yaml if this reads right: {shown}"
