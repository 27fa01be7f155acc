"""One port for the page and the API: access control, and the responses while the model is being loaded."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import secrets
import socket
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any
from urllib.parse import urlsplit

import uvicorn
from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, Response
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Receive, Scope, Send

from api import ApiError, router
from engine import ChatError, Engine
from request_queue import QueueFullError, RequestQueue

IN_USE = {errno.EADDRINUSE, errno.EACCES}  # on Windows, EACCES means that another program uses the port
PORTS = 100  # how many ports are tried, from the requested one on
LARGEST = 2**20  # bytes per request: far more than a model reads
LOADING = '<!doctype html><title>Loading</title><meta http-equiv="refresh" content="2">Loading the model …'


def listen(host: str, port: int, key: str) -> socket.socket:
    """Open the port, or the next free one; 0 takes any. Raises ChatError, also for a network without a key."""
    if not is_loopback(host) and not key:
        raise ChatError(
            f"Binding to anything but loopback ({host}) would let others on the network use the model: give a key in "
            "the variable CHAT_API_KEY, or use 127.0.0.1 and a tunnel (ssh -L 7860:localhost:7860 THIS-MACHINE)."
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


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable only from this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def create_app(
    prepare: Callable[[], Engine],
    open_page: Callable[[RequestQueue], FastAPI],
    is_ready: Callable[[], None],
    fail: Callable[[Exception], None],
    host: str = "127.0.0.1",
    key: str = "",
) -> FastAPI:
    """Return the application. It responds at once; a thread loads the engine, and then the page is mounted.

    `is_ready` is called when both respond, `fail` with the error otherwise. A request must have the key, if there is
    one, be for this host, and not come from another site.
    """

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async def open_when_prepared() -> None:
            try:
                app.state.queue = RequestQueue(await in_thread(prepare))
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

    app.include_router(router, max_body_size=LARGEST)
    app.mount("/v1", no_such_address)
    app.mount("/", page)
    app.add_middleware(Guard, host=host, key=key)
    for kind, explain in EXPLAIN.items():
        app.add_exception_handler(kind, explain)
    return app


def create_server(app: FastAPI) -> uvicorn.Server:
    """Return the server. It logs only errors, and does not report open pages when it ends."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    return server


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


class Guard:
    """Middleware that checks each request: key, host, origin and size."""

    def __init__(self, app: ASGIApp, host: str, key: str) -> None:
        """Wrap the application."""
        self.app, self.key = app, key.encode()
        # DNS rebinding: another site's name that points to this machine would bypass the browser's same-origin policy.
        self.hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = self.refusal(Headers(scope=scope), scope["path"]) if scope["type"] == "http" else None
        await (refusal.response() if refusal else self.app)(scope, receive, send)

    def refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Return the error for a request, or None."""
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if self.hosts and name not in self.hosts:
            return ApiError(403, f"This server is not {host or 'to be asked without a Host'}.", "wrong_host")
        if origin and origin.partition("://")[2] != host:
            return ApiError(403, "Pages of other sites may not use this server.", "wrong_origin")
        if path.startswith("/v1/") and self.key and not self.is_key(headers.get("authorization", "")):
            return ApiError(
                401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.", "invalid_api_key"
            )
        if int(headers.get("content-length", 0)) > LARGEST:
            return too_large()
        return None

    def is_key(self, authorization: str) -> bool:
        """Compare with the key in constant time."""
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self.key)


# ---- errors in OpenAI's format


async def no_such_address(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer an unknown path under /v1."""
    refusal = ApiError(404, f"There is nothing at {scope['method']} {scope['path']}.", "not_found")
    await refusal.response()(scope, receive, send)


def too_large() -> ApiError:
    """Return the error for a body that is too large."""
    return ApiError(413, f"The request is larger than {LARGEST} bytes, far more than the model reads.", "too_large")


async def refused(_: Request, error: Any) -> Response:
    """Return the response of an ApiError."""
    return error.response()


async def full(_: Request, error: Any) -> Response:
    """Tell the client to retry later."""
    return ApiError(429, str(error), "rate_limit_exceeded").response()


async def invalid(_: Request, error: Any) -> Response:
    """Return the error of the first invalid field."""
    first = error.errors()[0]
    where = [*first["loc"][1:], *filter(None, [first.get("ctx", {}).get("field")])]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {first['ctx']['error']}.").response()
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'The body'}: {message}.", param=param or None).response()


async def http_error(_: Request, error: Any) -> Response:
    """Answer requests that FastAPI itself refuses."""
    refusal = too_large() if error.status_code == 413 else ApiError(error.status_code, f"{error.detail}.")
    return refusal.response()


EXPLAIN: dict[Any, Any] = {
    ApiError: refused,
    QueueFullError: full,
    RequestValidationError: invalid,
    HTTPException: http_error,
}
