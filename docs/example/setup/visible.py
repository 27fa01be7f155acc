"""Texts that others have written, as a terminal may show them."""

# Only the standard library, and nothing newer than Python 3.8, as in create_env.py.
from __future__ import annotations

import re

# characters that move the cursor, end a line or turn the direction of writing
CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: object) -> str:
    """Return a text with control characters as escapes like \\u001b: they could forge or hide lines."""
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", str(text).replace("\r\n", "\n"))
