"""The workspace's workflow `update`: its steps, run here with a remote on this machine and without GitHub."""

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
import yaml

from .conftest import NEXT, NOW, ROOT, commit, git

Copy = Callable[..., Path]
FILE = ROOT / "template/.github/workflows/update.yml"
BRANCH = "template-update"
# Pull requests are a list in a file. The option --jq is followed as GitHub's program does.
GH = r"""#!/usr/bin/env python3
import json, os, subprocess, sys

words = sys.argv[1:]
path = os.environ["PULLS"]
pulls = json.load(open(path))
value = lambda name: words[words.index(name) + 1]
assert os.environ["GH_TOKEN"] == "token"
if words[:2] == ["pr", "list"]:
    states = {"open": ["OPEN"], "closed": ["CLOSED", "MERGED"]}[value("--state")]
    found = [pull for pull in pulls if pull["head"] == value("--head") and pull["state"] in states]
    shown = [{name: pull[name] for name in value("--json").split(",")} for pull in found]
    print(subprocess.run(["jq", "-r", value("--jq")], input=json.dumps(shown), text=True, stdout=-1, check=True).stdout)
elif words[:2] == ["pr", "create"]:
    if os.path.exists(path + ".forbidden"):
        sys.exit("GraphQL: GitHub Actions is not permitted to create or approve pull requests (createPullRequest)")
    pull = {"number": len(pulls) + 1, "state": "OPEN", "isCrossRepository": False, "edited": 0}
    pulls.append(pull | {name: value("--" + name) for name in ("head", "base", "title", "body")})
elif words[:4] == ["api", "--silent", "--method", "PATCH"]:
    [pull] = [pull for pull in pulls if words[4] == f"repos/owner/tone/pulls/{pull['number']}"]
    pull |= dict(words[at + 1].split("=", 1) for at, word in enumerate(words) if word == "-f")
    pull["edited"] += 1
else:
    sys.exit(f"gh: {words}")
json.dump(pulls, open(path, "w"))
"""


def jobs() -> dict[str, dict[str, Any]]:
    return dict(yaml.safe_load(FILE.read_text("utf-8"))["jobs"])


class GitHub:
    """A workspace with a remote, pull requests, and the setting that allows them."""

    def __init__(self, folder: Path, workspace: Path) -> None:
        self.folder, self.workspace = folder, workspace
        self.pulls_file, self.remote = folder / "pulls.json", folder / "remote"
        self.pulls_file.write_text("[]")
        (folder / "gitconfig").write_text("[protocol.file]\nallow = always\n")  # no identity, as on GitHub's machines
        programs = folder / "programs"
        programs.mkdir()
        (programs / "gh").write_text(GH)
        (programs / "gh").chmod(0o755)
        git(folder, "init", "--quiet", "--bare", "remote")
        git(workspace, "remote", "add", "origin", str(self.remote))
        self.push()

    @property
    def pulls(self) -> list[dict[str, Any]]:
        return list(json.loads(self.pulls_file.read_text()))

    def set(self, **values: Any) -> None:
        """Change the last pull request, as its owner does in the browser."""
        pulls = self.pulls
        pulls[-1] |= values
        self.pulls_file.write_text(json.dumps(pulls))

    def allow(self, allowed: bool) -> None:
        forbidden = self.pulls_file.with_name("pulls.json.forbidden")
        forbidden.unlink(missing_ok=True) if allowed else forbidden.touch()

    def push(self) -> None:
        git(self.workspace, "push", "--quiet", "origin", "main")

    def read(self, name: str) -> str:
        return git(self.remote, "show", f"{BRANCH}:{name}")

    def tip(self) -> str:
        return git(self.remote, "rev-parse", BRANCH)

    def run(self) -> tuple[int, str]:
        """Run both jobs on machines of their own, as GitHub does; return the status, and what was said."""
        for name in ("one", "two"):
            shutil.rmtree(self.folder / name, ignore_errors=True)
        path = os.pathsep.join([str(self.folder / "programs"), str(Path(sys.executable).parent), os.environ["PATH"]])
        env = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
        env |= {"PATH": path, "GIT_CONFIG_GLOBAL": str(self.folder / "gitconfig"), "GIT_CONFIG_NOSYSTEM": "1"}
        env |= {"GITHUB_REF_NAME": "main", "PULLS": str(self.pulls_file)}
        output, told = self.folder / "output", []
        output.write_text("")
        release = ""
        for machine, job in zip(("one", "two"), jobs().values(), strict=True):
            if "if" in job and not release:
                continue
            place = self.folder / machine
            git(self.folder, "clone", "--quiet", "--depth", "1", f"file://{self.remote}", machine)
            temporary = self.folder / f"{machine}.temp"
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            if machine == "two":  # what the actions for artifacts do
                shutil.copytree(self.folder / "one.temp/update", temporary / "update")
            for step in job["steps"]:
                if "run" not in step or step["run"].startswith("python -m pip install"):
                    continue
                more = {"RUNNER_TEMP": str(temporary), "GITHUB_OUTPUT": str(output)}
                for name, value in step.get("env", {}).items():
                    value = value.replace("${{ secrets.UPDATE_TOKEN || github.token }}", "token")
                    value = value.replace("${{ github.repository }}", "owner/tone")
                    more[name] = value.replace("${{ needs.update.outputs.release }}", release)
                    assert "${{" not in more[name]
                command = ["bash", "-e", "-c", step["run"]]
                done = subprocess.run(command, cwd=place, env=env | more, capture_output=True, text=True, check=False)
                told.append(done.stdout + done.stderr)
                if done.returncode:
                    return done.returncode, "".join(told)
            release = output.read_text().removeprefix("release=").strip()
        return 0, "".join(told)


@pytest.fixture
def github(copy: Copy, tmp_path: Path) -> GitHub:
    folder = copy(tmp_path / "tone", NOW, platform="linux", environment="venv")
    with (folder / "pyproject.toml").open("a") as file:
        file.write("# mine\n")
    commit(folder, "As copied, and edited")
    return GitHub(tmp_path, folder)


@pytest.fixture
def newest(releases: Path) -> Any:
    """Let a release be the newest of the template, by hiding the tags after it; afterwards all are there."""
    hidden = {tag: git(releases, "rev-parse", tag).strip() for tag in NEXT}

    def choose(tag: str) -> None:
        for number, name in enumerate(NEXT):
            there = git(releases, "tag", "--list", name)
            if number <= NEXT.index(tag) and not there:
                git(releases, "tag", name, hidden[name])
            elif number > NEXT.index(tag) and there:
                git(releases, "tag", "--delete", name)

    yield choose
    choose(NEXT[-1])


def test_a_newer_release_becomes_one_pull_request_that_later_releases_update(github: GitHub, newest: Any) -> None:
    newest(NEXT[0])
    github.allow(False)  # as a new repository on GitHub
    status, told = github.run()
    assert status == 1 and github.pulls == []
    error = next(line for line in told.splitlines() if line.startswith("::error::"))
    assert "Allow it under Settings → Actions → General, «Allow GitHub Actions to create" in error

    github.allow(True)
    tip = github.tip()
    assert github.run()[0] == 0
    [pull] = github.pulls
    assert (pull["head"], pull["base"], pull["title"]) == (BRANCH, "main", f"Update to {NEXT[0]} of the template")
    assert pull["body"].endswith("Conflicts to resolve: pyproject.toml ")
    assert f"_commit: {NEXT[0]}" in github.read(".copier-answers.yml")
    assert "<<<<<<< before updating" in github.read("pyproject.toml")
    assert github.tip() == tip  # the same patch is not pushed again

    newest(NEXT[1])
    assert github.run()[0] == 0
    [pull] = github.pulls
    assert (pull["title"], pull["edited"]) == (f"Update to {NEXT[1]} of the template", 1)
    assert f"_commit: {NEXT[1]}" in github.read(".copier-answers.yml")
    assert git(github.remote, "rev-list", "--count", f"main..{BRANCH}") == "1\n"

    github.set(state="MERGED")
    git(github.workspace, "pull", "--quiet", "origin", BRANCH)
    github.push()
    assert github.run() == (0, "")
    assert len(github.pulls) == 1


def test_a_branch_with_your_commits_and_a_closed_pull_request_are_left_alone(github: GitHub, newest: Any) -> None:
    newest(NEXT[0])
    assert github.run()[0] == 0
    git(github.workspace, "fetch", "--quiet", "origin")
    git(github.workspace, "switch", "--quiet", BRANCH)
    commit(github.workspace, "The conflict is resolved")
    git(github.workspace, "push", "--quiet", "origin", BRANCH)
    newest(NEXT[1])
    tip = github.tip()
    status, told = github.run()
    assert status == 0 and "::notice::The branch template-update has commits of yours" in told
    assert github.tip() == tip and [pull["edited"] for pull in github.pulls] == [0]

    git(github.remote, "branch", "-D", BRANCH)
    github.set(state="CLOSED", title=f"Update to {NEXT[1]} of the template")
    status, told = github.run()
    assert status == 0 and "::notice::You closed the pull request" in told
    newest(NEXT[2])
    assert github.run()[0] == 0
    assert [pull["state"] for pull in github.pulls] == ["CLOSED", "OPEN"]


def test_a_pull_request_from_a_fork_with_the_same_branch_is_not_touched(github: GitHub) -> None:
    stranger = {
        "number": 1,
        "state": "OPEN",
        "isCrossRepository": True,
        "edited": 0,
        "head": BRANCH,
        "title": "Merge me",
    }
    github.pulls_file.write_text(json.dumps([stranger]))
    assert github.run()[0] == 0
    assert github.pulls[0] == stranger and github.pulls[1]["title"] == f"Update to {NEXT[-1]} of the template"


def test_a_branch_that_cannot_be_pushed_is_an_error_that_names_the_secret(github: GitHub) -> None:
    hook = github.remote / "hooks/pre-receive"
    hook.parent.mkdir(exist_ok=True)
    hook.write_text(
        "#!/bin/sh\necho refusing to allow a GitHub App to update workflow without workflows permission\nexit 1\n"
    )
    hook.chmod(0o755)
    status, told = github.run()
    assert status == 1 and "needs the secret UPDATE_TOKEN" in told
    assert github.pulls == []


def test_a_template_that_cannot_be_reached_is_an_error(github: GitHub) -> None:
    answers = github.workspace / ".copier-answers.yml"
    answers.write_text(re.sub(r"_src_path: .*", "_src_path: /nowhere/at/all", answers.read_text()))
    commit(github.workspace, "Moved")
    github.push()
    assert github.run()[0] not in (0, 2)


def test_the_job_with_copier_has_no_token_and_the_job_with_a_token_runs_nothing_of_the_template() -> None:
    workflow = yaml.safe_load(FILE.read_text("utf-8"))
    assert workflow["permissions"] == {"contents": "read"}
    with_copier, with_token = workflow["jobs"].values()
    assert "copier update " in str(with_copier)
    for word in ("secrets", "github.token", "GH_TOKEN", "permissions"):
        assert word not in str(with_copier)
    assert with_copier["steps"][0]["with"] == {"persist-credentials": False}
    assert with_token["permissions"] == {"contents": "write", "pull-requests": "write"}
    commands = "".join(step.get("run", "") for step in with_token["steps"])
    assert not re.search(r"copier|python|pip|\bsetup/|eval|source ", commands)


def test_actions_and_packages_are_pinned_and_no_expression_gets_into_a_command() -> None:
    text = FILE.read_text("utf-8")
    workflow = yaml.safe_load(text)
    assert set(workflow[True]) == {"schedule", "workflow_dispatch"}  # YAML reads the key `on` as true
    [schedule] = workflow[True]["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* 1", schedule["cron"])  # Mondays
    actions = re.findall(r"uses: (.*)", text)
    assert len(actions) == 5
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in actions)
    runs = [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    assert not any("${{" in run for run in runs)
    assert runs[0] == "python -m pip install --quiet -r setup/requirements-copier.txt"
    lock = set((ROOT / "locks/repository.txt").read_text().splitlines())
    assert set((ROOT / "template/setup/requirements-copier.txt").read_text().splitlines()) <= lock
