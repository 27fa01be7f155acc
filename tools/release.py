"""Cut a release: `make release VERSION=1.2.0`. docs/how-to/release.md describes it and the steps after it.

Run it on a clean main, after the tests. It makes two commits and a tag in this clone; nothing is pushed.
"""

from __future__ import annotations

import argparse
import datetime
import re
import subprocess
import sys
from pathlib import Path

from packaging.version import InvalidVersion, Version

ROOT = Path(__file__).resolve().parents[1]


class ReleaseError(Exception):
    """Why the release failed, and what to do."""


def check(root: Path, version: str) -> None:
    """Raise ReleaseError unless this is a clean main, and the version is new and has a changelog entry."""
    try:
        new = Version(version)
    except InvalidVersion as error:
        raise ReleaseError(f"{version!r} is no version: type VERSION=1.2.0") from error
    if str(new) != version or not re.fullmatch(r"\d+\.\d+\.\d+((a|b|rc)\d+)?", version):
        raise ReleaseError(f"{version} is not written as X.Y.Z or X.Y.Zrc1: type VERSION=1.2.0")
    if git(root, "branch", "--show-current") != "main":
        raise ReleaseError("this is not the branch main: git switch main")
    if git(root, "status", "--porcelain"):
        raise ReleaseError("there are changes that are not committed: commit or stash them")
    released = [Version(tag) for tag in git(root, "tag", "--list", "v*").split()]
    released += [Version(tag) for tag in re.findall(r"^(v\S+):", releases(root).read_text("utf-8"), re.MULTILINE)]
    if released and new <= max(released):
        raise ReleaseError(f"{version} is not newer than {max(released)}: type a higher VERSION")
    entry = changelog(root).read_text("utf-8").partition("## Unreleased\n")[2].partition("\n## ")[0]
    if "*Update impact*:" not in entry or not re.search(r"^- ", entry, re.MULTILINE):
        raise ReleaseError("CHANGELOG.md says under «Unreleased» not what is new, or has no *Update impact*: write it")


def cut(root: Path, version: str, day: str) -> None:
    """Set the version of the changelog entry, commit and tag it, then add the commit to tests/update/releases.yml.

    A pre-release leaves the entry under «Unreleased», for the final release.
    """
    if not Version(version).is_prerelease:
        text = changelog(root).read_text("utf-8")
        entry = f"## Unreleased\n\n*Update impact*: none.\n\n## {version} ({day})\n"
        changelog(root).write_text(text.replace("## Unreleased\n", entry, 1), encoding="utf-8")
        git(root, "commit", "--quiet", "--all", "--message", f"Release {version}")
    git(root, "tag", "--annotate", f"v{version}", "--message", f"Release {version}")
    lines = releases(root).read_text("utf-8").replace("{}\n", "")
    line = f'v{version}: "{git(root, "rev-parse", "HEAD")}"\n'  # quoted: YAML reads some hashes as numbers
    releases(root).write_text(lines + line, encoding="utf-8")
    git(root, "commit", "--quiet", "--all", "--message", f"Test updates from {version}")


def changelog(root: Path) -> Path:
    """Return the path of the changelog."""
    return root / "CHANGELOG.md"


def releases(root: Path) -> Path:
    """Return the path of the list of releases that the update tests read."""
    return root / "tests" / "update" / "releases.yml"


def git(root: Path, *arguments: str) -> str:
    """Run git, and return its output. Raises ReleaseError with git's message if it fails."""
    done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise ReleaseError(f"git {arguments[0]} did not work: {done.stderr.strip()}")
    return done.stdout.strip()


def main() -> int:
    """Check, and unless --check is given, cut the release."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("version", help="PEP 440, as X.Y.Z")
    parser.add_argument("--check", action="store_true", help="change nothing")
    args = parser.parse_args()
    try:
        check(ROOT, args.version)
        if not args.check:
            cut(ROOT, args.version, datetime.datetime.now(tz=datetime.UTC).date().isoformat())
            print(f"Release {args.version} is here. Next:\n  git push origin main v{args.version}")
    except ReleaseError as error:
        print(f"release: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
