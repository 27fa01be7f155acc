"""Files and settings that a release renames are renamed in a workspace, with its edits; a deprecated model is kept."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from copier import run_copy, run_update

from .conftest import OPTIONS, ROOT, commit, contents, git, release, run_copier, working_tree

CONFIG = "finetuning/olive-config.yaml"
FILES = '{"finetuning/training/smoke.py": "finetuning/training/rehearse.py"}'
SETTINGS = '{"finetuning/olive-config.yaml": {"max_rows": "row_limit"}}'


def replace(file: Path, old: str, new: str) -> None:
    text = file.read_text(encoding="utf-8")
    assert old in text
    file.write_text(text.replace(old, new), encoding="utf-8")


@pytest.fixture(scope="module")
def template(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """v1.1.0 renames a file and changes it, v1.2.0 a setting; v1.3.0 deprecates a model and changes the CPU's lock."""
    folder = tmp_path_factory.mktemp("template")
    working_tree(folder)
    release(folder, "v1.0.0")
    (folder / "template/finetuning/training/smoke.py").rename(folder / "template/finetuning/training/rehearse.py")
    with (folder / "template/finetuning/training/rehearse.py").open("a") as file:
        file.write("# since v1.1.0\n")
    with (folder / "hooks/renames.py").open("a", encoding="utf-8") as renames:
        renames.write(f"RENAMED_FILES |= {FILES}\n")
    release(folder, "v1.1.0")
    replace(folder / f"template/{CONFIG}.jinja", "max_rows: null  #", "row_limit: null  # new words:")
    with (folder / "hooks/renames.py").open("a", encoding="utf-8") as renames:
        renames.write(f"RENAMED_SETTINGS |= {SETTINGS}\n")
    release(folder, "v1.2.0")
    models = folder / "catalog/models.yml"
    before, entry = models.read_text(encoding="utf-8").split("  - id: qwen3-0.6b\n")
    entry = entry.replace("deprecated: false", "deprecated: true", 1)
    entry = entry.replace("replaced_by: null", "replaced_by: qwen3-1.7b", 1)
    models.write_text(f"{before}  - id: qwen3-0.6b\n{entry}", encoding="utf-8")
    with (folder / "template/setup/requirements-cpu.txt").open("a") as lock:
        lock.write("# since v1.3.0\n")
    release(folder, "v1.3.0")
    return folder


def workspace_of(template: Path, folder: Path, tag: str = "v1.0.0", **answers: str) -> Path:
    answers = {"platform": "linux", "environment": "venv", "device": "cpu"} | answers
    run_copy(str(template), folder, data=answers, vcs_ref=tag, **OPTIONS)
    commit(folder, "As copied")
    return folder


def test_a_renamed_file_keeps_its_edits_although_the_release_changed_it_too(template: Path, tmp_path: Path) -> None:
    workspace = workspace_of(template, tmp_path / "ws/tone")
    file = workspace / "finetuning/training/smoke.py"
    file.write_text(f"# mine\n{file.read_text()}")
    commit(workspace, "My edits")
    run_update(workspace, vcs_ref="v1.1.0", **OPTIONS)
    fresh = contents(workspace_of(template, tmp_path / "fresh/tone", "v1.1.0"))
    fresh["finetuning/training/rehearse.py"] = b"# mine\n" + fresh["finetuning/training/rehearse.py"]
    assert contents(workspace) == fresh
    assert "finetuning/training/smoke.py" not in fresh


def test_a_renamed_file_that_git_ignores_keeps_its_edits(template: Path, tmp_path: Path) -> None:
    workspace = workspace_of(template, tmp_path / "tone")
    git(workspace, "rm", "--cached", "--quiet", "finetuning/training/smoke.py")
    (workspace / ".gitignore").write_text(f"{(workspace / '.gitignore').read_text()}smoke.py\n")
    commit(workspace, "Ignored")
    file = workspace / "finetuning/training/smoke.py"
    file.write_text(f"# mine\n{file.read_text()}")
    run_update(workspace, vcs_ref="v1.1.0", **OPTIONS)
    text = (workspace / "finetuning/training/rehearse.py").read_text()
    assert text.startswith("# mine\n") and text.endswith("# since v1.1.0\n")
    assert not file.exists()


def test_a_rename_is_followed_in_a_clone_of_the_template_that_has_no_tags(template: Path, tmp_path: Path) -> None:
    clone = tmp_path / "clone"
    git(tmp_path, "clone", "--quiet", str(template), str(clone))
    first = git(clone, "rev-parse", "v1.0.0").strip()
    git(clone, "tag", "--delete", *git(clone, "tag").split())
    workspace = workspace_of(clone, tmp_path / "tone", first)
    file = workspace / "finetuning/training/smoke.py"
    file.write_text(f"# mine\n{file.read_text()}")
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    commit(workspace, "My edits")
    run_update(workspace, vcs_ref="HEAD", **OPTIONS)
    assert (workspace / "finetuning/training/rehearse.py").read_text().startswith("# mine\n")
    assert "row_limit: 100" in (workspace / CONFIG).read_text(encoding="utf-8")
    assert not file.exists()


def test_a_file_that_you_deleted_or_renamed_does_not_come_back_under_its_new_name(
    template: Path, tmp_path: Path
) -> None:
    for number, target in enumerate([None, "finetuning/mine.py"]):
        workspace = workspace_of(template, tmp_path / str(number) / "tone")
        if target:
            (workspace / "finetuning/training/smoke.py").rename(workspace / target)
        else:
            (workspace / "finetuning/training/smoke.py").unlink()
        commit(workspace, "My edits")
        run_update(workspace, vcs_ref="v1.1.0", **OPTIONS)
        assert not (workspace / "finetuning/training/rehearse.py").exists()
        assert not (workspace / "finetuning/training/smoke.py").exists()
        assert not target or (workspace / target).exists()


def test_a_renamed_setting_keeps_the_value_of_the_user(template: Path, tmp_path: Path) -> None:
    """Over two releases at once, with the rename of the file between."""
    workspace = workspace_of(template, tmp_path / "ws/tone")
    replace(workspace / CONFIG, "        max_rows: null", "        max_rows: null\n        # for a trial: max_rows: 10")
    replace(workspace / CONFIG, "seed: 42", "seed: 7")
    commit(workspace, "My edits")
    run_update(workspace, vcs_ref="v1.2.0", **OPTIONS)
    text = (workspace / CONFIG).read_text(encoding="utf-8")
    assert "        row_limit: null" in text and "        # for a trial: max_rows: 10" in text and "seed: 7" in text
    assert (workspace / "finetuning/training/rehearse.py").exists() and not (
        workspace / "finetuning/training/smoke.py"
    ).exists()


def test_a_renamed_setting_keeps_the_user_s_value_and_takes_the_template_s_comment(
    template: Path, tmp_path: Path
) -> None:
    workspace = workspace_of(template, tmp_path / "ws/tone")
    replace(workspace / CONFIG, "max_rows: null", "max_rows: 100")
    commit(workspace, "My edits")
    run_update(workspace, vcs_ref="v1.2.0", **OPTIONS)
    text = (workspace / CONFIG).read_text(encoding="utf-8")
    assert "row_limit: 100  # new words:" in text
    assert "<<<<<<<" not in text and "max_rows" not in text


def test_a_deprecated_model_is_kept_and_its_successor_is_named(template: Path, tmp_path: Path) -> None:
    workspace = workspace_of(template, tmp_path / "tone", model="qwen3-0.6b", environment="none")
    done = copier_update(workspace, "v1.3.0")
    assert "model: qwen3-0.6b\n" in (workspace / ".copier-answers.yml").read_text()
    assert "copier update --trust -d model=qwen3-1.7b" in done
    assert "deprecated" not in copier_update(workspace_of(template, tmp_path / "demo", environment="none"), "v1.3.0")


def copier_update(workspace: Path, tag: str, *options: str) -> str:
    """Update as a user does, and return what is said."""
    done = run_copier(workspace, "update", "--trust", "--defaults", "--vcs-ref", tag, *options)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize(
    ("environment", "tag", "options", "runs"),
    [
        ("venv", "v1.3.0", [], 1),
        ("venv", "v1.2.0", [], 0),  # it changes nothing that is installed
        ("venv", "v1.3.0", ["--skip-tasks"], 0),
        ("none", "v1.3.0", [], 0),
    ],
)
def test_the_environment_is_updated_once_if_its_files_changed_and_tasks_are_allowed(
    environment: str, tag: str, options: list[str], runs: int, template: Path, tmp_path: Path
) -> None:
    workspace = workspace_of(template, tmp_path / "tone", environment=environment)
    script = workspace / "setup/create_env.py"
    # Only notes that it ran: to install takes minutes, and is tested elsewhere.
    replace(script, "def main() -> int:\n", "def main() -> int:\n    open('runs', 'a').write('x'); return 0\n")
    commit(workspace, "A script that notes")
    said = copier_update(workspace, tag, *options)
    ran = workspace / "runs"
    assert (len(ran.read_text()) if ran.exists() else 0) == runs, said


def test_a_conflict_in_the_lock_waits_for_the_user(template: Path, tmp_path: Path) -> None:
    workspace = workspace_of(template, tmp_path / "tone")
    with (workspace / "setup/requirements-cpu.txt").open("a") as lock:
        lock.write("mine==1.0\n")
    commit(workspace, "My package")
    said = copier_update(workspace, "v1.3.0")
    assert "Resolve the conflicts in setup/, then run: python3 setup/create_env.py" in said
    assert not (workspace / ".venv").exists()


def test_outside_a_repository_no_update_begins(tmp_path: Path) -> None:
    command = [sys.executable, "-I", str(ROOT / "hooks/migrate.py"), "before", ".copier-answers.yml", str(ROOT), ""]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.startswith(
        "The update did not begin, and nothing was changed: git does not track .copier-answers"
    )
    assert done.stderr.count("\n") == 1


def test_the_renames_end_at_the_names_in_the_template() -> None:
    sys.path.insert(0, str(ROOT / "hooks"))
    try:
        import renames
    finally:
        sys.path.pop(0)
    for old, new in renames.RENAMED_FILES.items():
        assert not (ROOT / "template" / old).exists()
        assert any((ROOT / "template" / f"{new}{suffix}").exists() for suffix in ("", ".jinja"))
