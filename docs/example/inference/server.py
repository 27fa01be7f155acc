"""One port for the page and the API: who may come in, and what is there while the model is being loaded."""

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

IN_USE = {errno.EADDRINUSE, errno.EACCES}  # Windows says the second of a port that another program holds
PORTS = 100  # that are tried from the wanted one on
LARGEST = 2**20  # bytes of a request: far more than a model reads
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
            # asyncio does so by itself for sockets of its own only; without, each answer takes 40 ms longer
            listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            return listener
    raise ChatError(f"Port {port} of {host} cannot be opened ({wrong}): choose another --port or --host.") from wrong


def is_loopback(host: str) -> bool:
    """Tell whether an address is this machine's own, for nobody else to reach."""
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
    """Return the application. It listens at once; a thread prepares the engine, and then the page is opened.

    `is_ready` is called when both answer, `fail` with what kept them from it. A request must bring the key, unless
    there is none, and be for this host and from no other site.
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

    # FastAPI's own pages would load scripts from elsewhere
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
    """Return the server, which says only what goes wrong, and not that pages are still open when it ends."""
    config = uvicorn.Config(app, log_level="warning", access_log=False, ws="none", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    logging.getLogger("uvicorn.error").addFilter(lambda _: not server.should_exit)
    return server


async def in_thread(work: Callable[[], Any]) -> Any:
    """Await what a thread does. Unlike asyncio's, it keeps nobody waiting who ends the program meanwhile."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[Any] = loop.create_future()

    def run() -> None:
        try:
            result, settle = work(), done.set_result
        except Exception as error:
            result, settle = error, done.set_exception
        with contextlib.suppress(RuntimeError):  # the loop is closed: the program ends
            loop.call_soon_threadsafe(lambda: done.cancelled() or settle(result))

    threading.Thread(target=run, daemon=True).start()
    return await done


class Guard:
    """Lets in who is meant: with the key, to this host, not from another site's page, with no more than is read."""

    def __init__(self, app: ASGIApp, host: str, key: str) -> None:
        """Stand before the application."""
        self.app, self.key = app, key.encode()
        # A name that another site makes point to this machine would get its scripts past the browser's barriers.
        self.hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else set()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer it with a refusal."""
        refusal = self.refusal(Headers(scope=scope), scope["path"]) if scope["type"] == "http" else None
        await (refusal.response() if refusal else self.app)(scope, receive, send)

    def refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Return what is wrong with a request, if anything."""
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
        """Compare with the key, in a time that tells nothing."""
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self.key)


# ---- errors, in OpenAI's shape


async def no_such_address(scope: Scope, receive: Receive, send: Send) -> None:
    """Answer what is under /v1 but not there."""
    refusal = ApiError(404, f"There is nothing at {scope['method']} {scope['path']}.", "not_found")
    await refusal.response()(scope, receive, send)


def too_large() -> ApiError:
    """Return the answer to a body that is too large."""
    return ApiError(413, f"The request is larger than {LARGEST} bytes, far more than the model reads.", "too_large")


async def refused(_: Request, error: Any) -> Response:
    """Answer a refusal."""
    return error.response()


async def full(_: Request, error: Any) -> Response:
    """Tell a client to come again."""
    return ApiError(429, str(error), "rate_limit_exceeded").response()


async def invalid(_: Request, error: Any) -> Response:
    """Say what is wrong with the first field that is."""
    first = error.errors()[0]
    where = [*first["loc"][1:], *filter(None, [first.get("ctx", {}).get("field")])]
    param = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in where).lstrip(".")
    if first["type"] == "json_invalid":
        return ApiError(400, f"The body is no JSON: {first['ctx']['error']}.").response()
    message = first["msg"].removeprefix("Value error, ")
    return ApiError(400, f"{param or 'The body'}: {message}.", param=param or None).response()


async def http_error(_: Request, error: Any) -> Response:
    """Answer what FastAPI refuses by itself."""
    refusal = too_large() if error.status_code == 413 else ApiError(error.status_code, f"{error.detail}.")
    return refusal.response()


EXPLAIN: dict[Any, Any] = {
    ApiError: refused,
    QueueFullError: full,
    RequestValidationError: invalid,
    HTTPException: http_error,
}
