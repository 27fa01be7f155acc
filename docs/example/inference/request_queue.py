"""The request queue of the model, for the web page and the API."""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import functools
import threading
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Generator, Iterator
from dataclasses import dataclass, field
from typing import Any, Protocol

from engine import BrokenError, ChatError, Generation, Message, Source, Usage

WAITING = 32  # requests that may wait while one is answered; more are refused


class QueueFullError(ChatError):
    """Too many requests are waiting."""


class Model(Protocol):
    """What answers: an engine that can be started again (model_process.py)."""

    source: Source
    backend: Any  # description, context, notices, switchable

    def stream(
        self,
        messages: list[Message],
        generation: Generation,
        notify: Callable[[str], None],
        usage: Usage | None = None,
        may_drop: bool = True,
    ) -> Generator[str | None, None, None]:
        """Yield the answer in pieces, or None while they take long; closing the iterator stops the computation."""

    def restart(self) -> None:
        """Load the model again. Raises ChatError."""


class RequestQueue:
    """First in, first out. Runs in one event loop; one worker computes, in a thread."""

    def __init__(self, engine: Model, fail: Callable[[Exception], None] = lambda _: None) -> None:
        """Create an empty queue; `fail` is called when no answer is possible any more."""
        self.engine, self.fail = engine, fail
        self.waiting: deque[Ticket] = deque()
        self.running: Ticket | None = None  # until its computation has ended, whether or not somebody reads it
        self.worker: asyncio.Task[None] | None = None
        self.restarting = False
        self.since = int(time.time())
        self.models = ["tuned"] if engine.source.adapter else ["base"]  # those that can answer
        if engine.backend.switchable:
            self.models = ["tuned", "base"]

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Yield a ticket; leaving the context stops its computation. Raises QueueFullError."""
        if len(self.waiting) + bool(self.running) > WAITING:
            raise QueueFullError(f"{WAITING} requests are waiting already: try again later.")
        ticket = Ticket(self)
        self.waiting.append(ticket)
        try:
            yield ticket
        finally:
            ticket.left.set()
            if ticket in self.waiting:
                self.waiting.remove(ticket)

    def begin(self) -> None:
        """Let the worker begin, if it has nothing to do."""
        if self.worker is None or self.worker.done():
            self.worker = asyncio.create_task(self.work())

    async def work(self) -> None:
        """Compute the answers in order, those whose request is complete; start the model again if it has ended."""
        while (ticket := next((one for one in self.waiting if one.compute), None)) and ticket.compute:
            self.waiting.remove(ticket)
            self.running = ticket
            try:
                await in_thread(ticket.compute)
                if ticket.broke:
                    self.restarting = True
                    await in_thread(self.engine.restart)
                    self.restarting = False
            except Exception as error:
                self.fail(error)
                return
            finally:
                self.running = None


@dataclass(eq=False)
class Ticket:
    """A place in the queue, for one answer."""

    queue: RequestQueue
    left: threading.Event = field(default_factory=threading.Event)
    compute: Callable[[], None] | None = None
    broke: bool = False  # whether the model ended

    async def stream(
        self,
        messages: list[Message],
        generation: Generation,
        notify: Callable[[str], None],
        usage: Usage | None = None,
        may_drop: bool = True,
    ) -> AsyncIterator[str]:
        """Yield the answer in pieces when its turn comes, as the engine does, also empty ones. Raises its errors.

        A slow reader does not block the queue: pieces are buffered, and the turn ends when all are computed.
        """
        made: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        hand = asyncio.get_running_loop().call_soon_threadsafe

        def compute() -> None:
            if self.left.is_set():
                return
            try:
                stream = self.queue.engine.stream(messages, generation, notify, usage, may_drop)
                with contextlib.closing(stream) as pieces:
                    for piece in pieces:
                        if self.left.is_set():
                            return
                        if piece is not None:
                            hand(made.put_nowait, piece)
            except Exception as error:
                self.broke = isinstance(error, BrokenError)
                hand(made.put_nowait, error)
            else:
                hand(made.put_nowait, None)

        # in the page's context, which knows to whom notices go
        self.compute = functools.partial(contextvars.copy_context().run, compute)
        self.queue.begin()
        while (piece := await made.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            yield piece


async def in_thread(work: Callable[[], Any]) -> Any:
    """Await work in a thread. Unlike asyncio's, the thread does not delay the end of the program."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        try:
            result, settle = work(), done.set_result
        except Exception as error:
            result, settle = error, done.set_exception
        with contextlib.suppress(RuntimeError):  # the loop is closed: the program is ending
            loop.call_soon_threadsafe(lambda: done.cancelled() or settle(result))

    threading.Thread(target=run, daemon=True).start()
    return await done
