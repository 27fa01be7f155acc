"""The key: who gave it, how often it was guessed wrong, and the page that asks for it.

Whoever gives the key to the page gets a cookie that says until when it counts, signed with the key: nothing is stored,
and a new key ends all sessions. It is the page's alone: the API takes only the key itself.
"""

from __future__ import annotations

import hmac
import ipaddress
import secrets
import time
from urllib.parse import parse_qs

from fastapi.responses import HTMLResponse, JSONResponse, RedirectResponse, Response
from starlette.requests import cookie_parser

from api_error import ApiError

SHORTEST = 16  # characters of a key, if others can reach the server
GUESSES, MINUTE = 10, 60  # wrong keys from one address in as many seconds; then it has to wait
DAYS = 7  # how long a login lasts
FORM = (
    '<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">'
    "<title>Login</title><style>body {{ font: 1rem system-ui, sans-serif; max-width: 22rem; margin: 4rem auto; }}"
    "input, button {{ font: inherit; box-sizing: border-box; width: 100%; padding: .5rem; margin: .5rem 0; }}"
    ":root {{ color-scheme: light dark; }}</style>"
    '<form method="post" action="{action}"><p>{said}</p><label>API key'
    '<input name="password" type="password" autocomplete="current-password" autofocus required></label>'
    "<button>Login</button></form></html>"
)
ASKS = "This chat needs the API key."
POLICY = "default-src 'none'; style-src 'unsafe-inline'; form-action 'self'; base-uri 'none'; frame-ancestors 'none'"


class Login:
    """Compares keys in constant time, and lets nobody guess."""

    def __init__(self, key: str, path: str = "") -> None:
        """Take the key; empty: everybody is known. A proxy shows the page at `path`."""
        self.key, self.path = key.encode(), path
        self.cookie = f"chat-{self.sign('name')[:8]}"  # cookies are the same for all ports of a machine
        self.wrong: dict[str, list[float]] = {}  # when each address gave a wrong key

    def sign(self, text: str) -> str:
        """Return a text's signature."""
        return hmac.digest(self.key, text.encode(), "sha256").hex()

    def wait(self, address: str) -> ApiError | None:
        """Return the error for an address that gave too many wrong keys, or None."""
        times = [at for at in self.wrong.get(address, []) if at > time.monotonic() - MINUTE]
        if len(times) < GUESSES:
            return None
        refusal = ApiError(429, "Too many wrong keys came from this address: wait a minute.", "too_many_wrong_keys")
        refusal.headers["Retry-After"] = str(int(times[0] + MINUTE - time.monotonic()) + 1)
        return refusal

    def is_key(self, given: str, address: str) -> bool:
        """Compare with the key, and remember that an address gave a wrong one."""
        if secrets.compare_digest(given.strip().encode("utf-8", "surrogateescape"), self.key):
            return True
        self.wrong[address] = [*self.wrong.pop(address, []), time.monotonic()][-GUESSES:]
        if len(self.wrong) > 10_000:  # the address that has been silent for the longest time
            del self.wrong[next(iter(self.wrong))]
        return False

    def is_logged_in(self, cookies: str) -> bool:
        """Return whether a header Cookie has a session that still counts."""
        until, _, signature = cookie_parser(cookies).get(self.cookie, "").partition("-")
        signed = secrets.compare_digest(signature.encode(), self.sign(until).encode())
        return signed and int(until) > time.time()

    def page(self, said: str = ASKS, status: int = 401) -> Response:
        """Return the page that asks for the key."""
        form = FORM.format(action=f"{self.path}/login", said=said)
        headers = {"Content-Security-Policy": POLICY, "Cache-Control": "no-store"}
        # without a referrer, the browser would send the form with the origin "null"
        return HTMLResponse(form, status, headers | {"Referrer-Policy": "same-origin"})

    def answer(self, body: bytes, address: str, browser: bool, https: bool) -> Response:
        """Answer a login: the cookie, and a browser is sent to the page."""
        given = parse_qs(body.decode("utf-8", "surrogateescape")).get("password", [""])[0]
        refusal = self.wait(address)
        if refusal is None and not self.is_key(given, address):
            refusal = ApiError(401, "This key is wrong.", "invalid_api_key")
        if refusal:
            response = self.page(str(refusal), refusal.status) if browser else refusal.response()
            response.headers.update(refusal.headers)
            return response
        until = str(int(time.time()) + DAYS * 24 * 3600)
        done = RedirectResponse(f"{self.path}/", 303) if browser else JSONResponse({"success": True})
        value = f"{until}-{self.sign(until)}"
        done.set_cookie(self.cookie, value, DAYS * 24 * 3600, secure=https, httponly=True, samesite="lax")
        return done


def network(address: str) -> str:
    """Return what counts as one address: an IPv4 address, or the network that one IPv6 connection usually has."""
    try:
        ip = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if ip.version == 6 and ip.ipv4_mapped:
        return str(ip.ipv4_mapped)
    return str(ip) if ip.version == 4 else str(ipaddress.ip_network(f"{ip}/64", strict=False))
