"""Undo the last `copier update` of this workspace: files and git index are as they were before it.

Only the files of the update change. Their current content is copied first, so this can be undone too. The copies of
the last three updates are in git's own folder.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path


class UndoError(Exception):
    """Why nothing was undone, and what to do."""


def undo(workspace: Path) -> None:
    """Undo the newest update. Raises UndoError."""
    copies = copies_of(workspace)
    pending = copies / "pending"
    names = sorted(path.name for path in copies.glob("[0-9]*") if not (path / "undone").exists())
    if pending.exists():
        names = [pending.read_text(encoding="utf-8")]
    if not names:
        raise UndoError(
            "there is no update to undo: the last three are kept, in this repository only; `git log` has older states."
        )
    copy = copies / names[-1]
    state = json.loads((copy / "state.json").read_text(encoding="utf-8"))
    touched = {*state["names"], *files(copy / "new"), *files(copy / "mine")}
    now = copies / f"undone-{datetime.now(UTC):%Y-%m-%d-%H%M%S-%f}"
    for name in sorted(touched):
        put(workspace / name, now / name)
    for name in sorted(touched):
        put(copy / "mine" / name, workspace / name)
    restore_index(workspace, state)
    if pending.exists():
        delete_again(workspace, state["gone"])
    (copy / "undone").touch()
    pending.unlink(missing_ok=True)
    print(f"The update of {names[-1][:10]} is undone. The previous content of these files is in {now}.")
    print("Next: git status")


def copies_of(workspace: Path) -> Path:
    """Return the folder with the copies made by the updates of this workspace. Raises UndoError."""
    folder = git(workspace, "rev-parse", "--absolute-git-dir").rstrip("\n")
    prefix = git(workspace, "rev-parse", "--show-prefix").rstrip("\n")
    return Path(folder) / "copier-finetune" / (prefix.strip("/").replace("/", "!") or "workspace")


def put(source: Path, target: Path) -> None:
    """Copy a file or link to a target; delete the target if the source does not exist."""
    if target.is_dir() and not target.is_symlink():
        return
    there = source.is_file() or source.is_symlink()
    unfinished = target.with_name(f".{target.name}.new")  # an interrupted update may have left one
    for path in (unfinished,) if there else (unfinished, target):
        with contextlib.suppress(FileNotFoundError, NotADirectoryError):
            path.unlink()
    if not there:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy2(source, unfinished, follow_symlinks=False)
    unfinished.replace(target)


def restore_index(workspace: Path, state: dict[str, list[str]]) -> None:
    """Restore the workspace's part of git's index from before the update."""
    prefix = state["prefix"]
    before = {line.partition("\t")[2]: line.split()[:3] for line in state["index"]}
    lines = []
    # for git, a file of another size has changed, even if only the line ends differ: make git compare it again
    written = {*git(workspace, "diff-files", "--name-only", "--relative", "-z").split("\0")}
    for line in git(workspace, "ls-files", "--stage", "-z").split("\0"):
        name = line.partition("\t")[2]
        if name and before.get(name) == line.split()[:3] and name not in written:
            del before[name]  # unchanged
        elif name:
            lines.append(f"0 {'0' * 40}\t{prefix}{name}")
    lines += [f"{mode} {digest} {stage}\t{prefix}{name}" for name, (mode, digest, stage) in before.items()]
    git(workspace, "update-index", "-z", "--index-info", given="".join(f"{line}\0" for line in lines))


def delete_again(workspace: Path, names: list[str]) -> None:
    """Delete files that were deleted before the update, and that Copier restored from git but did not delete again."""
    top = Path(git(workspace, "rev-parse", "--show-toplevel").rstrip("\n"))
    for name in names:
        if (top / name).is_file():
            staged = git(top, "ls-files", "--stage", "-z", "--", f":(literal){name}").split(" ")[1:2]
            if staged == [git(top, "hash-object", "--", name).strip()]:  # the same as in git, unchanged since
                (top / name).unlink()


def files(folder: Path) -> set[str]:
    """Return the names of all files and links below a folder."""
    found = folder.rglob("*") if folder.is_dir() else []
    return {path.relative_to(folder).as_posix() for path in found if path.is_symlink() or path.is_file()}


def git(workspace: Path, *arguments: str, given: str = "") -> str:
    """Run git in the workspace, and return its output. Raises UndoError."""
    done = subprocess.run(
        ["git", "-c", "core.quotePath=false", *arguments],
        cwd=workspace,
        input=given.encode(errors="surrogateescape"),
        capture_output=True,
        check=False,
    )
    if done.returncode != 0:
        reason = done.stderr.decode(errors="replace").strip().partition("\n")[0]
        raise UndoError(f"git {arguments[0]} failed in {workspace} ({reason}): fix that and try again.")
    return done.stdout.decode(errors="surrogateescape")


def main() -> int:
    """Parse the command line, and undo the last update."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=None, help="(default: the one that contains this script)")
    args = parser.parse_args()
    here = Path(__file__).resolve()
    workspace = args.workspace or (here.parents[1] if here.parent.name == "setup" else Path.cwd())
    try:
        undo(workspace)
    except UndoError as error:
        # git's own words may have names of files; the script is copied alone, so it imports no other
        text = "".join(one if one.isprintable() else f"\\u{ord(one):04x}" for one in str(error))
        print(f"undo_update: {text}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
