"""The GitLab jobs of docs/how-to/update-in-ci.md, run here with a remote on this machine."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import NEXT, NOW, ROOT, commit, git

Copy = Callable[..., Path]
PAGE = ROOT / "docs/how-to/update-in-ci.md"
BRANCH = "template-update"
# GitLab makes a merge request of the options of a push.
HOOK = """#!/bin/sh
cat > /dev/null
i=0
while [ "$i" -lt "${GIT_PUSH_OPTION_COUNT:-0}" ]; do
  eval "printf '%s\\n' \\"\\$GIT_PUSH_OPTION_$i\\"" >> options
  i=$((i + 1))
done
"""


def jobs() -> dict[str, dict[str, Any]]:
    blocks = re.findall(r"^```yaml\n(.*?)^```$", PAGE.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    [block] = [block for block in blocks if "CI_PIPELINE_SOURCE" in block]
    return dict(yaml.safe_load(block))


@pytest.fixture
def workspace(copy: Copy, tmp_path: Path) -> Path:
    folder = copy(tmp_path / "tone", NOW, platform="linux", environment="venv")
    with (folder / "pyproject.toml").open("a") as file:
        file.write("# mine\n")
    commit(folder, "As copied, and edited")
    git(tmp_path, "init", "--quiet", "--bare", "tone.git")
    git(tmp_path / "tone.git", "config", "receive.advertisePushOptions", "true")
    hook = tmp_path / "tone.git/hooks/post-receive"
    hook.parent.mkdir(exist_ok=True)
    git(folder, "remote", "add", "origin", str(tmp_path / "tone.git"))
    git(folder, "push", "--quiet", "origin", "main")
    hook.write_text(HOOK)
    hook.chmod(0o755)
    return folder


def run(workspace: Path) -> str:
    """Run both jobs, each in a clone of its own with a detached HEAD, as GitLab does; return what they said."""
    folder, said = workspace.parent, []
    env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    env |= {"CI_PROJECT_URL": f"file://{folder}/tone", "CI_DEFAULT_BRANCH": "main"}
    for number, job in enumerate(jobs().values()):
        place = folder / f"job{number}"
        shutil.rmtree(place, ignore_errors=True)
        git(folder, "clone", "--quiet", "--depth", "1", f"file://{folder}/tone.git", place.name)
        git(place, "switch", "--quiet", "--detach")
        if number and (folder / "job0/update-artifact").is_dir():
            shutil.copytree(folder / "job0/update-artifact", place / "update-artifact")
        for script in job["script"]:
            if not script.startswith("python -m pip install"):
                command = ["bash", "-eo", "pipefail", "-c", script]
                done = subprocess.run(command, cwd=place, env=env, capture_output=True, text=True, check=False)
                said.append(done.stdout + done.stderr)
                assert done.returncode == 0, said
    return "".join(said)


def test_a_newer_release_becomes_a_merge_request_through_push_options(workspace: Path, tmp_path: Path) -> None:
    run(workspace)
    remote = tmp_path / "tone.git"
    options = (remote / "options").read_text().splitlines()
    assert options == [
        "merge_request.create",
        "merge_request.target=main",
        "merge_request.remove_source_branch",
        f"merge_request.title=Update to {NEXT[-1]} of the template",
        "merge_request.description=Read the template's CHANGELOG first. Conflicts to resolve: pyproject.toml ",
    ]
    assert f"_commit: {NEXT[-1]}" in git(remote, "show", f"{BRANCH}:.copier-answers.yml")
    assert "update-artifact" not in git(remote, "ls-tree", "--name-only", BRANCH)
    assert git(remote, "rev-list", "--count", f"main..{BRANCH}") == "1\n"

    tip = git(remote, "rev-parse", BRANCH)
    run(workspace)
    assert git(remote, "rev-parse", BRANCH) == tip  # nothing new

    (workspace / "notes.md").write_text("mine\n")
    commit(workspace, "More of mine")
    git(workspace, "push", "--quiet", "origin", "main")
    run(workspace)
    assert "notes.md" in git(remote, "ls-tree", "--name-only", BRANCH)  # on top of what main is now

    git(workspace, "fetch", "--quiet", "origin")
    git(workspace, "switch", "--quiet", BRANCH)
    commit(workspace, "The conflict is resolved")
    git(workspace, "push", "--quiet", "origin", BRANCH)
    git(workspace, "switch", "--quiet", "main")
    (workspace / "notes.md").write_text("mine, again\n")
    commit(workspace, "Still more of mine")
    git(workspace, "push", "--quiet", "origin", "main")
    tip = git(remote, "rev-parse", BRANCH)
    assert "has commits of yours, so it stays as it is" in run(workspace)
    assert git(remote, "rev-parse", BRANCH) == tip


def test_a_workspace_that_is_up_to_date_is_left_alone(workspace: Path, update: Copy, tmp_path: Path) -> None:
    update(workspace, NEXT[-1])
    commit(workspace, "Updated")
    git(workspace, "push", "--quiet", "origin", "main")
    run(workspace)
    assert git(tmp_path / "tone.git", "branch", "--list", BRANCH) == ""


def test_the_jobs_run_only_on_a_schedule_and_the_one_with_copier_has_no_token() -> None:
    with_copier, with_token = jobs().values()
    for job in (with_copier, with_token):
        assert job["rules"] == [{"if": '$CI_PIPELINE_SOURCE == "schedule"'}]
    assert "TOKEN" not in str(with_copier) and "environment" not in with_copier
    assert with_token["environment"] == {"name": "template-update", "action": "access"}
    assert with_token["needs"] == ["template-update"] == list(jobs())[:1]
    assert not re.search(r"copier |python |pip ", "".join(with_token["script"]))
