"""An OpenAI-compatible API for the tuned model or the base model of this workspace.

/v1/models and /v1/chat/completions respond like OpenAI's, errors included. /health says whether the model is loaded,
and how many requests it has.
"""

from __future__ import annotations

import asyncio
import json
import logging
import time
import uuid
from collections.abc import AsyncIterator, Coroutine
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.sse import EventSourceResponse, format_sse_event

from api_error import ERRORS, ApiError
from chat_request import DESCRIPTION, ChatRequest, read_request
from engine import BrokenError, ChatError, TooLongError, Usage
from request_queue import RequestQueue, Ticket

READ = ["GET", "HEAD"]
AT_ONCE = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx would hold a stream back until its end

logger = logging.getLogger("uvicorn.error")


router = APIRouter(responses=ERRORS)
STREAM = {200: {"description": "The answer, or its events", "content": {"text/event-stream": {}}}}


async def open_queue(request: Request) -> RequestQueue:
    """Return the model's request queue. Raises ApiError while the model is being loaded."""
    if request.app.state.queue is None:
        raise ApiError(503, "The model is still being loaded.", "loading")
    return request.app.state.queue


async def take_ticket(queue: Annotated[RequestQueue, Depends(open_queue)]) -> AsyncIterator[Ticket]:
    """Hold a ticket until the response is sent or the client has disconnected."""
    with queue.ticket() as ticket:
        yield ticket


@router.api_route("/health", methods=READ)
async def health(queue: Annotated[RequestQueue, Depends(open_queue)]) -> dict[str, Any]:
    """Return that the model is ready, or is loaded again while requests wait, and the number of its requests."""
    status = "loading" if queue.restarting else "ok"
    return {"status": status, "running": int(queue.running is not None), "waiting": len(queue.waiting)}


@router.api_route("/v1/models", methods=READ)
async def models(queue: Annotated[RequestQueue, Depends(open_queue)]) -> dict[str, Any]:
    """List the models: the tuned one; the base model if there is no tuned one or the adapter can be disabled."""
    return {"object": "list", "data": [await model(name, queue) for name in queue.models]}


@router.api_route("/v1/models/{name:path}", methods=READ)
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


@router.post("/v1/chat/completions", openapi_extra=DESCRIPTION, responses=STREAM)
async def complete(
    wanted: Annotated[ChatRequest, Depends(read_request)],
    request: Request,
    ticket: Annotated[Ticket, Depends(take_ticket)],
) -> Any:
    """Answer a conversation, in one response or as a stream of events."""
    queue = ticket.queue
    check_name(wanted.model, queue)
    messages, generation, usage = wanted.conversation(), wanted.generation(), Usage()
    head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": wanted.model}
    pieces = ticket.stream(messages, generation, ignore, usage, may_drop=False)
    if wanted.stream:
        first = await unless_gone(request, begun(pieces))  # an error before it has a status of its own
        stream = events(head, first, pieces, usage, wanted.stream_options.include_usage)
        return EventSourceResponse(stream, headers=AT_ONCE)
    text = await unless_gone(request, whole(pieces))
    choice = {"index": 0, "message": {"role": "assistant", "content": text, "refusal": None}, "logprobs": None}
    choice["finish_reason"] = usage.finish_reason
    return {**head, "object": "chat.completion", "choices": [choice], "usage": counts(usage)}


def ignore(_: str) -> None:
    """Take a notice: finish_reason says that the answer was cut."""


async def begun(pieces: AsyncIterator[str]) -> str:
    """Return the first piece, when the turn has come and the model reads the conversation. Raises ApiError."""
    try:
        return await anext(pieces, "")
    except Exception as error:
        raise failure(error) from error


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
    head: dict[str, Any], first: str, pieces: AsyncIterator[str], usage: Usage, include_usage: bool
) -> AsyncIterator[bytes]:
    """Yield the answer as server-sent events: the role, the pieces, the finish reason, and the usage."""

    def chunk(delta: dict[str, str], finish_reason: str | None = None) -> bytes:
        choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return event({**head, "object": "chat.completion.chunk", "choices": [choice], **no_usage})

    no_usage = {"usage": None} if include_usage else {}
    yield chunk({"role": "assistant", "content": ""})
    if first:
        yield chunk({"content": first})
    try:
        async for piece in pieces:
            if piece:
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
    if isinstance(error, BrokenError):
        return ApiError(503, str(error))
    if isinstance(error, TooLongError):
        return ApiError(400, str(error), "context_length_exceeded", "messages")
    if isinstance(error, ChatError):  # not 500: clients would try again, with the same request
        return ApiError(400, str(error))
    logger.error("An answer failed.", exc_info=error)
    return ApiError(500, f"The answer failed ({type(error).__name__}); the server's log says more.")
