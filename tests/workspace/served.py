"""The workspace's server, in this process: page and API on a port of its own."""

from __future__ import annotations

import contextlib
import json
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any


class Here:
    """An engine in this process, in place of the model's process: tests reach into it."""

    def __init__(self, engine: Any) -> None:
        self.engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)

    def restart(self) -> None:
        raise RuntimeError("the engine of a test cannot be started again")


def wait_for_health(address: str, running: int = 0, waiting: int = 0, seconds: float = 2) -> None:
    """Wait until the server says that so many requests are answered and wait, or fail."""
    end, status = time.monotonic() + seconds, {}
    while (status.get("running"), status.get("waiting")) != (running, waiting):
        assert time.monotonic() < end, status
        with urllib.request.urlopen(f"{address}health") as response:
            status = json.load(response)


@contextlib.contextmanager
def served(
    prepare: Callable[[], Any], key: str = "", root_path: str = "", proxy_headers: bool = False
) -> Iterator[tuple[str, Any]]:
    """Serve what `prepare` returns; yield the page's address and the application when both answer, and end it after."""
    import gradio_chat

    def open_page(queue: Any) -> Any:
        return gradio_chat.open_page(queue, root_path)

    with serving(prepare, open_page, key, root_path, proxy_headers) as (address, app, ready):
        assert ready.wait(60)
        assert app.state.queue, "the engine could not be prepared"
        yield address, app


@contextlib.contextmanager
def serving(
    prepare: Callable[[], Any],
    open_page: Callable[[Any], Any],
    key: str = "",
    root_path: str = "",
    proxy_headers: bool = False,
) -> Iterator[tuple[str, Any, threading.Event]]:
    """Serve, and yield as soon as the port is open: the page's address, the application, and what is set when ready."""
    import server

    settled = threading.Event()
    listener = server.listen("127.0.0.1", 0, key)

    def prepare_here() -> Any:
        engine = prepare()
        return engine if hasattr(engine, "restart") else Here(engine)

    app = server.create_app(
        prepare_here, open_page, settled.set, lambda _: settled.set(), "127.0.0.1", key, root_path, proxy_headers
    )
    process = server.create_server(app)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", app, settled
    finally:
        process.should_exit = True
        thread.join()
