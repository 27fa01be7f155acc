"""Write files and folders atomically: never half written, and the old one stays until the new one is there."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


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
