"""One raw row → its chat messages, in any of the supported formats. What a single turn says is read by turns.py."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from typing import Any

from preparing.problems import DataError, short
from preparing.thoughts import divided
from preparing.turns import Message, kind, message, read_turn, unused_keys

# the column that identifies a format, its name, and the columns it uses
FORMATS = {
    "messages": ("messages", {"messages"}),
    "conversations": ("sharegpt", {"conversations", "system"}),
    "conversation": ("sharegpt", {"conversation", "system"}),
    "instruction": ("alpaca", {"instruction", "input", "output", "system", "history"}),
    "completion": ("prompt-completion", {"prompt", "completion"}),
    "text": ("text", {"text"}),
}
COLUMN = re.compile(r"\{([^{}]+)\}")
NAME = re.compile(r"[^\W\d][\w .-]*")  # looks like a column's name: not JSON, not a number
# columns in which KTO's rows (of TRL and LLaMA-Factory) say whether the answer is a good or a bad example
GOOD_OR_BAD = ("label", "kto_tag")


def to_messages(
    row: Any, dataset_format: str = "auto", prompt_template: str | None = None, completion_template: str | None = None
) -> list[Message]:
    """Map a row to messages of the roles system, user, assistant and tool. Raises DataError.

    The last message is an answer, and all contents are text that a tokenizer accepts.
    """
    if isinstance(row, list):
        if not any(isinstance(turn, dict) and {"role", "from"} & turn.keys() for turn in row):
            raise DataError("it is a list, but not of turns. A file that is one JSON array must end in .json.")
        row = {"messages": row}
    if not isinstance(row, dict):
        raise DataError(f"it is {kind(row)}, not an object with columns.")
    if dataset_format == "auto":
        dataset_format = detect(row, prompt_template)
    if dataset_format == "messages":
        messages = turns(row, "messages", "")
    elif dataset_format == "sharegpt":
        messages = turns(row, "conversations" if "conversations" in row else "conversation", "")
        messages = [message("system", text(row, "system")), *messages]
    elif dataset_format == "alpaca":
        question = "\n\n".join(filter(None, [text(row, "instruction", needed=True), text(row, "input")]))
        messages = [message("system", text(row, "system")), *history(row)]
        messages += [message("user", question), message("assistant", text(row, "output", needed=True))]
    elif dataset_format == "prompt-completion":
        messages = [*turns(row, "prompt", "user"), *turns(row, "completion", "assistant")]
    elif dataset_format == "columns":
        messages = [
            message("user", fill(prompt_template, row, "prompt_template")),
            message("assistant", fill(completion_template, row, "completion_template")),
        ]
    elif dataset_format == "text":
        messages = [message("assistant", text(row, "text", needed=True))]
    else:
        raise DataError(f"dataset_format {dataset_format!r} is unknown: see olive-config.yaml for the choices.")
    messages = [turn for turn in messages if turn != {"role": "system", "content": ""}]  # same as no system prompt
    check_messages(messages)
    return messages


def detect(row: dict[str, Any], prompt_template: str | None) -> str:
    """Return the format of a row by its columns; columns with a value take precedence."""
    if prompt_template:
        return "columns"
    there = [name for column, (name, _) in FORMATS.items() if row.get(column) is not None]
    there += [name for column, (name, _) in FORMATS.items() if column in row]
    if not there:
        texts = [column for column, value in row.items() if isinstance(value, str) and not {*"{}"} & {*column}]
        raise DataError(f"columns {short(', '.join(row), 300)} fit no known format: {way_on(texts)}")
    return there[0]


def way_on(texts: list[str]) -> str:
    """Return the settings that read a row by its columns of text: the first is the question, the last the answer."""
    if len(texts) < 2:
        return "see dataset_format in olive-config.yaml for the columns that each format needs, and rename them."
    return (
        f'set prompt_template: "{{{texts[0]}}}" and completion_template: "{{{texts[-1]}}}" in olive-config.yaml, or '
        "whichever columns have the question and the answer."
    )


def unused(row: Any, dataset_format: str, prompt_template: str | None, completion_template: str | None) -> set[str]:
    """Return the columns of a row, and the keys of its turns, from which nothing gets into the messages."""
    if isinstance(row, list):
        row = {"messages": row}
    if dataset_format == "auto":
        dataset_format = detect(row, prompt_template)
    if dataset_format == "columns":
        return row.keys() - set(COLUMN.findall(f"{prompt_template} {completion_template}"))
    used = set().union(*(columns for name, columns in FORMATS.values() if name == dataset_format))
    columns = [column for column in used & row.keys() if isinstance(row[column], list)]
    return (row.keys() - used) | {
        f"{column}[].{key}" for column in columns for turn in row[column] for key in unused_keys(turn)
    }


def bad_example(row: Any, dataset_format: str, prompt_template: str | None) -> str:
    """Return the column that marks the answer of a row as a bad example, as KTO's rows have it; "" if there is none."""
    if not isinstance(row, dict):
        return ""
    with contextlib.suppress(DataError):
        dataset_format = detect(row, prompt_template) if dataset_format == "auto" else dataset_format
    if dataset_format in ("auto", "columns", "text"):
        return ""
    return next((column for column in GOOD_OR_BAD if str(row.get(column)).lower() == "false"), "")


def turns(row: dict[str, Any], column: str, role_of_text: str) -> list[Message]:
    """Return the turns of a column; a text is one turn of the role `role_of_text`, if that is not empty."""
    value = required(row, column)
    if role_of_text and isinstance(value, str):
        return [message(role_of_text, value)]
    if not isinstance(value, list):
        raise DataError(f"column {column!r} is {kind(value)}, not a list of turns.")
    return [read_turn(turn, number) for number, turn in enumerate(value, start=1)]


def check_messages(messages: list[Message]) -> None:
    """Raise DataError unless the last turn is an answer and no turn is empty or breaks a tokenizer."""
    answers = [turn for turn in messages if turn["role"] == "assistant" and divided(turn)[1].strip()]
    if not answers:
        raise DataError("no assistant turn with text: there is nothing to learn from; add an answer or drop the row.")
    if not any(turn.get("learn", True) for turn in answers):
        raise DataError("its marks leave no assistant turn to learn from: change one, or drop the row.")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last turn is the {messages[-1]['role']}'s: add the answer to it, or drop the turn.")
    for turn in messages:
        if not divided(turn)[1].strip() and turn["role"] != "tool":
            raise DataError(f"the {turn['role']}'s content is empty: fill it or drop the turn.")
        said = turn["content"] + turn.get("reasoning_content", "")
        if "\0" in said or not is_unicode(said):
            raise DataError(f"the {turn['role']}'s content has a NUL or half a character: remove it.")


def is_unicode(content: str) -> bool:
    """Return whether a text has no lone surrogates, which JSON allows and no tokenizer accepts."""
    try:
        content.encode()
    except UnicodeEncodeError:
        return False
    return True


def history(row: dict[str, Any]) -> Iterator[Message]:
    """Yield the earlier turns of an alpaca row."""
    pairs = row.get("history") or []
    if not isinstance(pairs, list) or not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise DataError("column 'history' is not a list of pairs of question and answer.")
    for asked, answered in pairs:
        yield from (message("user", asked), message("assistant", answered))


def text(row: dict[str, Any], column: str, needed: bool = False) -> str:
    """Return the text of a column, empty if it is missing or null."""
    value = required(row, column) if needed else row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"column {column!r} is {kind(value)}, not text.")
    return value or ""


def required(row: dict[str, Any], column: str) -> Any:
    """Return a column's value. Raises DataError if it is missing."""
    if row.get(column) in (None, "", []):
        raise DataError(f"column {column!r} is missing or empty; the row has {short(', '.join(row), 300)}.")
    return row[column]


def fill(template: str | None, row: dict[str, Any], setting: str) -> str:
    """Fill the row's columns into a template like `Phrase: {phrase}`; other braces stay as they are."""
    if not template:
        what = "question" if setting == "prompt_template" else "answer"
        raise DataError(
            f"{setting} is empty: name the column with the {what} in olive-config.yaml, in braces; the row has "
            f"{short(', '.join(row), 300)}."
        )
    for name in COLUMN.findall(template):
        alike = name.strip().casefold() in {column.strip().casefold() for column in row}
        if name not in row and (alike or NAME.fullmatch(name.strip())):
            raise DataError(f"{setting} names {{{name}}}, but the row has {short(', '.join(row), 300)}.")
        if isinstance(row.get(name), dict | list):
            raise DataError(f"column {name!r} is {kind(row[name])}, not text.")
    if setting == "completion_template" and not row.keys() & set(COLUMN.findall(template)):
        raise DataError(
            f"{setting} {short(template)!r} is the same answer for every row: name a column in braces, of "
            f"{short(', '.join(row), 300)}."
        )

    def value(match: re.Match[str]) -> str:
        return match[0] if match[1] not in row else "" if row[match[1]] is None else str(row[match[1]])

    return COLUMN.sub(value, template)
