"""A folder in models/ written by an export: what it was made from, whether it is complete, and disk space for it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import NotRequired, TypedDict

from preparing.workspace import MODELS, ROOT
from settings.config_file import ConfigError
from training.whole_files import remove_unfinished, replace_folder


class MadeFrom(TypedDict):
    """What an export was made from, and its execution provider."""

    adapter_sha256: str
    base_model: str
    revision: str | None
    provider: NotRequired[str]  # of ONNX Runtime: cpu, cuda or dml


MERGED, ONNX = MODELS / "merged", MODELS / "onnx"
MARK = "export.json"  # written to a complete folder: what it was made from, its files and their sizes in bytes
INT4_BYTES = 0.65  # per weight, including the scale of each block of 32


def check_disk(base: Path, kind: str, made_from: MadeFrom) -> None:
    """Raise ConfigError unless the disk has room for the export in addition to the existing files.

    What an interrupted export left is removed first.
    """
    from safetensors import safe_open

    for folder in (MERGED, ONNX):
        remove_unfinished(folder)
    files = list(base.glob("*.safetensors"))
    needed = 0.0 if is_made_from(MERGED, made_from) else float(sum(file.stat().st_size for file in files))
    for file in files if kind == "onnx" else []:
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                needed += size * (4 if "embed" in name else INT4_BYTES)  # the embedding stays in float32
    free = shutil.disk_usage(MODELS).free
    if needed > free:
        raise ConfigError(
            f"{MODELS} has {free / 2**30:.1f} GiB of disk free and the export needs {needed / 2**30:.1f}: free some "
            "and run again."
        )


def is_made_from(folder: Path, made_from: MadeFrom) -> bool:
    """Return whether a folder is complete and was made from this adapter and base model."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in mark.pop("files").items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(whole and mark == made_from)


def put_in_place(unfinished: Path, folder: Path, made_from: MadeFrom) -> None:
    """Mark a folder as complete and rename it to its final name; the previous folder is removed after that."""
    sizes = {path.name: path.stat().st_size for path in unfinished.iterdir() if path.is_file()}
    (unfinished / MARK).write_text(json.dumps(made_from | {"files": sizes}, indent=2) + "\n", encoding="utf-8")
    replace_folder(unfinished, folder)


def shown(folder: Path) -> str:
    """Return a folder's path relative to the workspace."""
    return folder.relative_to(ROOT).as_posix()
