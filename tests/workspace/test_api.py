"""The API, with OpenAI's own client: on the demo's base model, and on a backend that repeats the prompt."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import logging
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import psutil
import pytest
from conftest import REPOSITORY, inference_of
from served import served, serving, wait_for_health

sys.path.append(str(REPOSITORY / ".cache" / "openai"))  # at the end: what a workspace has comes first
import openai

KEY = "a key of the test's"
COMPLETIONS = "/v1/chat/completions"
HELLO = [{"role": "user", "content": "She grinned at the market."}]
PAGE = (REPOSITORY / "docs" / "how-to" / "api.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    """Import inference/ of the workspace, with the demo's base model built."""
    from training.tiny_model import build_demo

    build_demo()
    with inference_of(workspace):
        yield


@pytest.fixture(scope="module")
def engine(workspace: Path) -> Any:
    from load_engine import load

    return load(baseonly=True, root=workspace)


@pytest.fixture(scope="module")
def address(engine: Any) -> Iterator[str]:
    """Page and API on the demo's base model."""
    with served(lambda: engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(address: str) -> openai.OpenAI:
    return client_of(address)


def client_of(address: str, key: str = "none") -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}v1", api_key=key, max_retries=0, timeout=60)


def ask(client: openai.OpenAI, messages: Any = HELLO, **fields: Any) -> Any:
    return client.chat.completions.create(model="base", messages=messages, **fields)


def fetch(
    address: str, path: str, body: bytes | None = None, method: str = "", **headers: str
) -> tuple[int, dict[str, str], str]:
    """Return status, headers (with small letters) and body, whatever the status."""
    host = address.removeprefix("http://").rstrip("/")
    connection = http.client.HTTPConnection(host, timeout=60)
    with contextlib.closing(connection):
        names = {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request(method or ("GET" if body is None else "POST"), path, body, names)
        response = connection.getresponse()
        return response.status, {k.lower(): v for k, v in response.getheaders()}, response.read().decode()


@pytest.fixture
def steps(engine: Any) -> Iterator[list[int]]:
    """Let the model go on until it is stopped, as slowly as a large one; a list that grows with each of its steps."""
    taken: list[int] = []

    def compute_slowly(*_: Any) -> None:
        taken.append(1)
        time.sleep(0.01)

    backend = engine.backend
    stops, backend.stops, backend.model.generation_config.eos_token_id = backend.stops, [], None
    hook = backend.model.register_forward_pre_hook(compute_slowly)
    yield taken
    hook.remove()
    backend.stops, backend.model.generation_config.eos_token_id = stops, stops


# ---- answers


def test_the_model_is_listed_with_the_folder_it_is_from(client: openai.OpenAI) -> None:
    (model,) = client.models.list().data
    assert (model.id, model.object, model.root) == ("base", "model", "models/demo")
    assert client.models.retrieve("base") == model


def test_an_answer_has_the_text_and_the_token_counts_of_the_engine(client: openai.OpenAI, engine: Any) -> None:
    from engine import Generation, Usage

    usage = Usage()
    expected = "".join(engine.stream(HELLO, Generation(), print, usage))
    answer = ask(client)
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content, choice.finish_reason) == ("assistant", expected, "stop")
    assert (answer.object, answer.model) == ("chat.completion", "base")
    assert answer.id.startswith("chatcmpl-")
    counted = (answer.usage.prompt_tokens, answer.usage.completion_tokens, answer.usage.total_tokens)
    assert counted == (usage.prompt_tokens, usage.completion_tokens, usage.prompt_tokens + usage.completion_tokens)
    assert usage.prompt_tokens == len(engine.backend.encode(engine.backend.render(HELLO)))


def test_a_stream_begins_with_the_role_and_ends_with_reason_and_usage(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert len({chunk.id for chunk in chunks}) == 1
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    first, *middle, last, usage = chunks
    assert first.choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content for chunk in middle) == whole.choices[0].message.content
    assert [chunk.choices[0].finish_reason for chunk in (first, *middle, last)] == [None] * (len(chunks) - 2) + ["stop"]
    assert (usage.choices, usage.usage.model_dump()) == ([], whole.usage.model_dump())
    assert {chunk.usage for chunk in (first, *middle, last)} == {None}
    assert all(chunk.choices for chunk in ask(client, stream=True))


def test_a_stream_consists_of_events_and_ends_with_done(address: str) -> None:
    body = json.dumps({"model": "base", "messages": HELLO, "stream": True}).encode()
    status, headers, text = fetch(address, "/v1/chat/completions", body, Content_Type="application/json")
    assert (status, headers["content-type"].partition(";")[0]) == (200, "text/event-stream")
    assert (headers["cache-control"], headers["x-accel-buffering"]) == ("no-cache", "no")
    *events, done, nothing = text.split("\n\n")
    assert (done, nothing) == ("data: [DONE]", "")
    assert all(json.loads(event.removeprefix("data: "))["choices"] for event in events)
    assert "access-control-allow-origin" not in headers


@pytest.mark.usefixtures("steps")
def test_either_name_limits_the_answer_and_the_newer_one_wins(client: openai.OpenAI) -> None:
    for fields, expected in (
        ({"max_tokens": 3}, 3),
        ({"max_completion_tokens": 4}, 4),
        ({"max_tokens": 3, "max_completion_tokens": 5}, 5),
    ):
        answer = ask(client, **fields)
        assert (answer.usage.completion_tokens, answer.choices[0].finish_reason) == (expected, "length")
    *_, last = ask(client, stream=True, max_tokens=2)
    assert last.choices[0].finish_reason == "length"


@pytest.mark.usefixtures("steps")
def test_an_answer_ends_before_a_stop_text_even_one_that_begins_in_the_middle_of_a_token(
    client: openai.OpenAI, engine: Any
) -> None:
    from engine import Generation

    pieces = [piece for piece in engine.stream(HELLO, Generation(40), lambda _: None) if piece]
    text = "".join(pieces)
    long = next(i for i in range(8, len(pieces)) if len(pieces[i]) > 1)
    stop = pieces[long][1:] + pieces[long + 1]
    before = text[: text.index(stop)]
    for stops in (stop, ["never said", stop], [stop, stop + "x"]):
        answer = ask(client, stop=stops, max_tokens=40)
        assert (answer.choices[0].message.content, answer.choices[0].finish_reason) == (before, "stop")
        *chunks, last = ask(client, stop=stops, max_tokens=40, stream=True)
        assert "".join(chunk.choices[0].delta.content for chunk in chunks) == before
        assert last.choices[0].finish_reason == "stop"
    kept = ask(client, stop=text[-2:] + "never", max_tokens=40)  # what only begins like a stop text is said
    assert kept.choices[0].message.content == text


@pytest.mark.usefixtures("steps")
def test_the_same_seed_gives_the_same_answer(client: openai.OpenAI) -> None:
    def draw(seed: int) -> str:
        return ask(client, seed=seed, temperature=1.5, max_tokens=12).choices[0].message.content

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(1, 5)}) > 1


def test_32_parallel_requests_get_the_same_greedy_answer(client: openai.OpenAI) -> None:
    with ThreadPoolExecutor(32) as pool:
        answers = list(pool.map(lambda i: ask(client, temperature=0, stream=i % 2 == 1), range(32)))
    texts = {
        answer.choices[0].message.content
        if hasattr(answer, "choices")
        else "".join(chunk.choices[0].delta.content or "" for chunk in answer)
        for answer in answers
    }
    assert texts == {ask(client, temperature=0).choices[0].message.content}


def test_200_requests_in_a_row_leak_no_memory(client: openai.OpenAI) -> None:
    process, sizes = psutil.Process(), []
    for i in range(250):
        ask(client, [{"role": "user", "content": f"Question {i % 7}"}])
        if i >= 50:  # after the warm-up
            sizes.append(process.memory_info().rss)
    assert max(sizes) < 1.05 * sizes[0]
    assert min(sizes) > 0.95 * sizes[0]


# ---- clients that go


def test_50_clients_that_disconnect_in_mid_stream_leave_nothing_running(
    address: str, client: openai.OpenAI, engine: Any, steps: list[int]
) -> None:
    def go_after_the_first_word(_: int) -> str:
        with ask(client, stream=True, max_tokens=400) as stream:
            return next(text for chunk in stream if (text := chunk.choices[0].delta.content))

    with ThreadPoolExecutor(25) as pool:
        assert all(pool.map(go_after_the_first_word, range(50)))
    wait_for_health(address)  # one answer to its end would take twice as long
    assert len(steps) < 50 * 20
    assert json.loads(fetch(address, "/health")[2]) == {"status": "ok", "running": 0, "waiting": 0}
    assert [thread.name for thread in threading.enumerate() if "(compute)" in thread.name] == []
    assert ask(client, max_tokens=2).usage.completion_tokens == 2


def test_a_client_that_disconnects_before_its_answer_stops_the_computation(
    address: str, engine: Any, steps: list[int]
) -> None:
    connection = post(address, {"messages": HELLO, "max_tokens": 400})
    while not steps:
        time.sleep(0.001)
    connection.close()
    wait_for_health(address)
    assert len(steps) < 200


def post(address: str, fields: dict[str, Any]) -> http.client.HTTPConnection:
    """Send a request and wait for nothing."""
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    body = json.dumps({"model": "base", **fields})
    connection.request("POST", "/v1/chat/completions", body, {"Content-Type": "application/json"})
    return connection


# ---- with a backend that repeats what it is asked


class Echo:
    """Says the prompt, a letter a token, once the gate is open; keeps what it is asked in the order of the answers."""

    description, context, notices, switchable = "echo", 600, [], False  # type: ignore[var-annotated]

    def __init__(self) -> None:
        self.gate, self.asked = threading.Event(), []  # type: ignore[var-annotated]
        self.gate.set()

    def render(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def generate(self, prompt: list[int], generation: Any) -> Iterator[int]:
        said = self.decode(prompt)
        self.asked.append((said, generation))
        self.gate.wait(60)
        if "fail" in said:
            yield prompt[0]
            raise RuntimeError("the device is gone")
        yield from prompt[: generation.max_new_tokens]


@pytest.fixture(scope="module")
def echo_server() -> Iterator[tuple[Echo, str]]:
    from fastapi import FastAPI

    from engine import Engine, Source

    backend = Echo()
    engine = Engine(Source("models/demo", None, None, "lora", "float32", "Rule"), backend)
    with serving(lambda: engine, lambda _: FastAPI()) as (address, _, ready):
        assert ready.wait(60)
        yield backend, address


@pytest.fixture
def echo(echo_server: tuple[Echo, str]) -> Iterator[Echo]:
    backend, _ = echo_server
    backend.asked.clear()
    yield backend
    backend.gate.set()


@pytest.fixture(scope="module")
def parrot(echo_server: tuple[Echo, str]) -> openai.OpenAI:
    return client_of(echo_server[1])


def said(client: openai.OpenAI, messages: Any, **fields: Any) -> str:
    return str(ask(client, messages, **fields).choices[0].message.content)


@pytest.mark.usefixtures("echo")
def test_system_prompt_history_and_parts_reach_the_model(parrot: openai.OpenAI) -> None:
    user = {"role": "user", "content": "hi"}
    assert said(parrot, [user]) == "[system]Rule[user]hi"
    assert said(parrot, [{"role": "system", "content": "Mine"}, user]) == "[system]Mine[user]hi"
    assert said(parrot, [{"role": "developer", "content": "Mine"}, user]) == "[system]Mine[user]hi"
    assert said(parrot, [{"role": "system", "content": ""}, user]) == "[user]hi"
    parts = [{"type": "text", "text": "é"}, {"type": "text", "text": "b"}]
    assert said(parrot, [{"role": "user", "content": parts}]) == "[system]Rule[user]éb"
    answer = ask(parrot, [user]).choices[0].message
    history = [user, answer, {"role": "user", "content": "and?"}]  # as the client keeps it
    assert said(parrot, history) == "[system]Rule[user]hi[assistant][system]Rule[user]hi[user]and?"


def test_settings_reach_the_model_and_the_defaults_are_those_of_the_page(echo: Echo, parrot: openai.OpenAI) -> None:
    from engine import Generation

    ask(parrot, HELLO)
    more = {"top_k": 5, "repetition_penalty": 1.25}
    ask(parrot, temperature=0.5, top_p=0.75, seed=7, stop="x", max_tokens=9, extra_body=more)
    (_, as_it_is), (_, changed) = echo.asked
    assert as_it_is == Generation(top_k=1000, adapter=False)
    assert changed == Generation(9, 0.5, 0.75, 5, 1.25, 7, ("x",), adapter=False)


@pytest.mark.usefixtures("echo")
def test_fields_without_effect_are_accepted(parrot: openai.OpenAI) -> None:
    fields = {"user": "me", "metadata": {"a": "b"}, "store": True, "n": 1, "frequency_penalty": 0.0, "logprobs": False}
    fields |= {"presence_penalty": 0, "response_format": {"type": "text"}, "tools": [], "logit_bias": {}, "seed": None}
    fields |= {"stop": None, "temperature": None, "service_tier": "auto", "modalities": ["text"], "tool_choice": "none"}
    assert said(parrot, [{"role": "user", "content": "hi", "name": "me"}], **fields) == "[system]Rule[user]hi"


IMAGE = [{"type": "text", "text": "?"}, {"type": "image_url", "image_url": {"url": "data:,"}}]
TOOL = {"type": "function", "function": {"name": "f", "parameters": {}}}


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"n": 2}, "n", "n: not supported here; only 1 is."),
        ({"frequency_penalty": 0.5}, "frequency_penalty", "only 0 is"),
        ({"presence_penalty": -1}, "presence_penalty", "only 0 is"),
        ({"tools": [TOOL]}, "tools", "tools: not supported here."),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported here"),
        ({"logprobs": True}, "logprobs", "only false is"),
        ({"extra_body": {"temprature": 1}}, "temprature", "not supported here"),
        ({"temperature": 2.5}, "temperature", "less than or equal to 2"),
        ({"temperature": 1e-40}, "temperature", "temperature: must be 0, or at least 0.01."),
        ({"extra_body": {"repetition_penalty": 1e-40}}, "repetition_penalty", "greater than or equal to 0.1"),
        ({"extra_body": {"repetition_penalty": 1e40}}, "repetition_penalty", "less than or equal to 10"),
        ({"temperature": "hot"}, "temperature", "valid number"),
        ({"top_p": 0}, "top_p", "greater than or equal to 0.000001"),
        ({"max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"seed": 2**64}, "seed", "less than"),
        ({"stop": ["a", ""]}, "stop[1]", "at least 1 character"),
        ({"stop": list("abcde")}, "stop", "at most 4 items"),
        ({"messages": []}, "messages", "at least 1 item"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages[0].role", "tool is not supported here, as the"),
        ({"messages": [{"role": "bot", "content": "x"}]}, "messages[0].role", "'system', 'developer', 'user'"),
        ({"messages": ["hi"]}, "messages[0]", "messages[0]: must be an object."),
        ({"extra_body": {"chat_template_kwargs": {"enable_thinking": False}}}, "chat_template_kwargs", "not supported"),
        ({"messages": [{"role": "user", "content": None}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": IMAGE}]}, "messages[0].content", "every part must be a text"),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [TOOL]}]},
            "messages[0].tool_calls",
            "not supported",
        ),
        # as OpenAI's client keeps the history of a chat with tools: the null is not what is wrong
        (
            {"messages": [{"role": "assistant", "content": None, "tool_calls": [TOOL]}]},
            "messages[0].tool_calls",
            "not supported here, as the model knows no tools: leave out the turns that call one",
        ),
        (
            {"messages": [{"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": ""}}]},
            "messages[0].function_call",
            "as the model knows no tools",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) and " " not in value else "",
)
def test_unsupported_fields_are_refused_by_name(
    parrot: openai.OpenAI, echo: Echo, fields: dict[str, Any], param: str, message: str
) -> None:
    with pytest.raises(openai.BadRequestError, match=re.escape(message)) as caught:
        ask(parrot, **({"messages": HELLO} | fields))
    assert caught.value.param == param
    assert caught.value.type == "invalid_request_error"
    assert echo.asked == []


@pytest.mark.usefixtures("echo")
def test_an_assistant_turn_without_text_is_accepted(parrot: openai.OpenAI) -> None:
    user = {"role": "user", "content": "hi"}
    for silent in ({"content": None}, {"content": None, "tool_calls": []}, {"content": ""}, {}):
        history = [user, {"role": "assistant", **silent}, user]
        assert said(parrot, history) == "[system]Rule[user]hi[assistant][user]hi"


@pytest.mark.usefixtures("echo")
@pytest.mark.parametrize(
    "kind", ["", "application/json", "application/x-www-form-urlencoded", "text/plain", "application/json; charset=x"]
)
def test_a_body_is_read_as_json_whatever_its_content_type(echo_server: Any, kind: str) -> None:
    body = json.dumps({"model": "base", "messages": [{"role": "user", "content": "é"}]}, ensure_ascii=False).encode()
    status, _, text = fetch(echo_server[1], COMPLETIONS, body, **({"Content_Type": kind} if kind else {}))
    assert (status, "[user]é" in text) == (200, True), text


LATIN = '{"model": "base", "messages": [{"role": "user", "content": "é"}]}'.encode("latin-1")


@pytest.mark.parametrize(
    ("body", "headers", "status", "sentence"),
    [
        (b"", {}, 400, "The body is empty: send a JSON object with the fields model and messages."),
        (b" \n", {}, 400, "The body is empty"),
        (b"[]", {}, 400, "The body is JSON, but not an object with the fields model and messages."),
        (b'"hi"', {}, 400, "The body is JSON, but not an object"),
        (b"null", {}, 400, "The body is JSON, but not an object"),
        (b"{model: 1}", {}, 400, "The body is not JSON: Expecting property name enclosed in double quotes (line 1,"),
        (b"model=base", {"Content_Type": "application/x-www-form-urlencoded"}, 400, "The body is a form, as its"),
        (LATIN, {}, 400, "The body is not UTF-8, from byte 60 on: send it as UTF-8."),
        (LATIN, {"Content_Type": "application/json; charset=iso-8859-1"}, 400, "The body is not UTF-8"),
        (b"[" * 100_000, {}, 400, "The body is nested too deeply to be read."),
        (b'{"model": ' + b"9" * 5000 + b"}", {}, 400, "The body contains a number that is too long"),
        (b'{"temperature": NaN}', {}, 400, "The body contains a number that is too long, NaN or infinite."),
        (b'{"model": "\\ud83d"}', {}, 400, "The body contains half a character (\\ud83d)"),
        (b'{"model": "base", "messages": [1], "\\ud83d": 1}', {}, 400, "The body contains half a character"),
        (b"\x1f\x8b", {"Content_Encoding": "gzip"}, 415, "The body is compressed (gzip): send it without the header"),
    ],
    ids=lambda value: value[:60] if isinstance(value, str) else "",
)
def test_an_unreadable_body_is_refused_with_its_real_reason(
    echo_server: Any, body: bytes, headers: dict[str, str], status: int, sentence: str
) -> None:
    given, _, text = fetch(echo_server[1], COMPLETIONS, body, **({"Content_Type": "application/json"} | headers))
    error = json.loads(text)["error"]
    assert (given, error["type"]) == (status, "invalid_request_error")
    assert error["message"].startswith(sentence)


def test_a_client_that_disconnects_while_sending_is_no_error_of_the_server(echo_server: Any) -> None:
    logged: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: logged.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("uvicorn.error").addHandler(handler)
    host, port = echo_server[1].removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port))) as half:
        half.sendall(f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}:{port}\r\nContent-Length: 50\r\n\r\n{{".encode())
    for _ in range(20):  # requests after it, which give the server time to see it
        assert fetch(echo_server[1], "/health")[0] == 200
    logging.getLogger("uvicorn.error").removeHandler(handler)
    assert logged == []


# ---- methods and addresses


@pytest.mark.parametrize(
    ("method", "path", "allowed"),
    [
        ("GET", COMPLETIONS, "POST"),
        ("HEAD", COMPLETIONS, "POST"),
        ("PUT", COMPLETIONS, "POST"),
        ("DELETE", "/v1/models/base", "GET, HEAD"),
        ("POST", "/v1/models", "GET, HEAD"),
        ("POST", "/health", "GET, HEAD"),
        ("BREW", "/v1/models", "GET, HEAD"),
    ],
)
def test_another_method_is_refused_with_the_allowed_ones(address: str, method: str, path: str, allowed: str) -> None:
    status, headers, text = fetch(address, path, method=method)
    assert (status, headers["allow"]) == (405, allowed)
    if method == "HEAD":
        assert text == ""
        return
    error = json.loads(text)["error"]
    assert (error["type"], error["code"]) == ("invalid_request_error", "method_not_allowed")
    assert error["message"] == f"{path} takes {allowed.replace(', ', ' or ')}, not {method}."


@pytest.mark.parametrize("path", ["/health", "/v1/models", "/v1/models/base", "/"])
def test_head_is_get_without_the_body(address: str, path: str) -> None:
    status, headers, text = fetch(address, path, method="HEAD")
    assert (status, text) == (200, "")
    assert headers["content-type"] == fetch(address, path)[1]["content-type"]
    assert fetch(address, "/v1/models/gpt-5", method="HEAD")[0] == 404


def test_options_say_what_is_allowed_and_other_sites_get_no_permission(address: str) -> None:
    asks = {"Access_Control_Request_Method": "POST", "Access_Control_Request_Headers": "content-type"}
    for headers in ({}, {"Origin": address.rstrip("/"), **asks}):
        status, given, text = fetch(address, COMPLETIONS, method="OPTIONS", **headers)
        assert (status, given["allow"], text) == (204, "OPTIONS, POST", "")
    status, given, _ = fetch(address, COMPLETIONS, method="OPTIONS", Origin="https://other.example", **asks)
    assert status == 403
    assert not [name for name in given if name.startswith("access-control")]


def test_a_base_url_without_v1_is_refused_with_the_reason(address: str, echo_server: Any) -> None:
    for server in (address, echo_server[1]):  # with the page, and without it
        client = openai.OpenAI(base_url=server, api_key="none", max_retries=0)
        for ask_it in (
            lambda c: ask(c),
            lambda c: c.models.list(),
            lambda c: c.embeddings.create(model="m", input="x"),
        ):
            with pytest.raises(openai.NotFoundError, match=r"the API is at /v1, so a client's base_url ends in /v1\."):
                ask_it(client)
    twice = openai.OpenAI(base_url=f"{address}v1/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError, match="the API has /v1/models and /v1/chat/completions"):
        ask(twice)


@pytest.mark.parametrize("path", ["/v1/models/", "//v1/models", "/v1//models", "/health/", "//health"])
def test_extra_slashes_in_an_address_are_ignored(address: str, path: str) -> None:
    plain = re.sub("/+", "/", path).rstrip("/")
    assert fetch(address, path)[::2] == fetch(address, plain)[::2]
    assert fetch(address, plain)[0] == 200


def test_extra_slashes_do_not_bypass_the_key(locked: str) -> None:
    for path in ("/v1/models", "//v1/models", "/v1//models/", "/v1", "/v1/"):
        assert fetch(locked, path)[0] == 401
    assert fetch(locked, "/v1/models", Authorization=f"Bearer {KEY}")[0] == 200
    assert ask(client_of(f"{locked}/", KEY)).choices  # base_url …//v1


@pytest.mark.parametrize(
    "head",
    [
        "Content-Length: 5\r\nContent-Length: 6",
        "Content-Length: five",
        "Content-Length: -1",
        "Content-Length: ²",
        "Content-Length: 99999999999999999999999",
        "Transfer-Encoding: chunked",  # the body is none
        "Host: another",
        "no header",
    ],
)
def test_invalid_http_is_refused_in_the_same_format(address: str, head: str) -> None:
    host, port = address.removeprefix("http://").rstrip("/").split(":")
    with socket.create_connection((host, int(port)), timeout=60) as connection:
        start = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {host}:{port}\r\n{head}\r\n\r\nwrong\r\n"
        connection.sendall(start.encode("latin-1"))
        response = b""
        while piece := connection.recv(4096):
            response += piece
    status, _, body = response.decode().partition("\r\n")[0], *response.decode().partition("\r\n\r\n")[1:]
    assert status == "HTTP/1.1 400 Bad Request"
    assert json.loads(body)["error"]["message"].startswith("This is no valid HTTP/1.1 request: ")
    assert fetch(address, "/health")[0] == 200


def test_a_conversation_that_is_too_long_is_refused_and_never_shortened(parrot: openai.OpenAI, echo: Echo) -> None:
    turns = [{"role": role, "content": "x" * 150} for role in ("user", "assistant") * 2]
    for messages in ([{"role": "user", "content": "x" * 700}], [*turns, {"role": "user", "content": "?"}]):
        with pytest.raises(openai.BadRequestError) as caught:
            ask(parrot, messages)
        assert (caught.value.code, caught.value.param) == ("context_length_exceeded", "messages")
    assert echo.asked == []


def test_other_errors_have_their_status_in_openais_format(parrot: openai.OpenAI, echo_server: Any) -> None:
    _, address = echo_server
    with pytest.raises(openai.NotFoundError) as caught:
        parrot.chat.completions.create(model="gpt-5", messages=HELLO)
    assert (caught.value.code, caught.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="There is no model 'a/b' here: ask for 'base'"):
        parrot.models.retrieve("a/b")
    with pytest.raises(openai.NotFoundError, match="There is nothing at POST /v1/embeddings"):
        parrot.embeddings.create(model="base", input="x")
    large = json.dumps({"model": "base", "messages": [{"role": "user", "content": "x" * 2**20}]})
    with pytest.raises(openai.APIStatusError) as caught:
        ask(parrot, [{"role": "user", "content": "x" * 2**20}])
    assert (caught.value.status_code, caught.value.code) == (413, "too_large")
    for body, headers in (
        (b"{", {"Content_Type": "application/json"}),
        (b"[]", {"Content_Type": "application/json"}),
        (b'{"model": "base"}', {"Content_Type": "application/json"}),
    ):
        status, _, text = fetch(address, "/v1/chat/completions", body, **headers)
        assert (status, json.loads(text)["error"]["type"]) == (400, "invalid_request_error")
    status, _, text = fetch(address, "/v1/chat/completions", iter([large.encode()]), Content_Type="application/json")  # type: ignore[arg-type]  # in pieces, without its length
    assert (status, json.loads(text)["error"]["code"]) == (413, "too_large")


def test_the_base_model_is_served_too_if_the_adapter_can_be_disabled() -> None:
    from fastapi import FastAPI

    from engine import Engine, Source

    tuned = Source("models/demo", None, "models/adapter", "lora", "float32", "")
    for switchable, names in ((True, ["tuned", "base"]), (False, ["tuned"])):
        backend = Echo()
        backend.switchable = switchable
        engine = Engine(tuned, backend)
        with serving(lambda engine=engine: engine, lambda _: FastAPI()) as (address, _, ready):
            assert ready.wait(60)
            client = client_of(address)
            assert [model.id for model in client.models.list().data] == names
            for name in names:
                answer = client.chat.completions.create(model=name, messages=HELLO)
                assert answer.model == name
            assert [generation.adapter for _, generation in backend.asked] == [name == "tuned" for name in names]
            if not switchable:
                with pytest.raises(openai.NotFoundError, match="ask for 'tuned'"):
                    client.chat.completions.create(model="base", messages=HELLO)


def test_a_failed_answer_is_an_error_and_the_next_one_works(parrot: openai.OpenAI, echo: Echo) -> None:
    messages = [{"role": "user", "content": "fail"}]
    with pytest.raises(openai.InternalServerError, match=r"The answer failed \(RuntimeError\)"):
        ask(parrot, messages)
    with pytest.raises(openai.APIError, match=r"The answer failed \(RuntimeError\)"):
        list(ask(parrot, messages, stream=True))
    assert said(parrot, [{"role": "user", "content": "hi"}]) == "[system]Rule[user]hi"


def test_requests_are_answered_in_order_and_too_many_get_a_retry_after(
    parrot: openai.OpenAI, echo: Echo, echo_server: Any
) -> None:
    _, address = echo_server
    echo.gate.clear()
    asked = []
    for i in range(33):  # one is answered, 32 wait
        asked.append(post(address, {"messages": [{"role": "user", "content": f"{i}"}], "stream": i % 2 == 0}))
        wait_for_health(address, 1, i)
    with pytest.raises(openai.RateLimitError, match="32 requests are waiting already") as caught:
        ask(parrot)
    assert caught.value.code == "rate_limit_exceeded"
    assert int(caught.value.response.headers["retry-after"]) > 0
    for number, left in ((3, 31), (2, 30)):  # those that wait and disconnect are gone at once, streaming or not
        asked.pop(number).close()
        wait_for_health(address, 1, left, seconds=0.3)
    patient = openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=5)
    with ThreadPoolExecutor() as pool:
        late = pool.submit(ask, patient, [{"role": "user", "content": "late"}])
        echo.gate.set()
        assert all(b'"stop"' in connection.getresponse().read() for connection in asked)
        late.result()
    order = [text.removeprefix("[system]Rule[user]") for text, _ in echo.asked]
    assert [number for number in order if number != "late"] == [str(i) for i in range(33) if i not in (2, 3)]


def test_a_client_that_stops_reading_blocks_nobody(echo: Echo) -> None:
    from engine import Engine, Generation, Source
    from request_queue import RequestQueue

    async def read_a_piece_then_let_the_next_be_answered() -> str:
        queue = RequestQueue(Engine(Source("models/demo", None, None, "lora", "float32", ""), echo))
        with queue.ticket() as slow, queue.ticket() as following:
            await anext(slow.stream(HELLO, Generation(), print))
            return "".join([piece async for piece in following.stream(HELLO, Generation(), print)])

    answer = asyncio.run(asyncio.wait_for(read_a_piece_then_let_the_next_be_answered(), 60))
    assert answer == "[user]" + HELLO[0]["content"]


# ---- who may come in


def test_health_is_503_until_the_model_answers() -> None:
    from fastapi import FastAPI

    from engine import Engine, Source

    loaded = threading.Event()

    def prepare() -> Any:
        assert loaded.wait(60)
        return Engine(Source("models/demo", None, None, "lora", "float32", ""), Echo())

    with serving(prepare, lambda _: FastAPI()) as (address, _, ready):
        for path in ("/health", "/v1/models"):
            status, headers, text = fetch(address, path)
            assert (status, json.loads(text)["error"]["code"]) == (503, "loading")
            assert int(headers["retry-after"]) > 0
        status, _, text = fetch(address, "/")
        assert (status, "Loading the model" in text) == (503, True)
        loaded.set()
        assert ready.wait(60)
        assert fetch(address, "/health")[0] == 200
        assert said(client_of(address), [{"role": "user", "content": "hi"}]) == "[user]hi"


def test_a_model_that_cannot_be_loaded_ends_the_server() -> None:
    def prepare() -> Any:
        raise RuntimeError("no model")

    with serving(prepare, print) as (_, app, ended):
        assert ended.wait(60)
        assert app.state.queue is None


@pytest.fixture(scope="module")
def locked(engine: Any) -> Iterator[str]:
    """Page and API behind a key."""
    with served(lambda: engine, KEY) as (address, _):
        yield address


def test_the_api_requires_the_key(locked: str) -> None:
    assert ask(client_of(locked, KEY)).choices
    for key in ("", "wrong", KEY + "x", KEY[:-1], "schlüssel"):
        status, headers, text = fetch(locked, "/v1/models", Authorization=f"Bearer {key}")
        assert (status, json.loads(text)["error"]["code"]) == (401, "invalid_api_key")
        assert headers["www-authenticate"] == "Bearer"
    with pytest.raises(openai.AuthenticationError):
        ask(client_of(locked))
    assert fetch(locked, "/v1/models")[0] == 401
    assert fetch(locked, "/v1/nothing")[0] == 401
    assert fetch(locked, "/health")[0] == 200


def test_the_page_requires_the_key(locked: str) -> None:
    from gradio_client import Client
    from gradio_client.exceptions import AuthenticationError

    for path in ("/config", "/gradio_api/info"):
        assert fetch(locked, path)[0] == 401
    call = b'{"data": ["hello", "", 8, 0, 1]}'
    assert fetch(locked, "/gradio_api/call/chat", call, Content_Type="application/json")[0] == 401
    join = b'{"data": ["hello", "", 8, 0, 1], "fn_index": 0, "session_hash": "x"}'
    assert fetch(locked, "/gradio_api/queue/join", join, Content_Type="application/json")[0] == 401
    with pytest.raises((AuthenticationError, ValueError)):
        Client(locked, auth=("me", "wrong"), verbose=False)
    inside = Client(locked, auth=("me", KEY), verbose=False)
    assert inside.predict(HELLO[0]["content"], api_name="/chat") == said(client_of(locked, KEY), HELLO)


def test_other_host_names_and_pages_of_other_sites_are_refused(address: str) -> None:
    port = address.rstrip("/").rpartition(":")[2]
    for path in ("/", "/health", "/v1/models", "/config"):
        for headers in (
            {"Host": "evil.example"},
            {"Host": f"127.0.0.1.evil.example:{port}"},
            {"Host": "["},
            {"Host": ""},
            {"Origin": "http://evil.example"},
            {"Origin": "null"},
            {"Origin": "http://127.0.0.1:1"},
        ):
            status, given, text = fetch(address, path, **headers)
            assert (status, json.loads(text)["error"]["type"]) == (403, "permission_error"), headers
            assert "access-control-allow-origin" not in given
        for headers in ({"Host": f"localhost:{port}"}, {"Origin": address.rstrip("/")}, {"Host": "[::1]:9"}):
            assert fetch(address, path, **headers)[0] == 200, headers


@pytest.mark.parametrize(("host", "key"), [("0.0.0.0", ""), ("::", ""), ("192.168.1.2", "")])
def test_listening_on_a_network_without_a_key_is_refused(host: str, key: str) -> None:
    from engine import ChatError
    from server import listen

    with pytest.raises(ChatError, match="Binding to anything but loopback"):
        listen(host, 0, key)


def test_listening_on_a_network_with_a_key_works() -> None:
    from server import listen

    with contextlib.closing(listen("0.0.0.0", 0, KEY)) as listener:
        port = listener.getsockname()[1]
        socket.create_connection(("127.0.0.1", port)).close()
        accepted, _ = listener.accept()
        with contextlib.closing(accepted):  # or each answer waits 40 ms for a packet that says no more
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)
    for ours in ("127.0.0.1", "localhost", "127.1.2.3"):
        listen(ours, 0, "").close()


# ---- what the docs say


def blocks(language: str) -> list[str]:
    """Return the page's blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("number", range(len(blocks("python"))))
def test_the_examples_of_the_docs_work(
    locked: str, number: int, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setenv("CHAT_API_KEY", KEY)
    code = blocks("python")[number].replace("http://127.0.0.1:7860/", locked).replace('"tuned"', '"base"')
    exec(compile(code, "api.md", "exec"), {})
    assert capsys.readouterr().out.strip()


def test_the_commands_of_the_docs_work(address: str) -> None:
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    commands = [c for block in blocks("bash") for c in re.split(r"(?<!\\)\n", block) if c.startswith("curl ")]
    assert commands
    for command in commands:
        local = command.replace("http://127.0.0.1:7860/", address).replace('"tuned"', '"base"')
        done = subprocess.run(["bash", "-c", local], capture_output=True, text=True, check=True)
        assert re.match(r'\{"(status|object|id)"|data: \{', done.stdout), done.stdout
