"""The workspace's server, in this process: page and API on a port of its own."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any


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
    app = server.create_app(
        prepare, open_page, settled.set, lambda _: settled.set(), "127.0.0.1", key, root_path, proxy_headers
    )
    process = server.create_server(app)
    thread = threading.Thread(target=process.run, kwargs={"sockets": [listener]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/", app, settled
    finally:
        process.should_exit = True
        thread.join()
