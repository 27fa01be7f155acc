"""Tokens that the tokenizer has and the model's embeddings lack: training on one would break off in the middle."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

from planning.model_facts import Model
from preparing.tokenised import tokenise_rows
from preparing.tokens import load_tokenizer
from settings.run_settings import Settings


def unknown_tokens(model: Model, settings: Settings, rows: dict[str, list[Any]]) -> str | None:
    """Return the error for a token of the rows, or a special one, that the model does not know; None if there is none.

    Only a tokenizer that is larger than the model costs the time to read all rows.
    """
    if model.folder is None or model.shape is None:
        return None
    tokenizer = load_tokenizer(model.folder)
    if max(tokenizer.get_vocab().values()) < model.shape.vocabulary:
        return None
    options = {part: vars(replace(data.tokens, max_bad_rows=1)) for part, data in settings.data.items()}
    found = [example for part in rows for example in tokenise_rows(tokenizer, rows[part], **options[part]).examples]
    return beyond(model, (example["input_ids"] for example in found))


def beyond(model: Model, rows: Iterable[Sequence[int]]) -> str | None:
    """Return the error for the first token in rows of ids, or the first special one, without an embedding."""
    if model.folder is None or model.shape is None:
        return None
    tokenizer, size = load_tokenizer(model.folder), model.shape.vocabulary
    used = {max(row, default=0): "a token of the rows" for row in rows}
    for name in ("bos", "eos", "pad"):
        if (token := getattr(tokenizer, f"{name}_token_id")) is not None:
            used[token] = f"the {name} token"
    if (token := max(used)) < size:
        return None
    return (
        f"The tokenizer of {model.name} is larger than its model: {used[token]}, "
        f"{tokenizer.convert_ids_to_tokens(token)!r}, has the id {token}, and the embeddings end at {size - 1}: take "
        "the tokenizer that belongs to the model, or resize the model with resize_token_embeddings and save both."
    )
