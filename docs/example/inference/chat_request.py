"""The request for an answer: its fields, and what is wrong with them in one sentence.

A field that would change the answer but is not supported is refused by its name, never ignored.
"""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, NoReturn

from fastapi import Request
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import PydanticCustomError
from starlette.requests import ClientDisconnect

from api_error import ApiError
from engine import COLDEST, LIMITS, LONGEST_STOP, MOST_MESSAGES, MOST_STOPS, Generation, Message, too_many

# Fields that do not affect the answer, and neutral values of other fields.
IGNORED = {"metadata", "name", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store"}
IGNORED |= {"tool_choice", "user"}  # without tools, tool_choice has no effect
NEUTRAL: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0}
NEUTRAL |= {"response_format": {"type": "text"}, "modalities": ["text"]}
NO_TOOLS = ", as the model knows no tools: leave out the turns that call one, and those with its result"
WHY = {"tool_calls": NO_TOOLS, "function_call": NO_TOOLS}
WHY["chat_template_kwargs"] = ": the chat template gets the same values as in the training"


class Fields(BaseModel):
    """A part of a request. A null field counts as missing."""

    model_config = ConfigDict(extra="allow", strict=True)

    @model_validator(mode="before")
    @classmethod
    def without_nulls(cls, fields: Any) -> Any:
        """Remove null fields."""
        return {k: v for k, v in fields.items() if v is not None} if isinstance(fields, dict) else fields

    @model_validator(mode="after")
    def nothing_else(self) -> Fields:
        """Refuse unknown fields, unless they have no effect."""
        for name, value in (self.model_extra or {}).items():
            if name not in IGNORED and value not in ([], {}) and (name not in NEUTRAL or value != NEUTRAL[name]):
                why = f"; only {json.dumps(NEUTRAL[name])} is" if name in NEUTRAL else WHY.get(name, "")
                raise PydanticCustomError("unsupported", "not supported here{why}", {"field": name, "why": why})
        return self


def known(role: Any) -> Any:
    """Refuse the roles of tools, which other servers take."""
    if role in ("tool", "function"):
        raise PydanticCustomError("unsupported", "{role} is not supported here{why}", {"role": role, "why": NO_TOOLS})
    return role


def joined(content: Any) -> Any:
    """Join the parts of a message without anything between them, as the training does."""
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
        raise ValueError("every part must be a text, as the model reads nothing else")
    return "".join(part["text"] for part in content)


def not_too_cold(temperature: float) -> float:
    """Refuse temperatures so low that probabilities become infinite, which ends ONNX Runtime's whole process."""
    if 0 < temperature < COLDEST:
        raise PydanticCustomError("too_cold", "must be 0, or at least {coldest}", {"coldest": COLDEST})
    return temperature


def within(name: str) -> Any:
    """Return the limits of a setting."""
    low, high = LIMITS[name]
    return Field(ge=low, le=high)


def listed(stop: Any) -> Any:
    """Return one stop text, or several, as a list."""
    return (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop


def not_too_many(messages: Any) -> Any:
    """Refuse conversations whose rendering would take long, before their messages are read."""
    if isinstance(messages, list) and len(messages) > MOST_MESSAGES:
        raise PydanticCustomError("too_many", "{why}", {"why": too_many(len(messages)).rstrip(".")})
    return messages


StopText = Annotated[str, Field(min_length=1, max_length=LONGEST_STOP)]


class ChatMessage(Fields):
    """One turn of a conversation."""

    role: Annotated[Literal["system", "developer", "user", "assistant"], BeforeValidator(known)]
    content: Annotated[str, BeforeValidator(joined)]

    @model_validator(mode="before")
    @classmethod
    def may_say_nothing(cls, turn: Any) -> Any:
        """Take an assistant's turn without text: clients keep null for it, for example where it calls tools."""
        silent = isinstance(turn, dict) and turn.get("role") == "assistant" and turn.get("content") is None
        return {**turn, "content": ""} if silent else turn


class StreamOptions(Fields):
    """What a stream contains in addition to the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # has no effect here


class ChatRequest(Fields):
    """A conversation, and how to answer it. Defaults are those of the page and the terminal."""

    model: Annotated[str, Field(examples=["tuned", "base"])]
    messages: Annotated[list[ChatMessage], Field(min_length=1), BeforeValidator(not_too_many)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int | None, within("max_new_tokens")] = None
    max_completion_tokens: Annotated[int | None, within("max_new_tokens")] = None
    temperature: Annotated[float, within("temperature"), AfterValidator(not_too_cold)] = Generation.temperature
    top_p: Annotated[float, within("top_p")] = Generation.top_p
    top_k: Annotated[int, within("top_k")] = Generation.top_k
    repetition_penalty: Annotated[float, within("repetition_penalty")] = Generation.repetition_penalty
    seed: Annotated[int | None, within("seed")] = None
    stop: Annotated[tuple[StopText, ...], Field(max_length=MOST_STOPS), BeforeValidator(listed)] = ()

    def conversation(self) -> list[Message]:
        """Return the messages for the engine; the role `developer` is the newer name of `system`."""
        roles = {"developer": "system"}
        return [{"role": roles.get(turn.role, turn.role), "content": turn.content} for turn in self.messages]

    def generation(self) -> Generation:
        """Return the generation settings."""
        return Generation(
            max_new_tokens=self.max_completion_tokens or self.max_tokens or Generation.max_new_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            repetition_penalty=self.repetition_penalty,
            seed=self.seed,
            stop=self.stop,
            adapter=self.model == "tuned",
        )


# The body for the description of the API, which FastAPI does not see: `read_request` reads it.
PLACE = "#/paths/~1v1~1chat~1completions/post/requestBody/content/application~1json/schema/$defs/{model}"
SCHEMA = ChatRequest.model_json_schema(ref_template=PLACE)
DESCRIPTION = {"requestBody": {"required": True, "content": {"application/json": {"schema": SCHEMA}}}}


# ---- reading it


async def read_request(request: Request) -> ChatRequest:
    """Return the request in a body, which is read as JSON whatever its Content-Type: `curl -d` sends another.

    Pages of other sites, which could send such a body unasked, are refused by their Origin. Raises ApiError.
    """
    try:
        body = await request.body()
    except ClientDisconnect as error:
        raise ApiError(499, "The client has gone.") from error  # nobody reads this
    fields = parsed(body, request.headers.get("content-type", ""))
    if not isinstance(fields, dict):
        raise ApiError(400, "The body is JSON, but not an object with the fields model and messages.")
    try:
        return ChatRequest.model_validate(fields)
    except ValidationError as error:
        raise explained(error) from error


def parsed(body: bytes, kind: str) -> Any:
    """Return the value in a JSON body; `kind` is its Content-Type. Raises ApiError."""
    if not body.strip():
        raise ApiError(400, "The body is empty: send a JSON object with the fields model and messages.")
    try:
        value = json.loads(body, parse_constant=no_number)
        json.dumps(value, ensure_ascii=False).encode()  # also what JSON can say and UTF-8 cannot
    except UnicodeDecodeError as error:
        raise ApiError(400, f"The body is not UTF-8, from byte {error.start} on: send it as UTF-8.") from error
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ApiError(400, f"The body contains half a character ({half}): a text was cut inside an emoji.") from error
    except json.JSONDecodeError as error:
        if "form" in kind:
            raise ApiError(400, f"The body is a form, as its Content-Type says ({kind}): send JSON.") from error
        where = f"line {error.lineno}, column {error.colno}"
        raise ApiError(400, f"The body is not JSON: {error.msg} ({where}).") from error
    except RecursionError as error:
        raise ApiError(400, "The body is nested too deeply to be read.") from error
    except ValueError as error:
        raise ApiError(400, "The body contains a number that is too long, NaN or infinite.") from error
    return value


def no_number(name: str) -> NoReturn:
    """Refuse NaN and Infinity, which Python's JSON would read."""
    raise ValueError(name)


def explained(error: ValidationError) -> ApiError:
    """Return the first mistake in the fields as a sentence, with the field's name."""
    first = error.errors()[0]
    where = [*first["loc"], *filter(None, [first.get("ctx", {}).get("field")])]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    message = "must be an object" if first["type"] == "model_type" else first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param}: {message}.", param=param)
