"""Thoughts of a reasoning model: in the answer between <think> and </think>, or under a key of the turn."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from preparing.chat_template import render
from preparing.problems import DataError
from preparing.turns import Message

START, END = "<think>", "</think>"
INLINE = re.compile(rf"\s*(?:{START})?(.*?){END}\s*", re.DOTALL)


def divided(turn: Message) -> tuple[str, str]:
    """Return the thought of an assistant's turn and the answer after it; for other turns, "" and the content."""
    content = turn["content"]
    thought = turn.get("reasoning_content", "").strip()
    # what a server answers lacks START if the prompt ends with it
    begins = content.lstrip().startswith(START) or START not in content
    if turn["role"] == "assistant" and not thought and begins and (match := INLINE.match(content)):
        return match[1].strip(), content[match.end() :]
    return thought, content.lstrip() if thought else content


def has_thought(messages: Iterable[Message]) -> bool:
    """Return whether an answer that is learnt has a thought."""
    return any(divided(turn)[0] for turn in messages if turn["role"] == "assistant" and turn.get("learn", True))


def as_written(tokenizer: Any, messages: list[Message], thinking: bool) -> list[Message]:
    """Return messages with their thoughts in a form that the chat template writes, or without thoughts.

    Raises DataError if the template leaves out the thought of an answer that is learnt.
    """
    turns = [*messages]
    for i, turn in enumerate(messages):
        thought, answer = divided(turn)
        if turn["role"] != "assistant" or (not thought and answer == turn["content"]):
            continue
        plain: Message = {"role": "assistant", "content": answer}
        if not turn.get("learn", True):
            plain["learn"] = False
        turns[i] = plain
        if not thinking or not thought:
            continue
        without = render(tokenizer, turns[: i + 1], thinking)
        inline: Message = plain | {"content": f"{START}\n{thought}\n{END}\n\n{answer}"}  # type: ignore[assignment]
        given: Message = turn if answer == turn["content"] or END in turn["content"] else turn | {"content": answer}
        for form in (given, inline):
            turns[i] = form
            # counted: a thought of few words can also stand in the answer, or be a word of the template
            if render(tokenizer, turns[: i + 1], thinking).count(thought) > without.count(thought):
                break
        else:
            if turn.get("learn", True):
                raise DataError(
                    f"the model's chat template leaves out the thought of turn {i + 1}: set thinking: off to train "
                    "without thoughts, or drop the row."
                )
    return turns
