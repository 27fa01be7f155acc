"""The request queue of the model, for the web page and the API."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator
from dataclasses import dataclass, field

from engine import BrokenError, ChatError, Engine, Generation, Message, Usage

WAITING = 32  # requests that may wait while one is answered; more are refused


class QueueFullError(ChatError):
    """Too many requests are waiting."""


class RequestQueue:
    """First in, first out. Runs in one event loop; the model computes in a thread."""

    def __init__(self, engine: Engine) -> None:
        """Create an empty queue."""
        self.engine, self.turn, self.tickets = engine, asyncio.Lock(), 0
        self.since = int(time.time())
        self.broken = ""  # why no answer is possible any more
        self.models = ["tuned"] if engine.source.adapter else ["base"]  # those that can answer
        if engine.backend.switchable:
            self.models = ["tuned", "base"]

    @contextlib.contextmanager
    def ticket(self) -> Iterator[Ticket]:
        """Yield a ticket; leaving the context stops its computation. Raises QueueFullError."""
        if self.tickets > WAITING:
            raise QueueFullError(f"{WAITING} requests are waiting already: try again later.")
        self.tickets += 1
        ticket = Ticket(self)
        try:
            yield ticket
        finally:
            self.tickets -= 1
            ticket.left.set()
            if ticket.work:
                ticket.work.cancel()


@dataclass
class Ticket:
    """A place in the queue, for one answer."""

    queue: RequestQueue
    left: threading.Event = field(default_factory=threading.Event)
    work: asyncio.Task[None] | None = None

    async def stream(
        self,
        messages: list[Message],
        generation: Generation,
        notify: Callable[[str], None],
        usage: Usage | None = None,
        fitted: tuple[list[int], int] | None = None,
    ) -> AsyncIterator[str]:
        """Yield the answer in pieces when its turn comes, as the engine does. Raises its errors.

        A slow reader does not block the queue: pieces are buffered, and the turn ends when all are computed.
        """
        made: asyncio.Queue[str | Exception | None] = asyncio.Queue()
        hand = asyncio.get_running_loop().call_soon_threadsafe

        def compute() -> None:
            try:
                stream = self.queue.engine.stream(messages, generation, notify, usage, fitted)
                with contextlib.closing(stream) as pieces:
                    for piece in pieces:
                        if self.left.is_set():
                            return
                        hand(made.put_nowait, piece)
            except Exception as error:
                if isinstance(error, BrokenError):
                    self.queue.broken = str(error)
                hand(made.put_nowait, error)
            else:
                hand(made.put_nowait, None)

        async def wait_and_compute() -> None:
            async with self.queue.turn:
                await asyncio.to_thread(compute)

        self.work = asyncio.create_task(wait_and_compute())
        while (piece := await made.get()) is not None:
            if isinstance(piece, Exception):
                raise piece
            if piece:
                yield piece
