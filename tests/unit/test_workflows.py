"""This repository's own workflows: what they may do, what they run, and how a failure of `newest` is reported.

Their steps are run here as GitHub runs them, with a `make` and a `gh` that note what they are told.
"""

from __future__ import annotations

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_docs import complaint

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / ".github" / "workflows"
FILES = sorted(FOLDER.iterdir())
TITLE = "The newest releases break the walk"

each_file = pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)


def read(file: Path) -> dict[Any, Any]:
    return dict(yaml.safe_load(file.read_text(encoding="utf-8")))


def triggers(workflow: dict[Any, Any]) -> dict[str, Any]:
    return dict(workflow[True])  # YAML reads the key `on` as true


def steps(workflow: dict[Any, Any]) -> list[dict[str, Any]]:
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def actions(file: Path) -> set[str]:
    return set(re.findall(r"uses: (.*)", file.read_text(encoding="utf-8")))


def test_there_are_two_workflows() -> None:
    assert [file.name for file in FILES] == ["newest.yml", "test.yml"]


def test_they_start_on_every_change_and_once_a_week() -> None:
    assert triggers(read(FOLDER / "test.yml")) == {"push": None, "pull_request": None}
    newest = triggers(read(FOLDER / "newest.yml"))
    assert set(newest) == {"schedule", "workflow_dispatch"}
    [schedule] = newest["schedule"]
    assert re.fullmatch(r"\d+ \d+ \* \* [0-6]", schedule["cron"])


@each_file
def test_actions_are_pinned_to_the_commits_of_the_workspaces_workflows(file: Path) -> None:
    assert all(re.fullmatch(r"actions/[a-z-]+@[0-9a-f]{40} # v\d+\.\d+\.\d+", action) for action in actions(file))
    assert actions(file) <= set.union(*map(actions, (ROOT / "template/.github/workflows").iterdir()))


@each_file
def test_only_the_report_may_write_and_only_issues(file: Path) -> None:
    workflow = read(file)
    assert workflow["permissions"] == {"contents": "read"}
    rights = {name: job["permissions"] for name, job in workflow["jobs"].items() if "permissions" in job}
    assert rights == ({"report": {"contents": "read", "issues": "write"}} if file.name == "newest.yml" else {})


@each_file
def test_no_secret_is_used_and_no_expression_gets_into_a_command(file: Path) -> None:
    text = file.read_text(encoding="utf-8")
    allowed = {"github.ref", "github.repository", "github.run_id", "github.server_url", "github.token"}
    allowed |= {"steps.report.outputs.report", "needs.walk.outputs.report"}
    assert set(re.findall(r"\$\{\{\s*(.*?)\s*\}\}", text)) <= allowed
    assert not any("${{" in step.get("run", "") for step in steps(read(file)))
    with_token = [step for step in steps(read(file)) if "github.token" in str(step)]
    assert all(step["run"].startswith("printf") for step in with_token)  # the report alone: it runs no package


@each_file
def test_every_checkout_has_the_full_history_and_leaves_no_token(file: Path) -> None:
    checkouts = [step["with"] for step in steps(read(file)) if step.get("uses", "").startswith("actions/checkout@")]
    assert checkouts == [{"fetch-depth": 0, "persist-credentials": False}]


@each_file
def test_every_job_ends_by_itself_and_a_hang_is_reported(file: Path) -> None:
    for job in read(file)["jobs"].values():
        assert job["runs-on"] == "ubuntu-24.04"
        assert 0 < job["timeout-minutes"] <= 90
        # At the job's limit it counts as cancelled, which reports nothing; at a step's, as failed.
        assert all(step.get("timeout-minutes", 0) < job["timeout-minutes"] for step in job["steps"])
    if file.name == "newest.yml":
        assert "timeout-minutes" in make_step()


def test_an_older_run_of_a_branch_is_cancelled() -> None:
    workflow = read(FOLDER / "test.yml")
    assert workflow["concurrency"] == {"group": "test-${{ github.ref }}", "cancel-in-progress": True}


@each_file
def test_the_commands_and_files_that_they_name_exist(file: Path) -> None:
    runs = "\n".join(step["run"] for step in steps(read(file)) if "run" in step)
    targets = re.findall(r"^(make [a-z-]+)", runs, re.MULTILINE)
    scripts = re.findall(r"^bash (\S+)", runs, re.MULTILINE)
    assert len(targets) + len(scripts) == 1
    assert not [wrong for command in targets if (wrong := complaint(command))]
    cached = [step["with"].get("cache-dependency-path", "") for step in steps(read(file)) if "with" in step]
    assert all((ROOT / name).is_file() for name in [*scripts, *"\n".join(cached).split()])


# ------------------------------------------------------------------------------------------- A failure of `newest`


def make_step() -> dict[str, Any]:
    [step] = [step for step in steps(read(FOLDER / "newest.yml")) if step.get("run", "").startswith("make")]
    return step


class Runner:
    """A machine of GitHub's: folders, the programs `make` and `gh`, and the files that carry outputs."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.programs = folder, folder / "programs"
        self.output, self.told = folder / "output", folder / "gh.log"
        self.programs.mkdir()
        self.program("gh", 'printf "%s\\n" "$@" >> "$TOLD"\n[ "$2" = list ] && printf "%s" "$OPEN" || cat body.md\n')

    def program(self, name: str, script: str) -> None:
        (self.programs / name).write_text(f"#!/bin/sh\n{script}")
        (self.programs / name).chmod(0o755)

    def run(self, step: dict[str, Any], **env: str) -> subprocess.CompletedProcess[str]:
        """Run a step with the shell that GitHub takes: pipefail is set only where `shell: bash` is named."""
        shell = ["bash", "--noprofile", "--norc", "-eo", "pipefail"] if step.get("shell") == "bash" else ["bash", "-e"]
        env = {
            "PATH": f"{self.programs}{os.pathsep}{os.environ['PATH']}",
            "RUNNER_TEMP": str(self.folder),
            "GITHUB_OUTPUT": str(self.output),
            "TOLD": str(self.told),
            "OPEN": "",
            **env,
        }
        command = [*shell, "-c", step["run"]]
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, check=False)

    def report(self) -> str:
        """Return the output `report`, read as GitHub reads it."""
        opening, *lines, closing = self.output.read_text().splitlines()
        name, _, delimiter = opening.partition("<<")
        assert (name, closing) == ("report", delimiter) and delimiter not in lines
        return "\n".join(lines)


@pytest.fixture
def runner(tmp_path: Path) -> Runner:
    return Runner(tmp_path)


def report_steps() -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the step that writes the report and the one that publishes it."""
    jobs = read(FOLDER / "newest.yml")["jobs"]
    assert jobs["walk"]["steps"][-1]["if"] == jobs["report"]["if"] == "failure()"
    return jobs["walk"]["steps"][-1], jobs["report"]["steps"][-1]


def test_the_walk_fails_with_make_and_passes_with_it(runner: Runner) -> None:
    runner.program("make", "echo $1 is fine\n")
    assert runner.run(make_step()).returncode == 0
    runner.program("make", "echo $1 broke >&2; exit 2\n")
    assert runner.run(make_step()).returncode != 0
    assert (runner.folder / "newest.log").read_text() == "newest broke\n"


def test_the_report_has_the_versions_and_the_end_of_the_log(runner: Runner) -> None:
    (runner.folder / "newest.log").write_text("".join(f"line {number}\n" for number in range(1000)) + "x" * 9999)
    (runner.folder / ".cache/newest").mkdir(parents=True)
    (runner.folder / ".cache/newest/versions.txt").write_text("transformers 5.23.0 5.24.0\n")
    done = runner.run(report_steps()[0])
    assert done.returncode == 0, done.stderr
    report = runner.report()
    assert "transformers 5.23.0 5.24.0" in report and "line 999" in report and "line 900" not in report
    assert report.count("````") == 4 and len(report) < 60_000  # an issue holds 65,536 characters


def test_there_is_a_report_when_nothing_was_installed_yet(runner: Runner) -> None:
    done = runner.run(report_steps()[0])
    assert done.returncode == 0, done.stderr
    assert "none listed" in runner.report()


@pytest.mark.parametrize("number", ["", "7"], ids=["no open issue", "an open issue"])
def test_a_failure_opens_an_issue_or_comments_on_the_open_one(runner: Runner, number: str) -> None:
    step = report_steps()[1]
    assert step["env"]["TITLE"] == TITLE
    assert (step["env"]["REPORT"], step["env"]["GH_TOKEN"]) == (
        "${{ needs.walk.outputs.report }}",
        "${{ github.token }}",
    )
    done = runner.run(step, TITLE=TITLE, REPORT="$(touch spoilt) `x`", RUN="https://example.org/run", OPEN=number)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "https://example.org/run\n\n$(touch spoilt) `x`\n"
    told = runner.told.read_text().splitlines()
    assert [word for word in told if word in ("create", "comment")] == ["comment" if number else "create"]
    assert number in told if number else TITLE in told
    assert not (runner.folder / "spoilt").exists()


def test_the_open_issue_is_found_by_its_title(runner: Runner) -> None:
    if not shutil.which("jq"):
        pytest.skip("jq is not on the PATH")
    runner.run(report_steps()[1], TITLE=TITLE, REPORT="", RUN="")
    told = runner.told.read_text().splitlines()
    query = told[told.index("--jq") + 1]
    others = [{"number": 1, "title": f"{TITLE} again"}, {"number": 2, "title": "Another"}]
    for issues, number in ((others, ""), ([*others, {"number": 3, "title": TITLE}], "3")):
        done = subprocess.run(["jq", query], input=json.dumps(issues), capture_output=True, text=True, check=True)
        assert done.stdout.strip() == number


# ----------------------------------------------------------------------------------------------- locks/newest.py


@pytest.fixture
def newest(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The script as a module; what it adds to the path and to the modules goes again."""
    monkeypatch.setattr(sys, "path", [str(ROOT / "locks"), *sys.path])
    before = set(sys.modules)
    yield importlib.import_module("newest")
    for name in {"newest", "lock", "install"} - before:
        sys.modules.pop(name, None)


def test_pins_are_left_out_and_other_limits_stay(newest: Any) -> None:
    assert newest.unpinned("# a==1\na==1.0\nb<2\nc\nd==1 ; sys_platform == 'linux'\n") == (
        "# a==1\na\nb<2\nc\nd ; sys_platform == 'linux'\n"
    )
    text = newest.unpinned((ROOT / "locks/workspace-cpu.in").read_text())
    assert "==" not in text and "\ntorch\n" in text


def test_what_differs_from_the_lock_is_listed(newest: Any) -> None:
    locked = (
        "# made by make lock\na==1.0\nb==1 ; python_full_version < '3.12'\nb==2 ; python_full_version >= '3.12'\nc==3\n"
    )
    table = newest.differences(locked, locked.replace("b==2", "b==2.1").replace("c==3", "d==4"))
    rows = [re.split(r"\s{2,}", line) for line in table.splitlines()]
    assert rows == [["package", "locked", "newest"], ["b", "1, 2", "1, 2.1"], ["c", "3", "-"], ["d", "-", "4"]]


@pytest.mark.parametrize(
    ("torch", "locked", "said"),
    [
        ("99.0", "torch==99.0\n", ""),
        ("99.0", "nvidia-new==1.0\ntorch==99.0\n", "torch asks for nvidia-new: add it to locks/without-cuda.txt"),
        ("", "", "no CPU build of torch found"),
    ],
    ids=["a lock", "CUDA in it", "no torch"],
)
def test_the_workspace_gets_a_lock_without_cuda_or_none(
    newest: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any, torch: str, locked: str, said: str
) -> None:
    asked: list[str] = []

    def lock(source: Path, target: Path, options: list[str]) -> None:
        asked.extend([source.read_text(), *options])
        target.write_text(locked)

    (tmp_path / "setup").mkdir()
    monkeypatch.setattr(newest, "lock", lock)
    monkeypatch.setattr(newest, "newest_torch", lambda: torch)
    monkeypatch.setattr(sys, "argv", ["newest.py", str(tmp_path)])
    assert newest.main() == (1 if said else 0)
    assert said in capsys.readouterr().err
    assert not torch or (asked[0].endswith(f"torch=={torch}\n") and "--upgrade" in asked)
    assert not torch or re.search(r"^torch +\S+ +99\.0$", (tmp_path / "versions.txt").read_text(), re.MULTILINE)


def test_torch_is_the_newest_with_a_cpu_build(
    newest: Any, make_workspace: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(Path(sys.executable).parent), prepend=os.pathsep)  # uv is one of our own packages
    machine = make_workspace(with_uv=True)  # it has torch 2.13.0+cpu
    for name, value in machine.env.items():
        monkeypatch.setenv(name, value)
    assert newest.newest_torch() == "2.13.0"
    machine.make_wheel(machine.wheels, "torch", "2.14.0+cpu")
    assert newest.newest_torch() == "2.14.0"
    monkeypatch.setenv("PIP_FIND_LINKS", str(machine.programs))
    assert newest.newest_torch() == ""
