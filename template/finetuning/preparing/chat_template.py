"""The tokenizer's chat template: rendering a conversation, and what a template can do to it.

A template is code that comes with the model: it may drop turns, refuse them, or write them in another way depending on
what follows.
"""

from __future__ import annotations

import contextlib
import datetime
from collections.abc import Sequence
from functools import lru_cache
from types import SimpleNamespace
from typing import Any
from unittest import mock

from preparing.problems import DataError
from preparing.turns import Message

ANSWER = "THE-ANSWER"
LONG = 20  # characters: a text of this length is in a rendering only if a turn brought it there


def render(tokenizer: Any, messages: Sequence[Message], thinking: bool, ask: bool = False) -> str:
    """Render messages with the chat template; `ask` adds the start of an answer, as a chat does."""
    turns = [{key: value for key, value in turn.items() if key != "learn"} for turn in messages]
    options = {"tokenize": False, "add_generation_prompt": ask, "enable_thinking": thinking}
    with today_is(getattr(tokenizer, "date", None)):  # see load_tokenizer
        return str(tokenizer.apply_chat_template(turns, **options))


def today_is(date: datetime.date | None) -> contextlib.AbstractContextManager[Any]:
    """Let chat templates write this date as today's, None the true one: transformers has no option for it."""
    if date is None:
        return contextlib.nullcontext()
    from transformers.utils import chat_template_utils

    return mock.patch.object(chat_template_utils, "datetime", SimpleNamespace(now=lambda: date))


def encode(tokenizer: Any, text: str) -> list[int]:
    """Tokenise a rendered text, which has its special tokens already."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def question(tokenizer: Any, messages: Sequence[Message], thinking: bool) -> list[int]:
    """Return the tokens with which a chat asks for the answer after these messages."""
    return encode(tokenizer, render(tokenizer, messages, thinking, ask=True))


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that the chat template writes after an answer; None if it writes only text.

    Tokens of blank text are none: some vocabularies (Gemma, Phi-2) have added tokens for line breaks and spaces.
    """
    return end_in(tokenizer, str(tokenizer.chat_template))


def ends_of_answer(tokenizer: Any) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end of sequence and the chat template's end of turn."""
    return sorted({tokenizer.eos_token_id, end_of_turn(tokenizer)} - {None})


@lru_cache(maxsize=8)
def end_in(tokenizer: Any, _template: str) -> int | None:
    """Find the end of turn once for each tokenizer and template."""
    turns: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    after = encode(tokenizer, render(tokenizer, turns, thinking=False).rpartition(ANSWER)[2])
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    return next((token for token in after if token in added and tokenizer.decode(token).strip()), None)


def refuse_dropped(tokenizer: Any, messages: Sequence[Message], contents: Sequence[str], thinking: bool) -> None:
    """Raise DataError if the rendered conversation lacks a turn or a part of it.

    `contents` are the texts that it must have: of each turn its content, or the end of it, after a thought.
    """
    text = render(tokenizer, messages, thinking)
    bare = [content.strip() for content in contents]
    for i, turn in enumerate(messages):
        expected = sum(other.count(bare[i]) for other in bare) if bare[i] else 0
        if not bare[i] or (len(bare[i]) > LONG and text.count(bare[i]) >= expected):
            continue
        # a short text can also come from the template or another turn, and a template may write it in another form
        before = turn["content"].removesuffix(contents[i])
        for changed in ("x" + contents[i], contents[i] + "x"):
            other: Message = turn | {"content": before + changed}  # type: ignore[assignment]
            if render(tokenizer, [*messages[:i], other, *messages[i + 1 :]], thinking) == text:
                raise DataError(
                    f"the model's chat template leaves out turn {i + 1} ({turn['role']}), or a part of it: write it "
                    "into another turn, or drop the row."
                )


def refuse_system_prompt(tokenizer: Any, system_prompt: str, thinking: bool) -> None:
    """Raise DataError if the chat template refuses or drops the system prompt of the settings."""
    turns: list[Message] = [{"role": "user", "content": "question"}, {"role": "assistant", "content": ANSWER}]
    asked: list[Message] = [{"role": "system", "content": system_prompt}, *turns]
    render(tokenizer, turns, thinking)
    try:
        refuse_dropped(tokenizer, asked, [turn["content"] for turn in asked], thinking)
    except DataError:
        reason = "leaves it out"
    except Exception as error:
        reason = f"does not take it ({error})"
    else:
        return
    raise DataError(
        f"system_prompt: the model's chat template {reason}: set system_prompt: null in olive-config.yaml, or write "
        "the text into the questions."
    )
