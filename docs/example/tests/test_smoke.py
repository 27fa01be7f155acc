"""The whole workflow on a tiny replica of the model: settings, training, evaluation, chat. Offline, within a minute."""

from __future__ import annotations

import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
SMOKE = ROOT / "models" / "smoke"


def run(script: Path, *arguments: str) -> None:
    """Run a script of the workspace offline; its output is shown if it fails."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "PYTHONUTF8": "1"}
    command = [sys.executable, str(script), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, encoding="utf-8", check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def results() -> dict[Path, tuple[int, int]]:
    """Return time and size of each file of a real run."""
    files = [ROOT / "models" / "run.json"]
    files += [file for folder in ("adapter", "report") for file in (ROOT / "models" / folder).rglob("*")]
    return {file: (file.stat().st_mtime_ns, file.stat().st_size) for file in files if file.is_file()}


@pytest.fixture(scope="module")
def smoke() -> dict[str, Any]:
    """Run the smoke run once for all tests, and return its run.json."""
    shutil.rmtree(SMOKE, ignore_errors=True)
    before = results()
    run(ROOT / "finetuning" / "invoke_olive.py", "--smoke")
    assert results() == before, "the smoke run changed the results of a real run in models/"
    return dict(json.loads((SMOKE / "run.json").read_text(encoding="utf-8")))


def test_the_settings_are_valid() -> None:
    from settings.startup import quiet

    quiet()
    from settings.run_settings import read_settings
    from settings.validation import validate

    validate(read_settings())


def test_the_smoke_run_trains_an_adapter_and_measures_it_before_and_after(smoke: dict[str, Any]) -> None:
    assert (SMOKE / "adapter" / "adapter_model.safetensors").stat().st_size > 0
    for moment in ("before", "after"):
        assert math.isfinite(smoke["metrics"][moment]["eval_loss"])
        assert 0 <= smoke["metrics"][moment]["accuracy"] <= 1


def test_the_tuned_replica_answers(smoke: dict[str, Any], tmp_path: Path) -> None:
    # a workspace in which the smoke run was the real one
    for folder in ("finetuning", "inference", "setup", "models/smoke/adapter", "models/smoke/base"):
        shutil.copytree(ROOT / folder, tmp_path / folder)
    shutil.copy(SMOKE / "run.json", tmp_path / "models" / "run.json")
    run(tmp_path / "inference" / "console_chat.py", "--prompt", "Hello", "--max-new-tokens", "8")
