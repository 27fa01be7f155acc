"""Texts of others in a terminal: each top folder has the same rule, and control characters come through nowhere."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import unicodedata
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "template"
PLACES = {
    "finetuning/preparing/problems.py": "visible",
    "inference/engine.py": "visible",
    "infra/az.py": "shown",
    "setup/visible.py": "visible",
    "../hooks/repository.py": "visible",
}
OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = "".join(map(chr, [*range(9), *range(11, 32), *range(127, 160)])) + OVERRIDES
FORGED = f"\x1b]52;c;aGk=\x07\x1b[2J\x9b31m{OVERRIDES}\rerror: all is well"


def load(file: Path) -> ModuleType:
    """Import a file by its path."""
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[file.stem] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(params=PLACES)
def rule(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """The function of a top folder that makes a text visible."""
    monkeypatch.setattr(sys, "modules", dict(sys.modules))
    monkeypatch.setattr(os, "environ", dict(os.environ))
    found: Any = getattr(load(TEMPLATE / request.param), PLACES[request.param])
    return found  # type: ignore[no-any-return]


def test_every_control_character_is_shown_as_an_escape_and_every_other_one_stays(rule: Callable[[str], str]) -> None:
    for number in range(0x11000):
        char = chr(number)
        category = unicodedata.category(char)
        if char in CONTROLS or category == "Cs":
            assert rule(char) == f"\\u{number:04x}"
        else:
            assert rule(char) == char, category
    assert rule("a\r\nb\tc\n") == "a\nb\tc\n" or rule("a\r\nb") == "a\\u000d\nb"  # git knows no line ends


def test_an_escape_is_the_one_of_json(rule: Callable[[str], str]) -> None:
    assert json.loads(rule(json.dumps(CONTROLS, ensure_ascii=False))) == CONTROLS


def test_what_an_installer_says_is_visible_in_the_error_and_in_the_log(make_workspace: Any) -> None:
    workspace = make_workspace()
    forged = "".join(f"\\0{byte:03o}" for byte in FORGED.encode())
    (workspace.programs / "uv").unlink(missing_ok=True)
    (workspace.programs / "uv").write_text(f"#!/bin/sh\nprintf '%b' '{forged}'; exit 1\n")
    (workspace.programs / "uv").chmod(0o755)
    workspace.env |= {"PYTHONIOENCODING": "utf-8", "PYTHONUTF8": "1"}
    done = workspace.run()
    assert done.returncode == 1
    for text in (done.stdout, done.stderr, workspace.log):
        assert not set(text) & set(CONTROLS)
    assert "\\u001b]52;c;aGk=\\u0007" in done.stderr and "\\u009b31m" in workspace.log


def test_the_name_of_a_file_that_stops_an_update_is_visible(tmp_path: Path) -> None:
    folder = tmp_path / "workspace"
    folder.mkdir()
    (folder / ".copier-answers.yml").write_text("_commit: v1\n")
    who = ["-c", "user.name=me", "-c", "user.email=me@example.org"]
    for command in (["init", "--quiet"], ["add", "-A"], [*who, "commit", "--quiet", "-m", "one"]):
        subprocess.run(["git", *command], cwd=folder, check=True)
    (folder / f"{FORGED.replace('/', '')}.rej").touch()
    command = [sys.executable, str(REPOSITORY / "hooks" / "migrate.py"), "before", ".copier-answers.yml"]
    done = subprocess.run(
        [*command, str(REPOSITORY), ""], cwd=folder, capture_output=True, encoding="utf-8", check=False
    )
    assert done.returncode == 1 and "Copier would mistake \\u001b]52;c;aGk=\\u0007" in done.stderr
    assert not set(done.stderr) & set(CONTROLS)
