"""Accounts without a name or a home folder, as in containers, and settings of Python and pip that change every run."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TEMPLATE = REPOSITORY / "template"
HOOK = REPOSITORY / "hooks" / "create_env.py"
SCRIPTS = sorted(
    file for file in TEMPLATE.glob("*/*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
)
NAMELESS = ["unshare", "--user", "--map-user=12345"]

Make = Callable[..., Any]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_a_script_finds_its_neighbours_where_python_leaves_its_folder_out(script: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-B", str(script), "--help"]
    env = {**os.environ, "PYTHONSAFEPATH": "1"}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)
    if "No module named 'yaml'" in done.stderr:
        pytest.skip("get_model.py reads YAML")
    assert done.returncode == 0 and done.stdout.startswith("usage: "), done.stderr


def test_the_hook_creates_the_environment_where_python_leaves_the_folder_of_scripts_out(make_workspace: Make) -> None:
    workspace = make_workspace()
    env = {**workspace.env, "PYTHONSAFEPATH": "1"}
    command = [sys.executable, "-I", str(HOOK)]
    done = subprocess.run(command, env=env, cwd=workspace.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stderr == ""
    assert workspace.version("small") == "1.0"


def test_an_account_without_a_name_and_a_home_gets_its_environment(make_workspace: Make) -> None:
    if not shutil.which("unshare") or subprocess.run([*NAMELESS, "true"], capture_output=True, check=False).returncode:
        pytest.skip("no account without a name can be had here")
    workspace = make_workspace()
    del workspace.env["HOME"]
    unshare = [str(shutil.which("unshare")), *NAMELESS[1:]]
    command = [*unshare, sys.executable, str(workspace.root / "setup" / "create_env.py")]
    done = subprocess.run(command, env=workspace.env, cwd=workspace.root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert workspace.version("torch") == "2.13.0+cpu"
    assert not (workspace.root / "~").exists()


# --------------------------------------------------------------------------------------- settings of Python and of pip


def foreign(workspace: Any) -> str:
    """Return a folder of packages of somebody else: what the lock has, and a pip."""
    folder = workspace.programs.parent / "foreign"
    for name in ("small", "torch", "pip"):
        info = folder / f"{name}-2.13.0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.13.0\n")
        (folder / f"{name}.py").write_text("__version__ = 'foreign'\n")
    return str(folder)


def config(workspace: Any, line: str) -> dict[str, str]:
    """Return the variable that names a pip.conf with this line."""
    file = workspace.programs.parent / "pip.conf"
    file.write_text(f"[global]\n{line}\n")
    return {"PIP_CONFIG_FILE": str(file)}


SETTINGS: dict[str, Callable[[Any], dict[str, str]]] = {
    "PIP_USER": lambda _: {"PIP_USER": "1"},
    "PIP_TARGET": lambda workspace: {"PIP_TARGET": str(workspace.programs.parent / "target")},
    "PIP_PREFIX": lambda workspace: {"PIP_PREFIX": str(workspace.programs.parent / "target")},
    "PYTHONPATH": lambda workspace: {"PYTHONPATH": foreign(workspace)},
    "user in pip.conf": lambda workspace: config(workspace, "user = true"),
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("with_uv", [True, False], ids=["uv", "pip"])
def test_the_packages_come_into_the_environment_whatever_is_set(
    make_workspace: Make, setting: str, with_uv: bool
) -> None:
    workspace = make_workspace(with_uv=with_uv and shutil.which("uv") is not None)
    workspace.env |= SETTINGS[setting](workspace)
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert (workspace.version("torch"), workspace.version("small")) == ("2.13.0+cpu", "1.0")
    assert not (workspace.programs.parent / "target").exists()
    home = Path(workspace.env["HOME"])
    assert not (home / ".local").exists()


@pytest.mark.parametrize("option", ["target", "dry-run"])
def test_a_pip_conf_that_sends_packages_elsewhere_is_one_sentence_and_no_complete_environment(
    make_workspace: Make, option: str
) -> None:
    workspace = make_workspace(with_uv=False)
    elsewhere = workspace.programs.parent / "elsewhere"
    settings = config(workspace, f"{option} = {elsewhere if option == 'target' else 'true'}")
    workspace.env |= settings
    done = workspace.run()
    assert done.returncode == 1
    assert "torch was installed, but not into" in done.stderr and "pip config list` shows." in done.stderr
    workspace.env["PIP_CONFIG_FILE"] = os.devnull
    assert workspace.run().returncode == 0
    assert workspace.version("small") == "1.0"


# ------------------------------------------------------------------------------------------- what the scripts then see


def seen(code: str, **variables: str) -> str:
    """Run code that imports setup/model_folder.py, as each script does first; return its output."""
    start = f"import sys; sys.dont_write_bytecode = True; sys.path.append({str(TEMPLATE / 'setup')!r}); "
    command = [sys.executable, "-c", f"{start}import model_folder, os; {code}"]
    env = {**os.environ, **variables}
    return subprocess.run(command, env=env, capture_output=True, text=True, check=True).stdout.strip()


def test_a_package_on_pythonpath_does_not_replace_one_of_the_environment(tmp_path: Path) -> None:
    for name in ("yaml", "only_there"):
        (tmp_path / f"{name}.py").write_text("__version__ = 'foreign'\n")
    code = "import yaml, only_there; print(yaml.__version__, only_there.__version__)"
    version, other = seen(code, PYTHONPATH=str(tmp_path)).split()
    assert version != "foreign" and other == "foreign"


@pytest.mark.parametrize("home", ["/nowhere", "relative"])
def test_a_home_that_cannot_be_written_is_replaced_by_a_folder_of_the_workspace(home: str) -> None:
    assert seen("print(os.environ['HOME'])", HOME=home) == str(TEMPLATE / "models" / "home")


def test_a_home_that_has_a_cache_or_takes_one_stays(tmp_path: Path) -> None:
    assert seen("print(os.environ['HOME'])", HOME=str(tmp_path)) == str(tmp_path)
    if os.geteuid() != 0:
        (tmp_path / ".cache").mkdir()
        tmp_path.chmod(0o555)  # as where an image brings its models along
        assert seen("print(os.environ['HOME'])", HOME=str(tmp_path)) == str(tmp_path)
        tmp_path.chmod(0o755)
