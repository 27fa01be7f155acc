"""A conversation → tokens and labels, by the tokenizer's own chat template.

What is learnt of an answer is what the template writes between two renderings: the conversation up to the answer, as a
chat asks for it, and the same with the answer. So a tuned model is asked exactly what it was trained on.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass
from typing import Any

import yaml

from preparing.chat_template import encode, end_of_turn, refuse_dropped, render
from preparing.conversations import Conversation
from preparing.problems import DataError, short
from preparing.thoughts import as_written, divided
from preparing.turns import Message
from preparing.workspace import MODEL_FACTS

IGNORED = -100  # the label that PyTorch's cross entropy ignores

Example = dict[str, list[int]]  # input_ids, attention_mask and labels of one length


@dataclass(frozen=True)
class Answer:
    """An answer in its conversation: the tokens up to its end, and which of them are learnt."""

    ids: list[int]
    start: int  # the tokens before it are the prompt, as a chat gives it
    end: int  # after the end of the turn; the template may write more, like a line break


def load_tokenizer(folder: str, date: str | None = None) -> Any:
    """Load a folder's tokenizer; one without a chat template (a base model's) gets the template of setup/model.yaml.

    `date` (YYYY-MM-DD) is what a template writes as today's (Llama 3.2, SmolLM3), so that a run has the same tokens on
    every day; None: today.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    if not tokenizer.chat_template:
        tokenizer.chat_template = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))["chat_template"]
    if tokenizer.pad_token_id is None:  # padding is masked, so any token will do
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.date = datetime.date.fromisoformat(date) if date else None
    return tokenizer


def with_system(messages: list[Message], system_prompt: str | None) -> list[Message]:
    """Add the system prompt at the start, unless the conversation has its own, or is plain text."""
    if not system_prompt or messages[0]["role"] == "system" or all(turn["role"] == "assistant" for turn in messages):
        return messages
    system: Message = {"role": "system", "content": system_prompt}
    return [system, *messages] if not isinstance(messages, Conversation) else messages.having([system, *messages])


def place(messages: list[Message]) -> str:
    """Return a conversation's place in the data."""
    return getattr(messages, "place", "a row")


def tokenise(
    tokenizer: Any, messages: list[Message], train_on: str = "responses", thinking: bool = False
) -> list[Example]:
    """Tokenise one conversation with the tokenizer's own chat template. Raises DataError with the row's place.

    Labels are the tokens of the assistant's answers with the end of turn, and IGNORED elsewhere; with `train_on: all`,
    every token but those of answers that are marked as not to be learnt.

    One example is returned if the template writes an answer the same way in the middle of a conversation as at its end.
    If it does not (Qwen3 drops the thoughts of earlier turns), an answer gets an example that ends with it.
    """
    try:
        written = as_written(tokenizer, messages, thinking)
        refuse_dropped(tokenizer, written, [divided(turn)[1] for turn in written], thinking)
        answers = [i for i, turn in enumerate(written) if turn["role"] == "assistant"]
        learnt = [answer(tokenizer, written, i, thinking) for i in answers if written[i].get("learn", True)]
        examples: list[Example] = []
        if train_on == "all":
            ids = encode(tokenizer, render(tokenizer, written, thinking))
            examples = [example(ids, [(0, len(ids))])]
            for i in (i for i in answers if not written[i].get("learn", True)):
                read = answer(tokenizer, written, i, thinking)
                if ids[: read.end] != read.ids[: read.end]:
                    raise DataError(f"turn {i + 1} is marked as not to be learnt, which needs train_on: responses.")
                examples[0]["labels"][read.start : read.end] = [IGNORED] * (read.end - read.start)
    except DataError as error:
        raise DataError(f"{place(messages)}: {error}") from None
    except Exception as error:  # a template is code that comes with the model, with its own errors
        raise DataError(
            f"{place(messages)}: the model's chat template does not take this row ({error}): change or drop the row."
        ) from error
    for one in reversed(learnt):
        if examples and examples[-1]["input_ids"][: one.end] == one.ids[: one.end]:
            examples[-1]["labels"][one.start : one.end] = one.ids[one.start : one.end]
        else:
            examples.append(example(one.ids, [(one.start, one.end)]))
    return examples[::-1]


def example(ids: list[int], spans: list[tuple[int, int]]) -> Example:
    """Return an example whose labels are the tokens of the spans."""
    labels = [IGNORED] * len(ids)
    for start, end in spans:
        labels[start:end] = ids[start:end]
    return {"input_ids": ids, "attention_mask": [1] * len(ids), "labels": labels}


def last_answer(tokenizer: Any, messages: list[Message], thinking: bool) -> tuple[list[Message], Answer | None]:
    """Return the conversation up to its last answer that is learnt, and that answer; None if nothing asks for it."""
    last = max(i for i, turn in enumerate(messages) if turn["role"] == "assistant" and turn.get("learn", True))
    written = as_written(tokenizer, messages[: last + 1], thinking)
    if all(turn["role"] == "assistant" for turn in messages[:last]):
        return written, None
    return messages[: last + 1], answer(tokenizer, written, last, thinking)


def answer(tokenizer: Any, messages: list[Message], i: int, thinking: bool) -> Answer:
    """Return the answer in turn `i`. Raises DataError unless it begins with exactly what a chat asks."""
    whole = render(tokenizer, messages[: i + 1], thinking)
    if any(turn["role"] != "assistant" for turn in messages[:i]):
        prompt = render(tokenizer, messages[:i], thinking, ask=True)
    else:  # nobody asks for it: learn the content, not what the template writes before it
        other: Message = {"role": "assistant", "content": "b" if messages[i]["content"].strip()[:1] == "a" else "a"}
        prompt = os.path.commonprefix([whole, render(tokenizer, [*messages[:i], other], thinking)])  # noqa: RUF071 - not paths
    if not whole.startswith(prompt):
        same = len(os.path.commonprefix([whole, prompt]))  # noqa: RUF071
        raise DataError(
            f"the chat template asks for turn {i + 1} with {short(prompt[same:], 40)!r}, and writes the row with "
            f"{short(whole[same:], 40)!r} there: a chat would ask what was not trained; change or drop the row."
        )
    asked, ids = encode(tokenizer, prompt), encode(tokenizer, whole)
    if ids[: len(asked)] != asked:  # a token reaches over the border
        joined = asked + encode(tokenizer, whole[len(prompt) :])
        if tokenizer.decode(joined) != tokenizer.decode(ids):
            raise DataError(f"the tokenizer does not divide turn {i + 1} from what is asked: change or drop the row.")
        ids = joined
    end, stop = len(ids), end_of_turn(tokenizer)
    if stop in ids[len(asked) :]:
        last = len(ids) - 1 - ids[::-1].index(stop)
        if not tokenizer.decode(ids[last + 1 :]).strip():
            end = last + 1
    return Answer(ids, len(asked), end)
