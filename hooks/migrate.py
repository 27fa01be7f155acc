"""Run before and after Copier merges a newer release into a workspace: what a merge alone would lose or get wrong.

before: files and settings that the template renamed are renamed in the workspace, so that edits move along.
after:  a file that you edited and that is gone or overwritten comes back; one that you deleted goes again.

It ends with status 0 whatever happens: an update that stops half-way is worse than one that keeps less.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

# From the release that is named on, a file has another name, or a setting in a file. Never shortened: a workspace may
# be brought here from any release.
RENAMED_FILES: dict[str, dict[str, str]] = {}
RENAMED_SETTINGS: dict[str, dict[str, dict[str, str]]] = {}


def main() -> int:
    """Do the stage that the command line names, in the workspace in the current folder; return 0."""
    try:
        stage, version_from, version_to = sys.argv[1:4]
        if stage == "before":
            before(Path.cwd(), between(version_from, version_to))
        else:
            after(Path.cwd())
    except Exception as error:  # whatever it is, the update has to go on
        print(f"The update's migration did not work ({error}): compare with `git diff HEAD`.", file=sys.stderr)
    return 0


def between(version_from: str, version_to: str) -> Callable[[str], bool]:
    """Return what tells whether a release is after the one and not after the other; versions are X.Y.Z."""

    def number(version: str) -> tuple[int, ...]:
        found = re.match(r"v?(\d+)\.(\d+)\.(\d+)", version)
        return tuple(map(int, found.groups())) if found else (0, 0, 0)

    return lambda version: number(version_from) < number(version) <= number(version_to)


def before(workspace: Path, crossed: Callable[[str], bool]) -> None:
    """Rename what the template renamed, here and in the old copy that Copier compares with; note what was edited."""
    copies = old_copies(workspace)
    old = copies[0] if len(copies) == 1 else None  # to rename in the copy of another update would spoil that
    for version, files in RENAMED_FILES.items():
        for name, new in files.items() if crossed(version) else ():
            rename(workspace, old, name, new)
    for version, settings in RENAMED_SETTINGS.items():
        for name, names in settings.items() if crossed(version) else ():
            for folder in filter(None, (workspace, old)):
                rename_settings(folder / name, names)
            if (workspace / name).is_file():
                git(workspace, "add", "--", name)  # Copier takes the user's edits from the index
    note(workspace).write_text(json.dumps(edits(workspace, copies[0] if copies else None)), encoding="utf-8")


def after(workspace: Path) -> None:
    """Bring back what the user edited and the update removed or overwrote; remove what the user had removed."""
    if not note(workspace).is_file():
        return
    noted = json.loads(note(workspace).read_text(encoding="utf-8"))
    note(workspace).unlink()
    for name in noted["edited"]:
        mine = git(workspace, "show", f":2:./{name}") or git(workspace, "show", f":0:./{name}")
        file = workspace / name
        if not file.exists():
            why = "is not a part of the workspace any more; yours is kept"
        elif b"\0" in mine and file.read_bytes() != mine:
            why = "is not text, and cannot be merged; yours is kept"
        else:
            continue
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(mine)
        print(f"{name} {why}.", file=sys.stderr)
    for name in noted["deleted"]:
        (workspace / name).unlink(missing_ok=True)


def old_copies(workspace: Path) -> list[Path]:
    """Return the folder with the workspace as the old release rendered it; none where it cannot be found.

    Copier makes it before this runs, in the folder for temporary files, and does not say where. It has these answers,
    and is no repository yet. Several are equal: updates that began at the same moment.
    """
    place = git(workspace, "rev-parse", "--show-prefix").decode().strip()
    answers = (workspace / ".copier-answers.yml").read_bytes()
    copies = []
    for folder in Path(tempfile.gettempdir()).glob("*old_copy.*"):
        try:
            same = (folder / place / ".copier-answers.yml").read_bytes() == answers
        except OSError:
            continue  # another's, or gone by now
        if same and not (folder / ".git").exists():
            copies.append(folder / place)
    return copies


def rename(workspace: Path, old: Path | None, name: str, new: str) -> None:
    """Rename a file in the workspace, for git too, and in the old copy; leave one that is gone or in the way."""
    if not (workspace / name).is_file() or (workspace / new).exists():
        return
    (workspace / new).parent.mkdir(parents=True, exist_ok=True)
    git(workspace, "mv", "--", name, new)
    if old and (old / name).is_file():
        (old / new).parent.mkdir(parents=True, exist_ok=True)
        (old / name).rename(old / new)


def rename_settings(file: Path, names: dict[str, str]) -> None:
    """Rename settings of a YAML or TOML file, each at the start of a line; values and comments stay."""
    if file.is_file():
        text = file.read_bytes()
        for name, new in names.items():
            text = re.sub(rb"(?m)^(\s*)%s(?=\s*[:=])" % re.escape(name.encode()), rb"\g<1>" + new.encode(), text)
        file.write_bytes(text)


def edits(workspace: Path, old: Path | None) -> dict[str, list[str]]:
    """Return the files of the template that the user edited, and those that the user deleted.

    Without the old copy, every file in git counts as edited: rather one too many stays than one is lost.
    """
    # Each line: mode, hash, stage, tab, name; the names are relative to the workspace.
    lines = [line.split("\t", 1) for line in git(workspace, "ls-files", "--stage", "-z").decode().split("\0") if line]
    mine = {name: facts.split()[1] for facts, name in lines}
    if old is None:
        return {"edited": [*mine], "deleted": []}
    rendered = [path.relative_to(old).as_posix() for path in old.rglob("*") if path.is_file()]
    both = [name for name in rendered if name in mine and name != ".copier-answers.yml"]
    paths = "".join(f"{old / name}\n" for name in both)
    hashes = git(workspace, "hash-object", "--no-filters", "--stdin-paths", given=paths).decode().split()
    return {
        "edited": [name for name, theirs in zip(both, hashes, strict=True) if mine[name] != theirs],
        "deleted": [name for name in rendered if not (workspace / name).exists()],
    }


def note(workspace: Path) -> Path:
    """Return the file that carries what was edited from one stage to the other: git's folder, where it is in no way."""
    return workspace / git(workspace, "rev-parse", "--git-path", "copier-finetune-edits.json").decode().strip()


def git(workspace: Path, *arguments: str, given: str = "") -> bytes:
    """Run git in the workspace, and return what it says; nothing when it fails."""
    command = ["git", *arguments]
    return subprocess.run(command, cwd=workspace, input=given.encode(), capture_output=True, check=False).stdout


if __name__ == "__main__":
    sys.exit(main())
