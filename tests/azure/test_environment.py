"""infra/environment.sh, run as in the containers: by bash, with real uv, in a folder that stands in for the share.

The lock has one tiny wheel, which is in a local folder: nothing is downloaded.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SCRIPT = REPOSITORY / "template" / "infra" / "environment.sh"
BIN = Path(sys.executable).parent
TELL = "python -c 'import tiny; print(tiny.version, tiny.__file__)'"


@pytest.fixture
def share(tmp_path: Path) -> Path:
    """A share with as much of a workspace as the script reads, and wheels of two versions beside it."""
    share = tmp_path / "my share"
    (share / "setup").mkdir(parents=True)
    (share / "infra").mkdir()
    for script in (SCRIPT, SCRIPT.with_name("seal.py")):
        (share / "infra" / script.name).write_bytes(script.read_bytes())
    (share / "setup" / "environment.toml").write_text(
        'manager = "venv"\ndevice = "cpu"  # cpu | gpu\npython = "3.11"\n'
    )
    lock(share, "1.0")
    for version in ("1.0", "2.0"):
        with zipfile.ZipFile(tmp_path / f"tiny-{version}-py3-none-any.whl", "w") as wheel:
            about = f"tiny-{version}.dist-info"
            wheel.writestr("tiny.py", f"version = '{version}'\n")
            wheel.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: tiny\nVersion: {version}\n")
            wheel.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{about}/RECORD", f"tiny.py,,\n{about}/METADATA,,\n{about}/WHEEL,,\n{about}/RECORD,,\n")
    return share


def lock(share: Path, version: str) -> None:
    (share / "setup" / "requirements-cpu.txt").write_text(f"# made by make lock\ntiny=={version}\n")


def command(*commands: str) -> list[str]:
    """Return what a container runs; test_bicep.py shows that it is this."""
    joined = " && ".join(['cd "$WORKSPACE_MOUNT"', "source infra/environment.sh", *commands])
    return ["bash", "-euo", "pipefail", "-c", joined]


def variables(share: Path, tools: Path = BIN) -> dict[str, str]:
    """Return the variables of a container: nothing of this environment, and uv from `tools`."""
    own = {"WORKSPACE_MOUNT": str(share), "HOSTNAME": "replica", "HOME": str(share.parent / "home")}
    own["ENVIRONMENT_KEY"] = "the key of the job and the app's"
    offline = {"UV_OFFLINE": "1", "UV_FIND_LINKS": str(share.parent)}
    return {"PATH": f"{tools}{os.pathsep}{BIN}{os.pathsep}{os.environ['PATH']}", **own, **offline}


def start(share: Path, *commands: str, tools: Path = BIN) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command(*commands), env=variables(share, tools), capture_output=True, text=True, cwd="/")


def environments(share: Path) -> list[Path]:
    return sorted((share / ".cache" / "environments").iterdir())


def uv_that(tmp_path: Path, does: str) -> Path:
    """Return a folder with a `uv` that does something else; $REAL is uv itself."""
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "uv").write_text(f"#!/bin/sh\nREAL={BIN / 'uv'}\n{does}\n")
    (tools / "uv").chmod(0o755)
    return tools


def test_the_first_start_creates_the_environment_and_the_second_installs_nothing(share: Path, tmp_path: Path) -> None:
    first = start(share, TELL)
    (environment,) = environments(share)
    assert first.returncode == 0, first.stderr
    assert first.stdout.splitlines()[0] == "Installing 1 locked packages; the next start finds them …"
    assert first.stdout.splitlines()[-1].startswith(f"1.0 {environment}/lib/")
    assert list(environment.rglob("__pycache__/tiny.*.pyc"))  # compiled, so that later starts are quick
    written = {path: path.lstat().st_mtime_ns for path in environment.rglob("*")}
    second = start(share, TELL, tools=uv_that(tmp_path, "echo uv was called >&2; exit 1"))
    assert (second.returncode, second.stderr) == (0, "")
    assert second.stdout == first.stdout.splitlines()[-1] + "\n"
    assert {path: path.lstat().st_mtime_ns for path in environment.rglob("*")} == written


def test_a_changed_lock_gets_a_new_environment_and_the_old_one_stays(share: Path) -> None:
    start(share)
    (old,) = environments(share)
    lock(share, "2.0")
    assert start(share, TELL).stdout.splitlines()[-1].startswith("2.0 ")
    assert len(environments(share)) == 2
    lock(share, "1.0")
    assert start(share, TELL).stdout.startswith(f"1.0 {old}/lib/")


def test_an_interrupted_start_is_never_mistaken_for_a_complete_one(share: Path, tmp_path: Path) -> None:
    killed = uv_that(tmp_path, 'case $1 in pip) kill -9 $PPID;; esac; exec "$REAL" "$@"')
    assert start(share, TELL, tools=killed).returncode != 0
    (half,) = environments(share)
    assert ".new." in half.name
    assert start(share, TELL).stdout.splitlines()[-1].startswith("1.0 ")
    assert [path.name for path in environments(share)] == [half.name.partition(".new.")[0]]


def test_nothing_runs_after_a_failed_installation(share: Path) -> None:
    lock(share, "3.0")
    failed = start(share, "echo trained with nothing")
    assert failed.returncode != 0
    assert "trained" not in failed.stdout
    assert "tiny==3.0" in failed.stderr  # uv says what is wrong
    assert environments(share) == []


def test_an_image_without_uv_is_one_sentence(share: Path, tmp_path: Path) -> None:
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "sed", "sha256sum", "cut", "cat"):
        (tools / name).symlink_to(str(shutil.which(name)))
    (tools / "python3").symlink_to(sys.executable)
    done = subprocess.run(command(), env={**variables(share), "PATH": str(tools)}, capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.startswith("infra/environment.sh: this image has no uv")
    assert len(done.stderr.splitlines()) == 1


def test_a_workspace_without_a_lock_is_refused(share: Path) -> None:
    (share / "setup" / "requirements-cpu.txt").unlink()
    failed = start(share, "echo went on")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert "requirements-cpu.txt" in failed.stderr
    assert not (share / ".cache").exists()


def test_two_concurrent_starts_both_get_a_complete_environment(share: Path) -> None:
    both = [
        subprocess.Popen(command(TELL), env=variables(share), stdout=subprocess.PIPE, text=True, cwd="/")
        for _ in range(2)
    ]
    for process in both:
        said, _ = process.communicate()
        assert process.returncode == 0
        assert said.splitlines()[-1].startswith("1.0 ")
    assert len(environments(share)) == 1


@pytest.mark.parametrize("change", ["a file", "a file beside", "a link", "another environment's name", "its own seal"])
def test_a_changed_environment_on_the_share_is_not_used_and_made_again(share: Path, change: str) -> None:
    start(share)
    (environment,) = environments(share)
    packages = next(environment.glob("lib/python*/site-packages"))
    if change == "a file":
        (packages / "tiny.py").write_text("version = 'stolen'\n")
    elif change == "a file beside":
        (packages / "json_of_mine.pth").write_text("import sys; sys.stdout.write('stolen')\n")
    elif change == "a link":
        (environment / "bin/python").unlink()
        (environment / "bin/python").symlink_to("/bin/echo")
    elif change == "another environment's name":
        lock(share, "2.0")
        start(share)
        (other,) = set(environments(share)) - {environment}
        shutil.rmtree(environment)
        other.rename(environment)
        lock(share, "1.0")
    else:
        key = {**os.environ, "ENVIRONMENT_KEY": "not known to who changed it"}
        (packages / "tiny.py").write_text("version = 'stolen'\n")
        command = [sys.executable, SCRIPT.with_name("seal.py"), environment, environment.name]
        subprocess.run(command, env=key, check=True)
    done = start(share, TELL)
    assert done.returncode == 0, done.stderr
    assert "is not as it was made, so it is not used, and made again." in done.stderr
    assert "stolen" not in done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"1.0 {environment}/lib/")
    again = start(share, TELL)
    assert again.stderr == "" and "Installing" not in again.stdout
    assert environments(share) == [environment]


def test_the_cache_of_the_share_is_no_source_of_packages(share: Path) -> None:
    start(share)
    assert [path.name for path in (share / ".cache").iterdir()] == ["environments"]
    assert not list(environments(share)[0].glob(".uv*"))


def test_the_key_is_not_left_to_the_commands(share: Path) -> None:
    assert start(share, 'echo "key: ${ENVIRONMENT_KEY:-none}"').stdout.splitlines()[-1] == "key: none"
