"""Install the locked packages into an environment: first torch, if locked, from its own index.

All commands and their output are logged to setup/create_env.log.
"""

# Only the standard library, and nothing newer than Python 3.8, as in create_env.py.
from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import deque
from collections.abc import Iterable, Iterator
from pathlib import Path

from installed import ROOT, canonical, conda_distributions, project, python_in, site_packages, torch_versions
from visible import visible

LOG = ROOT / "setup" / "create_env.log"
TORCH_INDEX = {"cpu": "https://download.pytorch.org/whl/cpu", "gpu": "https://download.pytorch.org/whl/cu130"}
# uv has its own names for pip's settings.
PIP_NAMES = ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL", "PIP_TRUSTED_HOST", "PIP_CERT")
UV_NAMES = ("UV_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INSECURE_HOST", "SSL_CERT_FILE")
# With these, pip installs elsewhere, or takes packages of another environment for installed.
ELSEWHERE = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_ROOT", "PIP_DRY_RUN")
HERE = {"PIP_USER": "0", "PYTHONNOUSERSITE": "1", "PIP_REQUIRE_VIRTUALENV": "0"}
# A run starts in half the time if what it imports is compiled; compiling all packages takes more than twice as long.
COMPILED = (
    "accelerate|datasets|gradio|huggingface_hub|matplotlib|numpy|olive|onnxscript|optuna|pandas|peft|pydantic|scipy"
    "|sympy|torch|transformers"
)
# What uv and pip say of a file that does not have the hash of the lock.
CHANGED = r"Hash mismatch for `([^`]+)`|MATCH THE HASHES(?:.|\n)*?\n *([\w.-]+==\S+) from "
NOT_COMPILED = rf"site-packages[\\/](?!({COMPILED})[\\/])|[\\/](tests?|testing|models)[\\/]"


class SetupError(Exception):
    """An error that the user can fix: what is wrong, where, and what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(visible(text))


def install(prefix: Path, device: str, lock: Path, dry_run: bool) -> None:
    """Install torch from its own index, if the lock has it, then the rest. Raises SetupError."""
    command, env = installer(python_in(prefix))
    if not dry_run:
        remove_torn(prefix)
    pins = dict(re.findall(r"^([\w.-]+)==(\S+)", lock.read_text(encoding="utf-8"), re.MULTILINE))
    by_conda = dict(project(folder) for _, _, folder in conda_distributions(prefix))
    version = pins.get("torch")
    # Its index has a build for each device. macOS has only one build, which the lock takes from the usual index.
    others = sys.platform == "darwin" or "torch" in by_conda
    if version and not others and not right_torch(prefix, version, device):
        options = ["--no-deps", "--reinstall" if "uv" in command else "--force-reinstall", f"torch=={version}"]
        for place, more, env_torch in torch_sources(env, device):
            done = step(f"torch {version} from {place}", [*command, *more, *options], env_torch, dry_run, may_fail=True)
            if done and not dry_run:
                check_arrived(prefix, ["torch"])
            if done and (dry_run or right_torch(prefix, version, device)):
                break
        else:
            build = "for the CPU only" if sys.platform == "win32" else "with CUDA, 4 GiB"
            print(f"  torch's own index cannot be used; yours is asked for torch (usually a build {build}).")
    for name in sorted(set(pins) & set(by_conda) - {"pip", "setuptools"}):
        if pins[name] != by_conda[name]:
            print(f"  {name} {by_conda[name]} is conda's and stays; the lock has {pins[name]}.")
    options = ["--no-index"] if env.get("PIP_NO_INDEX") else []
    for title, more, file in requirements(prefix, lock, set(by_conda), dry_run):
        step(title, [*command, *options, *more, "-r", str(file)], env, dry_run)
        if not dry_run:
            text = file.read_text(encoding="utf-8")
            check_arrived(prefix, re.findall(r"^([\w.-]+)==[^;\n]*$", text, re.MULTILINE))


def install_more(prefix: Path, packages: list[str], dry_run: bool) -> None:
    """Install the user's own packages of pip. Raises SetupError."""
    command, env = installer(python_in(prefix))
    step(f"{len(packages)} packages of pip, from conda-environment.yml", [*command, *packages], env, dry_run)


def compile_imported(prefix: Path, dry_run: bool) -> None:
    """Compile the packages that a run imports to bytecode, on all cores: pip would use one."""
    place = str(site_packages(prefix) or prefix)
    command = [str(python_in(prefix)), "-m", "compileall", "-q", "-j", "0", "-x", NOT_COMPILED, place]
    # it fails for files that are for another Python
    step("bytecode of what a run imports", command, dict(os.environ), dry_run, may_fail=True)


def remove_torn(prefix: Path) -> None:
    """Delete a package's *-info folder that has no metadata, which a full disk leaves and uv stops at."""
    site = site_packages(prefix)
    for folder in site.glob("*.dist-info") if site else ():
        metadata = folder / "METADATA"
        if not metadata.is_file() or metadata.stat().st_size == 0:
            shutil.rmtree(folder)


def check_arrived(prefix: Path, names: Iterable[str]) -> None:
    """Raise SetupError if packages are not in the environment, although the installer said that it succeeded."""
    site = site_packages(prefix)
    here = {project(path.name)[0] for path in site.glob("*-info")} if site else set()
    if missing := sorted({canonical(name) for name in names} - here):
        settings = quoted([str(python_in(prefix)), "-m", "pip", "config", "list"])
        raise SetupError(
            f"{missing[0]} was installed, but not into {prefix}: remove `target`, `prefix`, `root` or `dry-run` from "
            f"pip's settings, which `{settings}` shows.{again()}"
        )


def requirements(prefix: Path, lock: Path, by_conda: set[str], dry_run: bool) -> Iterator[tuple[str, list[str], Path]]:
    """Yield title, options and file of what is to be installed of the lock: what has hashes, then what has none.

    pip refuses a file in which only some lines have hashes. Lines without one were added by the user.
    """
    every = lines = re.findall(r"^[\w.-]+==.*", lock.read_text(encoding="utf-8"), re.MULTILINE)
    locked = TORCH_INDEX["gpu"].rpartition("/")[2]
    if any("+cu" in found and not found.endswith(f"+{locked}") for found in torch_versions(prefix)):
        # The lock's libraries are for another CUDA than this torch, which itself names its own, with their versions.
        lines = [line for line in lines if not line.startswith(("nvidia-", "cuda-"))]
        lines = [line.partition(" --hash")[0] if line.startswith("torch==") else line for line in lines]
    if prefix.parent != ROOT:
        # pip would replace the files of conda's packages, conda would forget that it has them, and then mix the two.
        lines = [line for line in lines if canonical(line.partition("==")[0]) not in by_conda]
    hashed = [line for line in lines if " --hash=" in line]
    others = [line for line in lines if line not in hashed]
    # The hashes are of all packages, so nothing else may be installed with them.
    for part, more in ((hashed, ["--no-deps"]), (others, [])):
        first = part is hashed or not hashed
        file = lock if part == every and prefix.parent == ROOT else prefix / f"{'' if first else 'more-'}{lock.name}"
        if part and file != lock and not dry_run:
            text = "\n".join([f"# {lock}, without what conda and torch bring along", *part, ""])
            file.write_text(text, encoding="utf-8")
        if part:
            yield f"{len(part)} {'locked packages' if first else 'packages without a hash'}", more, file


def installer(python: Path) -> tuple[list[str], dict[str, str]]:
    """Return the command that installs into `python`, and its variables: pip's settings also apply to uv."""
    env = {name: value for name, value in os.environ.items() if name not in ELSEWHERE}
    env.update(HERE, PIP_DISABLE_PIP_VERSION_CHECK="1", PIP_NO_INPUT="1")
    if not shutil.which("uv"):
        if "UV_FIND_LINKS" in env:
            env.setdefault("PIP_FIND_LINKS", env["UV_FIND_LINKS"].replace(",", " "))
        return [str(python), "-m", "pip", "install", "--no-compile"], env
    if "PIP_EXTRA_INDEX_URL" in env:
        env.setdefault("UV_INDEX_STRATEGY", "unsafe-best-match")  # as pip uses several indexes
    if "PIP_FIND_LINKS" in env:
        env.setdefault("UV_FIND_LINKS", ",".join(env["PIP_FIND_LINKS"].split()))
    for pip_name, uv_name in zip(PIP_NAMES, UV_NAMES):  # noqa: B905 (strict is newer than Python 3.8)
        if pip_name in env:
            env.setdefault(uv_name, env[pip_name])
    return ["uv", "pip", "install", "--python", str(python)], env


def torch_sources(env: dict[str, str], device: str) -> Iterator[tuple[str, list[str], dict[str, str]]]:
    """Yield the sources of torch, in order: description, options, variables."""
    if env.get("PIP_FIND_LINKS") or env.get("UV_FIND_LINKS"):
        yield "your find-links", ["--no-index"], env
    if env.get("PIP_NO_INDEX"):
        return
    index = env.get("TORCH_INDEX_URL") or TORCH_INDEX[device]
    # A variable, not an option: an index URL may contain a password, and command lines are visible to others.
    others = ("PIP_EXTRA_INDEX_URL", "UV_EXTRA_INDEX_URL", "UV_INDEX", "UV_DEFAULT_INDEX")
    only = {"PIP_DEFAULT_TIMEOUT": "15", "UV_HTTP_TIMEOUT": "15", "PIP_RETRIES": "1", "UV_HTTP_RETRIES": "1"}
    only.update((name, value) for name, value in env.items() if name not in others)
    only["UV_INDEX_URL" if shutil.which("uv") else "PIP_INDEX_URL"] = index
    yield hide_passwords(index), [], only


def asked_build(prefix: Path) -> bool:
    """Return whether torch, if installed, is for the CUDA that TORCH_INDEX_URL names; any is, if it names none."""
    asked = re.search(r"/(cu\d+)/?$", os.environ.get("TORCH_INDEX_URL", ""))
    return not asked or all(found.endswith(f"+{asked.group(1)}") for found in torch_versions(prefix) if "+cu" in found)


def right_torch(prefix: Path, version: str, device: str) -> bool:
    """Return whether the environment has this torch version, built for the device."""
    wrong = version + ("+cpu" if device == "gpu" else "+cu")
    same = [found for found in torch_versions(prefix) if found.split("+")[0] == version]
    return any(not found.startswith(wrong) for found in same) and asked_build(prefix)


# ------------------------------------------------------------------------------------------------ Running commands


def step(title: str, command: list[str], env: dict[str, str], dry_run: bool, may_fail: bool = False) -> bool:
    """Run one command, its output in the log, and return whether it worked. Raises SetupError unless it may fail."""
    ours = [f"{name}={env[name]}" for name in env if name.endswith("_INDEX_URL") and env[name] != os.environ.get(name)]
    shown = hide_passwords(" ".join([*ours, quoted(command)]))
    if dry_run:
        print(f"  {shown}")
        return True
    print(f"  {title} ... ", end="", flush=True)
    started = time.monotonic()
    last: deque[str] = deque(maxlen=10)
    log(f"\n$ {shown}\n")
    out, both = subprocess.PIPE, subprocess.STDOUT
    with subprocess.Popen(
        # It inherits the lock, and keeps it if it outlives this process.
        command,
        env=env,
        cwd=ROOT,
        stdin=subprocess.DEVNULL,
        stdout=out,
        stderr=both,
        text=True,
        errors="replace",
        close_fds=False,
    ) as process:
        for line in process.stdout or ():
            log(line)
            if line.strip():
                last.append(hide_passwords(line.rstrip()))
    failed = process.returncode != 0
    print(f"{'failed after ' if failed else ''}{time.monotonic() - started:.1f} s", flush=True)
    if failed and not may_fail:
        if changed := re.search(CHANGED, "\n".join(last)):
            raise SetupError(
                f"{changed.group(1) or changed.group(2)} is not the file whose hash is in the lock, and was not "
                f"installed: it was changed on your index or mirror after it was locked; ask who runs that, or use "
                f"another one, in PIP_INDEX_URL. All of it: {LOG}{again()}"
            )
        lines = "\n    ".join(last or [f"status {process.returncode}, no output"])
        raise SetupError(f"{title}: it failed with\n    {lines}\n  All of it: {LOG}{again()}")
    return not failed


def again() -> str:
    """Return the line with the command to try again, "" if the hook prints one."""
    python = "python" if sys.platform == "win32" else "python3"
    command = quoted([python, "setup/create_env.py", *sys.argv[1:]])
    return "" if os.environ.get("COPIER_SAYS_NEXT") else f"\n  Try again, in {ROOT}: {command}"


def quoted(command: list[str]) -> str:
    """Return the command as typed in this system's shell."""
    return subprocess.list2cmdline(command) if sys.platform == "win32" else " ".join(map(shlex.quote, command))


def log(text: str) -> None:
    """Append text to the log."""
    with LOG.open("a", encoding="utf-8") as file:
        file.write(visible(hide_passwords(text)))


def works(command: list[str | Path]) -> bool:
    """Return whether a command can be run and succeeds."""
    try:
        return subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        return False


def hide_passwords(text: str) -> str:
    """Return the text with the credentials in URLs masked."""
    return re.sub(r"(://)[^/@\s]+@", r"\1***@", text)
