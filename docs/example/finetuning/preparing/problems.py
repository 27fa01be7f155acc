"""The error for wrong data, and texts that fit into its one sentence."""

from __future__ import annotations

from typing import Any


class DataError(Exception):
    """What is wrong with the data, where, and what to do: always one line, whatever the data contains."""

    def __init__(self, text: str) -> None:
        super().__init__(one_line(text))


def one_line(text: str) -> str:
    """Return the text without line breaks and other control characters."""
    return " ".join("".join(char if char.isprintable() else " " for char in text).split())


def short(value: Any, longest: int = 60) -> str:
    """Return a value as text that fits into a sentence."""
    text = str(value)
    return text if len(text) <= longest else f"{text[:longest]}…"
