"""The Makefile, with stand-ins for what it installs and runs: `make demo` gives a workspace that can be updated."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
COPIER = """#!/bin/sh
mkdir -p demo/.venv/bin
echo '/.venv' > demo/.gitignore
echo "$@" > demo/rendered.txt
printf '#!/bin/sh\\necho "$@" >> demo.log\\n' > demo/.venv/bin/python
chmod +x demo/.venv/bin/python
"""


def repository(folder: Path) -> Path:
    """A copy of the Makefile in which the environment is ready, and a `copier` that writes a small workspace."""
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / "locks").mkdir()
    (folder / "locks/repository.txt").touch()
    (folder / ".venv/ready").touch()
    (folder / ".venv/bin/copier").write_text(COPIER)
    (folder / ".venv/bin/copier").chmod(0o755)
    shutil.copy(ROOT / "Makefile", folder)
    (folder / ".gitignore").write_text("/demo/\n")
    subprocess.run(["git", "init", "--quiet"], cwd=folder, check=True)
    return folder


def make(folder: Path, target: str) -> subprocess.CompletedProcess[str]:
    nobody = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["make", "--no-print-directory", target]
    return subprocess.run(command, cwd=folder, env=os.environ | nobody, capture_output=True, text=True, check=False)


def demo_log(folder: Path) -> list[str]:
    done = subprocess.run(
        ["git", "-C", "demo", "log", "--format=%s"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_demo_is_a_repository_of_its_own_with_one_commit_also_when_made_again(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    for _ in range(2):
        done = make(folder, "demo")
        assert done.returncode == 0, done.stderr
        assert demo_log(folder) == ["As rendered"]
    tracked = subprocess.run(["git", "-C", "demo", "ls-files"], cwd=folder, capture_output=True, text=True, check=True)
    assert tracked.stdout.split() == [".gitignore", "rendered.txt"]
    assert len((folder / "demo.log").read_text().splitlines()) == 4


def test_a_demo_that_was_interrupted_before_its_commit_gets_it(tmp_path: Path) -> None:
    folder = repository(tmp_path)
    subprocess.run(["git", "init", "--quiet", "demo"], cwd=folder, check=True)
    assert make(folder, "demo").returncode == 0
    assert demo_log(folder) == ["As rendered"]


def test_a_blank_in_the_path_is_refused_before_anything_else(tmp_path: Path) -> None:
    folder = repository(tmp_path / "my projects" / "template")
    (tmp_path / "my").mkdir()
    for target in ("demo", "workspace", "clean"):
        done = make(folder, target)
        assert done.returncode == 2
        assert "has a blank in it, which make cannot handle: move the folder to a path without one" in done.stderr
    assert (tmp_path / "my").is_dir() and (folder / ".venv").is_dir() and not (folder / "demo").exists()
