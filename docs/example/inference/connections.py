"""The connections: a request has to come within its time, and there are never too many of them."""

from __future__ import annotations

import asyncio
import contextlib
import json

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from api_error import ApiError

SECONDS = 15  # for a request to come, with its body; an answer may take as long as it takes
BACKLOG = 64  # connections that are accepted at once
INVALID = "This is no valid HTTP/1.1 request: check its headers, Host and Content-Length first."


def most_connections() -> int:
    """Return how many connections may be open: a quarter of the descriptors, as more are on their way in and out."""
    with contextlib.suppress(ImportError):  # Windows
        import resource

        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        if descriptors > 0:
            return min(512, descriptors // 4)
    return 512


MOST = most_connections()


class Protocol(H11Protocol):
    """The protocol of HTTP, which waits for no request longer than its time, and answers in the API's format."""

    deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Wait for a request. Where there are too many, the one that has waited longest is closed."""
        super().connection_made(transport)
        self.wait()
        there = [one for one in self.connections if isinstance(one, Protocol) and not one.transport.is_closing()]
        if len(there) > MOST:
            waiting = [one for one in there if one.is_waiting()]
            longest = min(waiting, key=lambda one: one.deadline.when() if one.deadline else 0)
            longest.refuse(ApiError(503, "Too many connections are open: try again later.", "too_many_connections"))

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the connection."""
        self.stop_waiting()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Read a part of a request."""
        if self.deadline is None:
            self.wait()
        super().data_received(data)
        if not self.is_waiting():
            self.stop_waiting()

    def on_response_complete(self) -> None:
        """Go on with the next request, of which a part may have come already."""
        if self.conn.their_state is h11.DONE:
            self.stop_waiting()
        super().on_response_complete()
        if self.conn.their_state is h11.SEND_BODY and self.deadline is None:
            self.wait()

    def is_waiting(self) -> bool:
        """Return whether a request, or the rest of one, is still to come."""
        return self.conn.their_state in (h11.IDLE, h11.SEND_BODY)

    def wait(self) -> None:
        """Begin the time that a request has."""
        late = ApiError(408, f"The request did not come within {SECONDS} seconds.", "too_slow")
        self.deadline = self.loop.call_later(SECONDS, self.refuse, late)

    def stop_waiting(self) -> None:
        """End that time: the request is here."""
        if self.deadline:
            self.deadline.cancel()
        self.deadline = None

    def refuse(self, refusal: ApiError) -> None:
        """Answer, unless an answer has begun or nothing was asked, and close the connection."""
        if self.transport.is_closing():
            return
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE, h11.ERROR) and (self.deadline or refusal.status == 400):
            body = json.dumps(refusal.body()).encode()
            status = {400: "Bad Request", 408: "Request Timeout", 503: "Service Unavailable"}[refusal.status]
            headers = f"content-type: application/json\r\ncontent-length: {len(body)}\r\nconnection: close\r\n\r\n"
            self.transport.write(f"HTTP/1.1 {refusal.status} {status}\r\n{headers}".encode() + body)
        self.transport.close()

    def send_400_response(self, _: str) -> None:
        """Answer what is no HTTP."""
        self.refuse(ApiError(400, INVALID))
