"""AGENTS.md is correct for every workspace; tests/unit/test_docs.py compares its commands with the scripts."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
TEXT = (ROOT / "template" / "AGENTS.md").read_text(encoding="utf-8")
COMMANDS = [
    shlex.split(line, comments=True)
    for block in re.findall(r"^```bash\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
    for line in block.splitlines()
]
WORKSPACES: dict[str, dict[str, Any]] = {
    "demo": {},
    "azure": {"model": "phi-3-mini-4k-instruct", "target": "azure", "device": "gpu"},
}
# what the scripts make, and infra/, which some workspaces have not
MADE = {"models/", "models/run.json", "models/merged", "models/onnx", "models/smoke/", "infra/azure.py"}
IN_MODELS = {"adapter/", "merged/", "onnx/", "report/index.html", "run.json", "checkpoints/", "logs/"}


def test_it_is_short_and_the_same_for_every_answer() -> None:
    lines = TEXT.splitlines()
    assert len(lines) <= 60
    assert max(map(len, lines)) <= 120
    assert "{{" not in TEXT and not (ROOT / "template" / "AGENTS.md.jinja").exists()


@pytest.mark.parametrize("name", WORKSPACES)
def test_every_path_in_it_exists_or_will_be_created(render: Callable[..., Path], tmp_path: Path, name: str) -> None:
    workspace = render(tmp_path / "workspace", **WORKSPACES[name])
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.MULTILINE | re.DOTALL)
    paths = {text for text in re.findall(r"`([^`\n]+)`", prose) if re.fullmatch(r"[\w.-]*[/.][\w./*-]*", text)}
    assert {"dataset/", "finetuning/", "inference/", "setup/", "tests/", "models/"} <= paths
    places = [workspace, *(workspace / folder for folder in ("finetuning", "inference"))]
    lacking = {path for path in paths - MADE - IN_MODELS if not any(list(place.glob(path)) for place in places)}
    assert lacking - {"127.0.0.1"} == set()


def test_the_rooms_are_those_of_the_folder_in_the_order_of_their_imports() -> None:
    rooms = re.findall(r"`(\w+)/`", TEXT.partition("Their stages\n")[2].partition("A folder imports")[0])
    folder = ROOT / "template" / "finetuning"
    assert set(rooms) == {path.parent.name for path in folder.glob("*/__init__.py")}
    for number, room in enumerate(rooms):
        for file in (folder / room).glob("*.py"):
            imported = re.findall(r"^\s*(?:from|import) (\w+)", file.read_text(encoding="utf-8"), re.MULTILINE)
            assert set(imported) & set(rooms[:number]) == set(), file.name


def test_every_script_in_it_has_help_with_the_options_that_are_used() -> None:
    scripts = {(command[1], *(word for word in command[2:] if word.startswith("--"))) for command in COMMANDS}
    assert len(scripts) == len(COMMANDS) > 8
    for script, *options in scripts - {("-m",)}:
        asked = [sys.executable, "-B", ROOT / "template" / script, "--help"]
        shown = subprocess.run(asked, capture_output=True, text=True, check=True, cwd="/").stdout
        assert set(options) <= set(re.findall(r"--[a-z-]+", shown)), script


@pytest.mark.parametrize("script", sorted({command[1] for command in COMMANDS} - {"-m", "setup/drift.py"}))
def test_wrong_options_are_exit_status_2(script: str) -> None:
    asked = [sys.executable, "-B", ROOT / "template" / script, "--no-such-option"]
    assert subprocess.run(asked, capture_output=True, check=False, cwd="/").returncode == 2
