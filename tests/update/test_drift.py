"""setup/drift.py lists the differences between a workspace and the template at the workspace's own release."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import NEXT, NOW, commit

Copy = Callable[..., Path]


def drift(
    workspace: Path, *options: str, path: str = os.environ["PATH"], isolated: bool = False
) -> tuple[int, str, str]:
    command = [sys.executable, *(["-S"] if isolated else []), "setup/drift.py", *options]
    env = os.environ | {"PATH": path}
    done = subprocess.run(command, cwd=workspace, env=env, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


@pytest.fixture(scope="module")
def rendered(copy: Copy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace of this release: newer ones are there."""
    return copy(tmp_path_factory.mktemp("drift") / "tone", NOW, platform="linux", environment="venv")


@pytest.fixture
def workspace(rendered: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(rendered, tmp_path / "tone"))


def test_a_fresh_workspace_has_no_differences_and_rows_are_not_compared(workspace: Path) -> None:
    (workspace / "dataset/sample-heldout.jsonl").unlink()
    with (workspace / "dataset/sample-train.jsonl").open("a") as rows:
        rows.write("{}\n")
    (workspace / "finetuning/mine.py").write_text("print('mine')\n")
    assert drift(workspace, "--strict") == (0, "No file differs from the template's release.\n", "")


def test_changed_and_missing_files_are_listed_and_strict_fails(workspace: Path) -> None:
    config = workspace / "finetuning/olive-config.yaml"
    config.write_text(config.read_text().replace("max_rows: null", "max_rows: 100"))
    (workspace / "tests/test_smoke.py").unlink()
    (workspace / "pf.yaml").write_bytes((workspace / "pf.yaml").read_bytes().replace(b"\n", b"\r\n"))
    commit(workspace, "Mine")
    told = f"These files differ from the template's release {NOW}:\n"
    told += "  changed  finetuning/olive-config.yaml\n  missing  tests/test_smoke.py\n"
    assert drift(workspace) == (0, told, "")
    assert drift(workspace, "--strict") == (1, told, "")
    status, shown, _ = drift(workspace, "--diff")
    assert status == 0 and "\n+" in shown and "max_rows: 100" in shown and NEXT[-1] not in shown
    assert "--- template/finetuning/olive-config.yaml\n+++ workspace/finetuning/olive-config.yaml\n" in shown


def test_every_error_is_one_sentence(workspace: Path, tmp_path: Path) -> None:
    status, out, err = drift(workspace, path=str(tmp_path), isolated=True)
    assert (status, out) == (0, "")
    assert err == "drift: Copier is not installed: run `python -m pip install -r setup/requirements-copier.txt`.\n"
    assert drift(workspace, "--strict", path=str(tmp_path), isolated=True)[0] == 1

    answers = workspace / ".copier-answers.yml"
    answers.write_text(answers.read_text().replace(f"_commit: {NOW}", "_commit: v99.0.0"))
    status, out, err = drift(workspace)
    assert (status, out) == (0, "")
    assert err.startswith("drift: the template cannot be rendered (") and err.count("\n") == 1
    answers.unlink()
    assert drift(workspace)[2].startswith("drift: .copier-answers.yml is missing")
