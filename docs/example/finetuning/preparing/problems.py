"""The error for wrong data, and texts that fit into its one sentence."""

from __future__ import annotations

import re
from typing import Any

# characters that move the cursor, end a line or turn the direction of writing
CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


class DataError(Exception):
    """What is wrong with the data, where, and what to do: always one line, whatever the data contains."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Return the text without line breaks and other control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def visible(text: object) -> str:
    """Return a text that others have written as a terminal may show it: control characters as escapes like \\u001b.

    In a terminal they could forge or hide lines, or write to the clipboard.
    """
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text).replace("\r\n", "\n"))


def short(value: Any, longest: int = 60) -> str:
    """Return a value as text that fits into a sentence."""
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"
