"""The workspace's workflow `update`: its commands are run here, with a remote on this machine and without GitHub."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import NEXT, NOW, ROOT, commit, git

Copy = Callable[..., Path]
FILE = ROOT / "template/.github/workflows/update.yml"


def step() -> dict[str, Any]:
    return yaml.safe_load(FILE.read_text("utf-8"))["jobs"]["update"]["steps"][-1]


@pytest.fixture
def workspace(copy: Copy, tmp_path: Path) -> Path:
    """A workspace of this release with a remote, and a `gh` that notes what it is told."""
    (tmp_path / "gh").write_text('#!/bin/sh\nprintf "%s\\n" "$@" >> "$GH_LOG"\n')
    (tmp_path / "gh").chmod(0o755)
    folder = copy(tmp_path / "tone", NOW, platform="linux", environment="venv")
    commit(folder, "As copied")
    git(tmp_path, "init", "--quiet", "--bare", "remote")
    git(folder, "remote", "add", "origin", str(tmp_path / "remote"))
    git(folder, "push", "--quiet", "origin", "main")
    return folder


def run(workspace: Path) -> str:
    """Run the step as GitHub does; return what gh was told."""
    log = workspace.parent / "gh.log"
    path = os.pathsep.join([str(workspace.parent), str(Path(sys.executable).parent), os.environ["PATH"]])
    env = os.environ | {"PATH": path, "GH_LOG": str(log), "GH_TOKEN": "none"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step()["run"]]
    done = subprocess.run(command, cwd=workspace, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return log.read_text() if log.exists() else ""


def test_a_newer_release_becomes_one_pull_request(workspace: Path, tmp_path: Path) -> None:
    with (workspace / "pyproject.toml").open("a") as file:
        file.write("# mine\n")
    commit(workspace, "My edits")
    told = run(workspace)
    branch = f"update-to-{NEXT[-1]}"
    assert told.startswith("pr\ncreate\n--head\n" + branch) and "Conflicts to resolve: pyproject.toml ." in told
    assert branch in git(tmp_path / "remote", "branch")
    assert f"_commit: {NEXT[-1]}" in git(tmp_path / "remote", "show", f"{branch}:.copier-answers.yml")
    git(workspace, "switch", "--quiet", "main")
    assert run(workspace) == told  # the branch is there: no second one


def test_a_workspace_that_is_up_to_date_is_left_alone(workspace: Path, update: Copy) -> None:
    update(workspace, NEXT[-1])
    commit(workspace, "Updated")
    assert run(workspace) == ""


def test_it_has_the_rights_that_it_needs_and_pinned_actions() -> None:
    text = FILE.read_text(encoding="utf-8")
    workflow = yaml.safe_load(text)
    assert workflow["permissions"] == {"contents": "write", "pull-requests": "write"}
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}  # YAML reads the key `on` as true
    actions = re.findall(r"uses: (.*)", text)
    assert len(actions) == 2
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in actions)
    assert "${{" not in step()["run"]  # nothing of the event or of the secrets gets into a command
    pinned = re.search(r"^copier==\S+", (ROOT / "locks/repository.in").read_text(), re.MULTILINE)
    assert pinned and f"install --quiet {pinned[0]}\n" in text
