"""Who gets in, and with what: addresses, other sites, bodies, connections, and guesses of the key."""

from __future__ import annotations

import contextlib
import json
import os
import re
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
from conftest import inference_of
from served import served, serving
from test_api import COMPLETIONS, HELLO, Echo, client_of, fetch, said

KEY = "a key of the test's"
BODY = json.dumps({"model": "base", "messages": HELLO}).encode()
FOREIGN = {"Sec_Fetch_Site": "cross-site"}


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    with inference_of(workspace):
        yield


def engine(context: int = 600) -> Any:
    from engine import Engine, Source

    backend = Echo()
    backend.context = context
    return Engine(Source("models/demo", None, None, "lora", "float32", ""), backend)


@pytest.fixture(scope="module")
def opened() -> Iterator[tuple[str, Any]]:
    with served(engine) as (address, app):
        yield address, app


@pytest.fixture
def locked() -> Iterator[str]:
    """Page and API behind a key, from which no wrong one has come yet."""
    with served(engine, KEY) as (address, _):
        yield address


def routes(app: Any, before: str = "") -> Iterator[tuple[str, str]]:
    """Yield method and address of every route, with something in place of its parameters."""
    for route in app.routes:
        if included := getattr(route, "original_router", None):
            yield from routes(included, before)
        elif hasattr(getattr(route, "app", None), "routes"):
            yield from routes(route.app, before + route.path.rstrip("/"))
        elif hasattr(route, "methods"):
            path = re.sub(r"{[^}]*:path}", "a/b", before + route.path)
            for method in route.methods or ():
                yield method, re.sub("{[^}]*}", "a", path)


def test_every_route_that_the_page_does_not_use_is_404(opened: tuple[str, Any]) -> None:
    from paths import PAGE

    address, app = opened
    found = {(method, path) for method, path in routes(app.state.page) if path}
    assert len(found) > 60
    used = {(m, path) for m, path in found for known, methods in PAGE.items() if re.fullmatch(known, path)}
    other = sorted(found - used)
    assert len(other) > 40
    more = ["file=https://evil/x.png", "file=/etc/passwd", "proxy=https://evil/", "custom_component/%1b/client/a/b"]
    for method, path in [*other, *(("GET", f"/gradio_api/{path}") for path in more)]:
        status, _, text = fetch(address, path, method=method)
        assert status == 404, (method, path)
        assert method == "HEAD" or json.loads(text)["error"]["code"] == "not_found", (method, path)
    for path in ("/assets/../config", "/static/%2e%2e/x", "/assets//etc/passwd", "/gradio_api/./info", "/docs"):
        assert fetch(address, path)[0] == 404, path
    assert fetch(address, "/", b"", "POST")[0] == 405


def test_a_stranger_sees_nothing_but_the_login(locked: str) -> None:
    for path in ("/config", "/gradio_api/info", "/assets/a.js", "/theme.css", "/gradio_api/queue/data?session_hash=a"):
        status, headers, text = fetch(locked, path)
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        assert "set-cookie" not in headers
    status, headers, text = fetch(locked, "/")
    assert (status, "gradio" in text, 'name="password"' in text) == (401, False, True)
    assert "form-action 'self'" in headers["content-security-policy"]
    for path in ("/gradio_api/upload", "/openapi.json", "/gradio_api/token"):
        assert fetch(locked, path)[0] == 404


def log_in(address: str, key: str, **headers: str) -> tuple[int, dict[str, str], str]:
    kind = {"Content_Type": "application/x-www-form-urlencoded"}
    return fetch(address, "/login", f"username=me&password={key}".encode(), **kind, **headers)


def test_a_login_is_one_strict_cookie_for_the_page_alone(locked: str) -> None:
    status, headers, _ = log_in(locked, KEY, Origin=locked.rstrip("/"))
    assert (status, headers["location"]) == (303, "/")
    cookie = headers["set-cookie"]
    assert re.fullmatch(r"chat-\w{8}=\d+-\w{64}; HttpOnly; Max-Age=\d+; Path=/; SameSite=lax", cookie)
    pair, _, _ = cookie.partition(";")
    assert fetch(locked, "/config", Cookie=f"a={{[}}; {pair}")[0] == 200
    assert fetch(locked, "/v1/models", Cookie=pair)[0] == 401
    name, _, value = pair.partition("=")
    until, _, signature = value.partition("-")
    for wrong in (f"{int(until) + 1}-{signature}", f"{until}-", "", f"-{signature}", f"{until}-{'0' * 64}"):
        assert fetch(locked, "/config", Cookie=f"{name}={wrong}")[0] == 401
    assert fetch(locked, "/config", Authorization=f"Bearer {KEY}")[0] == 200
    status, headers, _ = fetch(locked, "/", Cookie=pair)
    assert (status, "set-cookie" in headers) == (200, False)


def test_wrong_keys_are_throttled_for_the_address_they_come_from() -> None:
    with served(engine, KEY, proxy_headers=True) as (address, _):
        counts: dict[int, int] = {}
        for number in range(500):
            for status, headers, _ in (
                fetch(
                    address, "/v1/models", Authorization=f"Bearer guess {number}", X_Forwarded_For="1.1.1.1, 2.2.2.2"
                ),
                log_in(address, f"guess{number}", X_Forwarded_For=f"1.1.1.{number % 256}, 2.2.2.2"),
            ):
                counts[status] = counts.get(status, 0) + 1
                assert status != 429 or 0 < int(headers["retry-after"]) <= 61
        assert counts == {401: 10, 429: 990}
        right = {"Authorization": f"Bearer {KEY}"}
        assert fetch(address, "/v1/models", **right, X_Forwarded_For="2.2.2.2")[0] == 429
        assert fetch(address, "/v1/models", **right, X_Forwarded_For="2.2.2.2, 3.3.3.3")[0] == 200
        assert log_in(address, KEY, X_Forwarded_For="3.3.3.3")[0] == 200
        assert fetch(address, "/v1/models", X_Forwarded_For="4.4.4.4")[0] == 401  # no guess


def test_one_ipv6_network_is_one_address() -> None:
    from login import network

    assert network("2001:db8::1") == network("2001:db8::ffff:2%eth0") != network("2001:db8:0:1::1")
    assert network("::ffff:1.2.3.4") == "1.2.3.4"
    assert network("unknown") == "unknown"


@pytest.mark.parametrize("key", ["a", "fifteen letters"])
def test_a_short_key_is_refused_on_a_network_only(key: str) -> None:
    from engine import ChatError
    from server import listen

    with pytest.raises(ChatError, match=r"too short for a network.*at least 16 characters"):
        listen("0.0.0.0", 0, key)
    listen("127.0.0.1", 0, key).close()


def test_pages_of_other_sites_may_only_link_to_the_page(opened: tuple[str, Any]) -> None:
    address, _ = opened
    visit = {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "document"}
    for site in ("cross-site", "same-site"):
        assert fetch(address, "/", Sec_Fetch_Site=site, **visit)[0] == 200
        for path, headers in (
            ("/", {"Sec_Fetch_Mode": "navigate", "Sec_Fetch_Dest": "iframe"}),
            ("/", {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "image"}),
            ("/", {}),
            ("/health", visit),
            ("/v1/models", visit),
            ("/config", {"Sec_Fetch_Mode": "no-cors", "Sec_Fetch_Dest": "script"}),
            ("/gradio_api/file=https://evil/x.html", visit),
        ):
            status, _, text = fetch(address, path, Sec_Fetch_Site=site, **headers)
            assert (status, json.loads(text)["error"]["code"]) == (403, "wrong_site"), (path, headers)
        assert fetch(address, COMPLETIONS, BODY, Sec_Fetch_Site=site, **visit)[0] == 403
    for site in ("same-origin", "none"):
        assert fetch(address, "/config", Sec_Fetch_Site=site)[0] == 200
    assert said(client_of(address), HELLO) == "[user]" + HELLO[0]["content"]


def test_every_response_tells_browsers_to_keep_out(opened: tuple[str, Any]) -> None:
    address, _ = opened
    for path in ("/", "/config", "/health", "/nothing", "/theme.css", COMPLETIONS):
        _, headers, _ = fetch(address, path)
        assert headers["x-content-type-options"] == "nosniff", path
        assert headers["referrer-policy"] == "no-referrer", path
        assert headers["cross-origin-resource-policy"] == "same-origin", path
        assert not [name for name in headers if name.startswith("access-control-")], path
        policy = headers["content-security-policy"]
        assert policy.startswith("default-src 'none'"), path
        assert "frame-ancestors 'none'" in policy
    policy = fetch(address, "/")[1]["content-security-policy"]
    assert "'unsafe-inline'" not in policy.partition("script-src")[2].partition(";")[0]
    assert "'unsafe-eval'" not in policy
    for part in ("img-src data: blob:;", "form-action 'none'", "connect-src 'self'"):
        assert part in policy


PLACES = ["/", "/login", "/gradio_api/queue/join", "/gradio_api/cancel", COMPLETIONS, "/health", "/gradio_api/upload"]


@pytest.mark.parametrize("key", ["", KEY])
def test_a_body_is_counted_as_it_comes_on_every_path(key: str) -> None:
    process = psutil.Process()

    def pieces(size: int) -> Iterator[bytes]:
        for _ in range(size // 65536):
            yield b"x" * 65536

    with served(engine, key) as (address, _):
        begun = process.memory_info().rss
        for path in PLACES:
            for size in (2 * 2**20, 32 * 2**20):
                with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                    status, _, text = fetch(address, path, pieces(size), "POST")  # type: ignore[arg-type]
                    wrong = {404, 405, 401} if path in ("/", "/health", "/gradio_api/upload") or key else set()
                    assert status == 413 or status in wrong, (path, status)
                    assert json.loads(text)["error"]["message"]
        assert process.memory_info().rss - begun < 24 * 2**20
        known = {"Authorization": f"Bearer {key}"} if key else {}
        for path in ("/gradio_api/queue/join", COMPLETIONS):
            assert fetch(address, path, pieces(2**21), **known)[0] == 413  # type: ignore[arg-type]
            assert fetch(address, path, BODY, Content_Encoding="gzip", **known)[0] == 415


def test_a_form_in_parts_is_not_read_before_the_login(locked: str) -> None:
    parts = b'--b\r\nContent-Disposition: form-data; name="password"\r\n\r\n' + KEY.encode() + b"\r\n--b--\r\n"
    assert fetch(locked, "/login", parts, Content_Type="multipart/form-data; boundary=b")[0] == 401


# ---- connections

SERVER = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, (256, 256))
sys.path[:0] = {paths!r}
from test_doors import engine
from fastapi import FastAPI
import connections
from server import create_app, create_server, listen
assert connections.SECONDS == 15
connections.SECONDS = 5  # a test need not wait longer
listener = listen("127.0.0.1", 0, "")
print(listener.getsockname()[1], flush=True)
app = create_app(engine, lambda _: FastAPI(), lambda: None, print)
create_server(app).run(sockets=[listener])
"""


@pytest.fixture
def small(workspace: Path) -> Iterator[tuple[str, int]]:
    """A server with 256 descriptors in a process of its own: its address and port."""
    paths = [str(workspace / "inference"), str(workspace / "finetuning"), str(Path(__file__).parent)]
    command = [sys.executable, "-c", SERVER.format(paths=paths)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    assert process.stdout
    port = int(process.stdout.readline())
    address = f"http://127.0.0.1:{port}/"
    while fetch(address, "/health")[0] != 200:
        time.sleep(0.05)
    yield address, port
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert "Traceback" not in err
    assert "out of system resource" not in err


def test_300_half_requests_leave_a_server_with_256_descriptors_answering(small: tuple[str, int]) -> None:
    address, port = small
    halves = [b"", b"GET / HTTP/1.1\r\nHost: 127", b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"]
    halves.append(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
    halves.append(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n" + halves[3])
    begun = time.monotonic()
    with contextlib.ExitStack() as stack:
        connections = []
        for number in range(300):
            connection = stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=30))
            connection.sendall(halves[number % len(halves)])
            connections.append(connection)
        took = []
        for _ in range(20):
            asked = time.perf_counter()
            assert fetch(address, "/health")[0] == 200
            took.append(time.perf_counter() - asked)
        assert sorted(took)[10] < 0.05
        last = b""
        for connection in connections:
            with contextlib.suppress(ConnectionResetError):
                while piece := connection.recv(4096):
                    last = piece
    assert time.monotonic() - begun < 10
    assert json.loads(last.rpartition(b"\r\n\r\n")[2])["error"]["code"] == "too_slow"


def test_a_trickle_does_not_prolong_the_time_of_a_request(small: tuple[str, int]) -> None:
    _, port = small
    begun = time.monotonic()
    with socket.create_connection(("127.0.0.1", port), timeout=1) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\n")
        answer = b""
        with contextlib.suppress(ConnectionResetError, BrokenPipeError):
            while time.monotonic() - begun < 15:
                connection.sendall(b"X: y\r\n")
                with contextlib.suppress(TimeoutError):
                    answer = connection.recv(4096)
                    break
    assert b" 408 " in answer
    assert time.monotonic() - begun < 10


def test_a_slow_reader_gets_all_of_a_long_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import FastAPI

    import connections

    monkeypatch.setattr(connections, "SECONDS", 1)
    text = "abcdefgh" * 1500
    fields = {"model": "base", "messages": [{"role": "user", "content": text}], "stream": True, "max_tokens": 20000}
    with serving(lambda: engine(40000), lambda _: FastAPI()) as (address, _, ready):
        assert ready.wait(60)
        host, port = address.removeprefix("http://").rstrip("/").split(":")
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect((host, int(port)))
            connection.settimeout(30)
            body = json.dumps(fields).encode()
            head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n"
            connection.sendall(f"{head}Connection: close\r\n\r\n".encode() + body)
            time.sleep(3)
            answer = b""
            while piece := connection.recv(65536):
                answer += piece
    assert b"data: [DONE]" in answer


def test_64_connections_at_once_are_served(small: tuple[str, int]) -> None:
    address, _ = small
    with ThreadPoolExecutor(64) as pool:
        assert {status for status, _, _ in pool.map(lambda _: fetch(address, "/health"), range(200))} == {200}
