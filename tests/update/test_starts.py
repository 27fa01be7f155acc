"""The start of an update: an adopted folder, a template that moved, and Copier's own refusals."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from copier import VcsRef, run_copy, run_update
from copier.errors import UserMessageError

from .conftest import NEXT, NOW, OLDER, OPTIONS, ROOT, before, commit, git

Copy = Callable[..., Path]
ANSWERS = {"platform": "linux", "environment": "venv"}
PAGE = (ROOT / "docs/how-to/template-moved.md").read_text(encoding="utf-8")


@pytest.fixture
def workspace(copy: Copy, tmp_path: Path) -> Path:
    folder = copy(tmp_path / "tone", NOW, **ANSWERS)
    commit(folder, "As copied")
    return folder


def point(workspace: Path, name: str, value: str) -> None:
    answers = workspace / ".copier-answers.yml"
    answers.write_text(re.sub(rf"(?m)^{name}: .*", f"{name}: {value}", answers.read_text()))
    commit(workspace, f"Another {name}")


def test_an_existing_folder_is_adopted_with_its_rows_and_keeps_restored_lines(
    copy: Copy, update: Copy, tmp_path: Path
) -> None:
    folder = tmp_path / "project"
    mine = {"dataset/sample-train.jsonl": "{}\n", "dataset/rows.jsonl": "{}\n", "notes.md": "mine\n"}
    for name, text in {**mine, "README.md": "# Mine\n", ".gitignore": "/scratch/\n"}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    commit(folder, "Before")
    copy(folder, NOW, **ANSWERS, dataset_source="file", dataset_path="dataset/rows.jsonl")
    assert {name: (folder / name).read_text() for name in mine} == mine
    assert git(folder, "diff", "--name-only").split() == [".gitignore", "README.md"]
    with (folder / ".gitignore").open("a") as file:
        file.write("\n/scratch/\n")
    commit(folder, "Adopt the fine-tuning workspace")

    update(folder, NEXT[0])

    assert {name: (folder / name).read_text() for name in mine} == mine
    assert "/models\n" in (folder / ".gitignore").read_text() and "/scratch/\n" in (folder / ".gitignore").read_text()


def test_a_template_that_moved_is_found_under_its_new_address(workspace: Path, releases: Path, tmp_path: Path) -> None:
    moved = shutil.copytree(releases, tmp_path / "moved")
    commit(moved, "After the move")
    git(moved, "tag", "v99.0.0")
    point(workspace, "_src_path", str(moved))
    run_update(workspace, vcs_ref="v99.0.0", **OPTIONS)
    assert "_commit: v99.0.0" in (workspace / ".copier-answers.yml").read_text()


def test_the_docs_have_the_sentences_with_which_copier_refuses(
    workspace: Path, releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refusal(folder: Path, **options: str) -> str:
        with pytest.raises((UserMessageError, ValueError)) as caught:
            run_update(folder, **{**OPTIONS, **options})
        return str(caught.value)

    outside = shutil.copytree(workspace, tmp_path / "outside", ignore=shutil.ignore_patterns(".git"))
    assert refusal(outside) in PAGE
    assert refusal(workspace, vcs_ref=OLDER).startswith("You are downgrading from ")
    (workspace / "README.md").write_text("mine\n")
    assert refusal(workspace).startswith("Destination repository is dirty; cannot continue.")
    commit(workspace, "Mine")
    monkeypatch.chdir(tmp_path)
    point(workspace, "_src_path", "releases")
    assert refusal(workspace) in PAGE
    for sentence in (
        "You are downgrading from",
        "Destination repository is dirty; cannot continue.",
        "Unknown revision",
    ):
        assert f"| {sentence}" in PAGE


def test_the_command_after_the_copy_changes_the_model_also_ahead_of_the_last_tag(
    releases: Path, tmp_path: Path
) -> None:
    """As `make demo` does: it renders the newest commit, and a plain update to the last tag would be a downgrade."""
    template = shutil.copytree(releases, tmp_path / "template")
    commit(template, "Ahead of the last tag")
    run_copy(str(template), tmp_path / "demo", data=ANSWERS, vcs_ref="HEAD", **OPTIONS)
    commit(tmp_path / "demo", "As rendered")
    with pytest.raises(UserMessageError, match="You are downgrading"):
        run_update(tmp_path / "demo", **OPTIONS)
    message = yaml.safe_load((ROOT / "copier.yml").read_text(encoding="utf-8"))["_message_after_copy"]
    assert "copier update --trust --vcs-ref :current: -d model=…" in message
    run_update(tmp_path / "demo", vcs_ref=VcsRef.CURRENT, data={"model": "smollm2-135m-instruct"}, **OPTIONS)
    assert "smollm2-135m-instruct" in (tmp_path / "demo/.copier-answers.yml").read_text()
    assert git(tmp_path / "demo", "ls-files", "--deleted") == ""


@pytest.mark.filterwarnings("ignore::copier.errors.DirtyLocalWarning")
def test_a_copy_of_uncommitted_changes_is_repaired_with_the_nearest_commit(releases: Path, tmp_path: Path) -> None:
    template = shutil.copytree(releases, tmp_path / "template")
    (template / "new.txt").write_text("not committed\n")
    run_copy(str(template), tmp_path / "tone", data=ANSWERS, vcs_ref="HEAD", **OPTIONS)
    commit(tmp_path / "tone", "As copied")
    with pytest.raises(ValueError, match="Unknown revision"):
        run_update(tmp_path / "tone", vcs_ref="HEAD", **OPTIONS)
    point(tmp_path / "tone", "_commit", git(template, "describe", "--tags").strip())
    (template / "new.txt").unlink()
    run_update(tmp_path / "tone", vcs_ref="HEAD", **OPTIONS)
    assert git(tmp_path / "tone", "status", "--porcelain") == ""


def test_the_tests_start_at_the_last_stable_release_also_after_a_pre_release() -> None:
    releases = ["v0.1.0", "v0.2.0", "v0.10.0", "v0.11.0rc1"]
    assert before(releases, every=False) == ["v0.10.0", "v0.1.0"]
    assert before(releases, every=True) == ["v0.10.0", "v0.11.0rc1", "v0.2.0", "v0.1.0"]
    assert before(["v0.1.0rc1"], every=False) == ["v0.1.0rc1"]
    assert before([], every=False) == [OLDER]
