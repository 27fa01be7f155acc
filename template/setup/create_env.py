"""Make the Python environment of this workspace, or bring it up to date: conda where there is one, else a venv.

Packages are installed by uv where it is on PATH (it reads no pip.conf: set PIP_INDEX_URL for an index of your own),
else by pip. TORCH_INDEX_URL names another index for torch. Every command and all it says goes to setup/create_env.log.
What is up to date is left alone; to start over, delete the environment and run this again.
"""

# The standard library alone, and nothing newer than Python 3.8: this file runs before there is an environment.
from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SETUP = ROOT / "setup"
LOG = SETUP / "create_env.log"
TORCH_INDEX = {"cpu": "https://download.pytorch.org/whl/cpu", "gpu": "https://download.pytorch.org/whl/cu130"}
DISK_GIB = {"cpu": 3, "gpu": 9}
CONDAS = ("conda", "mamba", "micromamba")
STAMP = "create_env.stamp"
# uv has its own names for what is set for pip.
PIP_NAMES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_CERT")
UV_NAMES = ("UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INSECURE_HOST", "SSL_CERT_FILE")


class SetupError(Exception):
    """Something the user can put right; its text says what is wrong, where, and what to do."""


def create(manager: str, dry_run: bool) -> None:
    """Create or update the environment; `manager` "" means setup/environment.toml's. Raises SetupError."""
    started = time.monotonic()
    settings = read_settings()
    device, manager = settings["device"], manager or settings["manager"]
    if manager == "none":
        print('No environment: manager = "none" in setup/environment.toml. Use --manager to create one after all.')
        return
    lock = SETUP / f"requirements-{device}.txt"
    if not lock.is_file():
        raise SetupError(
            f"setup/{lock.name} is not there: run `copier update --trust --data device={device}` to get it."
        )

    conda, why = find_conda(manager)
    name = conda_name() if conda else ".venv"
    prefix, exists = find_prefix(conda, name, dry_run) if conda else (ROOT / ".venv", False)
    if not dry_run and read_stamp(prefix) == stamp_for(prefix, lock) and python_in(prefix).exists():
        print(f"The environment {name} is up to date.")
    else:
        print(f"{'Commands for' if dry_run else 'Setting up'} the environment {name} with {why}:")
        if not dry_run:
            check_place(prefix, device)
            log(f"\n===== {time.strftime('%Y-%m-%d %H:%M:%S')}, Python {sys.version.split()[0]}, {sys.platform}\n")
        if conda:
            prefix = make_conda(conda, name, prefix if exists else None, dry_run)
        else:
            make_venv(prefix, settings["python"], dry_run)
        install(prefix, device, lock, dry_run)
        if not dry_run:
            # Last, so that an environment that was interrupted never passes for a complete one.
            draft = prefix / f"{STAMP}.draft"
            draft.write_text(stamp_for(prefix, lock), encoding="utf-8")
            draft.replace(prefix / STAMP)
            print(f"Ready in {time.monotonic() - started:.0f} s.")
    activate = "source .venv/bin/activate" if sys.platform != "win32" else r".venv\Scripts\Activate.ps1"
    if conda:
        activate = f"{Path(conda).stem if shutil.which(Path(conda).stem) else conda} activate {name}"
    if not os.environ.get("COPIER_SAYS_NEXT"):  # set by the hook: Copier's message goes on from here
        print(f"Next, in {ROOT}:\n  {activate}\n  python finetuning/invoke_olive.py --check")


def read_settings() -> dict[str, str]:
    """Read setup/environment.toml: flat `key = "value"` lines, as tomllib needs a newer Python than conda does."""
    text = (SETUP / "environment.toml").read_text(encoding="utf-8")
    settings = dict(re.findall(r'^(\w+)\s*=\s*"([^"]*)"', text, re.MULTILINE))
    managers = "auto|conda|mamba|micromamba|venv|none"
    known = {"manager": managers, "device": "cpu|gpu", "python": "3.11|3.12|3.13|3.14"}
    for key, values in known.items():
        if not re.fullmatch(values, settings.get(key, "")):
            raise SetupError(f'setup/environment.toml: {key} = "{settings.get(key, "")}" is not one of {values}.')
    return settings


# ------------------------------------------------------------------ Which manager, and where the environment lies


def find_conda(manager: str) -> tuple[str, str]:
    """Return the program of the conda family that `manager` asks for ("" for a venv), and the choice in words."""
    if manager != "venv":
        for program, where in conda_programs():
            stem = Path(program).stem
            if Path(program).is_file() and (manager == "auto" or stem == manager):
                return program, f"{stem} ({where})"
        if manager != "auto":
            raise SetupError(f"{manager} was not found: install Miniforge (conda-forge.org) or use --manager venv.")
    return "", "venv" if manager == "venv" else "venv (no conda was found)"


def conda_programs() -> Iterator[tuple[str, str]]:
    """Yield where a conda may be, and that place in words; start-up files are never read or changed."""
    for variable in ("CONDA_EXE", "MAMBA_EXE"):
        yield os.environ.get(variable, ""), f"from {variable}"
    for name in CONDAS:
        yield shutil.which(name) or "", "on PATH"
    for folder in ("miniforge3", "miniconda3", "AppData/Local/miniforge3", "AppData/Local/miniconda3"):
        home = Path.home() / folder
        yield str(home / ("Scripts/conda.exe" if sys.platform == "win32" else "bin/conda")), f"in {home}"


def conda_name() -> str:
    """Return the environment's name, which stands in setup/conda-environment.yml alone."""
    text = (SETUP / "conda-environment.yml").read_text(encoding="utf-8")
    found = re.search(r"^name:\s*[\"']?([\w.-]+)", text, re.MULTILINE)
    if not found:
        raise SetupError("setup/conda-environment.yml has no name: add a line `name: my-environment`.")
    return found.group(1)


def find_prefix(conda: str, name: str, dry_run: bool) -> tuple[Path, bool]:
    """Return the folder that a conda environment has or will get, and whether it exists. Raises SetupError."""
    usual = Path(conda).resolve().parents[1] / "envs" / name
    if dry_run or (usual / "conda-meta").is_dir():
        return usual, (usual / "conda-meta").is_dir()
    try:
        done = subprocess.run([conda, "env", "list", "--json"], capture_output=True, text=True, check=True)
        folders = [Path(folder) for folder in json.loads(done.stdout)["envs"]]
    except (OSError, subprocess.CalledProcessError, ValueError, KeyError) as error:
        raise SetupError(f"{conda} does not work ({error}): repair it or use --manager venv.") from error
    found = [folder for folder in folders if folder.name == name]
    return (found[0], True) if found else (usual, False)


def python_in(prefix: Path) -> Path:
    """Return the environment's own Python."""
    if sys.platform != "win32":
        return prefix / "bin" / "python"
    return prefix / "Scripts" / "python.exe" if prefix.name == ".venv" else prefix / "python.exe"


def check_place(prefix: Path, device: str) -> None:
    """Raise SetupError for a place where the environment cannot work."""
    if prefix.name == ".venv" and os.pathsep in str(prefix):
        raise SetupError(f"{ROOT} has a `{os.pathsep}` in its path, which no venv works with: rename the folder.")
    if prefix.name != ".venv" and " " in str(prefix):
        raise SetupError(f"{prefix} has a space in its path, which breaks conda environments: use --manager venv.")
    folder = next(folder for folder in (prefix, *prefix.parents) if folder.exists())
    free = shutil.disk_usage(folder).free / 2**30
    if not read_stamp(prefix) and free < DISK_GIB[device]:
        raise SetupError(
            f"{folder} has {free:.1f} GiB free, the environment needs {DISK_GIB[device]}: make room first."
        )


def stamp_for(prefix: Path, lock: Path) -> str:
    """Return what a complete environment of these files holds in its stamp."""
    files = (lock, SETUP / "environment.toml", SETUP / "conda-environment.yml")
    digest = hashlib.sha256(b"".join(file.read_bytes() for file in files if file.is_file())).hexdigest()
    return f"{digest}\n{prefix}\n"


def read_stamp(prefix: Path) -> str:
    """Return the stamp of the environment, "" when it was never complete."""
    file = prefix / STAMP
    return file.read_text(encoding="utf-8") if file.is_file() else ""


# ------------------------------------------------------------------------------------------ The environment itself


def make_conda(conda: str, name: str, prefix: Path | None, dry_run: bool) -> Path:
    """Create the conda environment, or update the one in `prefix`; return its folder. Raises SetupError."""
    file = str(SETUP / "conda-environment.yml")
    # Variables instead of --yes: not every version of every manager has that option here.
    env = {**os.environ, "CONDA_ALWAYS_YES": "true", "MAMBA_ALWAYS_YES": "true"}
    if prefix:
        command = [conda, "env", "update", "--prefix", str(prefix), "--file", file, "--prune"]
        step(f"update of {prefix}", command, env, dry_run)
    else:
        step("Python", [conda, "env", "create", "--file", file], env, dry_run)
        prefix = find_prefix(conda, name, dry_run)[0]
    if not dry_run and not python_in(prefix).exists():
        raise SetupError(f"{conda} made no Python in {prefix}: see {LOG}.")
    return prefix


def make_venv(prefix: Path, least: str, dry_run: bool) -> None:
    """Create the venv unless it is there and works; one that was moved or broken is made anew. Raises SetupError."""
    python = python_in(prefix)
    stamp = read_stamp(prefix)
    moved = bool(stamp) and stamp.splitlines()[-1] != str(prefix)
    if not moved and works([python, "-c", ""]):
        if not shutil.which("uv") and not works([python, "-m", "pip", "--version"]):
            step("pip", [str(python), "-m", "ensurepip"], dict(os.environ), dry_run)
        return
    if sys.version_info < tuple(int(part) for part in least.split(".")):
        mine = sys.version.split()[0]
        raise SetupError(f"This is Python {mine}, and the venv needs {least} or newer: run this file with that one.")
    # uv installs without pip being there, and the lock brings pip.
    options = (["--clear"] if prefix.exists() else []) + (["--without-pip"] if shutil.which("uv") else [])
    title = f"Python {sys.version.split()[0]}" + (" (the folder was moved: made anew)" if moved else "")
    step(title, [sys.executable, "-m", "venv", *options, str(prefix)], dict(os.environ), dry_run)


def install(prefix: Path, device: str, lock: Path, dry_run: bool) -> None:
    """Install torch from its own index, then all the rest from the lock. Raises SetupError."""
    command, env = installer(python_in(prefix))
    pins = re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE)
    version = dict(pins)["torch"]
    # Its own index has a build for each device. macOS has one build, and the lock takes it from the usual index.
    if sys.platform != "darwin" and not right_torch(prefix, version, device):
        options = ["--no-deps", "--reinstall" if "uv" in command else "--force-reinstall", f"torch=={version}"]
        for place, more, env_torch in torch_sources(env, device):
            done = step(f"torch {version} from {place}", [*command, *more, *options], env_torch, dry_run, may_fail=True)
            if done and (dry_run or right_torch(prefix, version, device)):
                break
        else:
            build = "for the CPU only" if sys.platform == "win32" else "with CUDA, 4 GiB"
            print(f"  torch's own index cannot be used; yours is asked for torch (usually a build {build}).")
    options = ["--no-index"] if env.get("PIP_NO_INDEX") else []
    # Compiled, every script starts in half the time; pip compiles unasked.
    env = {"UV_COMPILE_BYTECODE": "1", **env}
    step(f"{len(pins)} locked packages", [*command, *options, "-r", str(lock)], env, dry_run)


def installer(python: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that installs into `python` and its variables: what is set for pip holds for uv too."""
    env = {**os.environ, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_INPUT": "1"}
    if not shutil.which("uv"):
        if "UV_FIND_LINKS" in env:
            env.setdefault("PIP_FIND_LINKS", env["UV_FIND_LINKS"].replace(",", " "))
        return [str(python), "-m", "pip", "install"], env
    if "PIP_EXTRA_INDEX_URL" in env:
        env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # pip's way to use several indexes
    if "PIP_FIND_LINKS" in env:
        env.setdefault("UV_FIND_LINKS", ",".join(env["PIP_FIND_LINKS"].split()))
    for pip_name, uv_name in zip(PIP_NAMES, UV_NAMES):  # noqa: B905 (strict is newer than Python 3.8)
        if pip_name in env:
            env.setdefault(uv_name, env[pip_name])
    return ["uv", "pip", "install", "--python", str(python)], env


def torch_sources(env: dict[str, str], device: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yield where to look for torch, in this order: the place in words, options, variables."""
    if env.get("PIP_FIND_LINKS") or env.get("UV_FIND_LINKS"):
        yield "your find-links", ["--no-index"], env
    if env.get("PIP_NO_INDEX"):
        return
    index = env.get("TORCH_INDEX_URL") or TORCH_INDEX[device]
    # A variable, not an option: the address of an index may hold a password, and everybody can read a command line.
    others = ("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_DEFAULT_INDEX")
    only = {"PIP_DEFAULT_TIMEOUT": "15", "UV_HTTP_TIMEOUT": "15", "PIP_RETRIES": "1", "UV_HTTP_RETRIES": "1"}
    only.update((name, value) for name, value in env.items() if name not in others)
    only["UV_INDEX_URL" if shutil.which("uv") else "PIP_INDEX_URL"] = index
    yield hide_passwords(index), [], only


def right_torch(prefix: Path, version: str, device: str) -> bool:
    """Tell whether the environment has this torch in a build for the device."""
    folders = [*prefix.glob("lib/python3.*/site-packages/torch-*"), *prefix.glob("Lib/site-packages/torch-*")]
    wrong = "+cpu" if device == "gpu" else "+cu"
    have = [folder.name[len("torch-") : -len(".dist-info")] for folder in folders if folder.suffix == ".dist-info"]
    return any(found.split("+")[0] == version and not (found + " ").startswith(version + wrong) for found in have)


# ------------------------------------------------------------------------------------------------ Running commands


def step(title: str, command: list[str], env: dict[str, str], dry_run: bool, may_fail: bool = False) -> bool:
    """Run one command, its output in the log, and return whether it worked. Raises SetupError unless it may fail."""
    ours = [f"{name}={env[name]}" for name in env if name.endswith("_INDEX_URL") and env[name] != os.environ.get(name)]
    shown = hide_passwords(" ".join([*ours, *(shlex.quote(part) for part in command)]))
    if dry_run:
        print(f"  {shown}")
        return True
    print(f"  {title} ... ", end="", flush=True)
    started = time.monotonic()
    last: deque[str] = deque(maxlen=10)
    log(f"\n$ {shown}\n")
    out, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        command, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=both, text=True, errors="replace"
    ) as process:
        for line in process.stdout or ():
            log(line)
            if line.strip():
                last.append(hide_passwords(line.rstrip()))
    failed = process.returncode != 0
    print(f"{'failed after ' if failed else ''}{time.monotonic() - started:.1f} s", flush=True)
    if failed and not may_fail:
        again = f"python setup/create_env.py {' '.join(sys.argv[1:])}".rstrip()
        lines = "\n    ".join(last)
        raise SetupError(f"{title}: it failed with\n    {lines}\n  All of it: {LOG}\n  Try again, in {ROOT}: {again}")
    return not failed


def log(text: str) -> None:
    """Append to the log."""
    with LOG.open("a", encoding="utf-8") as file:
        file.write(hide_passwords(text))


def works(command: list[str | Path]) -> bool:
    """Tell whether a command can be run and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def hide_passwords(text: str) -> str:
    """Return the text with what stands before the @ of an address made unreadable."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)


def main() -> int:
    """Read the command line and create the environment."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--manager", choices=(*CONDAS, "venv"), default="", help="instead of setup/environment.toml's")
    parser.add_argument("--for", choices=("finetuning",), default="finetuning", dest="purpose", help="what it is for")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and run none")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        create(args.manager, args.dry_run)
    except KeyboardInterrupt:
        print("\nInterrupted: run the same command again, it goes on from here.", file=sys.stderr)
        return 130
    except (SetupError, OSError) as error:
        if args.debug:
            raise
        print(f"create_env: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
