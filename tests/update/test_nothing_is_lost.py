"""Cases in which an update once lost edits or ended half-way: now it keeps them, or is refused before any change."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from copier import run_copy
from copier._main import Worker

from .conftest import FORKED, NEXT, NOW, OPTIONS, ROOT, commit, contents, git, known, run_copier

Copy = Callable[..., Path]
CONFIG = "finetuning/olive-config.yaml"
ANSWERS = {"platform": "linux", "environment": "venv", "device": "cpu"}


@pytest.fixture
def workspace(copy: Copy, tmp_path: Path) -> Path:
    """A workspace of the release before the next one, in a repository of its own, committed."""
    folder = copy(tmp_path / "tone", NOW, **ANSWERS)
    commit(folder, "As copied")
    return folder


@pytest.fixture
def settings() -> Iterator[Callable[[str], None]]:
    """Return a function that adds to git's settings, until the test ends."""
    config = Path(os.environ["GIT_CONFIG_GLOBAL"])
    before = config.read_text(encoding="utf-8")
    yield lambda more: config.write_text(f"{before}\n{more}\n", encoding="utf-8") and None
    config.write_text(before, encoding="utf-8")


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new, 1), encoding="utf-8")


def copier_update(folder: Path, *options: str, tag: str = NEXT[0]) -> subprocess.CompletedProcess[str]:
    """Update as a user does."""
    return run_copier(folder, "update", "--trust", "--defaults", "--skip-tasks", "--vcs-ref", tag, *options)


def refused(done: subprocess.CompletedProcess[str], *words: str) -> None:
    """Assert that the update did not begin, with one sentence that has these words."""
    assert done.returncode != 0
    lines = [line for line in done.stderr.splitlines() if line.startswith("The update did not begin")]
    assert len(lines) == 1, done.stderr
    assert all(word in lines[0] for word in words), lines[0]


def whole(folder: Path) -> dict[str, bytes]:
    """Return all that is there, with the modes of files and the targets of links."""
    found = {}
    for path in folder.rglob("*"):
        if ".git" in path.relative_to(folder).parts:
            continue
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            found[f"{name} -> {path.readlink()}"] = b""
        elif path.is_file():
            found[f"{name} {path.stat().st_mode:o}"] = path.read_bytes()
    return found


# ---- where the workspace lies


def test_a_workspace_in_an_ignored_folder_is_refused_unchanged_and_updated_once_it_is_in_git(
    copy: Copy, tmp_path: Path
) -> None:
    outer = tmp_path / "outer"
    workspace = copy(outer / "demo", NOW, **ANSWERS)
    (outer / ".gitignore").write_text("/demo/\n")
    commit(outer, "Outer")
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    before = whole(workspace)
    refused(copier_update(workspace), "git does not track .copier-answers.yml", "git init", "git commit")
    assert whole(workspace) == before
    commit(workspace, "In git")
    done = copier_update(workspace)
    assert done.returncode == 0, done.stderr
    assert "max_rows: 100" in (workspace / CONFIG).read_text(encoding="utf-8")
    assert (workspace / "later/release_1.py").exists() and (workspace / "README.md").exists()


def test_a_repository_without_a_commit_is_refused(copy: Copy, tmp_path: Path) -> None:
    workspace = copy(tmp_path / "tone", NOW, **ANSWERS)
    git(workspace, "init", "--quiet")
    before = whole(workspace)
    assert copier_update(workspace).returncode != 0
    assert whole(workspace) == before


@pytest.mark.parametrize("where", ["global", "workspace", "outer"])
def test_edits_in_ignored_files_are_kept_and_the_rest_is_updated(
    copy: Copy, update: Copy, tmp_path: Path, where: str, settings: Callable[[str], None]
) -> None:
    outer = tmp_path / "outer"
    workspace = copy(outer / "tone", NOW, **ANSWERS)
    ignored = tmp_path / "ignored"
    ignored.write_text(".vscode/\nsetup/\n")
    if where == "global":
        settings(f"[core]\nexcludesFile = {ignored}")
    elif where == "workspace":
        with (workspace / ".gitignore").open("a") as file:
            file.write(".vscode/\nsetup/\n")
    else:
        (outer / ".gitignore").write_text(".vscode/\nsetup/\n")
    commit(outer, "As copied")
    tasks, facts = workspace / ".vscode/extensions.json", workspace / "setup/model.yaml"
    tasks.write_text(tasks.read_text().replace("[", '[ "mine.mine",', 1))
    facts.write_text("# mine\n" + facts.read_text())
    update(workspace, NEXT[0])
    assert '"mine.mine"' in tasks.read_text()
    assert facts.read_text().startswith("# mine\n") and "since release 1" in facts.read_text()
    assert "since release 1" in (workspace / "setup/create_env.py").read_text()


@pytest.mark.parametrize(
    "text",
    [
        "[apply]\nwhitespace = error",
        "[apply]\nwhitespace = fix",
        "[core]\nautocrlf = true",
        "[core]\nautocrlf = input\nsafecrlf = true",
        "[diff]\nnoprefix = true",
        "[merge]\nconflictStyle = zdiff3",
        "[color]\nui = always",
        "[core]\nhooksPath = /nowhere",
    ],
)
def test_no_git_setting_loses_an_edit(
    workspace: Path, update: Copy, text: str, settings: Callable[[str], None]
) -> None:
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    with (workspace / "finetuning/training/train.py").open("a") as file:
        file.write("# mine, with a blank behind \n")
    replace(workspace / "README.md", "## Start\n", "## Start\n\nAsk Ada first. \n")
    commit(workspace, "My edits")
    settings(text)
    update(workspace, NEXT[0])
    assert "max_rows: 100" in (workspace / CONFIG).read_text(encoding="utf-8")
    assert "# mine, with a blank behind " in (workspace / "finetuning/training/train.py").read_text(encoding="utf-8")
    assert "Ask Ada first. \n" in (workspace / "README.md").read_text(encoding="utf-8")
    assert "Since release 1." in (workspace / "README.md").read_text(encoding="utf-8")


def test_another_answers_file_is_used_if_it_is_given(
    releases: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(FORKED, "worker", Worker)  # the other has an answers file of its own
    workspace, answers = tmp_path / "tone", ".copier-answers.tone.yml"
    run_copy(str(releases), workspace, data=ANSWERS, vcs_ref=NOW, answers_file=answers, **OPTIONS)
    (workspace / "finetuning/reporting/model_card.md").write_bytes("Meine Karte\n".encode("utf-16"))
    replace(workspace / "finetuning/training/smoke.py", "from", "# mine\nfrom")
    commit(workspace, "My edits")
    done = copier_update(workspace, "-a", answers)
    assert done.returncode == 0, done.stderr
    assert (workspace / "finetuning/reporting/model_card.md").read_bytes() == "Meine Karte\n".encode("utf-16")
    assert "# mine\n" in (workspace / "finetuning/training/smoke.py").read_text()
    assert not (workspace / ".copier-answers.yml").exists()


def test_an_uncommitted_deletion_elsewhere_in_the_repository_is_kept(copy: Copy, update: Copy, tmp_path: Path) -> None:
    workspace = copy(tmp_path / "all/tone", NOW, **ANSWERS)
    (tmp_path / "all/other.txt").write_text("other\n")
    (tmp_path / "all/kept.txt").write_text("kept\n")
    commit(tmp_path / "all", "As copied")
    (tmp_path / "all/other.txt").unlink()
    (tmp_path / "all/kept.txt").write_text("not committed\n")
    update(workspace, NEXT[0])
    assert not (tmp_path / "all/other.txt").exists()
    assert (tmp_path / "all/kept.txt").read_text() == "not committed\n"


# ---- refused before anything is changed


@pytest.mark.parametrize("answer", ["model=phi-4-mini", "dataset_source=file", "max_seq_len=3"])
def test_a_question_that_fails_changes_nothing_and_the_right_answer_works_at_once(workspace: Path, answer: str) -> None:
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    commit(workspace, "My edits")
    before, index = whole(workspace), git(workspace, "ls-files", "--stage")
    assert copier_update(workspace, "-d", answer).returncode != 0
    assert (whole(workspace), git(workspace, "ls-files", "--stage")) == (before, index)
    assert git(workspace, "status", "--porcelain") == ""
    done = copier_update(workspace)
    assert done.returncode == 0, done.stderr
    assert "max_rows: 100" in (workspace / CONFIG).read_text(encoding="utf-8")


@pytest.mark.skipif(sys.platform == "win32", reason="links are for administrators there")
def test_a_linked_folder_is_refused_unless_it_only_has_results(workspace: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "data"
    shutil.move(workspace / "dataset", elsewhere)
    (workspace / "dataset").symlink_to(elsewhere)
    commit(workspace, "Linked")
    before = whole(workspace)
    refused(copier_update(workspace), "dataset is a link")
    assert whole(workspace) == before
    (workspace / "dataset").unlink()
    shutil.move(elsewhere, workspace / "dataset")
    (tmp_path / "models").mkdir()
    (workspace / "models").symlink_to(tmp_path / "models")
    commit(workspace, "Back")
    assert git(workspace, "status", "--porcelain") == ""
    assert copier_update(workspace).returncode == 0


def test_a_sparse_checkout_is_refused(workspace: Path) -> None:
    git(workspace, "sparse-checkout", "set", "finetuning")
    refused(copier_update(workspace), "the checkout is sparse", "git sparse-checkout disable")
    git(workspace, "sparse-checkout", "disable")
    assert copier_update(workspace).returncode == 0


@pytest.mark.parametrize("ignored", [False, True])
def test_a_rej_file_elsewhere_in_the_repository_is_refused_and_no_work_is_lost(
    copy: Copy, tmp_path: Path, ignored: bool
) -> None:
    """Copier resets the file beside a .rej, and deletes that, or ends half-way where git does not track the file."""
    workspace = copy(tmp_path / "all/tone", NOW, **ANSWERS)
    other, rejected = tmp_path / "all/other.txt", tmp_path / "all/other.txt.rej"
    other.write_text("committed\n")
    (tmp_path / "all/.gitignore").write_text("*.rej\n" * ignored)
    commit(tmp_path / "all", "As copied")
    other.write_text("not committed\n")
    rejected.write_text("mine\n")
    before = whole(tmp_path / "all")
    refused(copier_update(workspace), "other.txt.rej", "move it out of the repository")
    assert whole(tmp_path / "all") == before
    rejected.unlink()
    assert copier_update(workspace).returncode == 0
    assert other.read_text() == "not committed\n"


@pytest.mark.parametrize("where", ["hooksPath", "templateDir"])
def test_a_git_hook_that_forbids_copiers_commit_is_refused_before_anything_changes(
    workspace: Path, settings: Callable[[str], None], tmp_path: Path, where: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hook = tmp_path / "hooks/prepare-commit-msg"
    hook.parent.mkdir()
    hook.write_text("#!/bin/sh\necho 'no ticket is named' >&2\nexit 1\n")
    hook.chmod(0o755)
    monkeypatch.delenv("GIT_TEMPLATE_DIR")
    settings(f"[core]\nhooksPath = {hook.parent}" if where == "hooksPath" else f"[init]\ntemplateDir = {tmp_path}")
    before = whole(workspace)
    refused(copier_update(workspace), "`git commit`", "no ticket is named", "core.hooksPath or init.templateDir")
    assert whole(workspace) == before and not git(workspace, "status", "--porcelain")
    hook.write_text("#!/bin/sh\n")
    assert copier_update(workspace).returncode == 0


def test_line_ends_that_git_refuses_are_refused_before_anything_changes(
    copy: Copy, releases: Path, settings: Callable[[str], None], tmp_path: Path
) -> None:
    """0.1.0 had no .gitattributes for all of its files."""
    workspace = copy(tmp_path / "tone", known(releases, "v0.1.0"), **ANSWERS)
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    commit(workspace, "My edits")
    before = whole(workspace)
    settings("[core]\nautocrlf = true\nsafecrlf = true")
    refused(copier_update(workspace, tag=NOW), "LF would be replaced by CRLF", "core.safecrlf warn")
    assert whole(workspace) == before
    settings("[core]\nautocrlf = true\nsafecrlf = warn")
    done = copier_update(workspace, tag=NOW)
    assert done.returncode == 0, done.stderr
    assert "max_rows: 100" in (workspace / CONFIG).read_text(encoding="utf-8")


def test_a_template_in_a_folder_that_git_may_not_clone_changes_nothing_and_the_page_says_what_helps(
    workspace: Path, settings: Callable[[str], None], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Copier clones the template before it runs anything of it."""
    monkeypatch.setitem(FORKED, "worker", Worker)  # the one that knows no clone
    before = whole(workspace)
    settings('[protocol "file"]\nallow = never')
    said = copier_update(workspace).stderr
    assert "fatal: transport 'file' not allowed" in said and whole(workspace) == before
    page = (ROOT / "docs/how-to/template-moved.md").read_text(encoding="utf-8")
    row = next(line for line in page.splitlines() if "fatal: transport 'file' not allowed" in line)
    assert "`GIT_ALLOW_PROTOCOL=file copier update --trust`" in row
    monkeypatch.setenv("GIT_ALLOW_PROTOCOL", "file")
    assert copier_update(workspace).returncode == 0


def test_a_missing_signing_key_does_not_stop_an_update(workspace: Path, settings: Callable[[str], None]) -> None:
    settings("[commit]\ngpgSign = true\n[gpg]\nformat = ssh\n[user]\nsigningKey = /does/not/exist")
    assert copier_update(workspace).returncode == 0


# ---- what was edited, and how


def test_the_users_file_modes_and_links_are_kept(workspace: Path, update: Copy, tmp_path: Path) -> None:
    script, card = workspace / "finetuning/training/smoke.py", workspace / "finetuning/reporting/model_card.md"
    script.chmod(0o755)
    card.unlink()
    card.symlink_to("../README.md")
    commit(workspace, "My edits")
    update(workspace, NEXT[0])
    assert script.stat().st_mode & 0o111
    assert "since release 1" in script.read_text()
    assert card.is_symlink() and str(card.readlink()) == "../README.md"


def test_a_file_of_the_user_with_the_name_of_a_new_file_is_a_conflict(workspace: Path, update: Copy) -> None:
    (workspace / "later").mkdir()
    (workspace / "later/release_1.py").write_text("print('mine')\n")
    commit(workspace, "Mine")
    update(workspace, NEXT[0])
    text = (workspace / "later/release_1.py").read_text()
    assert "print('mine')" in text and "<<<<<<< before updating" in text
    assert "AA later/release_1.py" in git(workspace, "status", "--porcelain")


def test_a_value_that_the_user_set_is_kept_over_a_new_default_and_both_are_shown(
    copy: Copy, update: Copy, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = copy(tmp_path / "tone", NOW, **ANSWERS)
    replace(workspace / CONFIG, "learning_rate: 0.004", "learning_rate: 0.0007")
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    commit(workspace, "My edits")
    update(workspace, NOW, model="phi-3-mini-4k-instruct")
    text = (workspace / CONFIG).read_text(encoding="utf-8")
    assert "<<<<<<<" not in text
    fresh = copy(tmp_path / "fresh/tone", NOW, **ANSWERS, model="phi-3-mini-4k-instruct")
    expected = (fresh / CONFIG).read_text(encoding="utf-8")
    default = next(line.split()[1] for line in expected.splitlines() if line.strip().startswith("learning_rate:"))
    expected = expected.replace(f"learning_rate: {default}", "learning_rate: 0.0007")
    assert text == expected.replace("max_rows: null", "max_rows: 100")
    said = capfd.readouterr().err
    assert f"{CONFIG}: learning_rate stays 0.0007, as you set it; the template's value is now {default}." in said


# ---- taking an update back


@pytest.mark.parametrize("committed", [False, True])
def test_undo_restores_everything_of_the_update_and_nothing_else(
    copy: Copy, update: Copy, tmp_path: Path, committed: bool
) -> None:
    workspace = copy(tmp_path / "all/tone", NOW, **ANSWERS)
    other = tmp_path / "all/other.txt"
    other.write_text("other\n")
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    with (workspace / CONFIG).open("a") as file:
        file.write("# a line that will be a conflict\n")
    (workspace / "finetuning/training/smoke.py").unlink()
    commit(tmp_path / "all", "As copied, and edited")
    other.write_text("not committed\n")
    before, index = whole(workspace), git(workspace, "ls-files", "--stage")
    update(workspace, NEXT[0])
    assert "<<<<<<<" in (workspace / CONFIG).read_text(encoding="utf-8")
    if committed:
        git(workspace, "add", "--all", ".")
        git(workspace, "commit", "--quiet", "--message", "Updated")
    updated = (workspace / CONFIG).read_bytes()
    done = subprocess.run(
        [sys.executable, workspace / "setup/undo_update.py"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    named = re.search(r"The previous content of these files is in (.+)\.\n", done.stdout)
    assert named and (Path(named[1]) / CONFIG).read_bytes() == updated
    assert (whole(workspace), git(workspace, "ls-files", "--stage")) == (before, index)
    assert other.read_text() == "not committed\n"


def test_the_copies_of_the_last_three_updates_stay(workspace: Path, update: Copy) -> None:
    for tag in (NEXT[0], NEXT[1], NEXT[2], NEXT[2]):
        update(workspace, tag)
        commit(workspace, tag)
    copies = workspace / ".git/copier-finetune/workspace"
    assert len([path for path in copies.iterdir() if path.is_dir()]) == 3
    assert not (copies / "pending").exists()


def test_without_an_update_there_is_nothing_to_undo(workspace: Path) -> None:
    script = workspace / "setup/undo_update.py"
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "there is no update to undo" in done.stderr
    assert contents(workspace) and ROOT.is_dir()


def test_a_default_that_was_only_confirmed_follows_the_model_and_a_chosen_value_stays(
    copy: Copy, update: Copy, tmp_path: Path
) -> None:
    """«Every setting: yes», then Enter throughout; one value is typed."""
    workspace = copy(tmp_path / "tone", NOW, **ANSWERS, advanced=True, epochs=5)
    commit(workspace, "As copied")
    given = {"model": "phi-4-mini-instruct", "device": "gpu"}
    update(workspace, NOW, **given)
    fresh = copy(tmp_path / "fresh/tone", NOW, **ANSWERS | given, advanced=True, epochs=5)
    assert (workspace / CONFIG).read_text(encoding="utf-8") == (fresh / CONFIG).read_text(encoding="utf-8")
    text = (workspace / CONFIG).read_text(encoding="utf-8")
    assert "learning_rate: 0.0002" in text and "num_train_epochs: 5" in text and "type: QLoRA" in text


@pytest.mark.parametrize("tag", ["v0.1.0", "v0.1.1"])
def test_a_default_that_an_early_release_recorded_follows_the_model_and_a_chosen_value_stays(
    tag: str, copy: Copy, update: Copy, releases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """In the very update that brings this release; one value is typed at first, one now, and one is edited."""
    typed = {"advanced": True, "epochs": 5}
    workspace = copy(tmp_path / "tone", known(releases, tag), **ANSWERS, **typed)
    assert "learning_rate: 0.004" in (workspace / ".copier-answers.yml").read_text()
    replace(workspace / CONFIG, "lora_dropout: 0.0", "lora_dropout: 0.3")
    commit(workspace, "As copied, and edited")
    given = {"model": "phi-4-mini-instruct", "device": "gpu", "eval_batch_size": 32}  # 32 is the demo's default, too
    update(workspace, NOW, **given)
    said = capfd.readouterr().err
    fresh = copy(tmp_path / "fresh/tone", NOW, **ANSWERS | given | typed)
    replace(fresh / CONFIG, "lora_dropout: 0.05", "lora_dropout: 0.3")
    assert contents(workspace) == contents(fresh)
    line = next(
        line for line in said.splitlines() if line.startswith("Values that you never chose follow the new answers: ")
    )
    assert "learning_rate 0.004 -> 0.0002" in line and "method lora -> qlora" in line
    assert "packing False -> True" in line and "epochs" not in line and "eval_batch_size" not in line
    assert "no conflict" in said
    commit(workspace, "Updated")
    update(workspace, NEXT[0])
    assert "learning_rate: 0.0002" in (workspace / CONFIG).read_text(encoding="utf-8")


def test_recorded_defaults_stay_as_they_are_where_no_answer_changes(
    copy: Copy, update: Copy, releases: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    workspace = copy(tmp_path / "tone", known(releases, "v0.1.1"), **ANSWERS, advanced=True)
    commit(workspace, "As copied")
    update(workspace, NOW)
    assert "never chose" not in capfd.readouterr().err
    assert contents(workspace) == contents(copy(tmp_path / "fresh/tone", NOW, **ANSWERS, advanced=True))
