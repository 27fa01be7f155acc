"""Lock the requirements of the repository and the workspaces: every locks/*.in. Needs uv and a package index."""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from pathlib import Path

LOCKS = Path(__file__).resolve().parent
SETUP = LOCKS.parent / "template" / "setup"
HEADER = "# made by make lock; do not edit\n"
# Input, output, and further options for uv.
TARGETS = [
    (LOCKS / "repository.in", LOCKS / "repository.txt", []),
    (LOCKS / "site.in", LOCKS / "site.txt", []),
    (LOCKS / "copier.in", SETUP / "requirements-copier.txt", []),
    (LOCKS / "workspace-cpu.in", SETUP / "requirements-cpu.txt", ["--excludes", str(LOCKS / "without-cuda.txt")]),
    (LOCKS / "workspace-gpu.in", SETUP / "requirements-gpu.txt", []),
    (LOCKS / "promptflow.in", SETUP.parent / "inference" / "flow" / "requirements.txt", []),
]
# One file for all platforms and Python 3.11 to 3.13, without index URLs, so it installs from any index.
COMPILE = ["uv", "pip", "compile", "--quiet", "--universal", "--python-version", "3.11", "--no-emit-index-url"]
COMPILE += ["--no-annotate", "--no-header", "--generate-hashes"]


def lock(source: Path, target: Path, options: list[str]) -> None:
    """Write one lock. uv keeps the versions already in the lock, unless it upgrades."""
    draft = target.with_suffix(".draft")
    draft.write_text(target.read_text() if target.is_file() else "")
    # A folder of local wheels would add their local versions (2.13.0+cpu) to the lock.
    env = {name: value for name, value in os.environ.items() if name != "UV_FIND_LINKS"}
    command = [*COMPILE, *options, "--output-file", str(draft), str(source)]
    try:
        subprocess.run(command, check=True, env=env, stdout=subprocess.DEVNULL)
        # A line for each package, so that a change is one line, and what reads a lock needs no parser.
        draft.write_text(HEADER + re.sub(r" \\\n +", " ", draft.read_text()))
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    print(f"{target.relative_to(LOCKS.parent)}: {len(target.read_text().splitlines()) - 1} packages")


def main() -> int:
    """Write every lock."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--upgrade", action="store_true", help="take the newest versions that the inputs allow")
    args = parser.parse_args()
    try:
        for source, target, options in TARGETS:
            lock(source, target, [*options, *(["--upgrade"] if args.upgrade else [])])
    except FileNotFoundError as error:
        print(f"lock: {error.filename} is missing; `make lock` installs uv and runs this", file=sys.stderr)
        return 1
    except subprocess.CalledProcessError as error:
        return int(error.returncode)  # uv has printed the reason
    return 0


if __name__ == "__main__":
    sys.exit(main())
