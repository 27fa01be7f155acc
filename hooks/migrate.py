"""Run before and after Copier updates a workspace: copy the user's files first, and merge them again at the end.

before: refuse updates that could not succeed, while nothing is changed; then copy the files into git's own folder.
after:  merge each file from the old render, the user's copy and the new render (merging.py), whatever Copier did to it;
        then print what was kept, what conflicts, and how to undo the update.

Runs with Copier's Python and needs only Copier and its dependencies. It exits with a status above 0 only if the update
must not continue.
"""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Collection, Iterator
from dataclasses import replace
from datetime import UTC, datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

sys.dont_write_bytecode = True  # new files in the template's folder would make it count as uncommitted
sys.path.insert(0, str(Path(__file__).resolve().parent))
from merging import Entry, ended_as, follow, lf, merge, read  # noqa: E402 - Copier runs this file with -I
from refusals import Refusal, first_line, refuse, try_git  # noqa: E402
from renames import RENAMED_FILES, RENAMED_SETTINGS, SPLIT_FILES  # noqa: E402
from rendering import files, left_by_copier, recorded, render  # noqa: E402
from repository import TAB, Repository, visible  # noqa: E402

OWNED = ("dataset/*.jsonl",)  # the user's from the first day, as `_skip_if_exists` of copier.yml says
KEPT = 3  # safety copies
UNDO = "setup/undo_update.py"


def main() -> int:
    """Run the stage given on the command line, for the workspace in the current folder."""
    stage, answers_file, template, given = sys.argv[1:5]
    update = Update(Path.cwd(), answers_file, Path(template))
    try:
        if stage == "before":
            interrupted = update.pending.exists() and update.has_begun()
            refuse(update.repository, answers_file, update.names_of_template(), update.undo if interrupted else None)
            update.save()
        else:
            update.finish(given.split())
    except Refusal as refusal:
        print(f"The update did not begin, and nothing was changed: {visible(refusal)}", file=sys.stderr)
        return 1
    except Exception as error:  # after any error the user must know the state of the workspace
        where = f"undo it with `python {update.undo}`" if stage == "after" else "nothing was changed"
        print(f"The update stopped ({visible(first_line(error))}): {where}.", file=sys.stderr)
        return 1
    return 0


class Update:
    """One update of a workspace, and its copies."""

    def __init__(self, workspace: Path, answers_file: str, template: Path) -> None:
        self.workspace, self.answers_file, self.template = workspace, answers_file, template
        self.repository = Repository(workspace)
        # a repository may hold several workspaces
        name = self.repository.prefix.strip("/").replace("/", "!") or "workspace"
        self.copies = Path(self.repository.path("--absolute-git-dir")) / "copier-finetune" / name
        self.pending = self.copies / "pending"

    @property
    def folder(self) -> Path:
        """The folder of this update's safety copy."""
        return self.copies / self.pending.read_text(encoding="utf-8")

    @property
    def undo(self) -> Path:
        """The copied script that undoes the update: the workspace's own may be older, or missing."""
        with contextlib.suppress(OSError):
            return self.folder / "undo_update.py"
        return Path(UNDO)

    # ---- before

    def has_begun(self) -> bool:
        """Return whether the recorded update changed anything: it may have failed at a question, before any change."""
        state = json.loads((self.folder / "state.json").read_text(encoding="utf-8"))
        return any(read(self.workspace, name) != read(self.folder / "mine", name) for name in state["names"])

    def save(self) -> None:
        """Copy the user's files and the old render into a folder inside git's own folder."""
        old = self.old_render()
        try_git(old)
        name = datetime.now(UTC).strftime("%Y-%m-%d-%H%M%S-%f")
        folder = self.copies / f".{name}"
        shutil.copytree(old, folder / "old", symlinks=True, ignore=shutil.ignore_patterns(".git"))
        defaults = self.recorded_defaults()
        shutil.rmtree(self.copies / "old", ignore_errors=True)
        names = set(files(folder / "old")) | self.names_of_template() | {self.answers_file}
        names |= {f"{name}.rej" for name in names}  # Copier creates these, and leaves those that git does not list
        for path in sorted(names):
            source, target = self.workspace / path, folder / "mine" / path
            if source.is_symlink() or source.is_file():
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
        state = {
            "prefix": self.repository.prefix,
            "names": sorted(names),
            "index": self.repository.listed("ls-files", "--stage", "-z"),
            "gone": Repository(self.repository.top).listed("ls-files", "--deleted", "-z"),
            "defaults": defaults,
        }
        (folder / "state.json").write_text(json.dumps(state), encoding="utf-8")
        shutil.copy2(self.template / "template" / UNDO, folder / "undo_update.py")
        folder.rename(self.copies / name)
        self.pending.write_text(name, encoding="utf-8")

    def names_of_template(self) -> set[str]:
        """Return all names that the new template may write, for any answers."""
        sources = files(self.template / "template")
        return {name.removesuffix(".jinja") for name in sources if "{" not in name}

    def old_render(self) -> Path:
        """Return the workspace as rendered by the old release. Raises Refusal if that is impossible."""
        if found := left_by_copier(self.workspace, self.answers_file, self.repository.prefix):
            return found
        self.render_old()
        return self.copies / "old"

    def render_old(self, without: Collection[str] = ()) -> dict[str, Any]:
        """Render the old release without some answers; return all answers. Raises Refusal if that is impossible."""
        answers = self.answers()
        try:
            return self.render(str(answers["_src_path"]), str(answers["_commit"]), self.copies / "old", without)
        except Exception as error:
            raise Refusal(
                f"the old release cannot be rendered ({first_line(error)}): check that _src_path and _commit in "
                f"{self.answers_file} still exist."
            ) from error

    def recorded_defaults(self) -> dict[str, Any]:
        """Return the answers that were defaults: 0.1.0 and 0.1.1 recorded every default when all questions were asked.

        They are the ones that the old release gives again if they are left out.
        """
        answers = self.answers()
        if not answers.get("advanced"):
            return {}
        questions = yaml.safe_load((self.template / "copier.yml").read_text(encoding="utf-8"))
        # a default that depends on other answers, and is no longer recorded
        names = [name for name in answers if f"or {name} is defined" in str(questions.get(name))]
        defaults = self.render_old(without=names) if names else {}
        return {name: answers[name] for name in names if defaults.get(name) == answers[name]}

    # ---- after

    def finish(self, given: list[str]) -> None:
        """Merge every file from its three versions, and print the result. `given` are answers on the command line."""
        folder = self.folder
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        said: list[str] = []
        conflicts: list[str] = []
        answers = self.answers()
        stale = {name: old for name, old in state["defaults"].items() if answers.get(name) == old and name not in given}
        if stale or self.is_edited(folder, state):  # otherwise there is nothing to merge, and Copier's result is right
            release = Repository(self.template).path("HEAD")
            # Copier's own render is deleted by now
            answers = self.render(str(self.template), release, folder / "new", without=stale)
            self.repository.restore_index(state["index"])
            said, conflicts = self.merge_files(folder, state, folder / "new")
        changed = [f"{name} {old} -> {answers[name]}" for name, old in stale.items() if answers[name] != old]
        if changed:
            said.append(f"Values that you never chose follow the new answers: {', '.join(changed)}.")
        self.repository.put_back_others(state)
        for line in said:
            print(visible(line), file=sys.stderr)
        (folder / "done").touch()
        self.pending.unlink()
        for older in sorted(path for path in self.copies.iterdir() if (path / "done").exists())[:-KEPT]:
            shutil.rmtree(older, ignore_errors=True)
        found = f"{len(conflicts)} conflicts, which `git diff` shows" if conflicts else "no conflict"
        print(f"The update ended with {found}. `python {UNDO}` undoes it.", file=sys.stderr)

    @staticmethod
    def is_edited(folder: Path, state: dict[str, Any]) -> bool:
        """Return whether the user changed any file of the template, or git does not track all of them."""
        tracked = {line.partition(TAB)[2] for line in state["index"]}
        return any(
            read(folder / "mine", name) != (old := read(folder / "old", name)) or (old and name not in tracked)
            for name in state["names"]
        )

    def answers(self) -> dict[str, Any]:
        """Return the recorded answers of the workspace."""
        return recorded(self.workspace / self.answers_file)

    def render(self, template: str, release: str, folder: Path, without: Collection[str] = ()) -> dict[str, Any]:
        """Render a release into a folder, with the workspace's answers except some; return all answers."""
        answers = self.workspace / self.answers_file
        is_local = template == str(self.template)
        return render(template, release, folder, answers, self.answers_file, without, is_local)

    def merge_files(self, folder: Path, state: dict[str, Any], new: Path) -> tuple[list[str], list[str]]:
        """Write every file of the update; return the notes to print, and the names with conflicts."""
        renames = dict(self.renames(files(folder / "old"), files(new)))
        said, conflicts = [], []
        left, edited_there = self.follow_edits(folder, new, renames)
        for name in sorted({*state["names"], *files(new)}):
            if name in renames.values():
                continue  # handled with its old name
            target = renames.get(name, name)
            old, mine = read(folder / "old", name), left.get(name) or read(folder / "mine", name)
            theirs = edited_there.get(target) or read(new, target)
            own = read(folder / "mine", target) if target != name else None
            if mine is None and own:
                mine, own = own, None  # the user renamed it before the template did
            if any(fnmatch(name, pattern) for pattern in OWNED) and mine:
                theirs = mine
            outcome = merge(target, old, mine, theirs, RENAMED_SETTINGS.get(target))
            if own and outcome.entry:  # the user has a file with the new name
                edited, entry = outcome.entry != read(new, target), outcome.entry
                outcome = merge(target, None, own, entry)
                if edited and not outcome.conflict and not own.same(entry):
                    self.write(name, read(folder / "mine", name))
                    self.write(target, own)
                    said.append(
                        f"{name} is now called {target}, and you already have a file with that name: both of your "
                        "files are kept; merge them yourself."
                    )
                    continue
            if target != name:
                self.write(name, None)
            self.write(target, outcome.entry)
            said += outcome.notes
            if outcome.conflict:
                conflicts.append(target)
                self.repository.mark_conflict(target, outcome.conflict)
        return said, conflicts

    @staticmethod
    def follow_edits(folder: Path, new: Path, renames: dict[str, str]) -> tuple[dict[str, Entry], dict[str, Entry]]:
        """Apply edits where the template moved code; return the rest of the old files, and the new files."""
        left: dict[str, Entry] = {}
        edited: dict[str, Entry] = {}
        for name in sorted(files(folder / "old")):
            old, mine = read(folder / "old", name), read(folder / "mine", name)
            if not (name.endswith(".py") and old and mine and old.is_text and mine.is_text) or mine.same(old):
                continue
            others = (renames.get(name, name), *SPLIT_FILES.get(name, ()))
            taken = {other: edited.get(other) or read(new, other) for other in others}
            texts = {other: lf(entry) for other, entry in taken.items() if entry and entry.is_text}
            rest, texts = follow(lf(old), lf(mine), texts)
            left[name] = ended_as(mine, replace(mine, data=rest))
            edited |= {
                other: replace(entry, data=texts[other]) for other, entry in taken.items() if entry and other in texts
            }
        return left, edited

    @staticmethod
    def renames(old: set[str], new: set[str]) -> Iterator[tuple[str, str]]:
        """Yield the files that the template renamed between the two renders, also across several releases."""
        for name in old - new:
            target = name
            while target in RENAMED_FILES and target not in new:
                target = RENAMED_FILES[target]
            if target != name and target in new and target not in old:
                yield name, target

    def write(self, name: str, entry: Entry | None) -> None:
        """Write an entry atomically."""
        path = self.workspace / name
        if entry == read(self.workspace, name):
            return
        if path.is_dir() and not path.is_symlink():
            return  # the user has a folder there
        if entry is None:
            path.unlink(missing_ok=True)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.new")
        unfinished.unlink(missing_ok=True)
        if entry.is_link:
            unfinished.symlink_to(entry.data.decode())
        else:
            unfinished.write_bytes(entry.data)
            mode = (path if path.is_file() else unfinished).stat().st_mode & 0o666
            unfinished.chmod(mode | (mode >> 2 & 0o111 if entry.executable else 0))
        unfinished.replace(path)


if __name__ == "__main__":
    sys.exit(main())
