"""List the files of this workspace that differ from the template's release.

Your rows in dataset/ and files that the template does not have are not compared. Nothing is changed.
"""

from __future__ import annotations

import argparse
import difflib
import importlib.util
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from visible import visible

WORKSPACE = Path(__file__).resolve().parents[1]
ANSWERS = ".copier-answers.yml"


class DriftError(Exception):
    """Why the comparison failed, and what to do."""


def render(folder: Path, answers: Path) -> None:
    """Render the workspace's release with its answers into a folder. Raises DriftError."""
    if importlib.util.find_spec("copier"):
        copier = [sys.executable, "-m", "copier"]
    elif found := shutil.which("copier"):
        copier = [found]
    else:
        raise DriftError("Copier is not installed: run `python -m pip install -r setup/requirements-copier.txt`.")
    if not answers.is_file():
        raise DriftError(f"{answers.name} is missing, so the release is unknown: run `git checkout {answers.name}`.")
    (folder / ANSWERS).write_bytes(answers.read_bytes())
    options = ["--vcs-ref", ":current:", "--defaults", "--overwrite", "--skip-tasks", "--quiet"]
    command = [*copier, "recopy", *options, str(folder)]
    done = subprocess.run(command, cwd=WORKSPACE, capture_output=True, encoding="utf-8", errors="replace", check=False)
    if done.returncode != 0:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        raise DriftError(f"the template cannot be rendered ({reason}): check _src_path and _commit in {answers.name}.")


def differences(template: Path) -> dict[str, str]:
    """Return «changed» or «missing» for each file that differs from the template."""
    found = {}
    for path in sorted(path for path in template.rglob("*") if path.is_file()):
        name = path.relative_to(template).as_posix()
        mine = WORKSPACE / name
        if name == ANSWERS or re.fullmatch(r"dataset/[^/]+\.jsonl", name):
            continue
        if not mine.is_file():
            found[name] = "missing"
        elif lines(mine) != lines(path):
            found[name] = "changed"
    return found


def lines(path: Path) -> list[str]:
    """Return the lines of a text file with any line ends; of other files, what can be decoded."""
    return path.read_text(encoding="utf-8", errors="backslashreplace").splitlines(keepends=True)


def main() -> int:
    """Parse the command line, compare, and print the differences."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--diff", action="store_true", help="show the lines too")
    parser.add_argument("--strict", action="store_true", help="exit with status 1 if a file differs, or on an error")
    parser.add_argument("--answers-file", type=Path, default=ANSWERS, help="(default: %(default)s)")
    args = parser.parse_args()
    try:
        with tempfile.TemporaryDirectory() as temporary:
            template = Path(temporary) / WORKSPACE.name
            template.mkdir()
            answers = WORKSPACE / args.answers_file
            render(template, answers)
            release = re.search(r"^_commit: (.*)", answers.read_text(encoding="utf-8"), re.MULTILINE)
            found = differences(template)
            if found:
                print(f"These files differ from the template's release {release[1] if release else ''}:")
            else:
                print("No file differs from the template's release.")
            for name, how in found.items():
                print(f"  {how}  {visible(name)}")
                if args.diff and how == "changed":
                    theirs, mine = lines(template / name), lines(WORKSPACE / name)
                    shown = difflib.unified_diff(theirs, mine, f"template/{name}", f"workspace/{name}")
                    print(visible("".join(line if line.endswith("\n") else f"{line}\n" for line in shown)))
    except DriftError as error:
        print(f"drift: {visible(error)}", file=sys.stderr)
        return int(args.strict)
    return int(args.strict and bool(found))


if __name__ == "__main__":
    sys.exit(main())
