"""A folder in models/ written by an export: what it was made from, whether it is complete, and disk space for it."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import NotRequired, TypedDict

from planning.quantizations import Weights
from preparing.workspace import MODELS, ROOT
from reporting.run_record import RunRecord
from settings.config_file import ConfigError
from training.whole_files import remove_unfinished, replace_folder


class MadeFrom(TypedDict):
    """What an export was made from, and for the ONNX model how."""

    adapter_sha256: str
    base_model: str
    revision: str | None
    provider: NotRequired[str]  # of ONNX Runtime: cpu, cuda or dml
    quantization: NotRequired[str]  # a name in planning/quantizations.py
    precision: NotRequired[str]  # of most weights: int4, int8, float16 or float32


MERGED, ONNX = MODELS / "merged", MODELS / "onnx"
BEST = MODELS / ".onnx.best"  # while an export lasts: the best of those that do not keep the answers
MARK = "export.json"  # written to a complete folder: what it was made from, its files and their sizes in bytes


def check_disk(base: Path, kind: str, made_from: MadeFrom, onnx: float) -> None:
    """Raise ConfigError unless the disk has room for the export in addition to the existing files.

    `onnx` is what the ONNX models need in bytes. What an interrupted export left is removed first.
    """
    for folder in (MERGED, ONNX):
        remove_unfinished(folder)
    shutil.rmtree(BEST, ignore_errors=True)
    merged = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    needed = (0 if is_made_from(MERGED, made_from) else merged) + (onnx if kind == "onnx" else 0)
    free = shutil.disk_usage(MODELS).free
    if needed > free:
        raise ConfigError(
            f"{MODELS} has {free / 2**30:.1f} GiB of disk free and the export needs {needed / 2**30:.1f}: free some "
            "and run again."
        )


def weights_of(base: Path, run: RunRecord) -> Weights:
    """Count the weights that the merged model will have, from the names and shapes in the base model's files."""
    from safetensors import safe_open

    counts = {"layers": 0, "embed": 0, "lm_head": 0}
    for file in base.glob("*.safetensors"):
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                part = next((part for part in ("embed", "lm_head") if part in name), "layers")
                counts[part] += math.prod(weights.get_slice(name).get_shape())
    adapted = run["config"]["adapter"].get("target_modules") or ()
    tied = not counts["lm_head"] and not {"embed_tokens", "lm_head"} & set(adapted)
    return Weights(counts["layers"], counts["embed"], tied)


def is_made_from(folder: Path, made_from: MadeFrom) -> bool:
    """Return whether a folder is complete and was made from this adapter and base model."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in mark["files"].items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False
    return bool(whole and made_from.items() <= mark.items())


def bytes_in(folder: Path) -> int:
    """Return the size of a folder's files."""
    return sum(path.stat().st_size for path in folder.iterdir())


def put_in_place(unfinished: Path, folder: Path, made_from: MadeFrom) -> None:
    """Mark a folder as complete and rename it to its final name; the previous folder is removed after that."""
    sizes = {path.name: path.stat().st_size for path in unfinished.iterdir() if path.is_file()}
    (unfinished / MARK).write_text(json.dumps(made_from | {"files": sizes}, indent=2) + "\n", encoding="utf-8")
    replace_folder(unfinished, folder)


def shown(folder: Path) -> str:
    """Return a folder's path relative to the workspace."""
    return folder.relative_to(ROOT).as_posix()
