"""The lengths of rows, and the sizes of their batches. Lengths are in tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Lengths:
    """Tokens and labels (the tokens that count for the loss) of each row, after the cut at max_seq_len."""

    tokens: Sequence[int]
    labels: Sequence[int]

    def cut(self, longest: int) -> Lengths:
        """Cut all rows at a length, as if the answers were at their ends."""
        pairs = list(zip(self.tokens, self.labels, strict=True))
        return Lengths([min(t, longest) for t, _ in pairs], [max(n - max(t - longest, 0), 0) for t, n in pairs])


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run by each measure, and the average one."""

    tokens: int  # padding included
    logits: int  # positions at which logits are computed
    masked: int  # cells of the attention mask: rows × longest row squared
    mean_tokens: float


def batches(lengths: Lengths, size: int, packing: bool, epochs: float = 1) -> Batch:
    """Distribute the rows into batches at random, as the Trainer does, and take the largest.

    The order differs from the run's: the largest batch is the one to expect, not the actual one. A packed batch is as
    long as its rows together and needs no mask. A padded batch has as many tokens as its longest row times its rows,
    and logits in every column in which some row has an answer; answers are assumed to be at the end of a row.
    """
    order, draw = list(range(len(lengths.tokens))), random.Random(0)
    tokens = logits = masked = total = count = 0
    for _ in range(max(1, min(math.ceil(epochs), 20_000 // max(len(order), 1)))):
        draw.shuffle(order)
        for start in range(0, len(order), size):
            rows = [(lengths.tokens[row], lengths.labels[row]) for row in order[start : start + size]]
            longest = max(length for length, _ in rows)
            if packing:
                width, answers = sum(length for length, _ in rows), sum(labels for _, labels in rows)
            else:
                width, answers = len(rows) * longest, len(rows) * columns(rows)
                masked = max(masked, len(rows) * longest**2 if len(rows) > 1 else 0)
            tokens, logits = max(tokens, width), max(logits, answers)
            total, count = total + width, count + 1
    return Batch(tokens, logits, masked, total / max(count, 1))


def columns(rows: Sequence[tuple[int, int]]) -> int:
    """Count the columns in which some row has an answer: rows are (length, labels), with the labels at the end."""
    found, first = 0, max(length for length, _ in rows)
    for length, labels in sorted(rows, reverse=True):
        found += max(min(length, first) - (length - labels), 0)
        first = min(first, length - labels)
    return found
