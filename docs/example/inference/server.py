"""One port for the page and the API: access control, and the responses while the model is being loaded."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import logging
import socket
from collections.abc import AsyncIterator, Callable
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import HTMLResponse, Response
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from api import router
from api_error import ApiError
from connections import BACKLOG, Protocol
from engine import ChatError
from guard import Guard, is_loopback
from login import SHORTEST
from request_queue import Model, QueueFullError, RequestQueue, in_thread

IN_USE = {errno.EADDRINUSE, errno.EACCES}  # on Windows, EACCES means that another program uses the port
PORTS = 100  # how many ports are tried, from the requested one on
LOADING = '<!doctype html><title>Loading</title><meta http-equiv="refresh" content="2">Loading the model …'


def listen(host: str, port: int, key: str) -> socket.socket:
    """Open the port, or the next free one; 0 takes any. Raises ChatError, also for a network without a key."""
    if not is_loopback(host) and not key:
        raise ChatError(
            f"Binding to anything but loopback ({host}) would let others on the network use the model: give a key in "
            "the variable CHAT_API_KEY, or use 127.0.0.1 and a tunnel (ssh -L 7860:localhost:7860 THIS-MACHINE)."
        )
    if not is_loopback(host) and len(key) < SHORTEST:
        raise ChatError(
            f"The key is too short for a network ({host}): others could guess it. Take one of at least {SHORTEST} "
            """characters, for example `python -c "import secrets; print(secrets.token_urlsafe())"`."""
        )
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    for candidate in range(port, port + PORTS):
        try:
            listener = socket.create_server((host, candidate), family=family)
        except (OSError, OverflowError) as error:
            wrong = error
            if getattr(error, "errno", None) not in IN_USE:
                break
        else:
            # asyncio does this only for its own sockets; without it, each answer takes 40 ms longer
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listener
    raise ChatError(f"Port {port} of {host} cannot be opened ({wrong}): choose another --port or --host.") from wrong


def create_app(
    prepare: Callable[[], Model],
    open_page: Callable[[RequestQueue], FastAPI],
    is_ready: Callable[[], None],
    fail: Callable[[Exception], None],
    host: str = "127.0.0.1",
    key: str = "",
    root_path: str = "",
    proxy_headers: bool = False,
) -> FastAPI:
    """Return the application. It responds at once; a thread loads the engine, and then the page is mounted.

    `is_ready` is called when both respond, `fail` with the error otherwise. A request must have the key, if there is
    one, be for this host, and not come from another site; `root_path` and `proxy_headers` are the Guard's.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def open_when_prepared() -> None:
            try:
                app.state.queue = RequestQueue(await in_thread(prepare), fail)
                page = open_page(app.state.queue)
                async with page.router.lifespan_context(page):
                    app.state.page = page
                    is_ready()
                    await asyncio.Event().wait()  # until the server ends
            except Exception as error:
                fail(error)

        opening = asyncio.create_task(open_when_prepared())
        yield
        opening.cancel()
        await asyncio.wait([opening])

    # FastAPI's documentation pages would load scripts from other sites
    app = FastAPI(lifespan=lifespan, openapi_url=None)
    app.state.queue, app.state.page = None, HTMLResponse(LOADING, 503, {"Retry-After": "2"})

    async def page(scope: Scope, receive: Receive, send: Send) -> None:
        await app.state.page(scope, receive, send)

    app.include_router(router)
    app.mount("/", page)
    app.add_middleware(Guard, host=host, key=key, root_path=root_path, proxy_headers=proxy_headers)
    for kind, explain in EXPLAIN.items():
        app.add_exception_handler(kind, explain)
    return app


def create_server(app: FastAPI) -> uvicorn.Server:
    """Return the server. It logs only errors, and does not report open pages when it ends."""
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        ws="none",
        http=Protocol,
        backlog=BACKLOG,
        proxy_headers=False,  # the Guard decides whom to believe
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    return server


# ---- errors in OpenAI's format


async def refused(_: Request, error: Any) -> Response:
    """Return the response of an ApiError."""
    return error.response()


async def full(_: Request, error: Any) -> Response:
    """Tell the client to retry later."""
    return ApiError(429, str(error), "rate_limit_exceeded").response()


async def http_error(request: Request, error: Any) -> Response:
    """Answer requests that FastAPI itself refuses."""
    nothing = f"There is nothing at {request.method} {request.scope['path']}."
    message = nothing if error.status_code == 404 else f"{error.detail}."
    return ApiError(error.status_code, message).response()


EXPLAIN: dict[Any, Any] = {ApiError: refused, QueueFullError: full, HTTPException: http_error}
