"""Write a lock of the newest releases for a rendered workspace: from locks/workspace-cpu.in without its pins.

setup/create_env.py of that workspace then installs them. versions.txt in the workspace lists the differences from the
committed lock. Needs uv and a package index; torch is a CPU build from the index that create_env.py uses.
"""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from lock import LOCKS, SETUP, lock

sys.path.insert(0, str(SETUP))
from install import installer, torch_sources

CUDA = re.compile(r"^(?:nvidia-|cuda-|triton)[\w.-]*", re.MULTILINE)


def unpinned(requirements: str) -> str:
    """Return the requirements without exact versions; other limits, like <2, stay."""
    return re.sub(r"^([\w.-]+)==[^\s;,]+", r"\1", requirements, flags=re.MULTILINE)


def newest_torch() -> str:
    """Return the newest version of torch that has a CPU build, "" if none is found."""
    _, env = installer(Path(sys.executable))
    command = [
        "uv",
        "pip",
        "compile",
        "--quiet",
        "--no-deps",
        "--no-annotate",
        "--no-header",
        "--python-version",
        "3.11",
    ]
    for _, options, variables in torch_sources(env, "cpu"):
        done = subprocess.run(
            [*command, *options, "-"], input="torch", env=variables, capture_output=True, text=True, check=False
        )
        if found := re.search(r"^torch==([^+\s]+)", done.stdout, re.MULTILINE):
            return found[1]
    return ""


def differences(locked: str, newest: str) -> str:
    """Return a table of the packages whose versions differ between two locks: name, locked, newest."""
    before, after = versions(locked), versions(newest)
    names = sorted(name for name in before | after if before.get(name) != after.get(name))
    rows = [("package", "locked", "newest"), *((name, before.get(name, "-"), after.get(name, "-")) for name in names)]
    return "".join(f"{name:<30}  {old:<20}  {new}\n" for name, old, new in rows)


def versions(lock_text: str) -> dict[str, str]:
    """Return each package's version, or its versions if they depend on the Python version."""
    found: dict[str, list[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==(\S+)", lock_text, re.MULTILINE):
        found.setdefault(name, []).append(version)
    return {name: ", ".join(dict.fromkeys(several)) for name, several in found.items()}


def main() -> int:
    """Write the lock and versions.txt into the workspace given on the command line."""
    workspace = Path(sys.argv[1]).resolve()
    torch = newest_torch()
    if not torch:
        print("newest: no CPU build of torch found: check TORCH_INDEX_URL and PIP_FIND_LINKS", file=sys.stderr)
        return 1
    source, target = workspace / "newest.in", workspace / "setup" / "requirements-cpu.txt"
    source.write_text(unpinned((LOCKS / "workspace-cpu.in").read_text()) + f"torch=={torch}\n")
    try:
        lock(source, target, ["--upgrade", "--excludes", str(LOCKS / "without-cuda.txt")])
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # uv has printed the reason
    newest = target.read_text()
    table = differences((SETUP / target.name).read_text(), newest)
    (workspace / "versions.txt").write_text(table)
    print(table, end="")
    if found := CUDA.findall(newest):
        print(f"newest: torch asks for {', '.join(found)}: add it to locks/without-cuda.txt", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
