"""Raw rows → chat messages. Rows that cannot be learnt from are set aside, in a file beside the data."""

from __future__ import annotations

import contextlib
import json
import os
import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

from rows import REJECTED, ROOT, DataError, file_rows, hub_rows, one_line, short

ROLES = {
    "system": "system",
    "developer": "system",  # OpenAI's newer name for it
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "function_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
}
# the column by which a format is known, its name, and the columns it uses
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


class Conversation(list[Message]):
    """The messages of one row, {role, content} each, and the place where the row stands."""

    def __init__(self, messages: Iterable[Message] = (), place: str = "a row") -> None:
        super().__init__(messages)
        self.place = place


def read(
    file: str | None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    prompt_template: str | None = None,
    completion_template: str | None = None,
    max_bad_rows: float = 0.05,
) -> list[Conversation]:
    """Read a local file, or a Hugging Face dataset when one is named, as conversations that can be learnt from.

    Rows that cannot are written to a file beside the data and counted on the screen. Raises DataError when they are
    more than the share `max_bad_rows` of all rows, and when the source cannot be read.
    """
    if type(max_bad_rows) not in (int, float) or not 0 <= max_bad_rows <= 1:
        raise DataError(f"max_bad_rows is {max_bad_rows!r}: write a share from 0 to 1 in olive-config.yaml.")
    source = dataset_name or str(file)
    unit = "row" if dataset_name or source.lower().endswith(".parquet") else "line"
    good: list[Conversation] = []
    bad: list[dict[str, Any]] = []
    unused: set[str] = set()
    for row in hub_rows(source, dataset_split) if dataset_name else file_rows(source):
        try:
            if row.problem:
                raise DataError(row.problem)
            messages = to_messages(row.value, dataset_format, prompt_template, completion_template)
        except (DataError, RecursionError) as error:
            reason = str(error) if isinstance(error, DataError) else "it is nested too deeply."
            bad.append({"file": source, "line": row.number, "reason": reason, "row": row.value})
        else:
            good.append(Conversation(messages, f"{source}, {unit} {row.number}"))
            if isinstance(row.value, dict):
                unused |= row.value.keys() - used_columns(
                    row.value, dataset_format, prompt_template, completion_template
                )
    if not good and not bad:
        raise DataError(f"{source}, {unit} 1: there are no rows. Put some there, or name another file.")
    first = f"{unit} {bad[0]['line']}: {bad[0]['reason']}" if bad else ""
    count = f"{len(bad)} of {len(good) + len(bad)} rows"
    if bad and (len(bad) > max_bad_rows * (len(good) + len(bad)) or not good):
        raise DataError(
            f"{source}, {first} In all, {count} cannot be used (max_bad_rows allows a share of {max_bad_rows:g}): "
            "repair them, or raise max_bad_rows in olive-config.yaml to set them aside."
        )
    beside = set_aside(source, bad, bool(dataset_name))
    if bad:
        say(f"{count} of {source} were set aside in {beside.as_posix()}; the first is {first}")
    if unused:
        say(f"{source}: columns {short(', '.join(sorted(unused)), 300)} are not used.")
    return good


def set_aside(source: str, bad: list[dict[str, Any]], is_from_hub: bool) -> Path:
    """Write the bad rows beside the data, or remove the file of an earlier run when there are none any more."""
    name = re.sub(r"\W+", "-", source).strip("-") if is_from_hub else Path(Path(source).name.removesuffix(".gz")).stem
    target = (ROOT / "dataset" if is_from_hub else Path(source).parent) / (name + REJECTED)
    try:
        if target.is_file() and is_list_of(target, source):
            if not bad:
                target.unlink(missing_ok=True)
        elif target.is_file() and bad:
            raise DataError(f"{target}, line 1: not the rows set aside from {source}. Move it away: it would be lost.")
        if bad:
            unfinished = target.with_name(f".{target.name}.{os.getpid()}")
            unfinished.write_bytes(b"".join(map(to_line, bad)))
            unfinished.replace(target)
    except OSError as error:
        raise DataError(f"{target}, line 1: bad rows cannot be set aside there: {error.strerror}.") from error
    return target


def is_list_of(target: Path, source: str) -> bool:
    """Tell whether a file holds the rows that were set aside from this source."""
    try:
        with target.open("rb") as file:
            first = json.loads(file.readline())
        return bool(first.keys() == {"file", "line", "reason", "row"} and Path(first["file"]).name == Path(source).name)
    except (FileNotFoundError, ValueError, AttributeError, TypeError, RecursionError):
        return False


def to_line(rejected: dict[str, Any]) -> bytes:
    """Return a line of JSON; what UTF-8 has no bytes for is escaped as JSON does it."""
    try:
        text = json.dumps(rejected, ensure_ascii=False, default=str)
    except RecursionError:
        text = json.dumps({**rejected, "row": None}, ensure_ascii=False)
    return (text + "\n").encode("utf-8", "backslashreplace")


@cache
def say(text: str) -> None:
    """Print a line once: the check, the training and the evaluation of a run read the same rows."""
    print(one_line(text))


def to_messages(
    row: Any, dataset_format: str = "auto", prompt_template: str | None = None, completion_template: str | None = None
) -> list[Message]:
    """Map a row to messages of the roles system, user, assistant and tool. Raises DataError.

    The last message is an answer, and all are text that a tokenizer takes.
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
    messages = [turn for turn in messages if turn != {"role": "system", "content": ""}]  # the same as none
    check_messages(messages)
    return messages


def detect(row: dict[str, Any], prompt_template: str | None) -> str:
    """Name the format of a row by the columns it has, and by those that hold something first."""
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
    """Return the columns that the messages of a row may come from."""
    if dataset_format == "auto":
        dataset_format = detect(row, prompt_template)
    if dataset_format == "columns":
        return set(COLUMN.findall(f"{prompt_template} {completion_template}"))
    return set().union(*(columns for name, columns in FORMATS.values() if name == dataset_format))


def turns(row: dict[str, Any], column: str, role_of_text: str) -> list[Message]:
    """Return the turns of a column; a text is one turn where `role_of_text` says whose."""
    value = need(row, column)
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
    """Yield each call as a line of JSON with name and arguments: text is what every chat template can show."""
    for call in calls if isinstance(calls, list) else [calls]:
        function = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call has no name of a function.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # OpenAI writes them as a text of JSON
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        yield json.dumps({"name": function["name"], "arguments": arguments}, ensure_ascii=False, default=str)


def message(role: str, content: Any) -> Message:
    """Make one message; content is a text or a list of text parts as in OpenAI's chat format."""
    if isinstance(content, list):
        parts = [
            part.get("text") if isinstance(part, dict) and part.get("type") == "text" else None for part in content
        ]
        if not all(isinstance(part, str) for part in parts):
            raise DataError(f"the {role}'s content has a part that is not text: only text can be learnt.")
        content = "".join(map(str, parts))
    if not isinstance(content, str):
        raise DataError(f"the {role}'s content is {kind(content)}, not text.")
    return {"role": role, "content": content}


def check_messages(messages: list[Message]) -> None:
    """Raise DataError unless there is an answer to learn at the end, and no turn is empty or breaks a tokenizer."""
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
    """Tell whether a text has no lone surrogates, which JSON can hold and no tokenizer takes."""
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
    """Return the text of a column; one that is missing or null is empty."""
    value = need(row, column) if needed else row.get(column)
    if value is not None and not isinstance(value, str):
        raise DataError(f"column {column!r} is {kind(value)}, not text.")
    return value or ""


def need(row: dict[str, Any], column: str) -> Any:
    """Return a column's value, or say that it is missing."""
    if row.get(column) in (None, "", []):
        raise DataError(f"column {column!r} is missing or empty; the row has {short(', '.join(row), 300)}.")
    return row[column]


def fill(template: str | None, row: dict[str, Any], setting: str) -> str:
    """Put the row's columns into a template such as `Phrase: {phrase}`; other braces stay as they are."""
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
    """Name what a value is, as one who writes JSON would."""
    return KINDS.get(type(value), type(value).__name__)
