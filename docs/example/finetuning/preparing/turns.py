"""One turn of a row, in OpenAI's, ShareGPT's or LLaMA-Factory's format → a message."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from typing import Any, NotRequired, TypedDict

from preparing.problems import DataError, short

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
# marks that say whether a turn is learnt: of OpenAI, LLaMA-Factory, Axolotl and others
MARKS = ("weight", "loss_weight", "loss", "train", "training")
THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys under which servers and datasets keep a thought
CALLS = ("tool_calls", "function_call")
TURN_KEYS = {"role", "from", "content", "value", *MARKS, *THOUGHTS, *CALLS}
CALL_PARTS = ("tool_call", "tool_calls", "function_call")
KINDS = {dict: "an object", list: "a list", str: "text", int: "a number", float: "a number", type(None): "null"}


class Message(TypedDict):
    """One turn of a conversation."""

    role: str  # system, user, assistant or tool
    content: str
    reasoning_content: NotRequired[str]  # the thought before the answer, if the row has it under a key
    learn: NotRequired[bool]  # False: an assistant's turn that is read and not learnt


def read_turn(turn: Any, number: int) -> Message:
    """Return a turn of a row as a message. Raises DataError."""
    if not isinstance(turn, dict):
        raise DataError(f"turn {number} is {kind(turn)}, not an object with role and content.")
    role = turn.get("role") or turn.get("from")
    content = turn.get("value") if turn.get("content") is None else turn["content"]
    if not isinstance(role, str) or role not in ROLES:
        shown = short(json.dumps(role, default=str))
        raise DataError(f"turn {number} has the role {shown}: use system, user, assistant or tool.")
    learn = learnt(turn, number)
    if ROLES[role] != "assistant":
        return message(ROLES[role], content)
    calls = [call for key in CALLS for call in tool_calls(turn.get(key))]
    read = message("assistant", content or "" if calls else content)
    read["content"] = "\n".join(filter(None, [read["content"], *calls]))
    if thought := next((turn[key] for key in THOUGHTS if turn.get(key) is not None), None):
        if not isinstance(thought, str):
            raise DataError(f"turn {number} has a thought that is {kind(thought)}, not text.")
        read["reasoning_content"] = thought
    if not learn:
        read["learn"] = False
    return read


def learnt(turn: dict[str, Any], number: int) -> bool:
    """Return whether the marks of a turn let it be learnt. Raises DataError if they are unclear or disagree."""
    said = {}
    for mark in MARKS:
        if (value := turn.get(mark)) is None:
            continue
        if isinstance(value, str) and value.lower() in ("true", "false", "0", "1"):  # as a CSV file has it
            value = value.lower() in ("true", "1")
        if not isinstance(value, bool | int | float) or value not in (0, 1):
            raise DataError(
                f"turn {number} has {mark}: {short(json.dumps(value, default=str))}: a turn is learnt (1, true) or not "
                "(0, false); there is nothing between."
            )
        said[mark] = bool(value)
    if len({*said.values()}) > 1:
        raise DataError(f"turn {number} has marks that disagree: {', '.join(said)}. Leave one of them out.")
    return all(said.values())


def unused_keys(turn: Any) -> Iterator[str]:
    """Yield the keys of a turn from which nothing gets into its message; a null, which Arrow fills in, is none."""
    if not isinstance(turn, dict):
        return
    is_answer = ROLES.get(str(turn.get("role") or turn.get("from"))) == "assistant"
    for key, value in turn.items():
        if value is None or (key in TURN_KEYS and (is_answer or key not in (*MARKS, *THOUGHTS, *CALLS))):
            continue
        if is_answer or key not in MARKS or value not in (False, 0):  # only answers are ever learnt
            yield key
    if turn.get("content") is not None and turn.get("value") not in (None, turn["content"]):
        yield "value"
    parts = turn["content"] if isinstance(turn.get("content"), list) else []
    yield from (f"content[].{key}" for part in parts if isinstance(part, dict) for key in part.keys() - PART_KEYS)


def message(role: str, content: Any) -> Message:
    """Return one message; content is text or a list of parts as in OpenAI's or LLaMA-Factory's chat format."""
    if not isinstance(content, list):
        if not isinstance(content, str):
            raise DataError(f"the {role}'s content is {kind(content)}, not text.")
        return {"role": role, "content": content}
    texts: list[str] = []
    thoughts: list[str] = []
    calls: list[str] = []
    for part in content:
        type_, said = (part.get("type"), text_of(part)) if isinstance(part, dict) else (None, None)
        if type_ == "reasoning" and role == "assistant" and said is not None:
            thoughts.append(said)
        elif type_ in CALL_PARTS and role == "assistant" and said is not None:
            calls += tool_calls(said)
        elif type_ == "text" and said is not None:
            texts.append(said)
        else:
            raise DataError(f"the {role}'s content has a part that is not text: only text is supported.")
    read: Message = {"role": role, "content": "\n".join(filter(None, ["".join(texts), *calls]))}
    if thoughts:
        read["reasoning_content"] = "".join(thoughts)
    return read


PART_KEYS = {"type", "text", "value"}


def text_of(part: dict[str, Any]) -> str | None:
    """Return the text of a part: OpenAI has it under `text`, LLaMA-Factory under `value`."""
    text = part.get("value") if part.get("text") is None else part["text"]
    return text if isinstance(text, str) else None


def tool_calls(calls: Any) -> Iterator[str]:
    """Yield each call as a line of JSON with name and arguments: every chat template can render text."""
    if isinstance(calls, str):
        with contextlib.suppress(ValueError):
            calls = json.loads(calls)
    for call in calls if isinstance(calls, list) else [calls] if calls else []:
        function = call.get("function") or call if isinstance(call, dict) else call
        if not isinstance(function, dict) or not isinstance(function.get("name"), str):
            raise DataError("a tool call has no name of a function.")
        arguments = function.get("arguments")
        if isinstance(arguments, str):  # OpenAI's format has them as a JSON string
            with contextlib.suppress(ValueError):
                arguments = json.loads(arguments)
        call = {"name": function["name"], "arguments": without_nulls(arguments)}
        yield json.dumps(call, ensure_ascii=False, default=str)


def without_nulls(value: Any) -> Any:
    """Return a value without keys that are null: Arrow fills in every key that another row has."""
    if isinstance(value, dict):
        return {key: without_nulls(one) for key, one in value.items() if one is not None}
    return [without_nulls(one) for one in value] if isinstance(value, list) else value


def kind(value: Any) -> str:
    """Return the kind of a value in JSON terms."""
    return KINDS.get(type(value), type(value).__name__)
