"""hooks/create_env.py runs in a new workspace and never fails: otherwise Copier would delete the workspace."""

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
    command = [*workspace.as_anybody, sys.executable, "-I", str(HOOK), *options]
    return subprocess.run(command, env=workspace.env, cwd=workspace.root, capture_output=True, text=True, check=False)


def files(workspace: Any) -> set[str]:
    """Return the files of the workspace outside its environment."""
    found = (file.relative_to(workspace.root) for file in workspace.root.rglob("*"))
    return {file.as_posix() for file in found if file.parts[0] != ".venv"}


@pytest.fixture
def workspace(make_workspace: Make) -> Any:
    return make_workspace()


def test_the_manager_none_prints_and_creates_nothing(workspace: Any) -> None:
    workspace.configure("none", "cpu")
    before = files(workspace)
    done = run_hook(workspace, "--download-model")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert files(workspace) == before


def test_it_creates_the_environment_and_does_not_change_a_complete_one(workspace: Any) -> None:
    before = files(workspace)
    done = run_hook(workspace, "--no-download-model")
    assert done.returncode == 0 and done.stderr == ""
    assert done.stdout.endswith("To use it: source .venv/bin/activate\n")  # Copier's message says the rest
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
def test_after_any_failure_the_hook_exits_with_0_and_names_the_command_to_try_again(
    workspace: Any, spoil: Callable[[Any], None]
) -> None:
    spoil(workspace)
    done = run_hook(workspace, "--download-model")
    assert done.returncode == 0
    assert "The workspace is complete, but its setup is not." in done.stderr
    assert done.stderr.endswith("  python3 setup/create_env.py\n")
    assert "Traceback" not in done.stderr


def no_network(workspace: Any) -> Callable[[], object]:
    wheel = next(workspace.wheels.glob("small-*"))
    wheel.rename(workspace.wheels / "away")
    workspace.env["PIP_INDEX_URL"] = "http://127.0.0.1:1/simple"
    del workspace.env["PIP_NO_INDEX"]

    def mend() -> None:
        (workspace.wheels / "away").rename(wheel)
        workspace.env["PIP_NO_INDEX"] = "1"

    return mend


def read_only_workspace(workspace: Any) -> Callable[[], object]:
    folders = [workspace.root, workspace.root / "setup"]
    for folder in folders:
        folder.chmod(0o555)
    return lambda: [folder.chmod(0o755) for folder in folders]


def read_only_environment(workspace: Any) -> Callable[[], object]:
    venv = workspace.root / ".venv"
    venv.mkdir()
    venv.chmod(0o555)
    return lambda: venv.chmod(0o755)


@pytest.mark.parametrize(
    ("spoil", "cause", "with_uv"),
    [
        (no_network, "127.0.0.1:1", True),
        (no_network, "small", False),
        (read_only_workspace, "create_env.log: Permission denied", True),
        (read_only_environment, "create_env.stamp.draft: Permission denied", True),
    ],
)
def test_the_message_has_the_cause_and_a_retry_succeeds_after_it_is_fixed(
    make_workspace: Make, spoil: Callable[[Any], Callable[[], object]], cause: str, with_uv: bool
) -> None:
    workspace = make_workspace(with_uv=with_uv and shutil.which("uv") is not None)
    mend = spoil(workspace)
    before = files(workspace) | {"setup/create_env.log", "setup/create_env.incomplete"}
    done = run_hook(workspace)
    assert done.returncode == 0 and cause in done.stderr, done.stderr
    assert done.stderr.count("create_env: ") == 1 and done.stderr.count("Try again") == 1
    assert "Traceback" not in done.stderr
    assert files(workspace) | {"setup/create_env.log", "setup/create_env.incomplete"} == before
    mend()
    done = run_hook(workspace)
    assert done.returncode == 0 and done.stderr == ""
    assert workspace.version("small") == "1.0"
    assert "setup/create_env.incomplete" not in files(workspace)
    assert not any(Path(workspace.env["HOME"]).iterdir())  # nor was any start-up file written


@pytest.mark.parametrize("room", [5, 28, 30], ids="room for {} files".format)
def test_a_full_disk_is_reported_and_a_retry_succeeds_after_space_is_freed(workspace: Any, room: int) -> None:
    venv = workspace.root / ".venv"
    venv.mkdir()
    first, second = workspace.run_on_full_disk(venv, venv, HOOK, files=room)
    assert "No space left on device" in first and first.count("Try again") == 1 and "Traceback" not in first, first
    assert "Ready in" in second and second.endswith("2.13.0+cpu\n"), second


def test_unknown_options_are_ignored(workspace: Any) -> None:
    workspace.configure("none", "cpu")
    assert run_hook(workspace, "--of-a-later-version").returncode == 0
