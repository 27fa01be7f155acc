"""Environments of the conda family: real solves and installations by rattler, from a channel in a folder.

conda, mamba and micromamba are stood in for by conda_stand_in.py, as no package index has them:
what they themselves print and ask is not tested here, what create_env.py asks of them is.
"""

from __future__ import annotations

import functools
import http.server
import importlib.util
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
RATTLER = REPOSITORY / ".cache" / "rattler"
HOOK = REPOSITORY / "hooks" / "create_env.py"
VERSION = f"{sys.version_info[0]}.{sys.version_info[1]}"
DEPENDENCIES = [f"python={VERSION}", "pip", "tool"]
START_UP = (".bashrc", ".bash_profile", ".profile", ".zshrc", ".config/fish/config.fish", ".condarc")

Make = Callable[..., Any]

if not (RATTLER / "rattler").is_dir():
    pytest.skip("py-rattler is not there: make .cache/rattler/ready", allow_module_level=True)


# ------------------------------------------------------------------------------------- a channel, and what serves it


def package(channel: Path, name: str, version: str, files: dict[str, bytes | Path], noarch: str = "generic") -> None:
    """Write a conda package; a file that is a Path is a link to it."""
    subdir = "noarch" if noarch else platform()
    index = {"name": name, "version": version, "build": "0", "build_number": 0, "subdir": subdir, "depends": []}
    if noarch:
        index["noarch"] = noarch
    kinds = {file: "softlink" if isinstance(content, Path) else "hardlink" for file, content in files.items()}
    paths = [{"_path": file, "path_type": kind} for file, kind in kinds.items()]
    info: dict[str, bytes | Path] = {
        "info/index.json": json.dumps(index).encode(),
        "info/paths.json": json.dumps({"paths": paths, "paths_version": 1}).encode(),
        "info/files": "\n".join(files).encode(),
    }
    if noarch == "python":
        info["info/link.json"] = b'{"noarch": {"type": "python"}, "package_metadata_version": 1}'
    (channel / subdir).mkdir(parents=True, exist_ok=True)
    with tarfile.open(channel / subdir / f"{name}-{version}-0.tar.bz2", "w:bz2", compresslevel=1) as archive:
        for file, content in {**info, **files}.items():
            member = tarfile.TarInfo(file)
            if isinstance(content, Path):
                member.type, member.linkname = tarfile.SYMTYPE, str(content)
                archive.addfile(member)
            else:
                member.size, member.mode = len(content), 0o644
                archive.addfile(member, io.BytesIO(content))


def platform() -> str:
    """Return conda's name of this machine."""
    with rattler_importable():
        from rattler import Subdir

        return str(Subdir.current())


@contextmanager
def rattler_importable() -> Iterator[None]:
    """Let rattler be imported from the folder of its own."""
    sys.path.append(str(RATTLER))
    yield
    sys.path.remove(str(RATTLER))


@pytest.fixture(scope="module")
def channels(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a channel conda-forge: this Python, its pip, and two versions of a tool."""
    folder = tmp_path_factory.mktemp("channels")
    channel = folder / "conda-forge"
    interpreter = Path(sys.base_prefix) / "bin" / f"python{VERSION}"
    site = f"lib/python{VERSION}/site-packages"
    config = f"home = {interpreter.parent}\ninclude-system-site-packages = false\n"
    full = ".".join(map(str, sys.version_info[:3]))
    python: dict[str, bytes | Path] = {
        "bin/python": interpreter,
        "pyvenv.cfg": config.encode(),
        f"{site}/README.txt": b"",
    }
    package(channel, "python", full, python, noarch="")
    spec = importlib.util.find_spec("pip")
    assert spec and spec.origin
    here = Path(spec.origin).parents[1]
    pip = [file for file in here.glob("pip*/**/*") if file.is_file() and "__pycache__" not in file.parts]
    files = {f"site-packages/{file.relative_to(here).as_posix()}": file.read_bytes() for file in pip}
    package(channel, "pip", next(here.glob("pip-*.dist-info")).stem[len("pip-") :], files, noarch="python")
    small = {
        "site-packages/small.py": b'__version__ = "1.0"\n',
        "site-packages/small-1.0.dist-info/METADATA": b"Metadata-Version: 2.1\nName: small\nVersion: 1.0\n",
    }
    package(channel, "small", "1.0", small, noarch="python")
    for version in ("1.0", "2.0"):
        package(channel, "tool", version, {"share/tool": version.encode()})
    with rattler_importable():
        import asyncio

        from rattler.index import index_fs

        asyncio.run(index_fs(channel, write_zst=False, write_shards=False))
    return folder


class Gate(http.server.SimpleHTTPRequestHandler):
    """Serves files; at the first package of the tool it says so, and waits until it may go on."""

    def do_GET(self) -> None:
        """Send a file, perhaps later."""
        if "/tool-" in self.path:
            self.server.reached.set()  # type: ignore[attr-defined]
            self.server.open.wait(60)  # type: ignore[attr-defined]
        super().do_GET()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def gate(channels: Path) -> Iterator[Any]:
    """Serve the channels so that an installation stops in the middle: `reached` tells when, `open` lets it go on."""
    server: Any = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Gate, directory=str(channels)))
    server.reached, server.open, server.daemon_threads = threading.Event(), threading.Event(), True
    server.handle_error = lambda *_: None  # a client that was killed
    server.address = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield server
    server.open.set()
    server.shutdown()
    server.server_close()


# ---------------------------------------------------------------------------------------------- a machine with conda


class CondaMachine:
    """A small workspace on a machine with one program of the conda family."""

    def __init__(self, workspace: Any, manager: str, channels: Path) -> None:
        self.workspace, self.root, self.manager = workspace, workspace.root, manager
        self.conda_root = workspace.programs.parent / manager
        self.prefix = self.conda_root / "envs" / "small"
        self.program = self.conda_root / "bin" / manager
        self.program.parent.mkdir(parents=True)
        self.program.write_text(
            f"#!{sys.executable}\nimport pathlib, sys\nsys.dont_write_bytecode = True\n"
            f"sys.path += [{str(RATTLER)!r}, {str(Path(__file__).parent)!r}]\n"
            "import conda_stand_in\nconda_stand_in.run(pathlib.Path(__file__).resolve().parents[1])\n"
        )
        self.program.chmod(0o755)
        self.env = workspace.env
        self.env["PATH"] += f"{os.pathsep}{self.program.parent}"
        self.channels(channels.as_uri())
        self.list(*DEPENDENCIES)
        workspace.configure("auto", "cpu")
        for name in START_UP:
            file = Path(self.env["HOME"]) / name
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text("# mine\n")
        self.home = self.files_at_home()

    def channels(self, address: str) -> None:
        """Say where conda-forge is."""
        self.env["CONDA_CHANNEL_ALIAS"] = address

    def list(self, *dependencies: str) -> None:
        """Write conda-environment.yml as it is rendered, with these dependencies."""
        template = (REPOSITORY / "template" / "setup" / "conda-environment.yml.jinja").read_text()
        lines = "".join(f"  - {dependency}\n" for dependency in dependencies)
        text = re.sub(r"\{\{.*\}\}", '"small"', template).replace("  - python=3.11\n  - pip\n", lines)
        (self.root / "setup" / "conda-environment.yml").write_text(text)

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run setup/create_env.py."""
        return self.workspace.run(*options)  # type: ignore[no-any-return]

    def start(self) -> subprocess.Popen[str]:
        """Start setup/create_env.py in a process group of its own."""
        command = [sys.executable, str(self.root / "setup" / "create_env.py")]
        return subprocess.Popen(
            command, env=self.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def hook(self) -> subprocess.CompletedProcess[str]:
        """Run the hook as Copier does."""
        command = [*self.workspace.as_anybody, sys.executable, "-I", str(HOOK)]
        return subprocess.run(command, env=self.env, cwd=self.root, capture_output=True, text=True, check=False)

    def calls(self) -> list[list[str]]:
        """Return the command lines that the program was given."""
        file = self.conda_root / "calls"
        return [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def tool(self) -> str:
        """Return the version of the conda package, "" when it is not there."""
        file = self.prefix / "share" / "tool"
        return file.read_text() if file.exists() else ""

    def complete(self) -> bool:
        """Tell whether conda's packages and the locked ones are there."""
        return bool(self.tool()) and self.workspace.version("torch", str(self.prefix)) == "2.13.0+cpu"

    def files_at_home(self) -> dict[str, str]:
        """Return all files of the home folder."""
        home = Path(self.env["HOME"])
        return {str(file.relative_to(home)): file.read_text() for file in home.rglob("*") if file.is_file()}

    def workspace_files(self) -> dict[str, bytes]:
        """Return the files of the workspace, but not the log."""
        files = [file for file in self.root.rglob("*") if file.is_file() and "__pycache__" not in file.parts]
        return {str(file): file.read_bytes() for file in files if file.suffix not in (".log", ".incomplete")}


@pytest.fixture
def conda(make_workspace: Make, channels: Path) -> CondaMachine:
    return CondaMachine(make_workspace(), "conda", channels)


def one_message(error: str) -> None:
    """Assert that the hook's message has a cause and a way to try again, each once, and no traceback."""
    assert error.count("create_env: ") == 1 and error.count("Try again") == 1
    assert error.endswith("  python3 setup/create_env.py\n")
    assert "Traceback" not in error and len(error.splitlines()) < 16, error


# ---------------------------------------------------------------------------------------------------- what goes well


@pytest.mark.parametrize("manager", ["conda", "mamba", "micromamba"])
def test_it_creates_then_leaves_alone_then_updates(make_workspace: Make, channels: Path, manager: str) -> None:
    machine = CondaMachine(make_workspace(), manager, channels)
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert f"with {manager} (on PATH)" in done.stdout and f"  {manager} activate small\n" in done.stdout
    assert machine.complete() and machine.tool() == "2.0"
    assert not (machine.root / ".venv").exists()

    calls = machine.calls()
    assert "is up to date" in machine.run().stdout
    assert machine.calls() == calls

    machine.list(f"python={VERSION}", "pip", "tool=1")
    assert machine.run().returncode == 0
    assert machine.tool() == "1.0"
    machine.list(f"python={VERSION}", "pip")
    assert machine.run().returncode == 0
    assert machine.tool() == "", "a package that is no longer listed goes"
    only = ["--override-channels", "--channel", "conda-forge"]
    place = ["--prefix", str(machine.prefix)]
    assert machine.calls()[-2:] == [
        ["remove", *place, *(only if manager == "conda" else []), "--force", "tool"],
        ["install", *place, *only, f"python={VERSION}", "pip"],
    ]
    assert machine.files_at_home() == machine.home


def test_a_conda_that_no_shell_knows_is_used_through_its_python(conda: CondaMachine) -> None:
    conda.env["CONDA_EXE"] = str(conda.program)
    conda.env["PATH"] = str(conda.workspace.programs)
    done = conda.run()
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith(f":\n  {conda.prefix}/bin/python finetuning/invoke_olive.py --check\n")


def test_pip_of_the_environment_installs_where_there_is_no_uv(make_workspace: Make, channels: Path) -> None:
    machine = CondaMachine(make_workspace(with_uv=False), "conda", channels)
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert f"{machine.prefix}/bin/python -m pip install" in machine.workspace.log
    assert machine.complete()


def test_what_was_installed_by_hand_is_removed_from_our_environment_only(conda: CondaMachine) -> None:
    assert conda.run().returncode == 0
    other = conda.prefix.with_name("other")
    shutil.copytree(conda.prefix, other, symlinks=True)
    conda.list(f"python={VERSION}", "pip")
    assert conda.run().returncode == 0
    assert (other / "share" / "tool").exists() and not (conda.prefix / "share" / "tool").exists()


# --------------------------------------------------------------------------------------- what real conda 26 showed


def newer_pip(wheels: Path) -> None:
    """Write a wheel of the pip that runs these tests, as version 99.0 and with one file more."""
    spec = importlib.util.find_spec("pip")
    assert spec and spec.origin
    here = Path(spec.origin).parents[1]
    with zipfile.ZipFile(wheels / "pip-99.0-py3-none-any.whl", "w") as archive:
        for file in [file for file in here.glob("pip*/**/*") if file.is_file() and "__pycache__" not in file.parts]:
            name = re.sub(r"^pip-[^/]*(?=\.dist-info)", "pip-99.0", file.relative_to(here).as_posix())
            text = file.read_bytes()
            if name.endswith(("dist-info/METADATA", "pip/__init__.py")):
                text = re.sub(rb'(?m)^(Version: |__version__ = ")[\w.]+', rb"\g<1>99.0", text)
            if not name.endswith("RECORD"):
                archive.writestr(name, text)
        archive.writestr("pip/newer.py", "")
        names = [*archive.namelist(), "pip-99.0.dist-info/RECORD"]
        archive.writestr("pip-99.0.dist-info/RECORD", "".join(f"{name},,\n" for name in names))


def pip_of(machine: CondaMachine) -> str:
    """Return what the environment's pip says about its version."""
    command = [str(machine.prefix / "bin" / "python"), "-m", "pip", "--version"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    return (done.stdout or done.stderr.splitlines()[-1]).split(" from")[0]


def conda_run(machine: CondaMachine, *options: str) -> None:
    """Run the program by hand."""
    env = {**machine.env, "CONDA_ALWAYS_YES": "true", "MAMBA_ALWAYS_YES": "true"}
    done = subprocess.run([str(machine.program), *options], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_packages_below_pip_in_the_file_are_installed_after_the_lock(conda: CondaMachine) -> None:
    conda.list(f"python={VERSION}", "pip", "pip:\n    - extra==1.0")
    lines = conda.run("--dry-run").stdout.splitlines()
    (lock,) = (i for i, line in enumerate(lines) if " -r " in line)
    assert lines[lock + 1].endswith(" extra==1.0")


@pytest.mark.parametrize("with_uv", [True, False])
def test_conda_keeps_its_pip_when_the_lock_has_another(make_workspace: Make, channels: Path, with_uv: bool) -> None:
    machine = CondaMachine(make_workspace(with_uv=with_uv and shutil.which("uv") is not None), "conda", channels)
    newer_pip(machine.workspace.wheels)
    lock = machine.root / "setup" / "requirements-cpu.txt"
    lock.write_text("pip==99.0\nsmall==1.0\ntorch==2.13.0\n")
    assert machine.run().returncode == 0
    version = pip_of(machine)
    assert version.startswith("pip ") and "99.0" not in version
    conda_run(machine, "list", "--prefix", str(machine.prefix))
    lock.write_text("pip==99.0\nsmall==1.0\n")
    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert "1 locked packages" in done.stdout and "repair" not in done.stdout
    assert pip_of(machine) == version
    assert len(list(machine.prefix.glob("lib/*/site-packages/pip-*.dist-info"))) == 1
    assert list(machine.prefix.glob("conda-meta/pip-*.json"))


@pytest.mark.parametrize("state", ["overwritten", "forgotten", "mixed", "broken"])
def test_a_pip_that_was_overwritten_by_an_earlier_release_is_mended(
    make_workspace: Make, channels: Path, state: str
) -> None:
    machine = CondaMachine(make_workspace(with_uv=False), "conda", channels)
    newer_pip(machine.workspace.wheels)
    assert machine.run().returncode == 0
    version = pip_of(machine)
    python = str(machine.prefix / "bin" / "python")
    subprocess.run([python, "-m", "pip", "install", "pip==99.0"], env=machine.env, check=True, capture_output=True)
    assert pip_of(machine) == "pip 99.0"
    if state != "overwritten":
        conda_run(machine, "list", "--prefix", str(machine.prefix))
        assert not list(machine.prefix.glob("conda-meta/pip-*.json"))
    if state in ("mixed", "broken"):
        conda_run(
            machine,
            "install",
            "--prefix",
            str(machine.prefix),
            "--override-channels",
            "--channel",
            "conda-forge",
            "pip",
        )
        assert len(list(machine.prefix.glob("lib/*/site-packages/pip-*.dist-info"))) == 2
    if state == "broken":
        next(machine.prefix.glob("lib/*/site-packages/pip/_internal/cli/main.py")).unlink()
        assert "No module named 'pip._internal.cli.main'" in pip_of(machine)
    (machine.root / "setup" / "requirements-cpu.txt").write_text("pip==99.0\ntorch==2.13.0\n")

    done = machine.run()
    assert done.returncode == 0, done.stderr
    assert "repair of pip, which pip had overwritten" in done.stdout
    assert pip_of(machine) == version
    assert len(list(machine.prefix.glob("lib/*/site-packages/pip-*.dist-info"))) == 1
    assert not list(machine.prefix.glob("lib/*/site-packages/pip/newer.py"))
    assert "is up to date" in machine.run().stdout


def test_a_package_that_conda_installed_stays_and_its_version_is_said(conda: CondaMachine, channels: Path) -> None:
    conda.list(*DEPENDENCIES, "small")
    (conda.root / "setup" / "requirements-cpu.txt").write_text("small==2.0\ntorch==2.13.0\n")
    conda.workspace.make_wheel(conda.workspace.wheels, "small", "2.0")
    done = conda.run()
    assert done.returncode == 0, done.stderr
    assert "  small 1.0 is conda's and stays; the lock has 2.0.\n" in done.stdout
    assert conda.workspace.version("small", str(conda.prefix)) == "1.0"


def test_after_a_change_of_python_torch_is_installed_anew_and_the_old_packages_go(conda: CondaMachine) -> None:
    assert conda.run().returncode == 0
    site = conda.prefix / "lib" / f"python{VERSION}" / "site-packages"
    older = conda.prefix / "lib" / "python3.8" / "site-packages"
    older.mkdir(parents=True)
    for path in site.glob("torch*"):  # as conda leaves what pip installed
        path.rename(older / path.name)
    conda.list(f"python={VERSION}", "pip")
    done = conda.run()
    assert done.returncode == 0, done.stderr
    assert "torch 2.13.0 from your find-links" in done.stdout
    assert conda.workspace.version("torch", str(conda.prefix)) == "2.13.0+cpu"
    assert not older.parent.exists() and site.is_dir()


@pytest.mark.parametrize("manager", ["conda", "mamba"])
def test_the_channels_of_the_user_are_never_asked(make_workspace: Make, channels: Path, manager: str) -> None:
    machine = CondaMachine(make_workspace(), manager, channels)
    machine.env["STAND_IN_TERMS"] = "not accepted"
    assert machine.run().returncode == 0
    machine.list(f"python={VERSION}", "pip")
    done = machine.run()
    assert done.returncode == 0 and "removal of tool" in done.stdout, done.stderr


@pytest.mark.parametrize(("manager", "key"), [("conda", "envs_dirs"), ("micromamba", "envs directories")])
def test_a_dry_run_names_the_folder_that_conda_then_uses(
    make_workspace: Make, channels: Path, tmp_path: Path, manager: str, key: str
) -> None:
    machine = CondaMachine(make_workspace(), manager, channels)
    system, mine = tmp_path / "system", tmp_path / "mine"
    system.touch()  # nothing can be created there
    machine.env |= {"CONDA_ENVS_DIRS": f"{system / 'envs'}{os.pathsep}{mine}", "STAND_IN_KEY": key}
    shown = machine.run("--dry-run").stdout
    assert f"create --prefix {mine / 'small'} " in shown and f"{mine / 'small'}/bin/python" in shown
    assert not mine.exists()
    assert machine.run().returncode == 0
    assert (mine / "small" / "share" / "tool").exists()
    assert "is up to date" in machine.run().stdout
    assert f"install --prefix {mine / 'small'} " in machine.run("--dry-run").stdout


def test_an_environment_that_conda_made_by_hand_from_the_file_is_completed(conda: CondaMachine) -> None:
    file = conda.root / "setup" / "conda-environment.yml"
    conda_run(conda, "env", "create", "-f", str(file))
    done = conda.run()
    assert done.returncode == 0, done.stderr
    assert conda.complete() and "is up to date" in conda.run().stdout


def test_an_environment_of_that_name_with_more_in_it_is_left_alone_with_the_command_that_deletes_it(
    conda: CondaMachine,
) -> None:
    conda_run(conda, "env", "create", "-f", str(conda.root / "setup" / "conda-environment.yml"))
    conda.list(f"python={VERSION}", "pip")  # so the tool is somebody's
    done = conda.run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "delete it with `conda env remove --name small`" in done.stderr
    assert conda.tool() == "2.0"


# -------------------------------------------------------------------------------------------------------- what fails


def unsatisfiable(machine: CondaMachine) -> Callable[[], None]:
    machine.list(f"python={VERSION}", "pip", "tool=9")
    return lambda: machine.list(*DEPENDENCIES)


def no_network(machine: CondaMachine) -> Callable[[], None]:
    address = machine.env["CONDA_CHANNEL_ALIAS"]
    machine.channels("http://127.0.0.1:1")
    return lambda: machine.channels(address)


def no_packages(machine: CondaMachine) -> Callable[[], None]:
    wheels = machine.workspace.wheels
    wheels.rename(wheels.with_name("away"))
    return lambda: wheels.with_name("away").rename(wheels) and None


def broken_conda(machine: CondaMachine) -> Callable[[], None]:
    text = machine.program.read_text()
    machine.program.write_text("#!/nowhere/python\n")
    return lambda: machine.program.write_text(text) and None


def read_only(machine: CondaMachine) -> Callable[[], None]:
    folder = machine.prefix if machine.prefix.exists() else machine.prefix.parent
    folder.mkdir(exist_ok=True)
    folder.chmod(0o555)
    return lambda: folder.chmod(0o755)


@pytest.mark.parametrize(
    ("there", "spoil", "cause"),
    [
        (False, unsatisfiable, "tool 9"),
        (False, no_network, "127.0.0.1:1"),
        (False, no_packages, "wheels"),
        (False, broken_conda, "does not work"),
        (False, read_only, "ermission denied"),
        (True, unsatisfiable, "tool 9"),
        (True, no_network, "127.0.0.1:1"),
        (True, broken_conda, "No such file or directory"),
        (True, read_only, "create_env.stamp.draft: Permission denied"),
    ],
)
def test_a_failure_leaves_the_workspace_whole_and_the_retry_succeeds(
    conda: CondaMachine, there: bool, spoil: Callable[[CondaMachine], Callable[[], None]], cause: str
) -> None:
    if there:
        assert conda.run().returncode == 0
        (conda.root / "setup" / "requirements-cpu.txt").write_text("torch==2.13.0\n")
        shutil.rmtree(next(conda.prefix.glob("lib/*/site-packages/torch-*")))
    mend = spoil(conda)
    before = conda.workspace_files()
    done = conda.hook()
    assert done.returncode == 0
    assert cause in done.stderr, done.stderr
    one_message(done.stderr)
    assert conda.workspace_files() == before

    mend()
    done = conda.run()
    assert done.returncode == 0, done.stderr + conda.workspace.log
    assert conda.complete() and "is up to date" in conda.run().stdout
    assert conda.files_at_home() == conda.home


def test_an_environment_of_the_same_name_that_is_not_ours_is_left_alone(conda: CondaMachine) -> None:
    assert conda.run().returncode == 0
    (conda.prefix / "create_env.stamp").unlink()  # now it is as any other
    before = {file: file.lstat().st_mtime_ns for file in conda.prefix.rglob("*")}
    conda.list(f"python={VERSION}", "pip")
    calls = conda.calls()
    done = conda.hook()
    assert done.returncode == 0 and f"{conda.prefix} was not made by this file, and is left alone" in done.stderr
    assert {file: file.lstat().st_mtime_ns for file in conda.prefix.rglob("*")} == before
    assert conda.calls()[len(calls) :] == [["env", "list", "--json"]]
    file = conda.root / "setup" / "conda-environment.yml"
    file.write_text(file.read_text().replace("small", "ours"))
    assert conda.run().returncode == 0
    assert conda.prefix.with_name("ours").is_dir() and conda.tool() == "2.0"


def test_a_space_in_the_prefix_is_one_sentence_before_anything_is_made(make_workspace: Make, channels: Path) -> None:
    machine = CondaMachine(make_workspace(), "micromamba", channels)
    machine.env["MAMBA_ROOT_PREFIX"] = str(machine.conda_root / "my mamba")
    done = machine.run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "has a space in its path" in done.stderr and "--manager venv" in done.stderr
    assert not any("create" in call for call in machine.calls())
    assert machine.run("--manager", "venv").returncode == 0


@pytest.mark.parametrize("whole_group", [True, False], ids=["all", "parent"])
def test_killed_in_the_middle_it_is_finished_by_the_next_run(conda: CondaMachine, gate: Any, whole_group: bool) -> None:
    conda.channels(gate.address)
    process = conda.start()
    assert gate.reached.wait(60)
    os.killpg(process.pid, signal.SIGKILL) if whole_group else process.kill()
    process.wait(60)
    assert conda.tool() == "" and "begun" in (conda.prefix / "create_env.stamp").read_text()
    if whole_group:
        gate.open.set()
    again = conda.start()
    if not whole_group:  # the conda that it started goes on, and is waited for
        assert again.stdout and "Another run is creating this environment" in again.stdout.readline()
        gate.open.set()
    _, error = again.communicate(timeout=60)
    assert again.returncode == 0, error
    assert conda.complete() and "is up to date" in conda.run().stdout


def test_two_at_once_make_one_environment_one_after_the_other(conda: CondaMachine, gate: Any) -> None:
    conda.channels(gate.address)
    first = conda.start()
    assert gate.reached.wait(60)
    second = conda.start()
    assert second.stdout and "Another run is creating this environment" in second.stdout.readline()
    gate.open.set()
    assert first.communicate(timeout=60) and first.returncode == 0
    out, _ = second.communicate(timeout=60)
    assert second.returncode == 0 and "is up to date" in out
    assert conda.complete()
    assert [call[0] for call in conda.calls()].count("install") == 1


def test_a_full_disk_is_said_and_the_retry_succeeds_once_there_is_room(conda: CondaMachine) -> None:
    (conda.conda_root / "envs").mkdir()
    first, second = conda.workspace.run_on_full_disk(conda.conda_root / "envs", conda.prefix, HOOK)
    assert "No space left on device" in first and "Traceback" not in first, first
    one_message(first[first.index("create_env: ") :])
    assert "Ready in" in second and second.endswith("2.13.0+cpu\n"), second


def test_copier_ends_well_and_keeps_the_workspace_whole(conda: CondaMachine, tmp_path: Path) -> None:
    address = conda.env["CONDA_CHANNEL_ALIAS"]
    conda.channels("http://127.0.0.1:1")
    answers = ["--vcs-ref", "HEAD", "-d", "environment=conda", "-d", "project_name=whole", "-d", "conda_env_name=small"]
    copier = [sys.executable, "-m", "copier", "copy", "--trust", "--defaults", *answers, str(REPOSITORY)]
    env = conda.env
    env["PATH"] += os.pathsep + str(Path(shutil.which("git") or "git").parent)

    def copy(target: Path, *options: str) -> subprocess.CompletedProcess[str]:
        command = [*copier, str(target), *options]
        return subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, check=False)

    assert copy(tmp_path / "bare", "--skip-tasks").returncode == 0
    done = copy(tmp_path / "whole")
    assert done.returncode == 0, done.stderr
    assert "127.0.0.1:1" in done.stderr and done.stderr.count("Try again") == 1 and "Traceback" not in done.stderr
    # Copier's last message follows what happened: no «is ready», no environment to activate.
    message = done.stderr.partition("Try again")[2]
    assert "The workspace whole is written, but not all is set up: see above. Next:" in message
    assert "python3 setup/create_env.py\n  # activate the environment, with the command" in message
    assert "is ready" not in message and "conda activate" not in message
    bare, whole = (
        {file.relative_to(tmp_path / name).as_posix() for file in (tmp_path / name).rglob("*") if file.is_file()}
        for name in ("bare", "whole")
    )
    assert whole == bare | {"setup/create_env.log", "setup/create_env.incomplete"}

    conda.channels(address)
    setup = tmp_path / "whole" / "setup"
    (setup / "requirements-cpu.txt").write_text("small==1.0\ntorch==2.13.0\n")  # the locked packages are not here
    file = setup / "conda-environment.yml"
    file.write_text(file.read_text().replace("python=3.11", f"python={VERSION}"))
    command = [sys.executable, "setup/create_env.py"]
    done = subprocess.run(command, env=env, cwd=setup.parent, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert conda.workspace.version("torch", str(conda.prefix)) == "2.13.0+cpu"
    assert not (setup / "create_env.incomplete").exists()
    assert conda.files_at_home() == conda.home
