"""A conversation → tokens and labels, by the tokenizer's own chat template."""

from __future__ import annotations

import os
from typing import Any

import yaml

from preparing.conversations import Conversation
from preparing.formats import Message
from preparing.rows import DataError
from preparing.workspace import MODEL_FACTS

# a variable of the chat template: reasoning models (Qwen3, SmolLM3) train on and give only the answer
NO_THINKING = {"enable_thinking": False}
IGNORED = -100  # the label that PyTorch's cross entropy ignores


def load_tokenizer(folder: str) -> Any:
    """Load a folder's tokenizer; one without a chat template (a base model's) gets the template of setup/model.yaml."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Add the system prompt at the start, unless the conversation has its own."""
    if not system_prompt or messages[0]["role"] == "system":
        return messages
    return Conversation([{"role": "system", "content": system_prompt}, *messages], place(messages))


def place(messages: list[Message]) -> str:
    """Return a conversation's place in the data."""
    return getattr(messages, "place", "a row")


def tokenise(tokenizer: Any, messages: list[Message], train_on: str) -> dict[str, list[int]]:
    """Tokenise one conversation with the tokenizer's own chat template. Raises DataError with the row's place."""
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False, **NO_THINKING)
        spans = answer_spans(tokenizer, messages, text) if train_on != "all" else []
    except DataError as error:
        raise DataError(f"{place(messages)}: {error}") from None
    except Exception as error:  # a template is code that comes with the model, with its own errors
        raise DataError(
            f"{place(messages)}: the model's chat template does not take this row ({error}): change or drop the row."
        ) from error
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    ids = encoded["input_ids"]
    if train_on == "all":
        labels = list(ids)
    else:
        labels = [IGNORED] * len(ids)
        special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
        offsets = encoded["offset_mapping"]
        for start, end in spans:
            after = next((i for i, (left, _) in enumerate(offsets) if left >= end), len(ids))
            # the token that ends the turn is a label too, with a space that a template may put before it
            while after < len(ids) and ids[after] not in special and not text[slice(*offsets[after])].strip():
                after += 1
            ends_turn = after < len(ids) and ids[after] in special
            for i, (left, right) in enumerate(offsets):
                if left >= start and (right <= end or (ends_turn and i <= after)):
                    labels[i] = ids[i]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def answer_spans(tokenizer: Any, messages: list[Message], text: str) -> list[tuple[int, int]]:
    """Return the span of each assistant turn in the rendered text: (first, last + 1) in characters."""
    spans = []
    for i, turn in enumerate(messages):
        if turn["role"] != "assistant":
            continue
        options = {"tokenize": False, "add_generation_prompt": True, **NO_THINKING}
        prompt = tokenizer.apply_chat_template(messages[:i], **options) if i else ""
        content = turn["content"].strip()
        start = len(os.path.commonprefix([text, prompt]))  # noqa: RUF071 - of any texts, not of paths
        found = text.find(content, start)
        # a template may shorten earlier turns (Qwen3 drops empty reasoning), but must not change the rest
        if found < 0 or (start < len(prompt) and text[start:found].strip()):
            raise DataError(
                "the chat template changes earlier turns, so that the answers cannot be found: set train_on: all."
            )
        spans.append((start, found + len(content)))
    return spans
