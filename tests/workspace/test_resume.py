"""Interrupted runs resume after any interruption, and end as if there had been none."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import RENDERED, Run

Invoke = Callable[..., Run]
KILLS = int(os.environ.get("KILLS", "5"))
SAME = 3e-4  # nats: a twentieth of what these short runs learn, and far below one per cent


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Runs that were killed at random moments, one that was terminated, and an uninterrupted one."""
    folder = tmp_path_factory.mktemp("killed") / "workspace"
    shutil.copytree(RENDERED, folder, ignore=shutil.ignore_patterns(".venv", "models", ".git"))
    config = folder / "finetuning" / "olive-config.yaml"
    text = config.read_text(encoding="utf-8")
    changes = {
        "max_steps": 40,
        "max_rows": 160,
        "eval_rows": 1000,
        "eval_steps": 0.05,
        "save_steps": 0.05,
        "num_train_epochs": 10,
    }
    for key, value in changes.items():
        text, found = re.subn(rf"(?m)^(\s*{key}:) \S+", rf"\1 {value}", text)
        assert found
    config.write_text(text, encoding="utf-8")
    script = Path(__file__).with_name("killed_runs.py")
    done = subprocess.run([sys.executable, script, folder, str(KILLS)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_a_run_killed_at_any_moment_resumes_and_ends_with_the_same_loss(interrupted: Any) -> None:
    assert len(interrupted["killed"]) == KILLS
    whole = interrupted["whole"]
    assert whole["base_loss"] - whole["eval_loss"] > 10 * SAME, "the runs learn too little to tell them apart"
    for run in interrupted["killed"]:
        assert run["status"] == 0, run["said"]
        assert run["eval_loss"] == pytest.approx(whole["eval_loss"], abs=SAME)
    assert any(run["went_on"] for run in interrupted["killed"])


def test_a_terminated_run_saves_first_and_resumes_later(interrupted: Any) -> None:
    assert interrupted["terminated"]["status"] == 143
    assert "Stopped. The same command resumes" in interrupted["terminated"]["said"]
    assert interrupted["after"]["went_on"]
    assert interrupted["after"]["eval_loss"] == pytest.approx(interrupted["whole"]["eval_loss"], abs=SAME)


@pytest.mark.parametrize("damage", ["cut", "missing", "unmarked"])
def test_a_damaged_checkpoint_is_skipped(workspace: Path, tmp_path: Path, damage: str) -> None:
    from training import checkpoints

    for step in (5, 10):
        checkpoint = tmp_path / f"checkpoint-{step}"
        checkpoint.mkdir()
        (checkpoint / "optimizer.pt").write_bytes(b"x" * 100)
        (checkpoint / checkpoints.SIZES).write_text('{"optimizer.pt": 100}')
    newest = tmp_path / "checkpoint-10"
    assert checkpoints.newest_checkpoint(tmp_path) == str(newest)
    {
        "cut": lambda: (newest / "optimizer.pt").write_bytes(b"x" * 50),
        "missing": lambda: (newest / "optimizer.pt").unlink(),
        "unmarked": lambda: (newest / checkpoints.SIZES).unlink(),
    }[damage]()
    assert checkpoints.newest_checkpoint(tmp_path) == str(tmp_path / "checkpoint-5")
    assert not newest.exists()
    assert checkpoints.newest_checkpoint(tmp_path / "absent") is None


def test_a_second_run_at_once_is_refused(invoke: Invoke, workspace: Path) -> None:
    from filelock import FileLock

    (workspace / "models").mkdir(exist_ok=True)
    with FileLock(workspace / "models" / ".lock", timeout=0):
        run = invoke()
    assert run.status == 1
    assert run.err == (
        "error: Another run is in progress in this workspace: wait for it or stop it, then run this again.\n"
    )
