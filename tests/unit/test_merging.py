"""One file of an update: the user's edits in code that the template moved, and next to lines that it changed."""

from __future__ import annotations

import random
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "hooks"))
from merging import Entry, beside, follow, merge

BASE = b"""import os


def read(path):
    text = open(path).read()
    return text


@cache
def check(text):
    return bool(text)


def write(path, text):
    open(path, "w").write(text)
"""
KEPT = b"""import os


def write(path, text, mode):
    open(path, mode).write(text)
"""
MOVED = b"""from files import cache


@cache
def check(text: str) -> bool:
    return bool(text)


def read(path):
    text = open(path).read()
    return text
"""


def edited(old: bytes, new: bytes) -> bytes:
    assert BASE.count(old) == 1
    return BASE.replace(old, new)


def test_an_edit_moves_to_the_file_that_has_the_lines_around_it() -> None:
    mine = edited(b"    text = open(path).read()\n", b"    text = open(path).read().strip()  # mine\n")
    rest, texts = follow(BASE, mine, {"old.py": KEPT, "new.py": MOVED})
    assert rest == BASE
    assert texts == {
        "old.py": KEPT,
        "new.py": MOVED.replace(b"open(path).read()", b"open(path).read().strip()  # mine"),
    }


@pytest.mark.parametrize(
    ("before", "file"), [(b"def write(", "old.py"), (b"@cache", "new.py"), (b"def read(", "new.py")]
)
def test_an_addition_before_a_function_stays_before_it_after_a_move(before: bytes, file: str) -> None:
    rest, texts = follow(BASE, edited(before, b"LIMIT = 3  # mine\n" + before), {"old.py": KEPT, "new.py": MOVED})
    assert rest == BASE
    both = {"old.py": KEPT, "new.py": MOVED}
    assert texts == both | {file: both[file].replace(before, b"LIMIT = 3  # mine\n" + before)}


def test_an_edit_of_a_deleted_line_is_left_to_the_user() -> None:
    mine = edited(b'    open(path, "w").write(text)\n', b'    open(path, "x").write(text)\n')
    assert follow(BASE, mine, {"old.py": KEPT, "new.py": MOVED}) == (mine, {"old.py": KEPT, "new.py": MOVED})
    outcome = merge("old.py", Entry(BASE), Entry(mine), Entry(KEPT))
    assert outcome.conflict and b"<<<<<<< before updating" in (outcome.entry or Entry(b"")).data


@pytest.mark.parametrize("end", [b"\n", b""])
def test_a_line_added_next_to_one_that_the_template_changed_is_no_conflict(end: bytes) -> None:
    base, theirs = b"a\nb\nc\nd\n", b"a\nB\nc\nD\n"
    for mine, merged in (
        (b"a\nmine\nb\nc\nd\n", b"a\nmine\nB\nc\nD\n"),
        (b"a\nb\nmine\nc\nd\n", b"a\nB\nmine\nc\nD\n"),
        (b"mine\na\nb\nc\nd\n", b"mine\na\nB\nc\nD\n"),
        (b"a\nb\nc\nd\nmine" + end, b"a\nB\nc\nD\nmine" + end),
    ):
        outcome = merge("notes.txt", Entry(base), Entry(mine), Entry(theirs))
        assert (outcome.conflict, outcome.entry) == (None, Entry(merged))


def test_two_lines_added_in_the_same_place_and_a_line_that_both_changed_are_conflicts() -> None:
    base = b"a\nb\nc\n"
    for mine, theirs in (
        (b"a\nb\nc\nmine\n", b"a\nb\nc\ntheirs\n"),
        (b"mine\na\nb\nc\n", b"theirs\na\nb\nc\n"),
        (b"a\nmine\nc\n", b"a\ntheirs\nc\n"),
        (b"a\nmine\nb\nc\n", b"a\nmine too\nb\nC\n"),
    ):
        assert merge("notes.txt", Entry(base), Entry(mine), Entry(theirs)).conflict, (mine, theirs)


def test_the_users_byte_order_mark_and_line_ends_are_kept() -> None:
    mine = b"\xef\xbb\xbfa\r\nmine\r\nb\r\n"
    outcome = merge("notes.txt", Entry(b"a\nb\n"), Entry(mine), Entry(b"A\nb\n"))
    assert outcome.entry == Entry(b"\xef\xbb\xbfA\r\nmine\r\nb\r\n")


def test_no_line_of_the_user_is_lost_or_duplicated() -> None:
    """Random texts: what is left of the user's and what went into the template's are the user's lines, once each."""
    draw = random.Random(7)
    moved = 0
    for _ in range(3000):
        base = [f"{draw.choice('abc')}{number}\n".encode() for number in range(draw.randint(1, 7))]
        theirs = [draw.choice([line, line, b"X" + line]) for line in base if draw.random() < 0.9]
        mine = list(base)
        for number in range(draw.randint(1, 3)):
            mine.insert(draw.randint(0, len(mine)), f"mine {number}\n".encode())
        rest, target = beside(b"".join(base), b"".join(mine), b"".join(theirs))
        in_rest, in_target = (text.splitlines(keepends=True) for text in (rest, target))
        added = [line for line in mine if line not in base]
        assert sorted([*in_rest, *(line for line in in_target if line in added)]) == sorted(mine)
        assert [line for line in in_target if line not in added] == theirs
        moved += len(in_target) > len(theirs)
    assert moved > 500
