"""What the property test draws: git settings and the location of a workspace. The user's edits are in user.py."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

ANSWERS = ".copier-answers.yml"
# One of these per line; several that belong together with a semicolon.
SETTINGS = """
core.autocrlf=true
core.autocrlf=input
core.eol=crlf
core.safecrlf=true
core.safecrlf=true;core.autocrlf=true
core.safecrlf=true;core.autocrlf=input
core.whitespace=trailing-space,tab-in-indent,blank-at-eof
core.quotePath=true
core.fileMode=false
core.ignoreCase=true
core.hooksPath={hooks}
core.hooksPath={refusing}
core.excludesFile={excludes}
core.attributesFile={attributes};filter.up.clean=tr a-z A-Z;filter.up.smudge=tr A-Z a-z
core.untrackedCache=true;core.splitIndex=true
core.trustctime=false;core.checkStat=minimal
core.bigFileThreshold=1
core.abbrev=4
core.commentChar=%
core.editor=false;core.pager=false;pager.status=true;pager.diff=less
core.logAllRefUpdates=always
feature.manyFiles=true
index.version=4
index.threads=1;index.skipHash=true
apply.whitespace=error
apply.whitespace=error-all
apply.whitespace=fix
apply.ignoreWhitespace=change
diff.noprefix=true
diff.mnemonicPrefix=true
diff.renames=copies
diff.renames=false
diff.external=false
diff.context=0;diff.interHunkContext=5
diff.algorithm=histogram;diff.indentHeuristic=false
diff.ignoreSubmodules=all;diff.submodule=log
diff.suppressBlankEmpty=true;diff.wsErrorHighlight=all
diff.relative=true
merge.conflictStyle=zdiff3
merge.conflictStyle=diff3
merge.renames=false;merge.tool=none
commit.gpgSign=true;tag.gpgSign=true;gpg.program=false
commit.gpgSign=true;gpg.format=ssh;user.signingKey=/does/not/exist
commit.template=/does/not/exist;commit.verbose=true;commit.cleanup=scissors
color.ui=always;color.status=always
column.ui=always
status.showUntrackedFiles=no
status.showUntrackedFiles=all
status.short=true;status.branch=true;status.relativePaths=false
status.renames=copies;status.showStash=true
submodule.recurse=true;fetch.recurseSubmodules=true;push.recurseSubmodules=check
rerere.enabled=true;rerere.autoUpdate=true
log.showSignature=true;log.date=iso;format.pretty=oneline
advice.statusHints=false;advice.detachedHead=false;advice.addIgnoredFile=false
i18n.commitEncoding=ISO-8859-1;i18n.logOutputEncoding=ISO-8859-1
init.defaultBranch=trunk;clone.defaultRemoteName=upstream
init.defaultBranch=größe
protocol.file.allow=never
transfer.fsckObjects=true;fetch.prune=true
user.useConfigOnly=true
safe.bareRepository=explicit
alias.add=!false;alias.st=status;help.autoCorrect=immediate
push.default=nothing;pull.rebase=true;rebase.autoStash=true
gc.auto=1;gc.autoDetach=false;maintenance.auto=true
extensions.unknown=true;some.thing=else
""".strip().splitlines()


class Entry(NamedTuple):
    """The content of a name: bytes, or the target of a link."""

    data: bytes
    link: bool = False
    executable: bool = False


Tree = dict[str, Entry]


def tree(folder: Path, but: Path | None = None) -> Tree:
    """Return the content of a folder, without git's own and without another folder."""
    found: Tree = {}
    for parent, folders, names in os.walk(folder):
        here = Path(parent)
        folders[:] = [name for name in folders if name != ".git" and here / name != but]
        for path in [here / name for name in [*names, *folders] if name != ".git"]:
            name = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[name] = Entry(os.fsencode(path.readlink()), link=True)
            elif path.is_file():
                found[name] = Entry(path.read_bytes(), executable=bool(path.stat().st_mode & 0o100))
    return found


def lf(data: bytes) -> bytes:
    return data.replace(b"\r\n", b"\n")


def is_text(data: bytes) -> bool:
    return b"\0" not in data


def lines(data: bytes) -> list[bytes]:
    """Return the lines without their ends, and without an empty one after the last."""
    found = lf(data).split(b"\n")
    return found[:-1] if found[-1] == b"" else found


def git(folder: Path, *arguments: str) -> str:
    """Run git in a folder as its user would who works around settings that forbid to commit."""
    free = ["commit.gpgSign=false", "core.hooksPath=/dev/null", "core.safecrlf=false", "commit.template="]
    options = [word for setting in free for word in ("-c", setting)]
    done = subprocess.run(["git", *options, *arguments], cwd=folder, capture_output=True, check=False)
    assert done.returncode == 0, f"git {arguments}: {done.stderr.decode(errors='replace')}"
    return done.stdout.decode(errors="surrogateescape")


def write_settings(file: Path, settings: Iterable[str], base: str) -> None:
    """Write git's configuration, and the files that it names, beside it."""
    names = {name: file.with_name(name) for name in ("hooks", "refusing", "excludes", "attributes")}
    hooks = [names["hooks"] / hook for hook in ("pre-commit", "commit-msg", "post-checkout", "post-index-change")]
    for hook in [*hooks, names["refusing"] / "prepare-commit-msg"]:
        hook.parent.mkdir(exist_ok=True)
        hook.write_text("#!/bin/sh\nexit 1\n")
        hook.chmod(0o755)
    names["excludes"].write_text(".vscode/\n*.toml\n")
    names["attributes"].write_text("*.md -text diff=none\n*.txt filter=up\n*.yaml whitespace=-trailing-space\n")
    text = [base]
    for setting in ";".join(settings).split(";") if settings else []:
        key, _, value = setting.partition("=")
        section, _, key = key.rpartition(".")
        section, _, part = section.partition(".")
        value = value.format(**names).replace("\\", "\\\\").replace('"', '\\"')
        name = f'{section} "{part}"' if part else section
        text.append(f'[{name}]\n\t{key} = "{value}"\n')
    file.write_text("".join(text))


@dataclass
class Place:
    """The location of a workspace: its folder, and the repositories whose index an update must leave alone."""

    workspace: Path
    repositories: list[Path]
    outside: Path | None = None  # a folder of the same repository with work that is not committed
    refused: bool = False

    def commit(self) -> None:
        for repository in self.repositories:
            git(repository, "add", "--all")
            git(repository, "commit", "--quiet", "--allow-empty", "--message", "As it is")


def own(base: Path, put: Callable[[Path], None]) -> Place:
    put(base / "tone")
    git(base / "tone", "init", "--quiet")
    return Place(base / "tone", [base / "tone"])


def with_blanks(base: Path, put: Callable[[Path], None]) -> Place:
    (base / "Eigene Projekte/Größe & 'Ähre'").mkdir(parents=True)
    return own(base / "Eigene Projekte/Größe & 'Ähre'", put)


def separate(base: Path, put: Callable[[Path], None]) -> Place:
    put(base / "tone")
    git(base / "tone", "init", "--quiet", f"--separate-git-dir={base.parent / 'elsewhere.git'}")
    return Place(base / "tone", [base / "tone"])


def monorepo(base: Path, put: Callable[[Path], None]) -> Place:
    put(base / "all/of it/tone")
    for name in ("other.txt", "changed.txt", "gone.txt", "of it/gone too.txt"):
        (base / "all" / name).write_text(f"{name}\n")
    git(base / "all", "init", "--quiet")
    return Place(base / "all/of it/tone", [base / "all"], base / "all")


def beside_another(base: Path, put: Callable[[Path], None]) -> Place:
    put(base / "all/other")
    place = monorepo(base, put)
    return replace(place, outside=None)


def submodule(base: Path, put: Callable[[Path], None]) -> Place:
    place = own(base / "outer", put)
    place.commit()
    git(base / "outer", "init", "--quiet")
    git(base / "outer", "submodule", "--quiet", "add", "--force", "./tone", "tone")
    git(base / "outer", "submodule", "--quiet", "absorbgitdirs")
    return Place(place.workspace, [place.workspace, base / "outer"])


def worktree(base: Path, put: Callable[[Path], None]) -> Place:
    (base / "main").mkdir()
    git(base / "main", "init", "--quiet")
    git(base / "main", "commit", "--quiet", "--allow-empty", "--message", "First")
    git(base / "main", "worktree", "add", "--quiet", "-b", "tone", "../tone")
    put(base / "tone")
    return Place(base / "tone", [base / "tone", base / "main"])


def ignored(base: Path, put: Callable[[Path], None]) -> Place:
    """In a folder that an outer repository ignores, and no repository of its own."""
    put(base / "outer/build/tone")
    (base / "outer/.gitignore").write_text("/build/\n")
    git(base / "outer", "init", "--quiet")
    return Place(base / "outer/build/tone", [base / "outer"], refused=True)


def own_in_ignored(base: Path, put: Callable[[Path], None]) -> Place:
    place = ignored(base, put)
    git(place.workspace, "init", "--quiet")
    return Place(place.workspace, [place.workspace, base / "outer"])


PLACES = {own: 8, with_blanks: 3, separate: 1, monorepo: 8, beside_another: 2, submodule: 3, worktree: 3}
PLACES |= {ignored: 1, own_in_ignored: 3}
