"""The lengths of rows, and the sizes of their batches. Lengths are in tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from training.pieces import pieces


@dataclass(frozen=True)
class Lengths:
    """Which tokens of each row are labels, the tokens that count for the loss."""

    masks: list[bytes]  # a byte for each token, 1 for a label

    @property
    def tokens(self) -> list[int]:
        """The tokens of each row."""
        return [len(mask) for mask in self.masks]

    @property
    def labels(self) -> list[int]:
        """The labels of each row."""
        return [mask.count(1) for mask in self.masks]

    @property
    def first_labels(self) -> list[int]:
        """The tokens of each row up to its first label: a shorter max_seq_len leaves nothing to learn."""
        return [mask.find(1) + 1 for mask in self.masks]

    def cut(self, longest: int) -> Lengths:
        """Cut all rows at a length, as the training does: a row that loses its labels is left out."""
        cut = (mask[:longest] for mask in self.masks)
        return Lengths([mask for mask in cut if 1 in mask])


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run by each measure, and the average one."""

    tokens: int  # padding included
    logits: int  # positions at which logits are computed
    masked: int  # cells of the attention mask: rows × longest row squared
    mean_tokens: float


def batches(lengths: Lengths, size: int, packing: bool, epochs: float = 1, piece: float = math.inf) -> Batch:
    """Distribute the rows into batches at random, as the Trainer does, and take the largest.

    The order differs from the run's: the largest batch is the one to expect, not the actual one. A packed batch is as
    long as its rows together and needs no mask; if it is computed in pieces of `piece` tokens, the largest one counts.
    A padded batch has as many tokens as its longest row times its rows, and logits in every column in which some row
    has a label.
    """
    order, draw = [*lengths.masks], random.Random(0)
    tokens = logits = masked = total = count = 0
    for _ in range(max(1, min(math.ceil(epochs), 20_000 // max(len(order), 1)))):
        draw.shuffle(order)
        for start in range(0, len(order), size):
            rows = order[start : start + size]
            longest = max(map(len, rows))
            if packing:
                width = sum(map(len, rows))
                for part in pieces(map(len, rows), piece):
                    here, rows = rows[: len(part)], rows[len(part) :]
                    tokens = max(tokens, sum(part))
                    logits = max(logits, sum(row.count(1) for row in here))
            else:
                width, answers = len(rows) * longest, len(rows) * columns(rows)
                masked = max(masked, len(rows) * longest**2 if len(rows) > 1 else 0)
                tokens, logits = max(tokens, width), max(logits, answers)
            total, count = total + width, count + 1
    return Batch(tokens, logits, masked, total / max(count, 1))


def columns(rows: Sequence[bytes]) -> int:
    """Count the columns in which some row has a label."""
    labels = 0
    for row in rows:
        labels |= int.from_bytes(row, "little")
    return labels.bit_count()
