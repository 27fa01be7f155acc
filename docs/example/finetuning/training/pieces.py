"""A packed batch on a CPU is computed in pieces: its memory is that of a piece, its gradient that of the batch."""

from __future__ import annotations

import math
from collections.abc import Iterable

from settings.run_settings import Settings

# Larger products of matrices are not faster on a CPU, and what they keep for the backward pass no longer fits into the
# processor's caches.
PIECE = 1024


def piece_tokens(settings: Settings) -> float:
    """Return how many tokens a run computes at once; infinity for the whole batch.

    Several processes exchange their gradients after each backward pass, so that they need equally many.
    """
    return math.inf if settings.gpu or settings.processes > 1 else PIECE


def pieces(lengths: Iterable[int], most: float) -> list[list[int]]:
    """Divide consecutive rows, given by their tokens, into pieces of at most `most` tokens, or of one longer row."""
    divided: list[list[int]] = []
    room = 0.0
    for length in lengths:
        if not divided or length > room:
            divided.append([])
            room = most
        divided[-1].append(length)
        room -= length
    return divided
