"""Rows of tokens → batches → the loss of their answers, for training and evaluation.

A packed batch concatenates its rows into one long row, masked from each other: no time is spent on padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from preparing.tokens import IGNORED
from training.pieces import pieces

PACKED_SDPA = "packed_sdpa"

Row = dict[str, list[int]]  # input_ids and labels of one length
Batch = dict[str, Any]


def pack(rows: list[Row], device: Any = None) -> Batch:
    """Concatenate rows: input_ids, labels and position_ids of shape (1, tokens), and where each row ends.

    There is no attention_mask: with one, the model would not separate the rows. position_ids restart with each row.
    """
    lengths = [len(row["input_ids"]) for row in rows]
    # the first token of a row must not be predicted from the row before it
    labels = [[IGNORED, *row["labels"][1:]] for row in rows]
    return {
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]], device=device),
        "labels": torch.tensor([[label for row in labels for label in row]], device=device),
        "position_ids": torch.cat([torch.arange(length, device=device) for length in lengths])[None],
        "row_ends": list(accumulate(lengths)),
        "use_cache": False,  # with a cache, packed rows would see each other
    }


def divide(batch: Batch, most: float) -> Iterator[Batch]:
    """Yield the rows of a packed batch as batches of at most `most` tokens, or of one longer row; a padded batch whole.

    The sum of their losses and of the gradients is that of the batch.
    """
    ends = batch.get("row_ends")
    if ends is None:
        yield batch
        return
    start = 0
    for lengths in pieces([end - before for before, end in pairwise([0, *ends])], most):
        end = start + sum(lengths)
        columns = {name: value[:, start:end] for name, value in batch.items() if isinstance(value, torch.Tensor)}
        yield batch | columns | {"row_ends": list(accumulate(lengths))}
        start = end


def pad(rows: list[Row], filler: int, device: Any = None) -> Batch:
    """Stack rows into input_ids, attention_mask and labels of shape (rows, longest row)."""
    return {
        "input_ids": stack([row["input_ids"] for row in rows], filler).to(device),
        "attention_mask": stack([[1] * len(row["input_ids"]) for row in rows], 0).to(device),
        "labels": stack([row["labels"] for row in rows], IGNORED).to(device),
        "use_cache": False,
    }


def stack(rows: list[list[int]], filler: int, side: str = "right") -> torch.Tensor:
    """Stack rows of numbers into one tensor (rows, longest row)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=filler, padding_side=side)


def answer_loss(model: Any, batch: Batch) -> torch.Tensor:
    """Return the cross entropy in nats, summed over all labels that are not IGNORED.

    Logits are computed only for answers: with a vocabulary of 100,000 they take most of a step's memory.
    """
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    following = batch["labels"][:, 1:]  # each token predicts the one after it
    columns = (following != IGNORED).any(dim=0).nonzero().squeeze(1)
    if takes_columns(model):
        logits = model(**inputs, logits_to_keep=columns).logits
    else:
        logits = model(**inputs).logits[:, columns]
    return cross_entropy(
        logits.flatten(0, 1).float(), following[:, columns].flatten(), ignore_index=IGNORED, reduction="sum"
    )


def takes_columns(model: Any) -> bool:
    """Return whether a model, under any wrappers, can compute the logits of some columns only."""
    model = getattr(model, "module", model)
    model = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in inspect.signature(model.forward).parameters


@torch.inference_mode()
def keeps_apart(model: Any, rows: list[Row]) -> bool:
    """Return whether the rows of a packed batch do not affect later rows: by the kinds of layers, and by a test.

    Attention separates them; a layer that reads tokens in sequence (Mamba, convolutions, linear attention) does not.
    Its effect can be too small for the test, which compares the losses of a row after two others.
    """
    base_model = model.get_base_model()
    if "position_ids" not in inspect.signature(base_model.forward).parameters:
        return False
    kinds = getattr(base_model.config.get_text_config(), "layer_types", None) or []
    if any(kind == "linear_attention" or not kind.endswith("attention") for kind in kinds):
        return False
    model.eval()
    first, second = (row["input_ids"][:32] for row in (rows[0], rows[-1]))
    labelled = {"input_ids": second, "labels": second}
    losses = [
        answer_loss(model, pack([{"input_ids": ids, "labels": [IGNORED] * len(ids)}, labelled], model.device))
        for ids in (first, first[::-1])
    ]
    return bool(torch.isclose(*losses, rtol=1e-4))


def attend_row_by_row(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a packed batch: a mask over the whole batch would cost its length squared.

    query, key and value have the shape (1, heads, tokens, head width); the result (1, tokens, heads, head width).
    """
    ends, window = options.pop("row_ends", None), options.get("sliding_window")
    if ends is None:
        raise ValueError("packed_sdpa takes packed batches only")
    attended, lengths = [], [end - start for start, end in pairwise([0, *ends])]
    # the gradient of a slice is a whole batch of zeros around it, those of a split are concatenated
    for row in zip(*(states.split(lengths, dim=2) for states in (query, key, value)), strict=True):
        length = row[0].shape[2]
        if window and length > window:
            band = torch.ones(length, length, dtype=torch.bool, device=query.device)
            mask = band.tril().triu(1 - window)[None, None]
        attended.append(sdpa_attention_forward(module, *row, mask, **options)[0])
        mask = None
    return torch.cat(attended, dim=1), None


AttentionInterface.register(PACKED_SDPA, attend_row_by_row)
