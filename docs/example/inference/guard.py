"""Who may use the server, and what of it: its addresses, its key, its names, its own pages and those of its proxy."""

from __future__ import annotations

import contextlib
import ipaddress
import re
from typing import Any
from urllib.parse import urlsplit

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_error import ApiError
from engine import ChatError
from login import Login, network
from paths import LOGIN, misdirected

LARGEST = 2**20  # bytes per request: far more than a model reads
LARGEST_LOGIN = 2**12
# Of every response. The page itself has a policy of its own.
HEADERS = {
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Resource-Policy": "same-origin",
}
NGINX = "nginx: proxy_set_header X-Forwarded-Host $http_host;"


def is_loopback(host: str) -> bool:
    """Return whether an address is reachable only from this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return host == "localhost"


def check_root_path(root_path: str) -> None:
    """Raise ChatError unless it is a path or an address, as a browser shows it."""
    if root_path and not re.fullmatch(r"(https?://[^\s/?#@]+)?(/[^\s?#]*)?", root_path):
        raise ChatError(
            f"--root-path {root_path} is neither a path nor an address: write, for example, /chat or "
            "https://example.com/chat."
        )


class Guard:
    """Middleware that checks each request, reads its body, and adds the headers that keep other sites away."""

    def __init__(self, app: ASGIApp, host: str, key: str, root_path: str = "", proxy_headers: bool = False) -> None:
        """Wrap the application.

        A proxy shows it at `root_path`, a path or a whole address; `proxy_headers` means that the proxy says in
        X-Forwarded-Host and X-Forwarded-For for whom it asks.
        """
        public = urlsplit(root_path.lower())
        self.app, self.key, self.proxy_headers = app, key, proxy_headers
        self.public, self.path = plain(public.netloc), urlsplit(root_path).path.rstrip("/")
        self.login = Login(key, self.path)
        # DNS rebinding: another site's name that points to this machine would bypass the browser's same-origin policy.
        self.hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else set()
        if self.hosts and public.hostname:
            self.hosts.add(public.hostname)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on with its whole body, or refuse it."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return

        async def send_with_headers(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        scope = {**scope, "path": self.address(scope["path"])}
        headers, path = Headers(scope=scope), scope["path"]
        response = self.response(scope["method"], path, headers, scope["client"])
        if response is None:
            body = await whole(receive, LARGEST_LOGIN if path == LOGIN else LARGEST)
            if body is None:
                return  # the client has gone
            if isinstance(body, ApiError):
                response = body.response()
            elif path == LOGIN:
                response = self.log_in(body, headers, scope["client"])
            else:
                receive = again(body, receive)
        await (response or self.app)(scope, receive, send_with_headers)

    def address(self, path: str) -> str:
        """Return a path without the proxy's part, if the proxy passed that on; the API's also without empty parts."""
        path = re.sub(r"^https?://[^/]*", "", path)
        if self.path and f"{path}/".startswith(f"{self.path}/"):
            path = path.removeprefix(self.path) or "/"
        tidy = re.sub("/+", "/", path).rstrip("/")
        return tidy if tidy == "/health" or f"{tidy}/".startswith("/v1/") else path

    def response(self, method: str, path: str, headers: Headers, client: Any) -> Response | None:
        """Return the response to a request that may not go on, or None."""
        if refusal := self.stranger(method, path, headers):
            return refusal.response()
        api, wrong = f"{path}/".startswith("/v1/"), misdirected(method, path)
        if wrong and not api:
            return wrong
        known = not self.key or path in ("/health", LOGIN)
        if not known and (refusal := self.without_key(api, headers, self.asking(headers, client))):
            return self.login.page() if path == "/" and refusal.status == 401 else refusal.response()
        if wrong:
            return wrong
        if (coding := headers.get("content-encoding", "identity")) != "identity":
            said = f"The body is compressed ({coding}): send it without the header Content-Encoding."
            return ApiError(415, said).response()
        return too_large(LARGEST).response() if int(headers.get("content-length", 0)) > LARGEST else None

    def stranger(self, method: str, path: str, headers: Headers) -> ApiError | None:
        """Return the error for a request to another name, or from a page of another site, or None."""
        host, origin = headers.get("host", "").lower(), headers.get("origin", "").lower()
        forwarded = headers.get("x-forwarded-host", "").partition(",")[0].strip().lower()
        try:
            name = urlsplit(f"//{host}").hostname
        except ValueError:
            name = None
        if self.hosts and name not in self.hosts:
            hint = f"; if a proxy sends this name, start the server with --root-path https://{host}" if name else ""
            return ApiError(403, f"This server is not {host or 'to be asked without a Host'}{hint}.", "wrong_host")
        ours = {plain(host), self.public, plain(forwarded) if self.proxy_headers else ""}
        if origin and (plain(origin.partition("://")[2]) or origin) not in ours:
            return ApiError(403, self.foreign(origin, forwarded), "wrong_origin")
        # Browsers send no Origin with images, scripts and links, but say in these headers where they come from.
        site, mode, kind = (headers.get(f"sec-fetch-{name}", "") for name in ("site", "mode", "dest"))
        opened = (method, path, mode, kind) == ("GET", "/", "navigate", "document")
        if site in ("cross-site", "same-site") and not opened:
            return ApiError(403, "Pages of other sites may only link to the page of this server.", "wrong_site")
        return None

    def asking(self, headers: Headers, client: Any) -> str:
        """Return the address that asks: that of the connection, or what the proxy says, which it adds at the end."""
        forwarded = headers.get("x-forwarded-for", "").rpartition(",")[2].strip() if self.proxy_headers else ""
        return network(forwarded or (client[0] if client else ""))

    def without_key(self, api: bool, headers: Headers, address: str) -> ApiError | None:
        """Return the error for a request without the key; the page also takes its cookie."""
        if not api and self.login.is_logged_in(headers.get("cookie", "")):
            return None
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() == "bearer":
            if refusal := self.login.wait(address):
                return refusal
            if self.login.is_key(given, address):
                return None
        said = "The API key is missing or wrong: send it as `Authorization: Bearer KEY`."
        return ApiError(401, said, "invalid_api_key")

    def log_in(self, body: bytes, headers: Headers, client: Any) -> Response:
        """Answer a login. A browser sends its Origin, which also says whether the connection is encrypted."""
        origin = headers.get("origin", "")
        return self.login.answer(body, self.asking(headers, client), bool(origin), origin.startswith("https://"))

    def foreign(self, origin: str, forwarded: str) -> str:
        """Return why a page is refused, and what to do if the page is this server's own behind a proxy."""
        said = f"Pages of other sites may not use this server, and this request comes from a page of {origin}"
        if "://" not in origin:
            return f"{said}."
        if forwarded and not self.proxy_headers and plain(forwarded) == plain(origin.partition("://")[2]):
            return f"{said}; if your proxy sent the header X-Forwarded-Host, start the server with --proxy-headers."
        if self.proxy_headers and not forwarded:
            return f"{said}; if that is your proxy, let it send the header X-Forwarded-Host ({NGINX})."
        return f"{said}; if that is your proxy, start the server with --root-path {origin}."


def plain(host: str) -> str:
    """Return host and port without a default port, which browsers leave out."""
    return re.sub(r":(80|443)$", "", host)


def too_large(largest: int) -> ApiError:
    """Return the error for a body that is too large."""
    return ApiError(413, f"The request is larger than {largest} bytes, far more than the model reads.", "too_large")


async def whole(receive: Receive, largest: int) -> bytes | ApiError | None:
    """Return the body, counted as it comes: an error if it is too large, None if the client goes."""
    body = bytearray()
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += message.get("body", b"")
        if len(body) > largest:
            return too_large(largest)
        if not message.get("more_body"):
            return bytes(body)


def again(body: bytes, receive: Receive) -> Receive:
    """Return a `receive` that begins with a body that was read."""
    left = [body]

    async def receive_again() -> Message:
        return {"type": "http.request", "body": left.pop(), "more_body": False} if left else await receive()

    return receive_again
