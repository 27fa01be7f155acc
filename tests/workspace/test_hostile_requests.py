"""Requests that mean harm, drawn with a seed, against the server as a user starts it.

HOSTILE=10000 draws as many; SEED=7 draws others.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from test_api import COMPLETIONS, HELLO, client_of, fetch, said
from test_inference import free_port

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


def hostile(draw: random.Random) -> tuple[bytes, str, str]:
    """Return a request, what is done with its connection, and the address that it comes from."""
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
    source = f"127.{draw.randint(1, 254)}.{draw.randint(0, 255)}.{draw.randint(1, 254)}"
    return request, draw.choice(["read", "read", "read", "go", "half", "slow"]), source


def send(port: int, request: bytes, ending: str, source: str) -> bytes:
    """Send a request in its way; return what came back, as far as it was waited for.

    Each has an address of its own, as a few wrong keys keep an address out.
    """
    answer = b""
    place, here = ("127.0.0.1", port), (source, 0)
    with contextlib.suppress(OSError), socket.create_connection(place, timeout=2, source_address=here) as connection:
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


@pytest.fixture(scope="module", params=["torch", "onnx"])
def server(request: pytest.FixtureRequest, workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """The server as a user starts it, on the demo's base model: its port, its process, and the file that it logs to."""
    from exporting.int4 import build
    from training.tiny_model import build_demo

    build_demo()
    log, port = tmp_path_factory.mktemp("hostile") / "log", free_port()
    onnx = workspace / "models/onnx-base"
    if request.param == "onnx":
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            build(workspace / "models/demo", onnx, "cpu")
        (onnx / "export.json").write_text('{"base_model": "models/demo", "files": {}}')
    command = ["inference/gradio_chat.py", "--baseonly", "--engine", request.param, "--port", str(port)]
    with log.open("w") as output:
        server = subprocess.Popen(
            [sys.executable, "-B", *command],
            cwd=workspace,
            env=os.environ | {"CHAT_API_KEY": KEY},
            stdout=output,
            stderr=output,
        )
    try:
        end = time.monotonic() + 60
        while health(port) != 200:
            assert time.monotonic() < end and server.poll() is None, log.read_text()
            time.sleep(0.1)
        yield port, psutil.Process(server.pid), log
    finally:
        server.terminate()
        server.wait(10)
        shutil.rmtree(onnx, ignore_errors=True)


def health(port: int) -> int:
    """Return the status of /health; 0 if nothing answers."""
    with contextlib.suppress(OSError):
        return fetch(f"http://127.0.0.1:{port}/", "/health")[0]
    return 0


# In a process of its own, so that what sends the requests does not keep it waiting. It ends with its input.
WATCH = """
import http.client, json, select, sys, time
took = []
while not select.select([sys.stdin], [], [], 0.05)[0]:
    asked = time.perf_counter()
    connection = http.client.HTTPConnection("127.0.0.1", int(sys.argv[1]), timeout=10)
    connection.request("GET", "/health")
    assert connection.getresponse().status == 200
    connection.close()
    took.append(time.perf_counter() - asked)
print(json.dumps(took))
"""


def memory(server: psutil.Process) -> int:
    """Return the bytes that the server and the model's process hold."""
    return sum(process.memory_info().rss for process in (server, *server.children(recursive=True)))


def test_hostile_requests_leave_the_server_quick_small_and_quiet(
    server: tuple[int, psutil.Process, Path],
) -> None:
    port, process, log = server
    draw = random.Random(SEED)
    requests = [hostile(draw) for _ in range(COUNT)]
    with ThreadPoolExecutor(9) as pool:
        list(pool.map(lambda one: send(port, *one), requests[: COUNT // 3]))  # warms up
        before, began = memory(process), time.monotonic()
        watching = subprocess.Popen(
            [sys.executable, "-c", WATCH, str(port)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        answers = list(pool.map(lambda one: send(port, *one), requests))
        seconds = time.monotonic() - began
        took = json.loads(watching.communicate()[0])
    for (request, *_), answer in zip(requests, answers, strict=True):
        if answer.startswith((b"HTTP/1.1 5", b"HTTP/1.1 4")):
            head, _, body = answer.partition(b"\r\n\r\n")
            explained = not body or b'{"error":{"message":"' in body.replace(b'": ', b'":') or b"Login" in body
            assert explained, (request[:200], answer[:300])
            assert not head.startswith(b"HTTP/1.1 500"), (request[:300], answer[:300])
    answered = sum(answer.startswith(b"HTTP/1.1 200") for answer in answers)
    grown = (memory(process) - before) / 2**20
    print(
        f"{len(answers)} requests in {seconds:.0f} s, {answered} answered; /health took {max(took) * 1000:.0f} ms at "
        f"most; the memory grew by {grown:.0f} MiB"
    )
    assert answered > COUNT / 50
    assert "Traceback" not in log.read_text()
    assert grown < 64
    assert sorted(took)[len(took) // 2] < 0.05
    assert said(client_of(f"http://127.0.0.1:{port}/", KEY), HELLO, max_tokens=3)
