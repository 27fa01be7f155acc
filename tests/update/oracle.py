"""What must be true of each file after an update. This shares no code with the update itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from fnmatch import fnmatch

import yaml

from .draws import ANSWERS, Entry, Tree, is_text, lf, lines
from .user import Edit, setting

START, MIDDLE, END = b"<<<<<<< before updating", b"=======", b">>>>>>> after updating"


BOM = b"\xef\xbb\xbf"


def losses(
    edits: dict[str, Edit],
    old: Tree,
    new: Tree,
    renames: dict[str, str],
    mine: Tree,
    result: Tree,
    unmerged: set[str],
    splits: Mapping[str, Sequence[str]],
) -> list[str]:
    """Return what of the user's is not there, what of the new release is not there, and what nobody wrote.

    `splits` are files and the others that took a part of them: an edit may be in any.
    """
    found = []
    taken = {part: name for name, parts in splits.items() if name in edits for part in parts if part not in old}
    marked = {name for name, entry in result.items() if not entry.link and START in lines(entry.data)}
    found += [f"{name}: a conflict that git does not show" for name in sorted(marked - unmerged)]
    found += [f"{name}: git shows a conflict that is not there" for name in sorted(unmerged - marked)]
    for name in sorted({*old, *new, *mine, *result}):
        if name in renames.values():
            continue  # with its old name
        target = renames.get(name, name)
        own = mine.get(target) if target != name else None
        beside = result.get(name) if target != name else None
        if beside and not (own and beside == mine.get(name) != old.get(name)):
            found.append(f"{name}: stays beside {target}")
        edit = edits.get(name, Edit())
        if name in taken and name not in mine and name in new and name in result:
            own = edits[taken[name]]
            if without(own, lines(result[name].data)) != without(own, lines(new[name].data)):
                found.append(f"{name}: nobody wrote this, nor {taken[name]}")
            continue
        moved = {
            part
            for part in edit.parts
            for other in splits.get(name, ())
            if other in taken and other in result and part in result[other].data
        }
        edit = replace(edit, parts=[part for part in edit.parts if part not in moved])
        entries = (old.get(name), mine.get(name), new.get(target), result.get(target))
        if own:
            other = edits.get(target, Edit())
            found += [f"{target}: {why}" for why in wrong_both(edit, other, entries, own, beside)]
        else:
            found += [f"{target}: {why}" for why in wrong(target, edit, entries, target in unmerged)]
    return found


Entries = tuple[Entry | None, Entry | None, Entry | None, Entry | None]


def wrong(name: str, edit: Edit, entries: Entries, unmerged: bool) -> list[str]:
    """Return what is wrong with one file."""
    old, mine, new, result = entries
    if mine and new and result and mine.data.startswith(BOM) and is_text(mine.data) and not mine.link:
        plain = [entry and entry._replace(data=entry.data.removeprefix(BOM)) for entry in entries]
        said = wrong(name, edit, (plain[0], plain[1], plain[2], plain[3]), unmerged)
        return said if result.data.startswith(BOM) else [*said, "lost its mark"]
    if name == ANSWERS:
        same = result and new and answers(result.data) == answers(new.data)
        return [] if same else ["not the answers of the new release"]
    if mine is None:
        if old is None:
            return [] if same_text(result, new) else ["nobody wrote this" if result else "is missing"]
        return ["came back"] if result else []
    if result is None:
        gone = new is None and old is not None and same_text(mine, old)
        return [] if gone else ["lost"]
    if fnmatch(name, "dataset/*.jsonl") or mine.link or new is None:
        if old and new is None and same_text(mine, old) and not fnmatch(name, "dataset/*.jsonl"):
            return ["the new release has it no more"]
        return [] if result == mine else ["is not as the user left it"]
    executable = mine.executable if old is None or mine.executable != old.executable else new.executable
    found = []
    if result.executable != executable and (old is not None or not same_text(mine, new)):
        found.append(f"executable: {result.executable}")
    if old and mine.data == old.data:
        return found + ([] if same_data(result, new) else ["is not as in the new release"])
    if not is_text(mine.data) or (old and same_data(old, new)):
        return found + ([] if result.data == mine.data else ["is not as the user left it"])
    if old and same_data(mine, old):
        found += [] if same_data(result, new) else ["is not as in the new release, line ends aside"]
    elif same_data(mine, new):
        found += [] if same_data(result, mine) else ["is not as the user left it, though as in the new release"]
    else:
        found += wrong_text(edit, old, mine, new, result, unmerged)
    if b"\n" in mine.data.replace(b"\r\n", b"") or b"\n" not in mine.data:
        return found
    return found + (["line ends"] if b"\n" in result.data.replace(b"\r\n", b"") else [])


def wrong_text(edit: Edit, old: Entry | None, mine: Entry, new: Entry, result: Entry, unmerged: bool) -> list[str]:
    """Return what is wrong with a text that the user and the template changed."""
    got, want = lines(result.data), lines(new.data)
    ours, theirs = sides(got)
    found = [f"lost {part!r}" for part in edit.parts if not any(part in line for line in ours)]
    once = {line for line in edit.removed if want.count(line) <= 1}
    if not unmerged:
        found += [f"came back: {line!r}" for line in sorted(once) if line in got and line not in lines(mine.data)]

    def rest(text: list[bytes]) -> list[bytes]:
        return without(edit, text)

    if rest(theirs) != rest(want):
        lost = [line for line in rest(want) if line not in theirs]
        extra = [line for line in rest(theirs) if line not in want]
        found.append(f"is not the new release with the edits: lacks {lost[:3]}, has {extra[:3]}")
    last = old is not None and lines(old.data)[-1:] == want[-1:]
    if last and not unmerged and mine.data[-1:] != b"\n" and edit.parts + list(edit.removed) == []:
        found += ["got a newline at its end"] if result.data.endswith(b"\n") else []
    return found


def without(edit: Edit, text: list[bytes]) -> list[bytes]:
    """Return the lines that are not the user's, nor what they took out."""
    keys = {key.strip() for key in edit.keys}
    return [
        line
        for line in text
        if line not in edit.removed
        and not any(part in line for part in edit.parts)
        and (setting(line) or b"").strip() not in keys | {b"-"}
    ]


def wrong_both(edit: Edit, other: Edit, entries: Entries, own: Entry, beside: Entry | None) -> list[str]:
    """Return what is wrong where the user has a file under the name that the template gives to another."""
    old, mine, _, result = entries
    if result is None:
        return ["lost"]
    if own.link or not is_text(own.data):
        found = ["is not as the user left it"] if result != own else []
    else:
        found = [f"lost {part!r}" for part in other.parts if part not in lf(result.data)]
    if mine and old and mine.data != old.data and (mine.link or not is_text(mine.data)):
        return found + ([] if mine in (result, beside) else ["the other is lost"])
    text = lf(result.data) + (lf(beside.data) if beside else b"")
    return found + [f"lost {part!r}" for part in edit.parts if mine and part not in text]


def sides(text: list[bytes]) -> tuple[list[bytes], list[bytes]]:
    """Return a text with its conflicts resolved to the user's side, and to the template's."""
    ours: list[bytes] = []
    theirs: list[bytes] = []
    to = (ours, theirs)
    for line in text:
        if line == START:
            to = (ours,)
        elif line == MIDDLE and to == (ours,):
            to = (theirs,)
        elif line == END and to == (theirs,):
            to = (ours, theirs)
        else:
            for side in to:
                side.append(line)
    return ours, theirs


def same_data(one: Entry, other: Entry) -> bool:
    return one.data == other.data if not is_text(one.data) else lf(one.data) == lf(other.data)


def same_text(one: Entry | None, other: Entry | None) -> bool:
    if one is None or other is None:
        return one is other
    return one.link == other.link and one.executable == other.executable and same_data(one, other)


def answers(data: bytes) -> dict[str, object]:
    return {name: value for name, value in yaml.safe_load(data).items() if not name.startswith("_src")}
