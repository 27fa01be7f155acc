"""An OpenAI-compatible API for the tuned model or the base model of this workspace.

/v1/models and /v1/chat/completions respond like OpenAI's, errors included; an unsupported field that would change the
answer is refused, never ignored. /health says whether the model is loaded, and how many requests it has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, Request
from fastapi.responses import JSONResponse, Response
from fastapi.sse import EventSourceResponse, format_sse_event
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator
from pydantic_core import PydanticCustomError

from engine import ChatError, Generation, Message, TooLongError, Usage
from request_queue import RequestQueue, Ticket

COME_AGAIN = {"Retry-After": "2"}  # seconds
# Fields that do not affect the answer, and neutral values of other fields.
IGNORED = {"metadata", "name", "parallel_tool_calls", "prompt_cache_key", "safety_identifier", "service_tier", "store"}
IGNORED |= {"tool_choice", "user"}  # without tools, tool_choice has no effect
NEUTRAL: dict[str, Any] = {"n": 1, "frequency_penalty": 0, "presence_penalty": 0, "logprobs": False, "top_logprobs": 0}
NEUTRAL |= {"response_format": {"type": "text"}, "modalities": ["text"]}

logger = logging.getLogger("uvicorn.error")


class ApiError(Exception):
    """An error response in OpenAI's format."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        """Store the HTTP status and the content of the error."""
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """Return the error body that OpenAI's clients expect."""
        kinds = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the complete response."""
        headers = COME_AGAIN if self.status in (429, 503) else {"WWW-Authenticate": "Bearer"}
        return JSONResponse(self.body(), self.status, headers if self.status in (401, 429, 503) else None)


# ---- the request


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
                only = f"; only {json.dumps(NEUTRAL[name])} is" if name in NEUTRAL else ""
                raise PydanticCustomError("unsupported", "not supported here{only}", {"field": name, "only": only})
        return self


def joined(content: Any) -> Any:
    """Join the parts of a message with line breaks."""
    if not isinstance(content, list):
        return content
    if any(not isinstance(part, dict) or not isinstance(part.get("text"), str) for part in content):
        raise ValueError("every part must be a text, as the model reads nothing else")
    return "\n".join(part["text"] for part in content)


def listed(stop: Any) -> Any:
    """Return one stop text, or several, as a list."""
    return (stop,) if isinstance(stop, str) else tuple(stop) if isinstance(stop, list) else stop


class ChatMessage(Fields):
    """One turn of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[str, BeforeValidator(joined)]


class StreamOptions(Fields):
    """What a stream contains in addition to the answer."""

    include_usage: bool = False
    include_obfuscation: bool = False  # has no effect here


class ChatRequest(Fields):
    """A conversation, and how to answer it. Defaults are those of the page and the terminal."""

    model: str
    messages: Annotated[list[ChatMessage], Field(min_length=1)]
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()
    max_tokens: Annotated[int | None, Field(ge=1)] = None
    max_completion_tokens: Annotated[int | None, Field(ge=1)] = None
    temperature: Annotated[float, Field(ge=0, le=2)] = Generation.temperature
    top_p: Annotated[float, Field(gt=0, le=1)] = Generation.top_p
    top_k: Annotated[int, Field(ge=0)] = Generation.top_k
    repetition_penalty: Annotated[float, Field(gt=0)] = Generation.repetition_penalty
    seed: Annotated[int | None, Field(ge=-(2**63), lt=2**63)] = None
    stop: Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(max_length=4), BeforeValidator(listed)] = ()

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


# ---- the API

router = APIRouter()


async def open_queue(request: Request) -> RequestQueue:
    """Return the model's request queue. Raises ApiError while the model is being loaded."""
    if request.app.state.queue is None:
        raise ApiError(503, "The model is still being loaded.", "loading")
    return request.app.state.queue


async def take_ticket(queue: Annotated[RequestQueue, Depends(open_queue)]) -> AsyncIterator[Ticket]:
    """Hold a ticket until the response is sent or the client has disconnected."""
    with queue.ticket() as ticket:
        yield ticket


@router.get("/health")
async def health(queue: Annotated[RequestQueue, Depends(open_queue)]) -> dict[str, Any]:
    """Return that the model is ready, and the number of its requests."""
    running = int(queue.engine.lock.locked())
    return {"status": "ok", "running": running, "waiting": max(0, queue.tickets - running)}


@router.get("/v1/models")
async def models(queue: Annotated[RequestQueue, Depends(open_queue)]) -> dict[str, Any]:
    """List the models: the tuned one; the base model if there is no tuned one or the adapter can be disabled."""
    return {"object": "list", "data": [await model(name, queue) for name in queue.models]}


@router.get("/v1/models/{name:path}")
async def model(name: str, queue: Annotated[RequestQueue, Depends(open_queue)]) -> dict[str, Any]:
    """Describe the model; `root` is what it was made from."""
    check_name(name, queue)
    facts = {"id": name, "object": "model", "created": queue.since, "owned_by": "workspace"}
    return facts | {"root": queue.engine.source.base}


def check_name(name: str, queue: RequestQueue) -> None:
    """Raise ApiError if there is no such model."""
    if name not in queue.models:
        message = f"There is no model {name!r} here: ask for {' or '.join(map(repr, queue.models))}."
        raise ApiError(404, message, "model_not_found", "model")


@router.post("/v1/chat/completions")
async def complete(wanted: ChatRequest, request: Request, ticket: Annotated[Ticket, Depends(take_ticket)]) -> Any:
    """Answer a conversation, in one response or as a stream of events."""
    queue = ticket.queue
    check_name(wanted.model, queue)
    messages, generation, usage = wanted.conversation(), wanted.generation(), Usage()

    def refuse(_: str) -> None:
        raise TooLongError(
            f"The conversation is longer than what the model reads ({queue.engine.backend.context} tokens, of which "
            "those of the answer are kept free): leave out its oldest messages, or ask for a shorter answer."
        )

    try:
        await asyncio.to_thread(queue.engine.fit, messages, generation.max_new_tokens, refuse)
    except ChatError as error:
        code = "context_length_exceeded" if isinstance(error, TooLongError) else None
        raise ApiError(400, str(error), code, "messages") from error
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}
    pieces = ticket.stream(messages, generation, lambda _: None, usage)  # finish_reason says that the answer was cut
    if wanted.stream:
        return EventSourceResponse(events(head, pieces, usage, wanted.stream_options.include_usage))
    text = await unless_gone(request, whole(pieces))
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}
    choice["finish_reason"] = usage.finish_reason
    return {**head, "object": "chat.completion", "choices": [choice], "usage": counts(usage)}


async def whole(pieces: AsyncIterator[str]) -> str:
    """Return the joined pieces. Raises ApiError if the model fails."""
    try:
        return "".join([piece async for piece in pieces])
    except Exception as error:
        raise failure(error) from error


async def unless_gone(request: Request, answer: Coroutine[Any, Any, str]) -> str:
    """Await the answer, but cancel it if the client disconnects."""

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.create_task(answer), asyncio.create_task(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return str(tasks[0].result())
        raise ApiError(499, "The client has gone.")  # nobody reads this
    finally:
        for task in tasks:
            task.cancel()


async def events(
    head: dict[str, Any], pieces: AsyncIterator[str], usage: Usage, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the answer as server-sent events: the role, the pieces, the finish reason, and the usage."""

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **no_usage})

    no_usage = {"usage": None} if include_usage else {}
    yield chunk({"role": "assistant", "content": ""})
    try:
        async for piece in pieces:
            yield chunk({"content": piece})
    except Exception as error:  # the status is already sent, so the error goes into the stream
        yield event(failure(error).body())
        return
    yield chunk({}, usage.finish_reason)
    if include_usage:
        yield event({**head, "object": "chat.completion.chunk", "choices": [], "usage": counts(usage)})
    yield format_sse_event(data_str="[DONE]")


def event(data: dict[str, Any]) -> bytes:
    """Return a server-sent event."""
    return format_sse_event(data_str=json.dumps(data, ensure_ascii=False))


def counts(usage: Usage) -> dict[str, int]:
    """Return the usage of an answer in tokens."""
    total = usage.prompt_tokens + usage.completion_tokens
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": total,
    }


def failure(error: Exception) -> ApiError:
    """Return the client's error for a failed answer; unexpected errors are logged."""
    if isinstance(error, ChatError):
        return ApiError(500, str(error))
    logger.error("An answer failed.", exc_info=error)
    return ApiError(500, f"The answer failed ({type(error).__name__}); the server's log says more.")
