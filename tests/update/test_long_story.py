"""A workspace with edits of every kind goes through three releases, then to another model, device and target."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from .conftest import NEXT, NOW, ROOT, commit, contents, git

Copy = Callable[..., Path]
PYTHON = Path(os.environ.get("WORKSPACE", ROOT / ".cache/workspace")) / ".venv/bin/python"
EDITS = {
    "finetuning/olive-config.yaml": (b"max_rows: null", b"max_rows: 24"),
    "README.md": (b"## Start\n", b"## Start\n\nAsk Ada first.\n"),
    "finetuning/training/train.py": (b"from __future__", b"# Ada was here.\nfrom __future__"),
}


def test_every_edit_survives_three_releases_and_another_model(copy: Copy, update: Copy, tmp_path: Path) -> None:
    workspace = copy(tmp_path / "ws/tone", NOW, platform="linux", environment="venv")
    commit(workspace, "As copied")
    edit(workspace)
    rows = (workspace / "dataset/sample-train.jsonl").read_bytes().splitlines(keepends=True)
    mine = {"dataset/sample-train.jsonl": b"".join(rows[:-1]), "notes.md": b"mine\n"}
    for name, content in mine.items():
        (workspace / name).write_bytes(content)
    commit(workspace, "My edits")
    for tag in NEXT:
        update(workspace, tag)
        commit(workspace, tag)
    answers = {"model": "phi-3-mini-4k-instruct", "device": "gpu", "target": "azure"}
    update(workspace, NEXT[-1], **answers)
    fresh = copy(tmp_path / "fresh/tone", NEXT[-1], platform="linux", environment="venv", **answers)
    edit(fresh)
    assert contents(workspace) == contents(fresh) | mine
    assert git(workspace, "diff", "--name-only", "--diff-filter=U") == ""
    if not PYTHON.exists():
        pytest.skip(f"its tests need the packages of a workspace, and there is no {PYTHON}: make workspace")
    done = subprocess.run([PYTHON, "-m", "pytest", "-q"], cwd=workspace, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def edit(workspace: Path) -> None:
    for name, (old, new) in EDITS.items():
        content = (workspace / name).read_bytes()
        assert old in content
        (workspace / name).write_bytes(content.replace(old, new, 1))
