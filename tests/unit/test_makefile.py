"""The Makefile, with stand-ins for what it installs and runs.

`make demo` gives a workspace that can be updated; `make test` runs every test, and says which one failed.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
COPIER = """#!/bin/sh
mkdir -p demo/.venv/bin
echo '/.venv' > demo/.gitignore
echo "$@" > demo/rendered.txt
printf '#!/bin/sh\\necho "$@" >> demo.log\\n' > demo/.venv/bin/python
chmod +x demo/.venv/bin/python
"""
PYTEST = """#!/bin/sh
printf "%s\\n" "$*" >> ran.log
case "$*" in *"$BROKEN"*) echo "FAILED $BROKEN/test_some.py::test_that_names_itself"; exit 1;; esac
"""
# `make test-all` runs these, as they take long.
LONG = {"tests/real/test_gemma.py", "tests/update/test_long_story.py", "tests/walk/test_every_walk.py"}


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


def installed(folder: Path) -> Path:
    """A repository in which everything is installed, with stand-ins for the checks and for both of pytest's Pythons."""
    folder = repository(folder)
    for name in ("template/setup/requirements-cpu.txt", "template/setup/requirements-gpu.txt"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    for name in ("template/inference/flow/requirements.txt", "tests/real/make_models.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    (folder / "locks/site.txt").touch()
    caches = ["azure-cli", "bicep-tools", "bitsandbytes", "fastjsonschema", "openai", "playwright", "rattler", "site"]
    caches += ["schemathesis", "smollm2", "tensorboard"]
    for name in ("workspace/.venv", "workspace/.venv-promptflow", *caches):
        (folder / ".cache" / name).mkdir(parents=True)
        (folder / ".cache" / name / "ready").touch()
    for name in ("ruff", "mypy", "zizmor", "pytest"):
        (folder / ".venv/bin" / name).write_text(PYTEST if name == "pytest" else "#!/bin/sh\n")
        (folder / ".venv/bin" / name).chmod(0o755)
    (folder / ".cache/workspace/.venv/bin").mkdir()
    shutil.copy(folder / ".venv/bin/pytest", folder / ".cache/workspace/.venv/bin/python")
    (folder / ".cache/site/bin").mkdir()
    (folder / ".cache/site/bin/python").write_text("#!/bin/sh\n")
    (folder / ".cache/site/bin/python").chmod(0o755)
    return folder


def make(folder: Path, target: str, **more: str) -> subprocess.CompletedProcess[str]:
    names = ("PATH", "HOME", "LANG", "TMPDIR")  # and not those with which a make tells another how it was started
    env = {name: os.environ[name] for name in names if name in os.environ} | more
    env |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
    command = ["make", "--no-print-directory", target]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, check=False)


def demo_log(folder: Path) -> list[str]:
    done = subprocess.run(
        ["git", "-C", "demo", "log", "--format=%s"], cwd=folder, capture_output=True, text=True, check=True
    )
    return done.stdout.splitlines()


def test_the_demo_is_a_repository_with_one_commit_even_if_made_again(tmp_path: Path) -> None:
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


def test_a_space_in_the_path_is_refused_before_anything_else(tmp_path: Path) -> None:
    folder = repository(tmp_path / "my projects" / "template")
    (tmp_path / "my").mkdir()
    for target in ("demo", "workspace", "clean"):
        done = make(folder, target)
        assert done.returncode == 2
        assert "has a blank in it, which make cannot handle: move the folder to a path without one" in done.stderr
    assert (tmp_path / "my").is_dir() and (folder / ".venv").is_dir() and not (folder / "demo").exists()


def test_every_test_is_run_once_and_some_of_the_updates_again_with_the_line_ends_of_windows(tmp_path: Path) -> None:
    folder = installed(tmp_path)
    done = make(folder, "test", BROKEN="nothing")
    assert done.returncode == 0, done.stderr
    runs = [shlex.split(line) for line in (folder / "ran.log").read_text().splitlines()]
    times: dict[str, int] = {}
    for file in (ROOT / "tests").glob("*/test_*.py"):
        name = file.relative_to(ROOT).as_posix()
        times[name] = sum(is_run(name, words) for words in runs)
    again = {"tests/update/test_edits.py"}
    assert times == {name: 2 if name in again else 0 if name in LONG else 1 for name in times}


def is_run(name: str, words: list[str]) -> bool:
    """Tell whether pytest, called with these words, runs a file."""
    ignored = {word for before, word in pairwise(words) if before == "--ignore"}
    return name not in ignored and any(name == word or name.startswith(f"{word}/") for word in words)


@pytest.mark.parametrize("part", ["tests/unit", "tests/workspace", "tests/real", "tests/azure", "tests/walk"])
def test_a_failing_test_is_named_and_fails_the_whole_run(tmp_path: Path, part: str) -> None:
    done = make(installed(tmp_path), "test", BROKEN=part)
    assert done.returncode != 0
    assert f"FAILED {part}/test_some.py::test_that_names_itself" in done.stdout
    assert "make: *** " in done.stderr
