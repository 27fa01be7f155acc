"""tools/release.py cuts a release only of a clean main with a changelog entry."""

from __future__ import annotations

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHANGES = "# Changelog\n\n## Unreleased\n\n- New.\n\n*Update impact*: none.\n\n## 0.9.0 (2026-01-01)\n\n- Old.\n"


@pytest.fixture(scope="module")
def tool() -> Any:
    spec = importlib.util.spec_from_file_location("release_tool", ROOT / "tools/release.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    (tmp_path / "tests/update").mkdir(parents=True)
    (tmp_path / "tests/update/releases.yml").write_text("# Releases.\n{}\n")
    (tmp_path / "CHANGELOG.md").write_text(CHANGES)
    (tmp_path / "tools").mkdir()
    shutil.copy(ROOT / "tools/release.py", tmp_path / "tools")
    git(tmp_path, "init", "--quiet", "--initial-branch", "main")
    git(tmp_path, "config", "user.name", "Test")
    git(tmp_path, "config", "user.email", "test@example.org")
    git(tmp_path, "add", "--all")
    git(tmp_path, "commit", "--quiet", "--message", "All")
    return tmp_path


def git(folder: Path, *arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_entry_gets_its_version_a_tag_and_a_line_for_the_tests(tool: Any, repository: Path) -> None:
    tool.check(repository, "1.0.0")
    tool.cut(repository, "1.0.0", "2026-02-03")
    text = (repository / "CHANGELOG.md").read_text()
    assert "## Unreleased\n\n*Update impact*: none.\n\n## 1.0.0 (2026-02-03)\n\n- New.\n" in text
    commit = git(repository, "rev-parse", "v1.0.0^{commit}")
    assert (repository / "tests/update/releases.yml").read_text() == f'# Releases.\nv1.0.0: "{commit}"\n'
    assert git(repository, "status", "--porcelain") == ""
    with pytest.raises(tool.ReleaseError, match=r"«Unreleased» not what is new"):
        tool.check(repository, "1.0.1")


def test_each_release_is_a_line_below_the_previous_one(tool: Any, repository: Path) -> None:
    for version in ("1.0.0", "1.1.0"):
        tool.cut(repository, version, "2026-02-03")
    lines = (repository / "tests/update/releases.yml").read_text().splitlines()
    assert [line.split(":")[0] for line in lines] == ["# Releases.", "v1.0.0", "v1.1.0"]
    with pytest.raises(tool.ReleaseError, match=r"not newer than 1\.1\.0"):
        tool.check(repository, "1.0.5")


def test_a_pre_release_leaves_the_entry_for_the_final_release(tool: Any, repository: Path) -> None:
    for version in ("1.0.0rc1", "1.0.0rc2"):
        tool.check(repository, version)
        tool.cut(repository, version, "2026-02-03")
    assert (repository / "CHANGELOG.md").read_text() == CHANGES
    tool.check(repository, "1.0.0")
    tool.cut(repository, "1.0.0", "2026-02-04")
    text = (repository / "CHANGELOG.md").read_text()
    assert "## 1.0.0 (2026-02-04)\n\n- New.\n" in text and "rc" not in text
    lines = (repository / "tests/update/releases.yml").read_text().splitlines()
    tags = ["v1.0.0rc1", "v1.0.0rc2", "v1.0.0"]
    commits = [git(repository, "rev-parse", f"{tag}^{{commit}}") for tag in tags]
    assert lines[1:] == [f'{tag}: "{commit}"' for tag, commit in zip(tags, commits, strict=True)]
    with pytest.raises(tool.ReleaseError, match=r"not newer than 1\.0\.0"):
        tool.check(repository, "1.0.0rc3")


@pytest.mark.parametrize(
    ("version", "spoil", "words"),
    [
        ("one", [], "no version"),
        ("1.0", [], "not written as X.Y.Z"),
        ("v1.0.0", [], "not written as X.Y.Z"),
        ("1.0.0", ["switch", "--quiet", "--create", "other"], "not the branch main"),
        ("1.0.0", ["mv", "CHANGELOG.md", "CHANGES.md"], "not committed"),
        ("1.0.0", ["tag", "v1.0.0"], "not newer"),
    ],
)
def test_a_release_that_is_not_ready_is_refused(
    tool: Any, repository: Path, version: str, spoil: list[str], words: str
) -> None:
    if spoil:
        git(repository, *spoil)
    with pytest.raises(tool.ReleaseError, match=words):
        tool.check(repository, version)


def run(repository: Path, *arguments: str) -> tuple[int, str, str]:
    """Run the tool of a repository as `make release` does. Return its status and what it prints."""
    command = [sys.executable, "tools/release.py", *arguments]
    done = subprocess.run(command, cwd=repository, capture_output=True, text=True, check=False)
    return done.returncode, done.stdout, done.stderr


def test_the_command_checks_without_a_change_and_cuts_without_check(repository: Path) -> None:
    before = git(repository, "rev-parse", "HEAD")
    assert run(repository, "1.0.0", "--check") == (0, "", "")
    assert (git(repository, "rev-parse", "HEAD"), git(repository, "tag")) == (before, "")
    status, shown, errors = run(repository, "1.0.0")
    assert (status, errors) == (0, "") and "git push origin main v1.0.0" in shown
    assert git(repository, "tag") == "v1.0.0" and git(repository, "rev-list", "--count", f"{before}..HEAD") == "2"
    assert run(repository, "1.0.0") == (1, "", "release: 1.0.0 is not newer than 1.0.0: type a higher VERSION\n")


def test_what_git_says_is_in_the_error(repository: Path) -> None:
    for hook in ("pre-commit", "commit-msg"):
        (repository / ".git/hooks").mkdir(exist_ok=True)
        (repository / ".git/hooks" / hook).write_text("#!/bin/sh\necho no commit today >&2\nexit 1\n")
        (repository / ".git/hooks" / hook).chmod(0o755)
    status, _, errors = run(repository, "1.0.0")
    assert (status, errors) == (1, "release: git commit did not work: no commit today\n")
