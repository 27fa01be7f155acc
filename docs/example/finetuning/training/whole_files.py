"""Write files and folders atomically: never half written, and the old one stays until the new one is there."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

from preparing.problems import visible


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file. What JSON has no number for (NaN, infinity) becomes null."""
    unfinished = path.with_name(f".{path.name}.new")
    # visible writes escapes as JSON does
    text = visible(json.dumps(finite(value), indent=2, ensure_ascii=False, allow_nan=False))
    unfinished.write_text(text + "\n", encoding="utf-8")
    unfinished.replace(path)


def finite(value: Any) -> Any:
    """Return a value with None for each number in it that is not finite."""
    if isinstance(value, dict):
        return {name: finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def new_folder(folder: Path) -> Path:
    """Return an empty folder with a temporary name next to `folder`."""
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def remove_unfinished(folder: Path) -> None:
    """Remove what a process that was killed has left next to `folder`."""
    for name in ("new", "old"):
        shutil.rmtree(folder.with_name(f".{folder.name}.{name}"), ignore_errors=True)


def replace_folder(unfinished: Path, folder: Path) -> None:
    """Replace a folder with another one; the old one is removed after the new one is in place."""
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)  # left by a run that was killed between the two renames
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)
