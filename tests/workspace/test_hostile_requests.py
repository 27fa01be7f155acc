"""Requests that mean harm, drawn with a seed, against the real server and the demo's base model.

HOSTILE=10000 draws as many; SEED=7 draws others.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import random
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import inference_of
from served import served
from test_api import COMPLETIONS, HELLO, client_of, fetch, said

KEY = "a key of the test's"
COUNT, SEED = int(os.environ.get("HOSTILE", "300")), int(os.environ.get("SEED", "0"))
PATHS = [
    COMPLETIONS,
    "/login",
    "/",
    "/gradio_api/queue/join",
    "/gradio_api/upload",
    "/v1/models",
    "/config",
    "/%00%1b[2J",
]
PATHS += [
    "/gradio_api/file=/etc/passwd",
    "/assets/../../x",
    "//v1//models/../..",
    "/gradio_api/queue/data?session_hash=x",
]
HEADERS = ["Origin: http://evil.example", "Sec-Fetch-Site: cross-site", "Host: evil.example", "Content-Encoding: gzip"]
HEADERS += [
    "Transfer-Encoding: chunked",
    "Content-Length: 99999999999",
    "Cookie: " + "a" * 9000,
    "X: \x1b]52;c;YQ==\x07",
]
HEADERS += ["Expect: 100-continue", "Authorization: Basic x", "Authorization: Bearer \xff", "Upgrade: websocket", ": x"]
HEADERS += [
    "Content-Type: multipart/form-data; boundary=" + "b" * 70,
    "Content-Length: -1",
    "Range: bytes=0-",
    "Host: [",
]
VALUES: list[Any] = [
    None,
    True,
    -1,
    0,
    1e-40,
    1e308,
    2**70,
    "",
    "\ud800",
    "x" * 9000,
    [],
    {},
    [[]],
    {"a": {"b": []}},
    "²",
]
FIELDS = ["temperature", "top_p", "top_k", "repetition_penalty", "seed", "stop", "max_tokens", "stream", "model", "n"]
FIELDS += ["messages", "tools", "response_format", "logprobs", "stream_options"]


def hostile(draw: random.Random) -> tuple[bytes, str]:
    """Return a request, and what is done with its connection."""
    fields: dict[str, Any] = {"model": "base", "messages": HELLO, "max_tokens": 4}
    for _ in range(draw.randrange(3)):
        fields[draw.choice(FIELDS)] = draw.choice(VALUES)
    if draw.random() < 0.1:
        fields["messages"] = [
            {"role": ("user", "assistant")[i % 2], "content": "a"} for i in range(draw.randrange(4000))
        ]
    body = json.dumps(fields).encode(draw.choice(["utf-8"] * 4 + ["utf-16"]))
    if draw.random() < 0.3:
        body = draw.choice([b"", b"[" * 50_000, b"\xff" * 9, b"x" * 2**20, b"1" * 9999, body[: len(body) // 2], b"a=b"])
    method = draw.choice([*["POST"] * 9, "GET", "PUT", "HEAD", "OPTIONS", "BREW"])
    path = COMPLETIONS if draw.random() < 0.5 else draw.choice(PATHS)
    lines = [f"{method} {path} HTTP/1.1", "Connection: close", *draw.sample(HEADERS, draw.choice([0, 0, 0, 1, 2]))]
    lines += ["Host: localhost"] * (draw.random() < 0.9) + [f"Content-Length: {len(body)}"] * (draw.random() < 0.9)
    lines += [f"Authorization: Bearer {KEY}"] * (draw.random() < 0.9)
    request = "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body
    if draw.random() < 0.1:
        request = draw.randbytes(draw.randrange(1, 999))
    return request, draw.choice(["read", "read", "read", "go", "half", "slow"])


def send(port: int, request: bytes, ending: str) -> bytes:
    """Send a request in its way; return what came back, as far as it was waited for."""
    answer = b""
    with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=2) as connection:
        if ending == "half":
            connection.sendall(request[: len(request) // 2])
            return b""
        pieces = [request] if ending != "slow" else [request[:9], request[9:40], request[40:]]
        for piece in pieces:
            connection.sendall(piece)
            time.sleep(0.02 * (ending == "slow"))
        if ending == "go":
            return b""
        while piece := connection.recv(65536):
            answer += piece
    return answer


@pytest.fixture(scope="module")
def address(workspace: Path) -> Iterator[str]:
    from training.tiny_model import build_demo

    build_demo()
    with inference_of(workspace):
        import login
        from load_engine import load

        login.GUESSES = 10**6  # so that what follows on wrong keys is read too
        engine = load(baseonly=True, root=workspace)
        with served(lambda: engine, KEY) as (address, _):
            yield address


def test_hostile_requests_leave_the_server_quick_small_and_quiet(
    address: str, caplog: pytest.LogCaptureFixture
) -> None:
    port = int(address.rstrip("/").rpartition(":")[2])
    draw = random.Random(SEED)
    requests = [hostile(draw) for _ in range(COUNT)]
    process, took, done = psutil.Process(), [], threading.Event()

    def watch() -> None:
        while not done.wait(0.05):
            asked = time.perf_counter()
            assert fetch(address, "/health")[0] == 200
            took.append(time.perf_counter() - asked)

    with ThreadPoolExecutor(9) as pool, caplog.at_level(logging.WARNING):
        list(pool.map(lambda one: send(port, *one), requests[: COUNT // 3]))  # warms up
        before = process.memory_info().rss
        watching = pool.submit(watch)
        answers = list(pool.map(lambda one: send(port, *one), requests))
        done.set()
        watching.result()
    for (request, _), answer in zip(requests, answers, strict=True):
        if answer.startswith((b"HTTP/1.1 5", b"HTTP/1.1 4")):
            head, _, body = answer.partition(b"\r\n\r\n")
            explained = not body or b'{"error":{"message":"' in body.replace(b'": ', b'":') or b"Login" in body
            assert explained, (request[:200], answer[:300])
            assert not head.startswith(b"HTTP/1.1 500"), (request[:300], answer[:300])
    answered = sum(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    assert answered > COUNT / 50
    print(f"{answered} of {len(answers)} were answered; /health took {max(took) * 1000:.0f} ms at most")
    assert [record.getMessage() for record in caplog.records if record.exc_info] == []
    assert process.memory_info().rss - before < 64 * 2**20
    assert sorted(took)[len(took) // 2] < 0.05
    assert said(client_of(address, KEY), HELLO, max_tokens=3)
