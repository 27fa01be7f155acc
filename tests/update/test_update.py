"""A workspace of one release is updated to the next with `copier update`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml
from copier import run_copy, run_update

ROOT = Path(__file__).resolve().parents[2]
ANSWERS = {"model": "phi-2", "device": "gpu", "platform": "linux", "environment": "venv", "epochs": 5}


def git(folder: Path, *arguments: str) -> str:
    identity = {
        f"GIT_{who}_{what}": "test@example.org" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")
    }
    return subprocess.run(
        ["git", *arguments], cwd=folder, env=os.environ | identity, check=True, capture_output=True, text=True
    ).stdout


def commit(folder: Path, message: str) -> None:
    git(folder, "add", "--all")
    git(folder, "commit", "--quiet", "--message", message)


@pytest.fixture
def releases(tmp_path: Path) -> Path:
    """The template at v1.0.0, and at v2.0.0 with a new file and a line more in two others."""
    template = tmp_path / "template"
    template.mkdir()
    shutil.copy2(ROOT / "copier.yml", template)
    for name in ("catalog", "hooks", "template"):
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, template / name, ignore=shutil.ignore_patterns("__pycache__", ".*_cache"))
    git(template, "init", "--quiet", "--initial-branch", "main")
    commit(template, "First release")
    git(template, "tag", "v1.0.0")
    for name in ("setup/create_env.py", "finetuning/olive-config.yaml.jinja"):
        with (template / "template" / name).open("a", encoding="utf-8") as file:
            file.write("# new in v2\n")
    (template / "template/setup/new.txt").write_text("new in v2\n")
    commit(template, "Second release")
    git(template, "tag", "v2.0.0")
    return template


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and ".git" not in path.relative_to(folder).parts
    }


def test_an_update_brings_the_new_release_and_keeps_the_answers_and_the_edits(releases: Path, tmp_path: Path) -> None:
    workspace, fresh = tmp_path / "ws/tone", tmp_path / "fresh/tone"
    options = {"defaults": True, "overwrite": True, "quiet": True, "unsafe": True, "skip_tasks": True}
    run_copy(str(releases), workspace, data=ANSWERS, vcs_ref="v1.0.0", **options)
    git(workspace, "init", "--quiet")
    config = workspace / "finetuning/olive-config.yaml"
    config.write_text(config.read_text().replace("max_rows: null", "max_rows: 100"))
    (workspace / "dataset/mine.jsonl").write_text("{}\n")
    commit(workspace, "My edits")

    run_update(workspace, vcs_ref="v2.0.0", **options)

    run_copy(str(releases), fresh, data=ANSWERS, vcs_ref="v2.0.0", **options)
    expected = contents(fresh)
    edited = expected["finetuning/olive-config.yaml"].replace(b"max_rows: null", b"max_rows: 100")
    assert edited != expected["finetuning/olive-config.yaml"]
    assert edited.endswith(b"# new in v2\n")
    assert contents(workspace) == expected | {
        "finetuning/olive-config.yaml": edited,
        "dataset/mine.jsonl": b"{}\n",
    }
    answers = yaml.safe_load((workspace / ".copier-answers.yml").read_text())
    assert answers["_commit"] == "v2.0.0"
    assert {name: answers[name] for name in ANSWERS} == ANSWERS
