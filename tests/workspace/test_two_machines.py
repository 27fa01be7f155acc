"""A server on a network, and two machines in network namespaces of their own: one attacks it, the other one uses it."""

from __future__ import annotations

import json
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

KEY = "the-key-of-this-test"
SUBNETS = {"attacker": "10.213.77", "friend": "10.213.78"}  # the server is .1 in both, the machine .2
GUESS = """
import collections, http.client, json, sys
host, port, key = sys.argv[1:]
def ask(key):
    connection.request("GET", "/v1/models", headers={"Authorization": f"Bearer {key}"})
    answer = connection.getresponse()
    answer.read()
    return answer.status
connection = http.client.HTTPConnection(host, int(port), timeout=20)
counted = collections.Counter(ask(f"guess-{number}") for number in range(1000))
print(json.dumps([dict(counted), ask(key)]))
"""
HOLD = """
import socket, sys, time
held = [socket.create_connection((sys.argv[1], int(sys.argv[2])), 20) for _ in range(300)]
for one in held:
    one.sendall(b"POST /v1/chat/completions HTTP/1.1\\r\\nHost: x\\r\\nContent-Le")
print("held", flush=True)
sys.stdin.read()
"""
USE = """
import http.client, json, sys, time
host, port, key, path, count, *headers = sys.argv[1:]
seen = []
for _ in range(int(count)):
    began = time.perf_counter()
    connection = http.client.HTTPConnection(host, int(port), timeout=20)
    more = dict(pair.split("=", 1) for pair in headers)
    connection.request("GET", path, headers=({"Authorization": f"Bearer {key}"} if key else {}) | more)
    answer = connection.getresponse()
    answer.read()
    seen.append((answer.status, time.perf_counter() - began))
    time.sleep(0.02)
print(json.dumps(seen))
"""


@pytest.fixture(scope="module")
def port(workspace: Path) -> Iterator[int]:
    """Serve the demo's base model on all addresses."""
    from training.tiny_model import build_demo

    build_demo()
    command = [sys.executable, "inference/gradio_chat.py", "--baseonly", "--host", "0.0.0.0", "--port", "0"]
    environment = os.environ | {"CHAT_API_KEY": KEY, "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(
        command, cwd=workspace, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as server:
        assert server.stdout and server.stderr
        line = next((line for line in server.stdout if line.startswith("Chat at")), "")
        found = re.search(r":(\d+)/", line)
        assert found, server.stderr.read()
        yield int(found[1])
        server.terminate()
        assert "Traceback" not in server.stderr.read()


@pytest.fixture(scope="module")
def on() -> Iterator[Callable[..., list[str]]]:
    """Make the two machines; return a command that runs a program on one of them."""
    names = {machine: f"chat-{machine}-{os.getpid()}" for machine in SUBNETS}

    def ip(*words: str) -> bool:
        try:
            return subprocess.run(["ip", *words], capture_output=True, check=False).returncode == 0
        except FileNotFoundError:
            return False

    try:
        for number, (machine, subnet) in enumerate(SUBNETS.items()):
            here, there = f"cf{number}a{os.getpid()}", f"cf{number}b{os.getpid()}"
            inside = ("netns", "exec", names[machine], "ip")
            if not ip("netns", "add", names[machine]):
                pytest.skip("no network namespace can be made here")
            assert ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", names[machine])
            assert ip("addr", "add", f"{subnet}.1/24", "dev", here) and ip("link", "set", here, "up")
            assert ip(*inside, "addr", "add", f"{subnet}.2/24", "dev", there)
            assert ip(*inside, "link", "set", there, "up")
        yield lambda machine, *command: ["ip", "netns", "exec", names[machine], sys.executable, "-c", *command]
    finally:
        for name in names.values():
            ip("netns", "del", name)  # the pair of links goes with it


def ask(on: Any, machine: str, port: int, path: str, key: str = "", count: int = 1, **headers: str) -> list[Any]:
    """Ask the server from a machine; return the status and the seconds of each answer."""
    more = [f"{name.replace('_', '-')}={value}" for name, value in headers.items()]
    command = on(machine, USE, f"{SUBNETS[machine]}.1", str(port), key, path, str(count), *more)
    return list(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))


def test_a_thousand_guesses_lock_out_the_machine_that_guesses_and_no_other(port: int, on: Any) -> None:
    command = on("attacker", GUESS, f"{SUBNETS['attacker']}.1", str(port), KEY)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(done.stdout) == [{"401": 10, "429": 990}, 429]
    assert [status for status, _ in ask(on, "friend", port, "/v1/models", KEY, 3)] == [200] * 3


def test_three_hundred_slow_connections_keep_nobody_waiting(port: int, on: Any) -> None:
    command = on("attacker", HOLD, f"{SUBNETS['attacker']}.1", str(port))
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holding:
        assert holding.stdin and holding.stdout
        assert holding.stdout.readline() == "held\n"
        answers = ask(on, "friend", port, "/health", count=20)
        holding.stdin.close()
    assert {status for status, _ in answers} == {200}
    assert statistics.median(seconds for _, seconds in answers) < 0.05


def test_a_page_whose_name_points_at_the_server_gets_nothing_without_the_key(port: int, on: Any) -> None:
    rebound = {"Host": f"evil.example:{port}", "Origin": f"http://evil.example:{port}"}
    for path in ("/v1/models", "/config", "/gradio_api/info"):
        assert ask(on, "friend", port, path, **rebound)[0][0] == 401, path
