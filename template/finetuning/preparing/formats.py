"""One raw row → its chat messages, in any of the supported formats."""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterator
from typing import Any

from preparing.rows import DataError, short

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# the column that identifies a format, its name, and the columns it uses
FORMATS = {
    "messages": ("messages", {"messages"}),
    "conversations": ("sharegpt", {"conversations", "system"}),
    "conversation": ("sharegpt", {"conversation", "system"}),
    "instruction": ("alpaca", {"instruction", "input", "output", "system", "history"}),
    "completion": ("prompt-completion", {"prompt", "completion"}),
    "text": ("text", {"text"}),
}
KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null"}
COLUMN = re.compile(r"\{([^{}]+)\}")

Message = dict[str, str]


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
        raise DataError(
            f"columns {short(', '.join(row), 300)} fit no known format: set dataset_format in olive-config.yaml."
        )
    return there[0]


def used_columns(
    row: dict[str, Any], dataset_format: str, prompt_template: str | None, completion_template: str | None
) -> set[str]:
    """Return the columns that the messages of a row can come from."""
    if dataset_format == "auto":
        dataset_format = detect(row, prompt_template)
    if dataset_format == "columns":
        return set(COLUMN.findall(f"{prompt_template} {completion_template}"))
    return set().union(*(columns for name, columns in FORMATS.values() if name == dataset_format))


def turns(row: dict[str, Any], column: str, role_of_text: str) -> list[Message]:
    """Return the turns of a column; a text is one turn of the role `role_of_text`, if that is not empty."""
    value = required(row, column)
    if role_of_text and isinstance(value, str):
        return [message(role_of_text, value)]
    if not isinstance(value, list):
        raise DataError(f"column {column!r} is {kind(value)}, not a list of turns.")
    messages = []
    for number, turn in enumerate(value, start=1):
        if not isinstance(turn, dict):
            raise DataError(f"turn {number} is {kind(turn)}, not an object with role and content.")
        role = turn.get("role") or turn.get("from")
        content = turn.get("value") if turn.get("content") is None else turn["content"]
        if not isinstance(role, str) or role not in ROLES:
            shown = short(json.dumps(role, default=str))
            raise DataError(f"turn {number} has the role {shown}: use system, user, assistant or tool.")
        calls = turn.get("tool_calls") or turn.get("function_call")
        if calls and ROLES[role] == "assistant":
            content = "\n".join(filter(None, [message(role, content or "")["content"], *tool_calls(calls)]))
        messages.append(message(ROLES[role], content))
    return messages


def tool_calls(calls: Any) -> Iterator[str]:
    """Yield each call as a line of JSON with name and arguments: every chat template can render text."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call has no name of a function.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # OpenAI's format has them as a JSON string
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        yield json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False, default=str)


def message(role: str, content: Any) -> Message:
    """Return one message; content is text or a list of text parts as in OpenAI's chat format."""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"the {role}'s content has a part that is not text: only text is supported.")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise DataError(f"the {role}'s content is {kind(content)}, not text.")
    return {"role": role, "content": content}


def check_messages(messages: list[Message]) -> None:
    """Raise DataError unless the last turn is an answer and no turn is empty or breaks a tokenizer."""
    if not any(turn["role"] == "assistant" and turn["content"].strip() for turn in messages):
        raise DataError("no assistant turn with text: there is nothing to learn from; add an answer or drop the row.")
    if messages[-1]["role"] != "assistant":
        raise DataError(f"the last turn is the {messages[-1]['role']}'s: add the answer to it, or drop the turn.")
    for turn in messages:
        if not turn["content"].strip() and turn["role"] != "tool":
            raise DataError(f"the {turn['role']}'s content is empty: fill it or drop the turn.")
        if "\0" in turn["content"] or not is_unicode(turn["content"]):
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
        raise DataError(f"{setting} is empty: dataset_format columns needs it in olive-config.yaml.")
    for name in COLUMN.findall(template):
        if name not in row and name.isidentifier():
            raise DataError(f"{setting} names {{{name}}}, but the row has {short(', '.join(row), 300)}.")
        if isinstance(row.get(name), dict | list):
            raise DataError(f"column {name!r} is {kind(row[name])}, not text.")

    def value(match: re.Match[str]) -> str:
        return match[0] if match[1] not in row else "" if row[match[1]] is None else str(row[match[1]])

    return COLUMN.sub(value, template)


def kind(value: Any) -> str:
    """Return the kind of a value in JSON terms."""
    return KINDS.get(type(value), type(value).__name__)
