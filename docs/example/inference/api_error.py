"""The errors of the API, in OpenAI's format."""

from __future__ import annotations

from typing import Any

from fastapi.responses import JSONResponse, Response

KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}
COME_AGAIN = {"Retry-After": "2"}  # seconds
HEADERS = {401: {"WWW-Authenticate": "Bearer"}, 429: COME_AGAIN, 503: COME_AGAIN}
TEXT, NOTHING = {"type": "string"}, {"type": ["string", "null"]}
FIELDS = {"message": TEXT, "type": TEXT, "param": NOTHING, "code": NOTHING}
ERROR = {"type": "object", "properties": FIELDS, "required": [*FIELDS]}
BODY = {"type": "object", "properties": {"error": ERROR}, "required": ["error"]}
# for the description of the API
ERRORS: dict[int | str, dict[str, Any]] = {
    statuses: {"description": "An error.", "content": {"application/json": {"schema": BODY}}}
    for statuses in ("4XX", "5XX")
}


class ApiError(Exception):
    """An error response: `code` is a word for programs, and `param` the field of the request that is wrong."""

    def __init__(self, status: int, message: str, code: str | None = None, param: str | None = None) -> None:
        """Store the HTTP status and the content of the error."""
        super().__init__(message)
        self.status, self.code, self.param = status, code, param
        self.headers = dict(HEADERS.get(status, {}))

    def body(self) -> dict[str, Any]:
        """Return the error body that OpenAI's clients expect."""
        kind = KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}

    def response(self) -> Response:
        """Return the complete response."""
        return JSONResponse(self.body(), self.status, self.headers)
