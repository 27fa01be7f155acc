"""What one request can cost: every number of it is bounded, and its time and memory are known before it is computed."""

from __future__ import annotations

import contextlib
import functools
import http.client
import io
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import stand_ins
from conftest import inference_of
from served import serving, wait_for_health

if sys.platform == "win32":
    pytest.skip("the stand-ins need POSIX signals", allow_module_level=True)

KINDS = ("torch", "onnx")
USER = {"role": "user", "content": "She grinned at the market."}


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    from training.tiny_model import build_demo

    build_demo()
    with inference_of(workspace):
        yield


@pytest.fixture(scope="module")
def folders(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The demo's model, and its int4 model."""
    from exporting.int4 import build

    onnx = tmp_path_factory.mktemp("cost") / "onnx"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build(workspace / "models/demo", onnx, "cpu")
    return {"torch": workspace / "models/demo", "onnx": onnx}


@contextlib.contextmanager
def started(kind: str, folders: dict[str, Path], workspace: Path, **how: Any) -> Iterator[tuple[str, Any]]:
    """Serve the API on a real model in its process; yield the address and the model."""
    from fastapi import FastAPI

    from model_process import ModelProcess

    root = workspace if kind == "torch" else folders[kind].parent
    (root / "setup").mkdir(exist_ok=True)
    (root / "setup/model.yaml").write_bytes((workspace / "setup/model.yaml").read_bytes())
    model = ModelProcess(functools.partial(stand_ins.load_demo, kind, folders[kind], root, **how))
    with contextlib.closing(model), serving(model.loaded, lambda _: FastAPI()) as (address, _, ready):
        assert ready.wait(60)
        yield address, model


def send(address: str, body: str) -> http.client.HTTPConnection:
    connection = http.client.HTTPConnection(address.removeprefix("http://").rstrip("/"), timeout=60)
    connection.request("POST", "/v1/chat/completions", body)
    return connection


def ask(address: str, **fields: Any) -> tuple[int, str]:
    """Return the status and the body; strings that begin with = are written into the JSON as they are."""
    written = [f'"{name}": {one[1:] if str(one).startswith("=") else json.dumps(one)}' for name, one in fields.items()]
    body = ", ".join(['"model": "base"', *written])
    with contextlib.closing(send(address, f"{{{body}}}")) as connection:
        response = connection.getresponse()
        return response.status, response.read().decode()


HUGE = ["=1e400", "=-1e400", "=NaN", "=Infinity", f"={10**400}", "true", True, "1", [], {}, "=5e-324", "=1e308", -1]
EDGES: dict[str, list[Any]] = {
    "temperature": [0, 0.0, "=-0.0", 0.01, 0.0099999, 1e-40, 1, 2, 2.0, 2.0000001, -1e-9],
    "top_p": [1e-6, 9e-7, 1e-5, 0.5, 0.9999999, 1, 1.0, 1.0000001, 0],
    "top_k": [0, 1, 2, 999, 1000, 1001, 200_000, 1_000_000, 1_000_001, 2**31, 2**63, 1.5],
    "repetition_penalty": [0.1, 0.0999, 0.5, 1, 9.999, 10, 10.0001, 1e-40, 1e38],
    "seed": [0, 1, -1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, -(2**63), 2**63, -(2**63) - 1, 1.5],
    "max_tokens": [0, 1, 2, 10_000_000, 10_000_001, 2**31, 2**64, 1.5],
    "stop": ["", "x", "x" * 1000, "x" * 1001, ["x"] * 4, ["x"] * 5, [""], ["x", 1], "\x00", "\U0001f642"],
}


@pytest.mark.parametrize("kind", KINDS)
def test_no_number_of_a_request_ends_the_model_or_is_an_error_of_the_server(
    workspace: Path, folders: dict[str, Path], kind: str
) -> None:
    given: dict[str, set[int]] = {}
    with started(kind, folders, workspace) as (address, model):
        pid = model.process.pid
        for name, values in EDGES.items():
            for value in [*values, *HUGE]:
                # the other numbers at their edges too: temperature decides whether the rest is used
                for others in ({}, {"temperature": 2, "top_p": 1e-6}, {"temperature": 0.01, "repetition_penalty": 10}):
                    fields = {"messages": [USER], "max_tokens": 3} | others | {name: value}
                    status, text = ask(address, **fields)
                    assert status in (200, 400), (fields, text)
                    given.setdefault(name, set()).add(status)
        assert ask(address, messages=[USER], max_tokens=3)[0] == 200
        assert model.process.pid == pid
    assert given == {name: {200, 400} for name in EDGES}


def test_an_abort_of_onnx_runtime_itself_is_a_sentence(workspace: Path, folders: dict[str, Path]) -> None:
    from engine import BrokenError, Generation

    with started("onnx", folders, workspace, unchecked=True) as (address, model):
        with pytest.raises(BrokenError, match="SIGABRT"):
            list(model.stream([USER], Generation(8, temperature=1e-40), print))
        assert ask(address, messages=[USER], max_tokens=3)[0] == 200


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_a_client_that_leaves_while_a_long_prompt_is_read_stops_it(
    workspace: Path, folders: dict[str, Path], kind: str, stream: bool
) -> None:
    long = {"role": "user", "content": "She grinned at the market. " * 40}
    with started(kind, folders, workspace, token_seconds=0.003) as (address, _):
        began = time.monotonic()
        status, text = ask(address, messages=[long], max_tokens=1)
        assert status == 200, text
        assert time.monotonic() - began > 0.7
        other = {"role": "user", "content": f"He {long['content'][20:]}"}
        fields = {"model": "base", "messages": [other], "max_tokens": 1, "stream": stream}
        leaving = send(address, json.dumps(fields))
        wait_for_health(address, running=1)
        time.sleep(0.3)
        wait_for_health(address, running=1, seconds=0.1)
        leaving.close()
        wait_for_health(address, seconds=0.3)


def test_thirty_thousand_short_turns_are_refused_at_once(workspace: Path, folders: dict[str, Path]) -> None:
    turns = ",".join(['{"role":"user","content":"a"}'] * 30_000)
    with started("torch", folders, workspace) as (address, _):
        began = time.monotonic()
        status, text = ask(address, messages=f"=[{turns}]")
        assert time.monotonic() - began < 1
    assert (status, json.loads(text)["error"]["param"]) == (400, "messages")
    assert "A conversation has at most 1,000 messages, and this has 30,000: leave out its oldest." in text


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_needs_more_memory_than_is_free_is_refused_before_any_is_taken(
    workspace: Path, folders: dict[str, Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnx_backend
    import torch_backend
    from engine import ChatError, Generation

    root = workspace if kind == "torch" else folders[kind].parent
    engine = stand_ins.load_demo(kind, folders[kind], root)
    backend = engine.backend
    module = torch_backend if kind == "torch" else onnx_backend
    list(engine.stream([USER], Generation(2), print))
    cost = backend.token_bytes
    for free, fits in ((60 * cost, True), (20 * cost, False)):
        backend.kept = None
        monkeypatch.setattr(module, "free_memory", lambda free=free: free)
        if fits:
            list(engine.stream([USER], Generation(12), print))
            continue
        with pytest.raises(ChatError, match=r"need 0\.0 GiB of memory, and 0\.0 are free: ask for a shorter answer"):
            list(engine.stream([USER], Generation(12), print))
        assert backend.kept is None


def test_the_memory_of_a_token_is_that_of_the_keys_and_values_of_all_layers(folders: dict[str, Path]) -> None:
    from transformers import AutoConfig, Phi3Config

    from torch_loading import bytes_per_token

    phi_4_mini = Phi3Config(num_hidden_layers=32, hidden_size=3072, num_attention_heads=24, num_key_value_heads=8)
    assert bytes_per_token(phi_4_mini, 4) * 131_072 == 32 * 2**30
    demo = stand_ins.load_demo("torch", folders["torch"], folders["torch"].parents[1]).backend
    list(demo.generate(list(range(10, 40)), __import__("engine").Generation(1)))
    taken = sum(one.keys.nbytes + one.values.nbytes for one in demo.kept.cache.layers)
    assert taken == demo.token_bytes * demo.kept.cache.get_seq_length()
    config = AutoConfig.from_pretrained(folders["torch"])
    assert bytes_per_token(config, 2) * 2 == demo.token_bytes
