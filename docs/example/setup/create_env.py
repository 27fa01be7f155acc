"""Create or update the Python environment of this workspace: with conda if there is one, otherwise as a venv.

Packages are installed by uv if it is on PATH (it reads no pip.conf: set PIP_INDEX_URL for an index of your own),
otherwise by pip. TORCH_INDEX_URL sets another index for torch. All commands and their output are logged to
setup/create_env.log. What is up to date is left alone; to start over, delete the environment and run this again. A
conda environment that was not made by this script and the start-up files of a shell are never changed.

--for promptflow creates a separate venv for inference/flow, since prompt flow and Olive are incompatible.
"""

# Only the standard library, and nothing newer than Python 3.8: this file runs before there is an environment.
from __future__ import annotations

import argparse
import hashlib
import os
import re
import shutil
import stat
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from conda_environment import (
    CONDAS,
    STAMP,
    conda_lists,
    conda_name,
    delete,
    find_conda,
    find_prefix,
    is_conda,
    made_from_file,
    mixed,
    not_needed,
    package_name,
)
from gpu import too_old
from install import (
    LOG,
    TORCH_INDEX,
    SetupError,
    again,
    asked_build,
    compile_imported,
    install,
    install_more,
    log,
    quoted,
    step,
    works,
)
from installed import ROOT, python_in, site_packages, torch_versions

SETUP = ROOT / "setup"
FLOW = ROOT / "inference" / "flow"
DISK_GIB = {"cpu": 3, "gpu": 9, "promptflow": 1}


def create(manager: str, purpose: str, dry_run: bool) -> None:
    """Create or update the environment; `manager` "": the one in setup/environment.toml. Raises SetupError."""
    started = time.monotonic()
    settings = read_settings()
    device, manager = settings["device"], manager or settings["manager"]
    lock, venv, command = SETUP / f"requirements-{device}.txt", ".venv", "python finetuning/invoke_olive.py --check"
    if purpose == "promptflow":
        device, manager, lock, venv = purpose, "venv", FLOW / "requirements.txt", ".venv-promptflow"
        command = "pf flow test --flow inference/flow --interactive"
    if manager == "none":
        print('No environment: manager = "none" in setup/environment.toml. Use --manager to create one after all.')
        return
    if not lock.is_file():
        get = "restore it with git" if device == purpose else f"run `copier update --trust --data device={device}`"
        raise SetupError(f"{lock.relative_to(ROOT).as_posix()} is not there: {get}.")

    conda, why = find_conda(manager)
    name = conda_name() if conda else venv
    with nullcontext() if dry_run else alone(f"{conda} {name}" if conda else str(ROOT)):
        prefix, exists = find_prefix(conda, name) if conda else (ROOT / name, False)
        complete = read_stamp(prefix) == stamp_for(prefix, lock) and python_in(prefix).exists()
        if not dry_run and complete and asked_build(prefix):
            print(f"The environment {name} is up to date.")
        else:
            print(f"{'Commands for' if dry_run else 'Setting up'} the environment {name} with {why}:")
            check_place(prefix, device, dry_run)
            check_machine(device, conda)
            if not dry_run:
                log(f"\n===== {time.strftime('%Y-%m-%d %H:%M:%S')}, Python {sys.version.split()[0]}, {sys.platform}\n")
            if conda:
                make_conda(conda, prefix, exists, dry_run)
            else:
                make_venv(prefix, settings["python"], dry_run)
            install(prefix, device, lock, dry_run)
            if conda and (more := conda_lists()[2]):
                install_more(prefix, more, dry_run)
            compile_imported(prefix, dry_run)
            if not dry_run:
                # Last, so that an interrupted environment never counts as complete.
                write_stamp(prefix, stamp_for(prefix, lock))
                if (SETUP / "create_env.incomplete").exists():  # from the hook
                    (SETUP / "create_env.incomplete").unlink()
                print(f"Ready in {time.monotonic() - started:.0f} s.")
    activate = [f"source {name}/bin/activate" if sys.platform != "win32" else rf"{name}\Scripts\Activate.ps1"]
    if conda:
        activate = [f"{Path(conda).stem} activate {name}"]
        if not shutil.which(Path(conda).stem):  # it is not in a start-up file, and none is changed
            activate, command = [], command.replace("python", quoted([str(python_in(prefix))]), 1)
    following = [*activate, command]
    if os.environ.get("COPIER_SAYS_NEXT"):  # set by the hook: Copier's message has the rest
        print(f"To use it: {following[0]}")
    else:
        print("\n  ".join([f"Next, in {ROOT}:", *following]))


@contextmanager
def alone(what: str) -> Iterator[None]:
    """Hold a lock on the environment: wait for other runs that create the same one, and make others wait."""
    with lock_file(what).open("a") as file:
        if not locked(file.fileno(), wait=False):
            print("Another run is creating this environment: waiting for it. Ctrl-C ends the wait.", flush=True)
            while not locked(file.fileno(), wait=True):
                pass
        yield


def lock_file(what: str) -> Path:
    """Return the lock's file, in a folder for temporary files that is this user's: others must not hold the lock.

    Not next to the environment, which may not exist yet; not deleted, since another run may wait for it. If somebody
    else has made that folder, the lock is in setup/.
    """
    home = os.path.expanduser("~")  # noqa: PTH111 - Path's fails for an account without one
    name = f"create_env-{hashlib.sha256(f'{home} {what}'.encode()).hexdigest()[:16]}.lock"
    if sys.platform == "win32":
        return Path(tempfile.gettempdir(), name)  # each user has a folder of their own
    own = Path(tempfile.gettempdir(), f"create_env-{os.geteuid()}")
    is_own = False
    with suppress(OSError):
        own.mkdir(mode=0o700, exist_ok=True)
        about = own.lstat()
        is_own = stat.S_ISDIR(about.st_mode) and about.st_uid == os.geteuid() and not about.st_mode & 0o077
    file = (own if is_own else SETUP) / name
    file.touch(mode=0o600)  # nobody else can open it
    return file


def locked(file: int, wait: bool) -> bool:
    """Lock an open file until it is closed, here and in programs that inherit it; return whether it succeeded."""
    if sys.platform == "win32":
        import msvcrt

        try:
            msvcrt.locking(file, msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)  # LK_LOCK waits for ten seconds
        except OSError:
            return False
    else:
        import fcntl

        os.set_inheritable(file, True)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            return False
    return True


def read_settings() -> dict[str, str]:
    """Read setup/environment.toml: flat `key = "value"` lines, since tomllib needs a newer Python."""
    text = (SETUP / "environment.toml").read_text(encoding="utf-8")
    settings = dict(re.findall(r'^(\w+)\s*=\s*"([^"]*)"', text, re.MULTILINE))
    managers = "auto|conda|mamba|micromamba|venv|none"
    known = {"manager": managers, "device": "cpu|gpu", "python": "3.11|3.12|3.13|3.14"}
    for key, values in known.items():
        if not re.fullmatch(values, settings.get(key, "")):
            raise SetupError(f'setup/environment.toml: {key} = "{settings.get(key, "")}" is not one of {values}.')
    return settings


# ------------------------------------------------------------------------------------------ Where the environment is


def check_place(prefix: Path, device: str, dry_run: bool) -> None:
    """Raise SetupError for a folder in which the environment cannot work, or that is already in use."""
    venv = prefix.parent == ROOT
    if venv and os.pathsep in str(prefix):
        raise SetupError(f"{ROOT} has a `{os.pathsep}` in its path, which no venv works with: rename the folder.")
    if not read_stamp(prefix):
        if venv and prefix.is_dir() and any(prefix.iterdir()) and not (prefix / "pyvenv.cfg").exists():
            raise SetupError(f"{prefix} is not an environment, and is left alone: rename it, then run this again.")
        if not venv and any(prefix.glob("conda-meta/*.json")) and not made_from_file(prefix, conda_lists()[1]):
            raise SetupError(
                f"The conda environment in {prefix} was not made by this file, and is left alone: give another name "
                f"in setup/conda-environment.yml, delete it with `conda env remove --name {prefix.name}`, or use "
                "--manager venv."
            )
    folder = next(folder for folder in (prefix, *prefix.parents) if folder.exists())
    free = shutil.disk_usage(folder).free / 2**30
    if not dry_run and not torch_versions(prefix) and free < DISK_GIB[device]:
        raise SetupError(
            f"{folder} has {free:.1f} GiB free, the environment needs {DISK_GIB[device]}: make room first."
        )


def check_machine(device: str, conda: str) -> None:
    """Raise SetupError for a machine on which the packages cannot be installed, or not used."""
    if sysconfig.get_platform() == "win-arm64" and not conda and device != "promptflow":
        raise SetupError(
            "This is a Python for Windows on ARM, for which pyarrow, among others, has no wheels: install the Python "
            "for x64 from python.org, which Windows on ARM runs too, and run this file with that one."
        )
    if device == "gpu" and (lacks := too_old(TORCH_INDEX["gpu"])):
        raise SetupError(lacks)


def stamp_for(prefix: Path, lock: Path) -> str:
    """Return the stamp of a complete environment made from these files."""
    files = (lock, SETUP / "environment.toml", SETUP / "conda-environment.yml")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
    return f"{digest}\n{prefix}\n"


def read_stamp(prefix: Path) -> str:
    """Return the stamp of the environment, "" if this script did not create it."""
    file = prefix / STAMP
    return file.read_text(encoding="utf-8") if file.is_file() else ""


def write_stamp(prefix: Path, stamp: str) -> None:
    """Mark the environment as created by this script."""
    prefix.mkdir(parents=True, exist_ok=True)
    draft = prefix / f"{STAMP}.draft"
    draft.write_text(stamp, encoding="utf-8")
    draft.replace(prefix / STAMP)


# ------------------------------------------------------------------------------------------ The environment itself


def make_conda(conda: str, prefix: Path, exists: bool, dry_run: bool) -> None:
    """Create the conda environment in `prefix`, or update the one that is there. Raises SetupError."""
    # Variables instead of --yes: not every version of every manager has that option for every command.
    env = {**os.environ, "CONDA_ALWAYS_YES": "true", "MAMBA_ALWAYS_YES": "true"}
    place = ["--prefix", str(prefix)]
    channels, dependencies, _ = conda_lists()
    # The user's own channels may be blocked, or their terms not accepted: they are never asked.
    only = ["--override-channels", *(part for channel in channels for part in ("--channel", channel))]
    if not exists:
        # Empty first, so the stamp is there before anything can be interrupted.
        empty = ["--no-default-packages"] if Path(conda).stem == "conda" else []
        step("an empty environment", [conda, "create", *place, *only, *empty], env, dry_run)
    if not dry_run:
        if not is_conda(prefix):
            raise SetupError(f"{conda} made no environment in {prefix}: see {LOG}.{again()}")
        write_stamp(prefix, f"begun\n{prefix}\n")
    if rest := not_needed(prefix, dependencies):
        # Nothing that stays needs them, so --force breaks nothing. Only conda asks channels before it removes.
        title, asked = f"removal of {', '.join(rest)}", only if Path(conda).stem == "conda" else []
        step(title, [conda, "remove", *place, *asked, "--force", *rest], env, dry_run)
    title = f"update of {prefix}" if any(prefix.glob("conda-meta/*.json")) else "Python"
    step(title, [conda, "install", *place, *only, *dependencies], env, dry_run)
    if broken := mixed(prefix):
        specs = {package_name(dependency): dependency for dependency in dependencies}
        if not dry_run:
            delete([file for files in broken.values() for file in files], prefix)
        again_in = [conda, "install", *place, *only, "--force-reinstall", *(specs.get(name, name) for name in broken)]
        step(f"repair of {', '.join(broken)}, which pip had overwritten", again_in, env, dry_run)
    if not dry_run:
        if not python_in(prefix).exists():
            raise SetupError(f"{conda} made no Python in {prefix}: see {LOG}.{again()}")
        remove_older_python(prefix)


def remove_older_python(prefix: Path) -> None:
    """Delete what pip installed for a Python that conda has replaced: nothing uses it, and it is 3 to 9 GiB."""
    current = site_packages(prefix)
    for folder in prefix.glob("lib/python3.*"):
        old = not folder.is_symlink() and current and folder.name != current.parent.name
        if old and {path.name for path in folder.iterdir()} <= {"site-packages", "__pycache__"}:
            shutil.rmtree(folder)


def make_venv(prefix: Path, least: str, dry_run: bool) -> None:
    """Create the venv unless it exists and works; a moved or broken one is recreated. Raises SetupError."""
    python = python_in(prefix)
    stamp = read_stamp(prefix)
    moved = bool(stamp) and stamp.splitlines()[-1] != str(prefix)
    if not moved and works([python, "-c", ""]):
        if not dry_run:
            write_stamp(prefix, f"begun\n{prefix}\n")
        if not shutil.which("uv") and not works([python, "-I", "-m", "pip", "--version"]):
            step("pip", [str(python), "-m", "ensurepip"], dict(os.environ), dry_run)
        return
    if sys.version_info < tuple(int(part) for part in least.split(".")):
        mine = sys.version.split()[0]
        raise SetupError(f"This is Python {mine}, and the venv needs {least} or newer: run this file with that one.")
    title = f"Python {sys.version.split()[0]}"
    if moved or (prefix / "pyvenv.cfg").exists():
        title += f" ({'the folder was moved' if moved else f'the one in {prefix.name} does not run'}: recreated)"
    if not dry_run:
        write_stamp(prefix, f"begun\n{prefix}\n")
        for path in prefix.iterdir():  # not venv's --clear, which would also delete the stamp
            if path.name != STAMP:
                shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
    # uv does not need pip in the venv, and the lock contains pip.
    options = ["--without-pip"] if shutil.which("uv") else []
    step(title, [sys.executable, "-m", "venv", *options, str(prefix)], dict(os.environ), dry_run)


def main() -> int:
    """Parse the command line and create the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manager", choices=(*CONDAS, "venv"), default="", help="overrides setup/environment.toml")
    purposes = ("finetuning", "promptflow")
    parser.add_argument(
        "--for", choices=purposes, default=purposes[0], dest="purpose", help="the purpose of the environment"
    )
    parser.add_argument("--dry-run", action="store_true", help="print the commands without running them")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    if args.purpose == "promptflow" and args.manager not in ("", "venv"):
        parser.error("prompt flow's environment is always a venv: leave --manager out")
    try:
        create(args.manager, args.purpose, args.dry_run)
    except KeyboardInterrupt:
        print("\nInterrupted: run the same command again to continue.", file=sys.stderr)
        return 130
    except (SetupError, OSError) as error:
        if args.debug:
            raise
        if isinstance(error, OSError):
            print(f"create_env: {error.filename or LOG}: {error.strerror or error}.{again()}", file=sys.stderr)
        else:
            print(f"create_env: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
