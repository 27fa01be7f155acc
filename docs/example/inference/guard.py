"""Who may use the server: its key, its names, its own pages and those of the proxy in front of it."""

from __future__ import annotations

import contextlib
import ipaddress
import re
import secrets
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from api_error import ApiError
from engine import ChatError

LARGEST = 2**20  # bytes per request: far more than a model reads
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
    """Middleware that checks each request: key, host, origin and size."""

    def __init__(self, app: ASGIApp, host: str, key: str, root_path: str = "", proxy_headers: bool = False) -> None:
        """Wrap the application.

        A proxy shows it at `root_path`, a path or a whole address; `proxy_headers` means that the proxy says in
        X-Forwarded-Host for whom it asks.
        """
        public = urlsplit(root_path.lower())
        self.app, self.key, self.proxy_headers = app, key.encode(), proxy_headers
        self.public, self.path = plain(public.netloc), urlsplit(root_path).path.rstrip("/")
        # DNS rebinding: another site's name that points to this machine would bypass the browser's same-origin policy.
        self.hosts = {"localhost", "127.0.0.1", "::1", host} if is_loopback(host) else set()
        if self.hosts and public.hostname:
            self.hosts.add(public.hostname)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass a request on, or refuse it."""
        refusal = None
        if scope["type"] == "http":
            scope = {**scope, "path": self.address(scope["path"])}
            refusal = self.refusal(Headers(scope=scope), scope["path"])
        await (refusal.response() if refusal else self.app)(scope, receive, send)

    def address(self, path: str) -> str:
        """Return a path without the proxy's part, if the proxy passed that on; the API's also without empty parts."""
        path = re.sub(r"^https?://[^/]*", "", path)
        if self.path and f"{path}/".startswith(f"{self.path}/"):
            path = path.removeprefix(self.path) or "/"
        tidy = re.sub("/+", "/", path).rstrip("/")
        return tidy if tidy == "/health" or f"{tidy}/".startswith("/v1/") else path

    def refusal(self, headers: Headers, path: str) -> ApiError | None:
        """Return the error for a request, or None."""
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
        if f"{path}/".startswith("/v1/") and self.key and not self.is_key(headers.get("authorization", "")):
            return ApiError(
                401, "The API key is missing or wrong: send it as `Authorization: Bearer KEY`.", "invalid_api_key"
            )
        if int(headers.get("content-length", 0)) > LARGEST:
            return too_large()
        return None

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

    def is_key(self, authorization: str) -> bool:
        """Compare with the key in constant time."""
        scheme, _, given = authorization.partition(" ")
        return scheme.lower() == "bearer" and secrets.compare_digest(given.strip().encode("latin-1"), self.key)


def plain(host: str) -> str:
    """Return host and port without a default port, which browsers leave out."""
    return re.sub(r":(80|443)$", "", host)


def too_large() -> ApiError:
    """Return the error for a body that is too large."""
    return ApiError(413, f"The request is larger than {LARGEST} bytes, far more than the model reads.", "too_large")
