"""What tests of the environment share: a workspace with a lock of two tiny packages, and a machine of its own."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPTS = ("create_env.py", "conda_environment.py", "gpu.py", "install.py", "installed.py", "visible.py")


def with_hash(wheel: Path, line: str) -> str:
    """Return the line of a lock with the hash of its wheel."""
    return f"{line} --hash=sha256:{hashlib.sha256(wheel.read_bytes()).hexdigest()}\n"


def make_wheel(folder: Path, name: str, version: str) -> Path:
    """Write an installable wheel of one package that knows its version."""
    folder.mkdir(parents=True, exist_ok=True)
    wheel = folder / f"{name}-{version}-py3-none-any.whl"
    info = f"{name}-{version}.dist-info"
    files = {
        f"{name}/__init__.py": f'__version__ = "{version}"\n',
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    rows = []
    with zipfile.ZipFile(wheel, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
            digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).rstrip(b"=").decode()
            rows.append(f"{path},sha256={digest},{len(text)}\n")
        archive.writestr(f"{info}/RECORD", "".join(rows) + f"{info}/RECORD,,\n")
    return wheel


class SmallWorkspace:
    """A workspace's setup/ with a lock of two tiny packages, and the variables of a machine that has only `wheels`."""

    make_wheel = staticmethod(make_wheel)
    with_hash = staticmethod(with_hash)

    def __init__(self, root: Path, machine: Path, with_uv: bool) -> None:
        self.root, self.wheels = root, machine / "wheels"
        self.programs = machine / "programs"
        (root / "setup").mkdir(parents=True)
        for folder in (machine / "home", self.programs, self.wheels):
            folder.mkdir(parents=True, exist_ok=True)
        for script in SCRIPTS:
            shutil.copy(REPOSITORY / "template" / "setup" / script, root / "setup")
        # torch's hash is that of the usual index; its own index has other builds, with other hashes.
        small = with_hash(make_wheel(self.wheels, "small", "1.0"), "small==1.0")
        self.lock = f"# made by make lock; do not edit\n{small}torch==2.13.0 --hash=sha256:{'0' * 64}\n"
        self.configure("venv", "cpu")
        (root / "setup" / "conda-environment.yml").write_text("name: small\ndependencies: [python=3.11, pip]\n")
        make_wheel(self.wheels, "torch", "2.13.0+cpu")
        if with_uv:
            (self.programs / "uv").symlink_to(str(shutil.which("uv")))
        self.env = {
            "PATH": str(self.programs),
            "HOME": str(machine / "home"),
            "TMPDIR": str(machine),
            "PIP_CONFIG_FILE": os.devnull,
            "PIP_FIND_LINKS": str(self.wheels),
            "PIP_NO_INDEX": "1",
            # Nobody listens on port 1: no test reaches a network.
            "TORCH_INDEX_URL": "http://127.0.0.1:1/torch",
            "PIP_RETRIES": "0",
            "UV_HTTP_RETRIES": "0",
            "UV_NO_CONFIG": "1",
            "UV_CACHE_DIR": str(machine / "cache"),
            "PIP_CACHE_DIR": str(machine / "cache"),
        }

    def configure(self, manager: str, device: str) -> None:
        """Write the answers that setup/create_env.py reads, and the lock of the device."""
        settings = f'manager = "{manager}"  # auto | venv\ndevice = "{device}"\npython = "3.11"\n'
        (self.root / "setup" / "environment.toml").write_text(settings)
        (self.root / "setup" / f"requirements-{device}.txt").write_text(self.lock)

    def run(self, *options: str, python: str = sys.executable) -> subprocess.CompletedProcess[str]:
        """Run setup/create_env.py from another folder, as a user may."""
        command = [python, str(self.root / "setup" / "create_env.py"), *options]
        return subprocess.run(command, env=self.env, cwd=self.programs, capture_output=True, text=True, check=False)

    @property
    def as_anybody(self) -> list[str]:
        """The prefix of a command that makes the mode bits count for root, too."""
        if os.geteuid() != 0:
            return []
        if not shutil.which("setpriv"):
            pytest.skip("root writes everywhere, and there is no setpriv (util-linux)")
        rights = "-dac_override,-dac_read_search"
        return [str(shutil.which("setpriv")), f"--bounding-set={rights}", f"--inh-caps={rights}"]

    def run_on_full_disk(self, folder: Path, prefix: Path, script: Path, files: int = 40) -> list[str]:
        """Run a script where `folder` has room for so many files, and again with more room.

        Return what each run said; after the second stands torch's version. The free bytes suffice both times.
        """
        own = [str(shutil.which("unshare")), "--map-root-user", "--mount"]
        if subprocess.run([*own, "true"], capture_output=True, check=False).returncode != 0:
            pytest.skip("no file system can be mounted here, so that no disk is full")
        steps = """
            mount -t tmpfs -o size=5g,nr_inodes=$3 none "$1" || exit 1
            "$4" "$5" >first 2>&1 || true
            mount -o remount,nr_inodes=100000 "$1" || exit 1
            { "$4" "$5" && "$2/bin/python" -c "import torch; print(torch.__version__)"; } >second 2>&1
        """
        values = [str(folder), str(prefix), str(files), sys.executable, str(script)]
        env = {**self.env, "PATH": f"{self.env['PATH']}{os.pathsep}/usr/bin{os.pathsep}/bin{os.pathsep}/sbin"}
        done = subprocess.run([*own, "sh", "-c", steps, "sh", *values], env=env, cwd=self.root, check=False)
        outputs = [self.root / "first", self.root / "second"]
        assert done.returncode == 0, [file.read_text() for file in outputs if file.exists()]
        return [file.read_text() for file in outputs]

    def version(self, name: str, prefix: str = ".venv") -> str:
        """Return what the environment's own Python imports."""
        command = [str(self.root / prefix / "bin" / "python"), "-c", f"import {name}; print({name}.__version__)"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    @property
    def log(self) -> str:
        """The text of setup/create_env.log, "" when there is none."""
        file = self.root / "setup" / "create_env.log"
        return file.read_text() if file.exists() else ""


@pytest.fixture
def small_workspace() -> type[SmallWorkspace]:
    """The class, for tests that choose the folders."""
    return SmallWorkspace


@pytest.fixture
def make_workspace(tmp_path: Path) -> Callable[..., SmallWorkspace]:
    """Return a function that makes a small workspace below the test's folder."""
    if sys.platform == "win32":
        pytest.skip("these tests put programs on PATH as POSIX systems have them")

    def make(name: str = "workspace", with_uv: bool = shutil.which("uv") is not None) -> SmallWorkspace:
        return SmallWorkspace(tmp_path / name, tmp_path / "machine", with_uv)

    return make
