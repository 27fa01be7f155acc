"""Why an update does not begin: everything that would lose an edit or stop Copier half-way, before any change."""

from __future__ import annotations

import os
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from repository import Repository


class Refusal(Exception):  # noqa: N818 - not an error
    """Why the update does not begin, and what to do, in one sentence."""


def refuse(repository: Repository, answers_file: str, names: set[str], undo: Path | None) -> None:
    """Raise Refusal if the update would lose something or could not finish.

    `names` are those that the template may write; `undo` is the script that undoes an interrupted update, None if there
    is none.
    """
    if not repository.git("ls-files", "--", answers_file):
        raise Refusal(
            f"git does not track {answers_file}, so nothing could be restored: run `git init` in the workspace unless "
            "it is part of a larger repository, then `git add -A` and `git commit`."
        )
    if not repository.git("rev-parse", "--verify", "--quiet", "HEAD"):
        raise Refusal("the repository has no commit yet: run `git add -A` and `git commit`.")
    if undo:
        raise Refusal(f"an earlier update was interrupted: undo it with `python {undo}`, then try again.")
    hidden = [line[2:] for line in repository.listed("ls-files", "-v", "-z") if line.startswith("S ")]
    if hidden:
        raise Refusal(f"the checkout is sparse ({hidden[0]} is missing): run `git sparse-checkout disable`.")
    for line in Repository(repository.top).listed("status", "--porcelain", "--ignored", "-z"):
        if line.startswith(("?? ", "!! ")) and line.endswith(".rej"):
            raise Refusal(
                f"Copier would mistake {line[3:]} for its own patch, reset the file next to it, and delete it: move it "
                "out of the repository, or delete it."
            )
    lock = repository.folder / repository.path("--git-path", "index.lock")
    for _ in range(20):  # an editor may hold it for a moment
        if not lock.exists():
            break
        time.sleep(0.25)
    else:
        raise Refusal(f"another program uses the repository: end it, or delete {lock} if there is none.")
    for name in sorted(names):
        path = repository.folder / name
        if path.is_dir() and not path.is_symlink():
            raise Refusal(f"{name} is a folder, and the template has a file with that name: rename yours.")
        for parent in list(Path(name).parents)[:-1]:
            path = repository.folder / parent
            if path.is_symlink():
                raise Refusal(
                    f"{parent} is a link, and Copier does not write through links: move the folder itself there, and "
                    "put a link to it where it is now."
                )
            if path.exists() and not path.is_dir():
                raise Refusal(f"{parent} is a file, and the template has a folder with that name: rename yours.")


def try_git(rendered: Path) -> None:
    """Commit a render in another folder, as Copier does next. Raises Refusal if a setting or a hook prevents it."""
    who = {f"GIT_{role}_{fact}": "copier" for role in ("AUTHOR", "COMMITTER") for fact in ("NAME", "EMAIL")}
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        copy = shutil.copytree(rendered, Path(folder) / "copy", symlinks=True)
        for command, to_do in (
            ("init --quiet", "check init.templateDir in git's settings, and try again."),
            ("add .", "run `git config --global core.safecrlf warn`, and try again."),
            (
                "commit --quiet --message=Rendered --no-gpg-sign --no-verify",
                "a hook from git's core.hooksPath or init.templateDir forbids it; allow it, and try again.",
            ),
        ):
            done = subprocess.run(
                ["git", *command.split()], cwd=copy, env=os.environ | who, capture_output=True, check=False
            )
            if done.returncode != 0:
                reason = first_line(OSError(done.stderr.decode(errors="replace")))
                raise Refusal(f"`git {command.split()[0]}` fails in Copier's temporary folder ({reason}): {to_do}")


def first_line(error: Exception) -> str:
    """Return the first line of an error's message."""
    return (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".:")
