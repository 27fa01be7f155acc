"""Merge one file in an update: from the old render, the user's file, and the new render.

Copier's own merge uses `git apply`, which fails with some git settings and some ignored files. This one compares the
three versions and merges text with `git merge-file`, independently of the workspace's location and git's settings.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from codecs import BOM_UTF8
from dataclasses import dataclass, field, replace
from difflib import SequenceMatcher
from pathlib import Path

LABELS = ("before updating", "last update", "after updating")  # as Copier names the sides of a conflict
SETTINGS = (".yaml", ".yml", ".toml")  # files in which a value of the user can differ from a new default


@dataclass(frozen=True)
class Entry:
    """The content under a name: a file's bytes, or a link's target."""

    data: bytes
    is_link: bool = False
    executable: bool = False

    @property
    def is_text(self) -> bool:
        """Whether it can be merged line by line."""
        return not self.is_link and b"\0" not in self.data

    @property
    def crlf(self) -> bool:
        """Whether it has Windows line ends."""
        return self.is_text and b"\r\n" in self.data

    def same(self, other: Entry) -> bool:
        """Return whether two entries have the same text, apart from line ends."""
        return self.is_link == other.is_link and lf(self) == lf(other)


@dataclass
class Outcome:
    """The entry after the update (None: nothing), the notes to print, and the sides of a conflict."""

    entry: Entry | None
    notes: list[str] = field(default_factory=list)
    conflict: tuple[bytes | None, bytes, bytes] | None = None  # base, the user's, the template's


def lf(entry: Entry) -> bytes:
    """Return the bytes with Unix line ends and without a byte order mark."""
    return entry.data.removeprefix(BOM_UTF8).replace(b"\r\n", b"\n") if entry.is_text else entry.data


def read(folder: Path, name: str) -> Entry | None:
    """Return the entry under a name in a folder; None if there is nothing or a folder."""
    path = folder / name
    if path.is_symlink():
        return Entry(str(path.readlink()).encode(), is_link=True)
    if path.is_file():
        return Entry(path.read_bytes(), executable=bool(path.stat().st_mode & 0o100))
    return None


def merge(
    name: str, old: Entry | None, mine: Entry | None, new: Entry | None, names: dict[str, str] | None = None
) -> Outcome:
    """Return the outcome for `name` after the update. `names` are settings that the template renamed: old → new."""
    if mine is None or (old and mine == old):
        untouched = mine is not None or old is None
        return Outcome(new if untouched else None)
    if new is None:
        kept = Outcome(mine)
        same_mark = old and mine.data.startswith(BOM_UTF8) == old.data.startswith(BOM_UTF8)
        if old and mine.same(old) and same_mark and mine.executable == old.executable:
            kept.entry = None  # only line ends differ: not an edit
        elif old:
            kept.notes.append(
                f"{name} is no longer part of the workspace; yours is kept: delete it if you do not need it."
            )
        return kept
    mode = mine.executable if not old or mine.executable != old.executable else new.executable
    if old and mine.same(old):
        return Outcome(replace(ended_as(mine, new), executable=mode))
    if mine.same(new) or (old and new.same(old)):
        return Outcome(replace(mine, executable=mode))
    if not (mine.is_text and new.is_text and (old is None or old.is_text)):
        return Outcome(
            mine, [f"{name} is not text and cannot be merged; yours is kept, without the template's changes."]
        )
    base, ours, theirs = lf(old) if old else b"", lf(mine), lf(new)
    notes: list[str] = []
    if old and name.endswith(SETTINGS):
        if names:
            base, ours = renamed(base, names, theirs), renamed(ours, names, theirs)
        base, theirs, values = keep_values(base, ours, theirs)
        notes = [f"{name}: {value}." for value in values]
    data, conflicts = three_way(base, ours, theirs)
    if conflicts:
        data_beside, conflicts_beside = three_way(base, *beside(base, ours, theirs))
        if not conflicts_beside:
            data, conflicts = data_beside, False
    outcome = Outcome(replace(ended_as(mine, Entry(data)), executable=mode), notes)
    if conflicts:
        outcome.conflict = (lf(old) if old else None, lf(mine), lf(new))
        outcome.notes.append(
            f"{name} was changed by you and by the template: resolve the conflict that is marked in it."
        )
    return outcome


def ended_as(mine: Entry, new: Entry) -> Entry:
    """Return the new text with line ends and byte order mark like the user's."""
    if not new.is_text:
        return new
    data = lf(new).replace(b"\n", b"\r\n") if mine.crlf else lf(new)
    return replace(new, data=BOM_UTF8 + data if mine.data.startswith(BOM_UTF8) else data)


def three_way(base: bytes, ours: bytes, theirs: bytes) -> tuple[bytes, bool]:
    """Merge three texts with `git merge-file`; return the result, and whether it has conflicts."""
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder) / name for name in ("ours", "base", "theirs")]
        for file, data in zip(files, (ours, base, theirs), strict=True):
            file.write_bytes(data)
        labels = [word for label in LABELS for word in ("-L", label)]
        command = ["git", "-c", "merge.conflictStyle=merge", "merge-file", "-p", *labels, *map(str, files)]
        done = subprocess.run(command, capture_output=True, check=False)
    if done.returncode < 0 or done.returncode > 127:
        raise OSError(f"git merge-file: {done.stderr.decode(errors='replace').strip()}")
    return done.stdout, done.returncode > 0


def edits(base: bytes, ours: bytes) -> list[tuple[bool, list[bytes], list[bytes], int]]:
    """Return both texts in pieces: whether a piece is the same, its lines in each, and its position in the old."""
    before, after = base.splitlines(keepends=True), ours.splitlines(keepends=True)
    codes = SequenceMatcher(None, before, after, autojunk=False).get_opcodes()
    return [(tag == "equal", before[i1:i2], after[j1:j2], i1) for tag, i1, i2, j1, j2 in codes]


def joined(lines: list[bytes]) -> bytes:
    """Join lines; one of them may be from the end of a file without a final newline."""
    return b"".join(line if line.endswith(b"\n") else line + b"\n" for line in lines[:-1]) + b"".join(lines[-1:])


def beside(base: bytes, ours: bytes, theirs: bytes) -> tuple[bytes, bytes]:
    """Move lines that the user added next to a changed line of the template into the template's text.

    Returns the user's text without them, and the template's with them. For git, such lines are a conflict. They stay a
    conflict if both sides added something in the same place, if the template has such a line too, or if no remaining
    line shows where they belong.
    """
    target = theirs.splitlines(keepends=True)
    before = base.splitlines(keepends=True)
    kept: dict[int, int] = {0: 0, len(before) + 1: len(target) + 1}  # where a line of the old text is in the new one
    taken = set()  # places in the old text where the template added something
    at = 0
    for same, old, new, start in edits(base, theirs):
        if same:
            kept |= {start + number + 1: at + number + 1 for number in range(len(old))}
        elif not old:
            taken.add(start)
        at += len(new)
    rest: list[bytes] = []
    places: list[tuple[int, list[bytes]]] = []
    for same, old, new, start in edits(base, ours):
        above, below = kept.get(start), kept.get(start + 1)
        is_open = same or old or start in taken or any(line in target for line in new if line.strip())
        outermost = (above == 0 or above is None) and (below is None or start == len(before))
        if is_open or (above is None and below is None) or (outermost and new[0][:1].isspace()):
            rest += new
        else:
            places.append((above if above is not None and start else below - 1 if below else 0, new))
    for place, new in reversed(places):
        target[place:place] = new
    return joined(rest), joined(target)


def follow(base: bytes, ours: bytes, texts: dict[str, bytes]) -> tuple[bytes, dict[str, bytes]]:
    """Apply the user's edits to the new template, wherever it moved the surrounding lines.

    `texts` are the new file and the files that took over parts of the old one. An edit goes where its surrounding lines
    are; an addition before a function or class goes before the one of that name. Returns the user's text without the
    applied edits, and the new texts with them.
    """
    lines = {name: text.splitlines(keepends=True) for name, text in texts.items()}
    before = base.splitlines(keepends=True)
    rest: list[bytes] = []
    for same, old, new, start in edits(base, ours):
        end = start + len(old)
        above, below = before[max(start - 2, 0) : start], before[end : end + 2]
        places = places_of([*above, *old, *below], lines)
        if not places and (old or all(line.strip() for line in [*above[-1:], *below[:1]])):  # one more may have moved
            above, below = above[-1:], below[:1]
            places = places_of([*above, *old, *below], lines)
        if same or len(places) > 1 or not b"".join([*above, *old, *below]).strip():
            rest += new
        elif places:
            ((name, at),) = places
            lines[name][at + len(above) : at + len(above) + len(old)] = new
            rest += old
        elif not old and len(homes := definitions(before[end:], lines)) == 1:
            ((name, at),) = homes
            lines[name][at:at] = new
        else:
            rest += new
    return joined(rest), {name: joined(text) for name, text in lines.items()}


def places_of(block: list[bytes], texts: dict[str, list[bytes]]) -> list[tuple[str, int]]:
    """Return the places of a block of lines in the texts."""
    return [
        (name, at)
        for name, lines in texts.items()
        for at in range(len(lines) - len(block) + 1)
        if lines[at : at + len(block)] == block
    ]


DEFINITION = re.compile(rb"(?:async )?(?:def|class) \w+\b")


def definitions(following: list[bytes], texts: dict[str, list[bytes]]) -> list[tuple[str, int]]:
    """Return where the first function or class of `following`, or the next one, starts, with decorators."""
    if not DEFINITION.match(next((line for line in following if not line.startswith(b"@")), b"")):
        return []
    for line in following:
        if named := DEFINITION.match(line):
            found = []
            for name, lines in texts.items():
                for number, other in enumerate(lines):
                    if (match := DEFINITION.match(other)) and match[0] == named[0]:
                        while number and lines[number - 1].startswith(b"@"):
                            number -= 1
                        found.append((name, number))
            if found:
                return found
    return []


@dataclass(frozen=True)
class Setting:
    """The position of a value: its line, and the columns from `start` to `end`."""

    line: int
    start: int
    end: int
    value: str


LINE = re.compile(r"""(?P<indent>\s*)(?P<dash>-\s+)?(?P<key>[\w.$<-]+)\s*[:=](?:\s+&\w+)?(?P<rest>.*)""")
VALUE = re.compile(r"""\s*(?P<value>"(?:[^"\\]|\\.)*"|'[^']*'|[^#\s](?:[^#]*[^#\s])?)\s*(?:#.*)?$""")


def settings(text: str) -> dict[tuple[str, ...], Setting]:
    """Find the values on a single line in YAML or TOML, by their path of keys.

    A list item is identified by its name or first key, not by its index. Duplicate paths are left out.
    """
    found: dict[tuple[str, ...], Setting] = {}
    twice: set[tuple[str, ...]] = set()
    above: list[tuple[int, str]] = []
    for number, line in enumerate(text.split("\n")):
        if section := re.fullmatch(r"\s*\[(.+)\]\s*(#.*)?", line):
            above = [(-1, section[1])]
            continue
        if not (match := LINE.fullmatch(line)) or line.lstrip().startswith("#"):
            continue
        indent = len(match["indent"])
        above = [(at, key) for at, key in above if at < indent]
        if match["dash"]:
            named = match["key"] in ("name", "id")
            above.append((indent, line.strip().partition(" #")[0].rstrip() if named else f"- {match['key']}"))
            indent += len(match["dash"])
        path = (*(key for _, key in above), match["key"])
        value = VALUE.match(match["rest"])
        if not value:
            above.append((indent, match["key"]))
            continue
        if path in found:
            twice.add(path)
        offset = match.start("rest")
        found[path] = Setting(number, offset + value.start("value"), offset + value.end("value"), value["value"])
    return {path: setting for path, setting in found.items() if path not in twice}


def keep_values(base: bytes, ours: bytes, theirs: bytes) -> tuple[bytes, bytes, list[str]]:
    """Write the values that the user chose into the old and the new text; return both, and the notes to print.

    Only the rest is merged, so a new default or comment does not conflict with a chosen value.
    """
    try:
        texts = [text.decode("utf-8") for text in (base, ours, theirs)]
    except UnicodeDecodeError:
        return base, theirs, []
    before, chosen, after = map(settings, texts)
    notes = []
    old_lines, new_lines = texts[0].split("\n"), texts[2].split("\n")
    for path in before.keys() & chosen.keys() & after.keys():
        mine = chosen[path].value
        if mine == before[path].value:
            continue
        for lines, setting in ((old_lines, before[path]), (new_lines, after[path])):
            line = lines[setting.line]
            lines[setting.line] = f"{line[: setting.start]}{mine}{line[setting.end :]}"
        if after[path].value not in (mine, before[path].value):
            notes.append(f"{path[-1]} stays {mine}, as you set it; the template's value is now {after[path].value}")
    return "\n".join(old_lines).encode(), "\n".join(new_lines).encode(), sorted(notes)


def renamed(text: bytes, names: dict[str, str], new: bytes) -> bytes:
    """Rename settings at the start of their lines, if the new text has only the new name."""
    for name, other in names.items():
        pattern = rb"(?m)^(\s*(?:- )?)%s(?=\s*[:=])"
        has = [re.search(pattern % re.escape(word.encode()), new) for word in (name, other)]
        if has[1] and not has[0]:
            text = re.sub(pattern % re.escape(name.encode()), rb"\g<1>" + other.encode(), text)
    return text
