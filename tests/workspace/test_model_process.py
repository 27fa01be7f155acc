"""The model's process: whatever happens in it, the server answers, and nothing of it stays behind."""

from __future__ import annotations

import contextlib
import http.client
import json
import logging
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
import stand_ins
from conftest import inference_of
from served import serving, wait_for_health

if sys.platform == "win32":
    pytest.skip("the stand-ins need POSIX signals", allow_module_level=True)


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    with inference_of(workspace):
        yield


@contextlib.contextmanager
def started(load: Callable[[], Any]) -> Iterator[tuple[str, Any, threading.Event]]:
    """Serve the API on a model in its process; yield the address, the application, and what is set when ready."""
    from fastapi import FastAPI

    from model_process import ModelProcess

    models: list[Any] = []

    def prepare() -> Any:
        models.append(ModelProcess(load))
        return models[0].loaded()

    try:
        with serving(prepare, lambda _: FastAPI()) as all_of_it:
            yield all_of_it
    finally:
        models[0].close()


@pytest.fixture
def address() -> Iterator[str]:
    with started(stand_ins.load) as (address, _, ready):
        assert ready.wait(60)
        yield address


def post(address: str, question: str, **fields: Any) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": question}], **fields})
    connection.request("POST", "/v1/chat/completions", body)
    return connection


def answer(connection: http.client.HTTPConnection) -> tuple[int, str]:
    """Return the status, and the answer or the error."""
    response = connection.getresponse()
    body = json.loads(response.read())
    said = body["choices"][0]["message"]["content"] if response.status == 200 else body["error"]["message"]
    return response.status, said


def ask(address: str, question: str, **fields: Any) -> tuple[int, str]:
    return answer(post(address, question, **fields))


def times_of_health(address: str, until: Callable[[], bool]) -> tuple[set[int], float]:
    """Ask for /health over and over; return the statuses, and the time within which 19 of 20 were answered."""
    statuses, times = set(), []
    while not until():
        began = time.monotonic()
        connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
        connection.request("GET", "/health")
        statuses.add(connection.getresponse().status)
        connection.close()
        times.append(time.monotonic() - began)
        time.sleep(0.01)
    return statuses, sorted(times)[len(times) * 19 // 20]


ENDS = "The process of the model ended in the middle of this answer ({}): the model is loaded again"


@pytest.mark.parametrize(("what", "cause"), [("abort", "SIGABRT"), ("kill", "SIGKILL, as when the memory is full")])
def test_a_model_that_ends_is_a_sentence_for_its_reader_and_those_who_wait_are_answered(
    address: str, what: str, cause: str
) -> None:
    _, before = ask(address, "pid")
    ending, following = post(address, what), post(address, "hello")
    status, message = answer(ending)
    assert (status, message.startswith(ENDS.format(cause))) == (503, True), message
    assert answer(following) == (200, "well")
    _, after = ask(address, "pid")
    assert before != after
    assert not psutil.pid_exists(int(before))


def test_a_gpu_that_has_failed_gets_a_new_process(address: str) -> None:
    _, before = ask(address, "pid")
    status, message = ask(address, "break")
    assert (status, message) == (
        503,
        "The GPU has failed (CUDA error: device-side assert triggered): the model is loaded again, so send the request "
        "once more, or a shorter one.",
    )
    assert ask(address, "hello") == (200, "well")
    assert ask(address, "pid")[1] != before


def test_a_model_that_ends_again_and_again_ends_the_server_with_a_sentence() -> None:
    from model_process import EndedError

    with started(stand_ins.load) as (address, app, ready):
        assert ready.wait(60)
        for _ in range(2):
            assert ask(address, "abort")[0] == 503
        assert ask(address, "hello") == (200, "well")  # and the count begins anew
        failures: list[Any] = []
        app.state.queue.fail = failures.append
        for _ in range(3):
            assert ask(address, "abort")[0] == 503
        end = time.monotonic() + 10
        while not failures and time.monotonic() < end:
            time.sleep(0.01)
        assert isinstance(failures[0], EndedError)
        assert str(failures[0]).startswith("The process of the model ended 3 times in a row (SIGABRT): close what else")


def test_a_model_that_ends_while_it_is_loaded_is_a_sentence() -> None:
    from engine import ChatError
    from model_process import ModelProcess

    for load, message in (
        (stand_ins.load_and_abort, "The process of the model ended while it loaded it (SIGABRT): close what else"),
        (stand_ins.load_what_is_missing, "The model is missing: get it."),
    ):
        model = ModelProcess(load)
        with contextlib.closing(model), pytest.raises(ChatError) as caught:
            model.loaded()
        assert str(caught.value).startswith(message)


def test_a_model_that_was_ended_while_it_had_nothing_to_do_is_loaded_again(address: str) -> None:
    _, pid = ask(address, "pid")
    os.kill(int(pid), signal.SIGKILL)
    os.waitid(os.P_PID, int(pid), os.WEXITED | os.WNOWAIT)  # until the last of its threads has ended
    assert ask(address, "hello") == (200, "well")


def test_health_answers_at_once_while_the_model_is_loaded_and_computes() -> None:
    with started(stand_ins.load_slowly) as (address, _, ready):
        statuses, most = times_of_health(address, ready.is_set)
        assert statuses <= {503, 200} and 503 in statuses
        assert most < 0.05
        with ThreadPoolExecutor() as pool:
            asked = pool.submit(ask, address, "hold 2")
            statuses, most = times_of_health(address, asked.done)
        assert asked.result() == (200, "well")
        assert statuses == {200}
        assert most < 0.05


@pytest.mark.parametrize("stream", [True, False])
def test_a_request_that_is_given_up_while_its_prompt_is_read_is_gone_at_once(address: str, stream: bool) -> None:
    given_up = post(address, "read 20", stream=stream)
    wait_for_health(address, running=1)
    given_up.close()
    wait_for_health(address, seconds=0.3)
    assert ask(address, "hello") == (200, "well")


def test_a_turn_is_held_until_the_computation_has_ended(address: str) -> None:
    given_up = post(address, "hold 1")
    wait_for_health(address, running=1)
    began = time.monotonic()
    given_up.close()
    patient = post(address, "hello")
    wait_for_health(address, running=1, waiting=1)
    assert answer(patient) == (200, "well")
    assert time.monotonic() - began > 0.5


def test_errors_reach_the_client_and_leave_the_process_as_it_is(
    address: str, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    logger = logging.getLogger("uvicorn.error")
    monkeypatch.setattr(logger, "filters", [])  # those of servers that have ended
    monkeypatch.setattr(logger, "handlers", [caplog.handler])
    _, pid = ask(address, "pid")
    assert ask(address, "fail") == (500, "The answer failed (KeyError); the server's log says more.")
    assert "in generate" in caplog.text  # the traceback of the other process
    assert ask(address, "memory") == (400, "The memory is full: ask for a shorter answer, or clear the chat.")
    assert ask(address, "x" * 1990)[0] == 400
    assert ask(address, "x" * 1990, stream=True)[0] == 400  # before the first piece, a stream has a status too
    assert ask(address, "pid")[1] == pid


SERVER = """
import sys, time
sys.path[:0] = sys.argv[1:3]
import stand_ins
from model_process import ModelProcess

if __name__ == "__main__":
    model = ModelProcess(stand_ins.load).loaded()
    print(model.process.pid, flush=True)
    list(model.stream([{"role": "user", "content": sys.argv[3]}], __import__("engine").Generation(), print))
    time.sleep(60)
"""


@pytest.mark.parametrize("doing", ["hello", "read 30"])
def test_the_model_s_process_ends_with_the_server_even_if_that_is_killed(
    workspace: Path, tmp_path: Path, doing: str
) -> None:
    program = tmp_path / "server.py"
    program.write_text(textwrap.dedent(SERVER), encoding="utf-8")
    command = [sys.executable, str(program), str(workspace / "inference"), str(Path(__file__).parent), doing]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
        assert server.stdout
        model = psutil.Process(int(server.stdout.readline()))
        server.kill()
    psutil.wait_procs([model], 2)
    assert not model.is_running() or model.status() == psutil.STATUS_ZOMBIE


def test_ctrl_c_in_the_terminal_reaches_the_server_alone() -> None:
    from model_process import ModelProcess

    model = ModelProcess(stand_ins.load)
    with contextlib.closing(model):
        for _ in range(20):  # from its first moment on
            os.kill(model.process.pid or 0, signal.SIGINT)
            time.sleep(0.02)
        model.loaded()
        os.kill(model.process.pid or 0, signal.SIGINT)
        from engine import Generation

        said = model.stream([{"role": "user", "content": "hello"}], Generation(), print)
        assert "".join(piece for piece in said if piece) == "well"
