"""setup/create_env.py, from what costs nothing to real environments from tiny wheels; no network."""

from __future__ import annotations

import functools
import http.server
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
CPU = "https://download.pytorch.org/whl/cpu"
NO_UV = shutil.which("uv") is None

Make = Callable[..., Any]


@pytest.fixture
def create_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module, in a workspace of its own, on a machine without conda and uv."""
    setup = tmp_path / "my workspace" / "setup"
    setup.mkdir(parents=True)
    scripts = ("create_env.py", "conda_environment.py", "gpu.py", "install.py", "installed.py", "visible.py")
    for script in scripts:
        shutil.copy(REPOSITORY / "template" / "setup" / script, setup)
    (setup / "environment.toml").write_text('manager = "auto"\ndevice = "cpu"\npython = "3.11"\n')
    (setup / "conda-environment.yml").write_text("name: small\ndependencies: [python=3.11, pip]\n")
    for device in ("cpu", "gpu"):
        (setup / f"requirements-{device}.txt").write_text("small==1.0\ntorch==2.13.0\n")
    for name in list(os.environ):
        if name.startswith(("CONDA", "MAMBA", "PIP_", "UV_", "TORCH_")):
            monkeypatch.delenv(name)
    (tmp_path / "programs").mkdir()
    monkeypatch.setenv("PATH", str(tmp_path / "programs"))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    spec = importlib.util.spec_from_file_location("workspace_create_env", setup / "create_env.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    monkeypatch.syspath_prepend(setup)
    for script in scripts:
        monkeypatch.delitem(sys.modules, Path(script).stem, raising=False)
    spec.loader.exec_module(module)
    return module


def program(file: Path, text: str = "#!/bin/sh\n") -> Path:
    """Write an executable file."""
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)
    file.chmod(0o755)
    return file


def environments(module: ModuleType, *options: str, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run main() with a command line."""
    monkeypatch.setattr(sys, "argv", ["create_env.py", *options])
    return int(module.main())


# ------------------------------------------------------------------------------------------------------- dry runs


@pytest.mark.parametrize(
    ("platform", "device", "index", "activate"),
    [
        ("linux", "cpu", "whl/cpu", "source .venv/bin/activate"),
        ("linux", "gpu", "whl/cu130", "source .venv/bin/activate"),
        ("win32", "cpu", "whl/cpu", ".venv\\Scripts\\Activate.ps1"),
        ("win32", "gpu", "whl/cu130", ".venv\\Scripts\\Activate.ps1"),
        ("darwin", "cpu", None, "source .venv/bin/activate"),
        ("darwin", "gpu", None, "source .venv/bin/activate"),
    ],
)
def test_a_dry_run_shows_torch_before_the_lock_and_touches_nothing(
    create_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    platform: str,
    device: str,
    index: str | None,
    activate: str,
) -> None:
    settings = create_env.SETUP / "environment.toml"
    settings.write_text(settings.read_text().replace("cpu", device))
    monkeypatch.setattr(sys, "platform", platform)
    before = sorted(create_env.ROOT.rglob("*"))
    assert environments(create_env, "--dry-run", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    mark = '"' if platform == "win32" else "'"  # what a shell of that system takes; the folder has a space in its name
    python = create_env.ROOT / ".venv" / ("Scripts/python.exe" if platform == "win32" else "bin/python")
    pip = f"{mark}{python}{mark} -m pip install --no-compile"
    compiler = f"  {mark}{python}{mark} -m compileall -q -j 0 -x "
    torch = f"  PIP_INDEX_URL=https://download.pytorch.org/{index} {pip} --no-deps --force-reinstall torch==2.13.0"
    assert [line for line in lines if not line.startswith(compiler)] == [
        "Commands for the environment .venv with venv (no conda was found):",
        f"  {sys.executable} -m venv {mark}{create_env.ROOT / '.venv'}{mark}",
        *([torch] if index else []),  # macOS has one build, and the lock takes it from the usual index
        f"  {pip} -r {mark}{create_env.SETUP / f'requirements-{device}.txt'}{mark}",
        f"Next, in {create_env.ROOT}:",
        f"  {activate}",
        "  python finetuning/invoke_olive.py --check",
    ]
    assert lines[-4].startswith(compiler)
    assert sorted(create_env.ROOT.rglob("*")) == before


@pytest.mark.parametrize("platform", ["linux", "darwin", "win32"])
def test_a_dry_run_with_conda_asks_it_for_the_place_and_runs_nothing_else(
    create_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    platform: str,
) -> None:
    facts = json.dumps({"envs": [], "envs_dirs": [str(tmp_path / "mine")]})
    conda = program(tmp_path / "programs" / "conda", f"#!/bin/sh\necho \"$@\" >>ran\necho '{facts}'\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(create_env.shutil, "which", lambda name: str(conda) if name == "conda" else None)
    assert environments(create_env, "--dry-run", monkeypatch=monkeypatch) == 0
    lines = capsys.readouterr().out.splitlines()
    prefix = tmp_path / "mine" / "small"
    python = prefix / ("python.exe" if platform == "win32" else "bin/python")
    only = "--override-channels --channel conda-forge"
    assert lines[1:3] == [
        f"  {conda} create --prefix {prefix} {only} --no-default-packages",
        f"  {conda} install --prefix {prefix} {only} python=3.11 pip",
    ]
    assert lines[-5] == f"  {python} -m pip install --no-compile -r {prefix / 'requirements-cpu.txt'}"
    assert lines[-2] == "  conda activate small"
    assert (tmp_path / "ran").read_text() == "env list --json\ninfo --json\n" and not prefix.exists()


@pytest.mark.parametrize(
    ("platform", "said"),
    [("linux", "python3 setup/create_env.py"), ("darwin", "python3 setup/"), ("win32", "python setup/create_env.py")],
)
def test_the_command_that_tries_again_is_the_systems_own(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, platform: str, said: str
) -> None:
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(sys, "argv", ["create_env.py", "--manager", "conda"])
    assert f"Try again, in {create_env.ROOT}: {said}" in create_env.again()
    assert create_env.again().endswith("--manager conda")


def test_the_lock_of_windows_waits_in_rounds_of_ten_seconds(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked: list[str] = []

    def locking(_file: int, mode: str, _bytes: int) -> None:
        asked.append(mode)
        if len(asked) < 4:
            raise PermissionError(13, "Permission denied")

    monkeypatch.setitem(sys.modules, "msvcrt", SimpleNamespace(locking=locking, LK_LOCK="wait", LK_NBLCK="try"))
    monkeypatch.setattr(sys, "platform", "win32")
    with create_env.alone("this"):
        assert asked == ["try", "wait", "wait", "wait"]
    assert capsys.readouterr().out.count("waiting for it") == 1


# ------------------------------------------------------------------------------------------- which manager, and why


def test_conda_is_looked_for_in_variables_then_on_path_then_at_home(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert create_env.find_conda("auto") == ("", "venv (no conda was found)")
    places = [
        (program(tmp_path / "home/miniconda3/bin/conda"), "conda"),
        (program(tmp_path / "home/miniforge3/bin/conda"), "conda"),
        (program(tmp_path / "programs/micromamba"), "micromamba"),
        (program(tmp_path / "programs/mamba"), "mamba"),
        (program(tmp_path / "programs/conda"), "conda"),
        (program(tmp_path / "b/micromamba"), "micromamba"),
        (program(tmp_path / "a/conda"), "conda"),
    ]
    for place, _ in places:
        place.chmod(0o644)
    for place, name in places:  # each is preferred to all before it
        place.chmod(0o755)
        if place.parent.name in "ab":
            monkeypatch.setenv("CONDA_EXE" if place.parent.name == "a" else "MAMBA_EXE", str(place))
        if "home" in place.parts and place.parts[-3] == "miniconda3":
            continue  # both folders at home are files from the start; Miniforge comes first
        found, why = create_env.find_conda("auto")
        assert (found, why.split()[0]) == (str(place), name)


def test_a_conda_that_is_gone_is_not_chosen(create_env: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CONDA_EXE", "/nowhere/bin/conda")
    assert create_env.find_conda("auto")[0] == ""


@pytest.mark.parametrize("manager", ["conda", "mamba", "micromamba"])
def test_a_manager_that_was_asked_for_is_never_replaced_by_another(
    create_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    manager: str,
) -> None:
    for other in {"conda", "mamba", "micromamba"} - {manager}:
        program(tmp_path / "programs" / other)
    assert environments(create_env, "--manager", manager, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert f"{manager} was not found" in error and "--manager venv" in error


def test_the_manager_none_creates_nothing_and_says_so(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = create_env.SETUP / "environment.toml"
    settings.write_text(settings.read_text().replace("auto", "none"))
    assert environments(create_env, monkeypatch=monkeypatch) == 0
    assert "No environment" in capsys.readouterr().out
    assert not (create_env.ROOT / ".venv").exists()


@pytest.mark.parametrize("manager", ["auto", "conda", "none"])
def test_prompt_flow_has_a_venv_of_its_own_whatever_manager_the_other_environment_has(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], manager: str
) -> None:
    settings = create_env.SETUP / "environment.toml"
    settings.write_text(settings.read_text().replace("auto", manager))
    options = "--for", "promptflow", "--dry-run"
    assert environments(create_env, *options, monkeypatch=monkeypatch) == 1
    assert capsys.readouterr().err == "create_env: inference/flow/requirements.txt is not there: restore it with git.\n"
    create_env.FLOW.mkdir(parents=True)
    (create_env.FLOW / "requirements.txt").write_text("promptflow==1.0\n")
    assert environments(create_env, *options, monkeypatch=monkeypatch) == 0
    prefix = create_env.ROOT / ".venv-promptflow"
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if " -m compileall " not in line] == [
        "Commands for the environment .venv-promptflow with venv:",
        f"  {sys.executable} -m venv '{prefix}'",
        f"  '{prefix}/bin/python' -m pip install --no-compile -r '{create_env.FLOW / 'requirements.txt'}'",
        f"Next, in {create_env.ROOT}:",
        "  source .venv-promptflow/bin/activate",
        "  pf flow test --flow inference/flow --interactive",
    ]
    assert not prefix.exists()


@pytest.mark.parametrize(
    "options",
    [["--for", "promptflow", "--manager", "conda"], ["--for", "chat"], ["--manager", "poetry"], ["--unknown"]],
)
def test_an_unknown_option_is_a_usage_error(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, options: list[str]
) -> None:
    with pytest.raises(SystemExit) as end:
        environments(create_env, *options, monkeypatch=monkeypatch)
    assert end.value.code == 2


# ------------------------------------------------------------------------------ what is checked before anything runs


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ("auto", "poetry", 'manager = "poetry" is not one of auto|'),
        ("cpu", "tpu", 'device = "tpu" is not one of cpu|gpu'),
        ("3.11", "3", 'python = "3" is not one of 3.11|'),
        ("manager", "menager", 'manager = "" is not one of auto|'),
    ],
)
def test_an_unknown_setting_is_one_sentence(
    create_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    old: str,
    new: str,
    said: str,
) -> None:
    settings = create_env.SETUP / "environment.toml"
    settings.write_text(settings.read_text().replace(old, new, 1))
    assert environments(create_env, monkeypatch=monkeypatch) == 1
    error = capsys.readouterr().err
    assert said in error and "setup/environment.toml" in error and error.count("\n") == 1


def test_the_lock_of_another_device_comes_from_copier(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (create_env.SETUP / "requirements-cpu.txt").unlink()
    assert environments(create_env, monkeypatch=monkeypatch) == 1
    assert "copier update --trust --data device=cpu" in capsys.readouterr().err


@pytest.mark.parametrize(("device", "free", "fits"), [("cpu", 2.9, False), ("cpu", 3.1, True), ("gpu", 8, False)])
def test_too_little_disk_is_said_before_anything_is_written(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, device: str, free: float, fits: bool
) -> None:
    usage = SimpleNamespace(free=int(free * 2**30))
    monkeypatch.setattr(create_env.shutil, "disk_usage", lambda _folder: usage)
    if fits:
        create_env.check_place(create_env.ROOT / ".venv", device, False)
    else:
        with pytest.raises(create_env.SetupError, match=r"GiB free, the environment needs \d"):
            create_env.check_place(create_env.ROOT / ".venv", device, False)


def test_a_colon_in_the_path_of_a_venv_is_refused(make_workspace: Make) -> None:
    workspace = make_workspace("a:b")
    done = workspace.run()
    assert done.returncode == 1
    assert "`:` in its path" in done.stderr and done.stderr.count("\n") == 1
    assert not (workspace.root / ".venv").exists()


def test_a_folder_named_venv_that_is_no_environment_is_left_alone(make_workspace: Make) -> None:
    workspace = make_workspace()
    notes = workspace.root / ".venv" / "notes.txt"
    notes.parent.mkdir()
    notes.write_text("mine")
    done = workspace.run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "is not an environment, and is left alone: rename it" in done.stderr
    assert notes.read_text() == "mine" and len(list(notes.parent.iterdir())) == 1


def test_a_python_that_is_too_old_for_a_venv_is_named(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "version_info", (3, 10, 13))
    assert environments(create_env, monkeypatch=monkeypatch) == 1
    assert "the venv needs 3.11 or newer" in capsys.readouterr().err


def old_python() -> str:
    """Return a Python of this machine that is too old for a workspace, "" when there is none."""
    beside = sorted(str(file) for file in Path(sys.base_prefix).parent.glob("3.*/bin/python"))
    on_path = [shutil.which(f"python3.{minor}") or "" for minor in range(8, 11)]
    for python in filter(None, [*beside, *on_path]):
        code = "import sys; sys.exit(not (3, 8) <= sys.version_info < (3, 11))"
        if subprocess.run([python, "-c", code], capture_output=True, check=False).returncode == 0:
            return python
    return ""


def test_an_old_python_reads_the_file_and_says_one_sentence(make_workspace: Make) -> None:
    python = old_python()
    if not python:
        pytest.skip("no Python from 3.8 to 3.10 on this machine")
    done = make_workspace().run(python=python)
    assert done.returncode == 1
    assert "the venv needs 3.11 or newer" in done.stderr and done.stderr.count("\n") == 1


# ----------------------------------------------------------------------------------- what the caller's variables do


def test_what_is_set_for_pip_holds_for_uv_and_what_is_set_for_uv_wins(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    program(tmp_path / "programs" / "uv")
    monkeypatch.setenv("PIP_INDEX_URL", "https://pip.example/simple")
    monkeypatch.setenv("PIP_EXTRA_INDEX_URL", "https://extra.example/simple")
    monkeypatch.setenv("PIP_FIND_LINKS", "/one /two")
    command, env = sys.modules["install"].installer(Path("/python"))
    assert command[:3] == ["uv", "pip", "install"]
    assert env["UV_INDEX_URL"] == "https://pip.example/simple"
    assert env["UV_EXTRA_INDEX_URL"] == "https://extra.example/simple"
    assert env["UV_FIND_LINKS"] == "/one,/two"
    monkeypatch.setenv("UV_INDEX_URL", "https://uv.example/simple")
    assert sys.modules["install"].installer(Path("/python"))[1]["UV_INDEX_URL"] == "https://uv.example/simple"


def test_torch_is_asked_of_its_own_index_alone(create_env: ModuleType) -> None:
    env = {"PIP_EXTRA_INDEX_URL": "x", "UV_DEFAULT_INDEX": "x", "UV_INDEX": "x", "PIP_PROXY": "p", "PIP_RETRIES": "7"}
    [(place, options, seen)] = sys.modules["install"].torch_sources(env, "cpu")
    assert (place, options) == (CPU, [])
    assert seen["PIP_INDEX_URL"] == CPU
    assert not {"PIP_EXTRA_INDEX_URL", "UV_DEFAULT_INDEX", "UV_INDEX"} & set(seen)
    assert (seen["PIP_PROXY"], seen["PIP_RETRIES"], seen["UV_HTTP_RETRIES"]) == ("p", "7", "1")


# ------------------------------------------------------------------------------------------------ real environments


@pytest.fixture
def index(tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Serve a folder as package indexes; yield its address and the folder."""
    folder = tmp_path / "served"
    folder.mkdir()
    handler = functools.partial(Quiet, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield f"127.0.0.1:{server.server_port}", folder
    server.shutdown()
    server.server_close()


class Quiet(http.server.SimpleHTTPRequestHandler):
    """Serves files without a word."""

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def test_an_environment_is_made_of_the_folder_of_wheels_and_then_left_alone(make_workspace: Make) -> None:
    workspace = make_workspace()
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0 from your find-links" in done.stdout
    assert (workspace.version("torch"), workspace.version("small")) == ("2.13.0+cpu", "1.0")
    assert workspace.log.count("$ ") == 4  # the venv, torch, the lock, bytecode
    site = next((workspace.root / ".venv").glob("lib/*/site-packages"))
    assert list(site.glob("torch/__pycache__/*.pyc")) and not list(site.glob("pip/__pycache__/*.pyc"))
    assert done.stdout.splitlines()[-2:] == [
        "  source .venv/bin/activate",
        "  python finetuning/invoke_olive.py --check",
    ]

    log, started = workspace.log, time.monotonic()
    done = workspace.run()
    assert "is up to date" in done.stdout and done.returncode == 0
    assert time.monotonic() - started < 1
    assert workspace.log == log


@pytest.mark.skipif(NO_UV, reason="without uv, the test before this one has run pip")
def test_pip_does_the_same_where_there_is_no_uv(make_workspace: Make) -> None:
    workspace = make_workspace(with_uv=False)
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert (workspace.version("torch"), workspace.version("small")) == ("2.13.0+cpu", "1.0")
    assert "-m pip install" in workspace.log and "uv pip" not in workspace.log


def test_torch_comes_from_the_index_that_a_variable_names_and_its_password_is_shown_nowhere(
    make_workspace: Make, index: tuple[str, Path]
) -> None:
    workspace = make_workspace()
    address, folder = index
    (folder / "torch").mkdir()
    wheel = next(workspace.wheels.glob("torch-*"))
    wheel.rename(folder / "torch" / wheel.name)
    workspace.env["TORCH_INDEX_URL"] = f"http://me:secret@{address}"
    workspace.env["PIP_INDEX_URL"] = f"http://{address}"
    del workspace.env["PIP_NO_INDEX"]
    (folder / "small").mkdir()
    shutil.copy(workspace.wheels / "small-1.0-py3-none-any.whl", folder / "small")
    done = workspace.run()
    assert done.returncode == 0, done.stderr + workspace.log
    assert f"torch 2.13.0 from http://***@{address} ..." in done.stdout
    assert workspace.version("torch") == "2.13.0+cpu"
    assert "secret" not in done.stdout + done.stderr + workspace.log


def test_an_index_that_does_not_answer_is_replaced_by_the_callers_own_with_a_word(
    make_workspace: Make, index: tuple[str, Path]
) -> None:
    workspace = make_workspace()
    address, folder = index
    next(workspace.wheels.glob("torch-*")).unlink()
    usual = workspace.with_hash(workspace.make_wheel(workspace.wheels, "torch", "2.13.0"), "torch==2.13.0")
    lock = workspace.root / "setup" / "requirements-cpu.txt"
    lock.write_text(re.sub("torch==.*\n", usual, lock.read_text()))
    for wheel in workspace.wheels.iterdir():
        (folder / wheel.name.split("-")[0]).mkdir()
        wheel.rename(folder / wheel.name.split("-")[0] / wheel.name)
    workspace.env["PIP_INDEX_URL"] = f"http://{address}"
    del workspace.env["PIP_NO_INDEX"]
    done = workspace.run()
    assert done.returncode == 0, done.stderr + workspace.log
    assert "torch's own index cannot be used" in done.stdout
    assert workspace.version("torch") == "2.13.0"


@pytest.mark.parametrize("uv", [pytest.param(True, marks=pytest.mark.skipif(NO_UV, reason="uv is not here")), False])
def test_a_wheel_that_was_changed_since_it_was_locked_is_refused(make_workspace: Make, uv: bool) -> None:
    workspace = make_workspace(with_uv=uv)
    with zipfile.ZipFile(workspace.wheels / "small-1.0-py3-none-any.whl", "a") as wheel:
        wheel.writestr("small/stolen.py", "")
    done = workspace.run()
    assert done.returncode == 1
    [said] = [line for line in done.stderr.splitlines() if "small" in line]
    assert said.startswith("create_env: small==1.0 is not the file whose hash is in the lock, and was not installed: ")
    assert "PIP_INDEX_URL" in said and "Traceback" not in done.stderr
    assert not list((workspace.root / ".venv").rglob("small"))
    assert workspace.run().returncode == 1  # nor is it taken for complete


def test_a_line_of_the_users_own_needs_no_hash(make_workspace: Make) -> None:
    for with_uv in {False, not NO_UV}:
        workspace = make_workspace(f"workspace-{with_uv}", with_uv)
        workspace.make_wheel(workspace.wheels, "mine", "1.0")
        with (workspace.root / "setup" / "requirements-cpu.txt").open("a") as lock:
            lock.write("mine==1.0\n")
        done = workspace.run()
        assert done.returncode == 0, done.stderr + workspace.log
        assert "1 packages without a hash ... " in done.stdout
        assert (workspace.version("small"), workspace.version("mine")) == ("1.0", "1.0")


def test_a_failure_shows_its_reason_and_the_next_run_finishes(make_workspace: Make) -> None:
    workspace = make_workspace()
    wheel = workspace.wheels / "small-1.0-py3-none-any.whl"
    wheel.rename(workspace.wheels / "away")
    done = workspace.run("--manager", "venv")
    assert done.returncode == 1
    assert "2 locked packages: it failed with" in done.stderr and "small" in done.stderr
    assert str(workspace.root / "setup" / "create_env.log") in done.stderr
    assert f"Try again, in {workspace.root}: python3 setup/create_env.py --manager venv" in done.stderr
    assert "Traceback" not in done.stderr and len(done.stderr.splitlines()) < 15

    (workspace.wheels / "away").rename(wheel)
    assert workspace.run("--manager", "venv").returncode == 0
    assert workspace.version("small") == "1.0"
    assert workspace.log.count("-m venv") == 1  # what was there was kept


@pytest.fixture
def gate() -> Iterator[Any]:
    """Serve an index that has nothing, and says so late: `reached` tells when it is asked, `open` lets it answer."""

    class Late(Quiet):
        def do_GET(self) -> None:
            self.server.reached.set()  # type: ignore[attr-defined]
            self.server.open.wait(60)  # type: ignore[attr-defined]
            self.send_error(404)

    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Late)
    server.reached, server.open, server.daemon_threads = threading.Event(), threading.Event(), True
    server.handle_error = lambda *_: None  # a client that was killed
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.open.set()
    server.shutdown()
    server.server_close()


def start(workspace: Any, gate: Any) -> subprocess.Popen[str]:
    """Start setup/create_env.py, in a process group of its own, with the index that answers late."""
    env = {**workspace.env, "PIP_INDEX_URL": f"http://127.0.0.1:{gate.server_port}"}
    del env["PIP_NO_INDEX"]
    command = [sys.executable, str(workspace.root / "setup" / "create_env.py")]
    out = subprocess.PIPE
    return subprocess.Popen(command, env=env, stdout=out, stderr=out, text=True, start_new_session=True)


@pytest.mark.parametrize(
    ("how", "with_uv"), [(signal.SIGINT, not NO_UV), (signal.SIGKILL, not NO_UV), (signal.SIGKILL, False)]
)
def test_an_interrupted_run_never_passes_for_a_complete_one(
    make_workspace: Make, gate: Any, how: signal.Signals, with_uv: bool
) -> None:
    workspace = make_workspace(with_uv=with_uv)
    process = start(workspace, gate)
    assert gate.reached.wait(60)
    os.killpg(process.pid, how)  # SIGINT: what Ctrl-C does in a terminal
    _, error = process.communicate(timeout=60)
    if how == signal.SIGINT:
        assert process.returncode == 130
        assert "Interrupted: run the same command again" in error and "Traceback" not in error

    done = workspace.run()
    assert "is up to date" not in done.stdout and done.returncode == 0, done.stderr
    assert workspace.version("small") == "1.0"
    assert "is up to date" in workspace.run().stdout


def test_two_at_once_make_one_venv_one_after_the_other(make_workspace: Make, gate: Any) -> None:
    workspace = make_workspace()
    first = start(workspace, gate)
    assert gate.reached.wait(60)
    second = start(workspace, gate)
    assert second.stdout and "Another run is creating this environment" in second.stdout.readline()
    gate.open.set()
    _, error = first.communicate(timeout=60)
    assert first.returncode == 0, error
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "is up to date" in out
    assert workspace.log.count("-m venv") == 1


def test_a_lock_that_was_changed_and_changed_back_is_not_taken_for_installed(make_workspace: Make) -> None:
    workspace = make_workspace()
    assert workspace.run().returncode == 0
    lock = workspace.root / "setup" / "requirements-cpu.txt"
    text = lock.read_text()
    lock.write_text(text + "missing==1.0\n")
    assert workspace.run().returncode == 1
    lock.write_text(text)
    assert "locked packages" in workspace.run().stdout
    assert "is up to date" in workspace.run().stdout


def test_a_venv_whose_python_is_gone_is_made_anew(make_workspace: Make) -> None:
    workspace = make_workspace("my workspace")
    assert workspace.run().returncode == 0
    python = workspace.root / ".venv" / "bin" / "python"
    python.unlink()
    python.symlink_to("/nowhere/bin/python3.11")
    (workspace.root / ".venv" / "lib" / "old").touch()
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert "the one in .venv does not run: recreated" in done.stdout
    assert workspace.version("small") == "1.0" and not (workspace.root / ".venv" / "lib" / "old").exists()


@pytest.mark.parametrize("left", ["pyvenv.cfg", "create_env.stamp"])
def test_half_an_environment_is_repaired(make_workspace: Make, left: str) -> None:
    workspace = make_workspace()
    venv = workspace.root / ".venv"
    (venv / "bin").mkdir(parents=True)
    (venv / "bin" / "python").symlink_to("/nowhere/python3.11")
    (venv / left).write_text({"pyvenv.cfg": "home = /nowhere\n", "create_env.stamp": f"begun\n{venv}\n"}[left])
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert workspace.version("torch") == "2.13.0+cpu"


def test_a_changed_lock_updates_what_is_there_without_asking_for_torch_again(make_workspace: Make) -> None:
    workspace = make_workspace()
    assert workspace.run().returncode == 0
    (workspace.root / "setup" / "requirements-cpu.txt").write_text("torch==2.13.0\n")
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0 from" not in done.stdout and "-m venv" not in workspace.log.rpartition("=====")[2]
    assert "is up to date" in workspace.run().stdout


def test_the_torch_of_another_python_is_not_taken_for_installed(make_workspace: Make) -> None:
    workspace = make_workspace()
    assert workspace.run().returncode == 0
    site = next((workspace.root / ".venv").glob("lib/python3.*/site-packages"))
    older = site.parents[1] / "python3.8" / "site-packages"
    older.mkdir(parents=True)
    for path in site.glob("torch*"):  # as it is left where the system's Python was replaced by a newer one
        path.rename(older / path.name)
    (workspace.root / "setup" / "requirements-cpu.txt").write_text("torch==2.13.0\n")
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0 from your find-links" in done.stdout
    assert workspace.version("torch") == "2.13.0+cpu"


def test_another_device_gets_another_build_of_the_same_torch(make_workspace: Make, index: tuple[str, Path]) -> None:
    workspace = make_workspace()
    address, folder = index
    assert workspace.run().returncode == 0
    workspace.env["TORCH_INDEX_URL"] = f"http://{address}"
    (folder / "torch").mkdir()
    workspace.make_wheel(folder / "torch", "torch", "2.13.0+cu130")
    del workspace.env["PIP_NO_INDEX"]
    small = folder / "small"
    small.mkdir()
    shutil.copy(workspace.wheels / "small-1.0-py3-none-any.whl", small)
    workspace.env["PIP_INDEX_URL"] = f"http://{address}"
    workspace.configure("venv", "gpu")
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert workspace.version("torch") == "2.13.0+cu130"


def test_a_workspace_that_was_moved_gets_its_environment_anew(make_workspace: Make) -> None:
    workspace = make_workspace()
    assert workspace.run().returncode == 0
    workspace.root = workspace.root.rename(workspace.root.with_name("moved"))
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert "the folder was moved" in done.stdout
    assert str(workspace.root / ".venv") in (workspace.root / ".venv" / "bin" / "activate").read_text()


# ------------------------------------------------------------------------------------------ names that do other things


@pytest.mark.parametrize(
    "line",
    ["name: ..", 'name: ".."', "name: -n", "name: --prefix", "name: base", 'name: "root"', "name: ../a", "name: a/b"],
)
def test_a_name_that_is_no_environment_s_own_is_refused(
    create_env: ModuleType,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    line: str,
) -> None:
    program(tmp_path / "programs" / "conda", "#!/bin/sh\ntouch ran\n")
    (create_env.SETUP / "conda-environment.yml").write_text(f"{line}\n")
    monkeypatch.chdir(tmp_path)
    assert environments(create_env, monkeypatch=monkeypatch) == 1
    assert "has no name of its own: write a line `name: my-environment`." in capsys.readouterr().err
    assert not (tmp_path / "ran").exists()


def test_the_base_environment_is_never_taken_for_the_workspace_s(
    create_env: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = tmp_path / "small"  # where conda lies, and the environment's name
    (base / "condabin").mkdir(parents=True)
    (base / "conda-meta").mkdir()
    conda = program(base / "bin" / "conda", f"#!/bin/sh\necho '{json.dumps({'envs': [str(base)]})}'\n")
    monkeypatch.setenv("PATH", f"{tmp_path / 'programs'}{os.pathsep}/bin")
    assert create_env.find_prefix(str(conda), "small") == (base / "envs" / "small", False)


# ------------------------------------------------------------------------------------- what conda-environment.yml lists


@pytest.mark.parametrize(
    ("text", "channels", "dependencies"),
    [
        ("dependencies: [python=3.11, pip]", ["conda-forge"], ["python=3.11", "pip"]),
        (
            "channels:\n- https://mirror.example/forge  # ours\n- nodefaults\ndependencies:\n- 'python >=3.11,<3.13'\n",
            ["https://mirror.example/forge"],
            ["python >=3.11,<3.13"],
        ),
        (
            '---\nprefix: /opt/x\ndependencies:\n  # comment\n  - "conda-forge::python=3.12"\n\n  - numpy\n',
            ["conda-forge"],
            ["conda-forge::python=3.12", "numpy"],
        ),
    ],
)
def test_channels_and_dependencies_are_read_as_conda_reads_them(
    create_env: ModuleType, text: str, channels: list[str], dependencies: list[str]
) -> None:
    (create_env.SETUP / "conda-environment.yml").write_text(f"name: small\n{text}")
    assert create_env.conda_lists() == (channels, dependencies, [])


def test_packages_below_pip_are_read_apart(create_env: ModuleType) -> None:
    (create_env.SETUP / "conda-environment.yml").write_text(
        "name: small\ndependencies:\n  - python\n  - pip:\n    - small==1.0\n    # why\n    - 'other[x]>=2'\n  - git\n"
    )
    assert create_env.conda_lists()[1:] == (["python", "git"], ["small==1.0", "other[x]>=2"])


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("dependencies:\n  - python\n  - pip:\n    - --force\n", "line 5: `- --force` is neither"),
        ("dependencies:\n  - python\nvariables:\n  A: b\n", "line 4: `variables:` is neither"),
        ("dependencies:\n  - --force\n  - python\n", "line 3: `- --force` is neither"),
        ("dependencies:\n  - pip\n", "lists no Python: write `- python=3.11`"),
    ],
)
def test_what_cannot_be_read_in_the_conda_file_is_one_sentence(create_env: ModuleType, text: str, said: str) -> None:
    (create_env.SETUP / "conda-environment.yml").write_text(f"name: small\n{text}")
    with pytest.raises(create_env.SetupError, match=re.escape(said)):
        create_env.conda_lists()
