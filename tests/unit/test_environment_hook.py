"""hooks/create_env.py runs in a new workspace and never fails: Copier would delete what it has just made."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

HOOK = Path(__file__).resolve().parents[2] / "hooks" / "create_env.py"

Make = Callable[..., Any]


def run_hook(workspace: Any, *options: str) -> subprocess.CompletedProcess[str]:
    """Run the hook as Copier does."""
    command = [sys.executable, "-I", str(HOOK), *options]
    return subprocess.run(command, env=workspace.env, cwd=workspace.root, capture_output=True, text=True, check=False)


def files(workspace: Any) -> set[str]:
    """Return the files of the workspace outside its environment."""
    found = (file.relative_to(workspace.root) for file in workspace.root.rglob("*"))
    return {file.as_posix() for file in found if file.parts[0] != ".venv"}


@pytest.fixture
def workspace(make_workspace: Make) -> Any:
    return make_workspace()


def test_the_manager_none_says_and_makes_nothing(workspace: Any) -> None:
    workspace.configure("none", "cpu")
    before = files(workspace)
    done = run_hook(workspace, "--download-model")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files(workspace) == before


def test_it_creates_the_environment_and_a_second_time_leaves_it_alone(workspace: Any) -> None:
    before = files(workspace)
    done = run_hook(workspace, "--no-download-model")
    assert done.returncode == 0 and done.stderr == ""
    assert "Next" not in done.stdout  # Copier says it
    assert workspace.version("torch") == "2.13.0+cpu"
    assert files(workspace) - before == {"setup/create_env.log"}
    assert "is up to date" in run_hook(workspace).stdout


def test_the_model_is_fetched_with_the_new_environments_python(workspace: Any) -> None:
    get_model = workspace.root / "setup" / "get_model.py"
    get_model.write_text("import small, sys\nprint('fetched by', sys.prefix)\n")
    done = run_hook(workspace, "--download-model")
    assert done.returncode == 0 and done.stderr == ""
    assert f"fetched by {workspace.root / '.venv'}" in done.stdout


def test_a_model_that_cannot_be_fetched_leaves_the_environment_and_a_command(workspace: Any) -> None:
    (workspace.root / "setup" / "get_model.py").write_text("raise SystemExit('get_model: the model is gated')\n")
    done = run_hook(workspace, "--download-model")
    assert done.returncode == 0
    assert "the model is gated" in done.stderr and done.stderr.endswith("  python setup/get_model.py\n")
    assert workspace.version("torch") == "2.13.0+cpu"


def no_packages(workspace: Any) -> None:
    shutil.rmtree(workspace.wheels)


def no_manager(workspace: Any) -> None:
    workspace.configure("micromamba", "cpu")


def unknown_manager(workspace: Any) -> None:
    workspace.configure("poetry", "cpu")


def no_settings(workspace: Any) -> None:
    (workspace.root / "setup" / "environment.toml").unlink()


def no_script(workspace: Any) -> None:
    (workspace.root / "setup" / "create_env.py").unlink()


def broken_script(workspace: Any) -> None:
    (workspace.root / "setup" / "create_env.py").write_text("this is not Python\n")


def no_lock(workspace: Any) -> None:
    (workspace.root / "setup" / "requirements-cpu.txt").unlink()


@pytest.mark.parametrize(
    "spoil", [no_packages, no_manager, unknown_manager, no_settings, no_script, broken_script, no_lock]
)
def test_whatever_fails_the_hook_ends_well_and_says_how_to_try_again(
    workspace: Any, spoil: Callable[[Any], None]
) -> None:
    spoil(workspace)
    done = run_hook(workspace, "--download-model")
    assert done.returncode == 0
    assert "The workspace is complete, but not all is set up." in done.stderr
    assert done.stderr.endswith("  python3 setup/create_env.py\n")
    assert "Traceback" not in done.stderr


def test_an_option_it_does_not_know_is_no_failure(workspace: Any) -> None:
    workspace.configure("none", "cpu")
    assert run_hook(workspace, "--of-a-later-version").returncode == 0
