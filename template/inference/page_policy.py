"""What the browser may do with the page: nothing that an answer of the model asks for."""

from __future__ import annotations

import base64
import hashlib
import re

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from api_error import ApiError

# Scripts are the files of Gradio, and those in the page by their hashes. Answers may contain styles and images, but
# nothing of theirs is loaded, and no form is sent: the page itself sends none.
POLICY = (
    "default-src 'none'; script-src 'self' {hashes}; style-src 'self' 'unsafe-inline'; img-src data: blob:; "
    "font-src 'self' data:; connect-src 'self'; form-action 'none'; base-uri 'self'; frame-ancestors 'none'"
)


class PagePolicy:
    """Middleware that adds the policy to the page, and takes off the cookies and the rights to read of Gradio."""

    def __init__(self, app: ASGIApp) -> None:
        """Wrap Gradio's application."""
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; the page is held until its scripts are known."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        start: Message = {}
        html = bytearray()
        status = 0

        async def send_with_policy(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            if status >= 400:
                return
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                for name in [name for name in headers if name.startswith(("access-control-", "set-cookie"))]:
                    del headers[name]
                if headers.get("content-type", "").startswith("text/html"):
                    start.update(message)
                    return
            elif start:
                html.extend(message.get("body", b""))
                if message.get("more_body"):
                    return
                MutableHeaders(scope=start)["Content-Security-Policy"] = policy(html.decode())
                await send(start)
                message = {"type": "http.response.body", "body": bytes(html)}
            await send(message)

        if scope["path"] == "/":  # a compressed page could not be read here
            headers = [(name, value) for name, value in scope["headers"] if name != b"accept-encoding"]
            scope = {**scope, "headers": headers, "query_string": b""}
        try:
            await self.app(scope, receive, send_with_policy)
        except Exception:
            # Gradio fails at what its page never sends, and at sessions that it had before a restart. The response has
            # begun if those were found too late.
            if 0 < status < 400:
                await send({"type": "http.response.body", "body": b""})
                return
            status = 400
        if status >= 400:
            refusal = ApiError(
                status if status < 500 else 400,
                "The page sends no such request, or the server was started again since: reload the page.",
            )
            await refusal.response()(scope, receive, send)


def policy(html: str) -> str:
    """Return the policy of a page, with the hash of each script in it."""
    scripts = re.findall(r"<script[^>]*>(.*?)</script>", html, re.DOTALL)
    digests = [hashlib.sha256(script.encode()).digest() for script in scripts if script.strip()]
    return POLICY.format(hashes=" ".join(f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests))
