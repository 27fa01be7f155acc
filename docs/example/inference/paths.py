"""The addresses that exist: the API's, and those that the page and Gradio's client use.

Gradio has many more, for uploads, files, components and proxies; what the page does not need is not there.
"""

from __future__ import annotations

import re

from fastapi.responses import Response

from api import router
from api_error import ApiError

ADDRESSES = ("/v1/models", "/v1/chat/completions")
WITHOUT_V1 = {"chat", "completions", "embeddings", "models", "responses"}  # how OpenAI's addresses begin after /v1
LOGIN = "/login"
PAGE = {
    r"/": ("GET", "HEAD"),
    LOGIN: ("POST",),
    r"/(config|theme\.css|favicon\.ico|gradio_api/info)": ("GET",),
    r"/(assets|static)(/[\w-][\w.-]*)+": ("GET",),
    r"/gradio_api/(queue/join|run/predict|call/chat|cancel|reset)": ("POST",),
    r"/gradio_api/(queue/data|call/chat/\w+|heartbeat/\w+)": ("GET",),
}


def misdirected(method: str, path: str) -> Response | None:
    """Return the response to a request that meets neither the API nor the page, or None."""
    api = sorted({known for route in router.routes if route.path_regex.match(path) for known in route.methods})
    allowed = api or next((list(methods) for known, methods in PAGE.items() if re.fullmatch(known, path)), [])
    if method in allowed:
        return None
    if api and method == "OPTIONS":
        return Response(status_code=204, headers={"Allow": ", ".join(["OPTIONS", *allowed])})
    if allowed:
        refusal = ApiError(405, f"{path} takes {' or '.join(allowed)}, not {method}.", "method_not_allowed")
        refusal.headers["Allow"] = ", ".join(allowed)
        return refusal.response()
    nothing, first = f"There is nothing at {method} {path}", path.strip("/").partition("/")[0]
    hint = ""
    if first == "v1":
        hint = f": the API has {' and '.join(ADDRESSES)}"
    elif first in WITHOUT_V1:
        hint = ": the API is at /v1, so a client's base_url ends in /v1"
    return ApiError(404, f"{nothing}{hint}.", "not_found").response()
