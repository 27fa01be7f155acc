"""The model in a process of its own: what ends or blocks that process does not end or block the server.

The server's process sends a conversation through a pipe and receives the answer's pieces; it imports no library that
computes. One conversation is answered at a time, and the pipe is used by one thread at a time.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, field
from multiprocessing.connection import Connection

from engine import AGAIN, BrokenError, Engine, Generation, Message, Source, Usage

LOOK_SECONDS = 0.02  # how often the server looks whether an answer is still wanted
DEATHS = 3  # in a row, without an answer in between, that end the server
STOP = "stop"  # what is sent to end an answer


class EndedError(BrokenError):
    """The model's process cannot be started, or ends each time."""


@dataclass(frozen=True)
class Facts:
    """What is known about the backend outside of its process."""

    description: str = ""
    context: int = 0
    notices: list[str] = field(default_factory=list)
    switchable: bool = False


class ModelProcess:
    """Answers like an engine, which `load` loads in another process."""

    source: Source
    backend: Facts

    def __init__(self, load: Callable[[], Engine]) -> None:
        """Start the process; `load` is a function that can be pickled."""
        self.load, self.deaths = load, 0
        self.start()

    def start(self) -> None:
        """Start the process, which begins to load the model."""
        context = multiprocessing.get_context("spawn")  # a fork would copy the server's threads and locks
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=answer_requests, args=(theirs, self.load), daemon=True)
        with without_interrupts():
            self.process.start()
        theirs.close()

    def loaded(self) -> ModelProcess:
        """Return this when the model is loaded. Raises ChatError if it cannot be."""
        try:
            got = self.connection.recv()
        except (EOFError, OSError) as error:
            raise EndedError(f"The process of the model ended while it loaded it ({self.cause()}): {FREE}.") from error
        if isinstance(got, Exception):
            raise got
        self.source, self.backend = got
        return self

    def restart(self) -> None:
        """Load the model again in a new process. Raises EndedError if no answer came between several ends."""
        self.close()
        if self.deaths >= DEATHS:
            raise EndedError(
                f"The process of the model ended {self.deaths} times in a row ({self.cause()}): {FREE}, or use another "
                "--engine."
            )
        self.start()
        self.loaded()

    def stream(
        self,
        messages: list[Message],
        generation: Generation,
        notify: Callable[[str], None],
        usage: Usage | None = None,
        may_drop: bool = True,
    ) -> Generator[str | None, None, None]:
        """Yield the answer in pieces, as the engine does, and None whenever the next one takes long.

        Closing the iterator returns when the model computes no more. Raises the engine's errors, and BrokenError if
        the process has ended.
        """
        if not self.process.is_alive():  # it was ended while it had nothing to do
            self.restart()
        usage, running = usage or Usage(), True
        try:
            self.connection.send((messages, generation, may_drop))
            while running:
                if not self.connection.poll(LOOK_SECONDS):
                    yield None
                    continue
                kind, value = self.connection.recv()
                running = kind in ("piece", "notice")
                if kind == "piece":
                    yield value
                elif kind == "notice":
                    notify(value)
                elif kind == "error":
                    raise value
                else:
                    vars(usage).update(vars(value))
            self.deaths = 0
        except (EOFError, OSError, BrokenError) as error:
            running = False
            self.process.join(5)
            self.deaths += 1
            reason = f"The process of the model ended in the middle of this answer ({self.cause()}): "
            if isinstance(error, BrokenError):
                reason = str(error).removesuffix(AGAIN)
            raise BrokenError(
                f"{reason}the model is loaded again, so send the request once more, or a shorter one."
            ) from error
        finally:
            if running:  # the reader has gone
                with contextlib.suppress(EOFError, OSError):
                    self.connection.send(STOP)
                    while self.connection.recv()[0] in ("piece", "notice"):
                        pass

    def cause(self) -> str:
        """Return how the process ended."""
        self.process.join(1)
        code = self.process.exitcode or 0
        if code >= 0:
            return f"exit status {code}"
        name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
        return f"{name}, as when the memory is full" if name == "SIGKILL" else name

    def close(self) -> None:
        """End the process."""
        self.process.kill()
        self.process.join()
        self.connection.close()


FREE = "close what else uses the memory and start this program again"


@contextlib.contextmanager
def without_interrupts() -> Iterator[None]:
    """Let a process that is started here ignore Ctrl-C, from its first moment on: the server decides."""
    if not hasattr(signal, "pthread_sigmask"):  # Windows
        yield
        return
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


# ---- in the model's process


def answer_requests(connection: Connection, load: Callable[[], Engine]) -> None:
    """Load the model and answer requests until the server ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=end_with_the_server, daemon=True).start()
    with contextlib.suppress(EOFError, OSError):  # the server has ended
        try:
            engine = load()
        except Exception as error:
            return connection.send(portable(error))
        backend = engine.backend
        facts = Facts(backend.description, backend.context, backend.notices, backend.switchable)
        connection.send((engine.source, facts))
        while True:
            request = connection.recv()
            if request == STOP:  # it crossed with the end of the answer
                continue
            try:
                connection.send(("end", answered(connection, engine, *request)))
            except Exception as error:
                connection.send(("error", portable(error)))
                if isinstance(error, BrokenError):  # only another process can use the GPU again
                    return None


def answered(
    connection: Connection, engine: Engine, messages: list[Message], generation: Generation, may_drop: bool
) -> Usage:
    """Send an answer's pieces and notices until it ends or is not wanted any more; return its usage."""
    usage = Usage()

    def notify(notice: str) -> None:
        connection.send(("notice", notice))

    with contextlib.closing(engine.stream(messages, generation, notify, usage, may_drop)) as pieces:
        for piece in pieces:
            if connection.poll():
                connection.recv()
                break
            connection.send(("piece", piece))
    return usage


def end_with_the_server() -> None:
    """Wait for the server's end, also if it is killed, and end this process, whatever it computes."""
    if server := multiprocessing.parent_process():
        server.join()
        os._exit(0)


def portable(error: Exception) -> Exception:
    """Return an error that can be sent, with its traceback as a note."""
    try:
        pickle.loads(pickle.dumps(error))  # noqa: S301 (an error of this process)
    except Exception:
        error = RuntimeError(f"{type(error).__name__}: {error}").with_traceback(error.__traceback__)
    error.add_note("".join(traceback.format_exception(error)))
    return error
