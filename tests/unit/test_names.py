"""The template's files are valid on Windows, macOS and Linux, and can be merged."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEMPLATE = ROOT / "template"
PATHS = [path for path in TEMPLATE.rglob("*") if not re.search(r"__pycache__|_cache\b", path.as_posix())]
# Names of devices, with any ending: Windows makes no such file.
DEVICES = {"con", "prn", "aux", "nul", *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10))}


def complaint(name: str) -> str:
    """Return what Windows has against a name, "" for nothing."""
    if re.search(r'[<>:"|?*\\\x00-\x1f]', name):
        return "a character"
    if name.endswith((".", " ")):
        return "its end"
    return "a device" if name.split(".")[0].lower() in DEVICES else ""


def rendered(path: Path) -> str:
    """Return a file's path as the workspace has it."""
    name = path.relative_to(TEMPLATE).as_posix().removesuffix(".jinja")
    return name.replace("{{_copier_conf.answers_file}}", ".copier-answers.yml")


def test_every_file_name_is_valid_on_windows() -> None:
    assert {path: why for path in PATHS for part in rendered(path).split("/") if (why := complaint(part))} == {}
    # Its paths have 260 characters, the user's folder included.
    assert max(len(rendered(path)) for path in PATHS) <= 100


def test_no_two_names_differ_only_in_case() -> None:
    names = [rendered(path).lower() for path in PATHS]
    assert len(names) == len(set(names))


def test_there_is_no_link_and_no_binary_file() -> None:
    """Windows makes links for administrators only; Copier cannot merge a binary file, and would overwrite yours."""
    assert [path for path in PATHS if path.is_symlink()] == []
    for path in filter(Path.is_file, PATHS):
        content = path.read_bytes()
        content.decode("utf-8")
        assert b"\0" not in content and b"\r" not in content, path


@pytest.mark.parametrize("name", ["a:b", "aux.txt", "what?", "end.", "COM1", "a\\b"])
def test_a_name_that_is_invalid_on_windows_is_found(name: str) -> None:
    assert complaint(name)
