"""The renders of a release that an update compares: the one that Copier has left, or one that is made here."""

from __future__ import annotations

import contextlib
import io
import os
import re
import shutil
import stat
import sys
import tempfile
from collections.abc import Collection
from pathlib import Path
from typing import Any

import yaml


def left_by_copier(workspace: Path, answers_file: str, prefix: str) -> Path | None:
    """Return Copier's own render of the old release; None if it cannot be told.

    Copier renders it before an update into the folder for temporary files, but does not pass the path: it is the folder
    with the same answers that is not a repository yet. If there are several, one may be what a killed update left,
    incomplete. `prefix` is the workspace's path in its repository.
    """
    answers, found = recorded(workspace / answers_file), []
    for folder in Path(tempfile.gettempdir()).glob("*old_copy.*"):
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            rendered = folder / prefix
            # a pipe in the place of the file would hold this for ever
            if not is_own(folder) or not (rendered / answers_file).is_file():
                continue
            if recorded(rendered / answers_file) == answers and not (folder / ".git").exists():
                found.append(rendered)
    return found[0] if len(found) == 1 else None


def render(
    template: str, release: str, folder: Path, answers: Path, name: str, without: Collection[str], is_local: bool
) -> dict[str, Any]:
    """Render a release into a folder, with the answers in a file except some; return all answers.

    `name` is the path of that file in a workspace, and `is_local` says that the template is Copier's clone.
    """
    from copier import run_copy
    from plumbum import local

    shutil.rmtree(folder, ignore_errors=True)
    file = folder / name
    file.parent.mkdir(parents=True)
    given = entries(answers.read_text(encoding="utf-8"))
    kept = "".join(text for question, text in given.items() if question not in without)
    file.write_text(kept, encoding="utf-8", newline="\n")
    options: dict[str, Any] = {"defaults": True, "overwrite": True, "quiet": True, "skip_tasks": True}
    # the user's git settings and hooks must not apply to the clone
    plain = {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"} if is_local else {}
    with contextlib.redirect_stderr(io.StringIO()), local.env(**plain):
        worker = run_copy(template, folder, answers_file=name, vcs_ref=release, **options)
    # the workspace's file has the template's address; this one has its current folder
    rendered = entries(file.read_text(encoding="utf-8"))
    rendered |= {question: text for question, text in given.items() if question.startswith("_")}
    file.write_text("".join(rendered.values()), encoding="utf-8", newline="\n")
    return dict(worker.answers.combined)


def recorded(file: Path) -> dict[str, Any]:
    """Return the answers that are recorded in a file."""
    answers: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
    return answers


def entries(answers: str) -> dict[str, str]:
    """Return the text of each answer by its name; the text above them counts as one, too."""
    return {text.partition(":")[0]: text for text in re.split(r"(?m)^(?=\S)", answers)}


def is_own(folder: Path) -> bool:
    """Return whether this user made a folder, in which then nobody else can put anything. On Windows, each has one."""
    about = folder.lstat()
    return stat.S_ISDIR(about.st_mode) and (sys.platform == "win32" or about.st_uid == os.geteuid())


def files(folder: Path) -> set[str]:
    """Return the names of all files and links below a folder, without those of a repository."""
    found = set()
    for parent, folders, names in os.walk(folder):
        if ".git" in folders:
            folders.remove(".git")
        links = [name for name in folders if (Path(parent) / name).is_symlink()]
        found |= {(Path(parent) / name).relative_to(folder).as_posix() for name in [*names, *links]}
    return found
