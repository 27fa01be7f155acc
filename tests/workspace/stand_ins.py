"""Engines that tests load in the model's process: what a question says happens to them."""

from __future__ import annotations

import ctypes
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ANSWER = b"well"


class Obedient:
    """A backend that answers, ends its process, fails, or computes for long, as the last question says."""

    description, context, switchable = "obedient", 2000, False

    def __init__(self) -> None:
        self.notices = ["I am a stand-in."]

    def render(self, messages: list[dict[str, str]]) -> str:
        return messages[-1]["content"]

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace")

    def generate(self, prompt: list[int], _: Any) -> Iterator[int | None]:
        what, _, number = bytes(prompt).decode().partition(" ")
        if what == "abort":
            yield ANSWER[0]
            os.abort()
        if what == "kill":
            os.kill(os.getpid(), 9)
        if what == "break":
            raise RuntimeError("CUDA error: device-side assert triggered")
        if what == "fail":
            raise KeyError("the stand-in fails")
        if what == "memory":
            raise MemoryError("bad allocation")
        if what == "hold":  # as ONNX Runtime GenAI, which does not release Python's lock
            ctypes.PyDLL(None).usleep(int(float(number) * 1_000_000))
        if what == "read":  # a prompt in pieces
            for _ in range(int(float(number) * 10)):
                time.sleep(0.1)
                yield None
        if what == "pid":
            yield from str(os.getpid()).encode()
            return
        yield from ANSWER


def load() -> Any:
    from engine import Engine, Source

    return Engine(Source("models/demo", None, None, "lora", "float32", ""), Obedient())  # type: ignore[arg-type]


def load_slowly() -> Any:
    ctypes.PyDLL(None).usleep(2_000_000)
    return load()


def load_what_is_missing() -> Any:
    from engine import ChatError

    raise ChatError("The model is missing: get it.")


def load_and_abort() -> Any:
    os.abort()


def load_demo(kind: str, folder: Path, root: Path, token_seconds: float = 0.0, unchecked: bool = False) -> Any:
    """Load a real model: `folder` with torch or onnx. It can read as slowly as a large one, and check no number."""
    import engine

    source = engine.Source("models/demo", None, None, "lora", "float32", "")
    backend: Any
    if unchecked:
        engine.Generation.check = lambda _: None  # type: ignore[method-assign]
    if kind == "torch":
        from torch_backend import TorchBackend

        def read_slowly(_: Any, __: Any, options: dict[str, Any]) -> None:
            time.sleep(token_seconds * options["input_ids"].shape[1])

        backend = TorchBackend(source, folder, root)
        backend.pieces.size = backend.pieces.least = 32  # so that the demo's short prompts have several
        backend.model.register_forward_pre_hook(read_slowly, with_kwargs=True)
    else:
        import onnx_backend

        class Slow(onnx_backend.onnxruntime_genai.Generator):  # type: ignore[misc]
            def append_tokens(self, tokens: Any) -> None:
                ctypes.PyDLL(None).usleep(int(token_seconds * len(tokens) * 1_000_000))
                super().append_tokens(tokens)

        onnx_backend.onnxruntime_genai.Generator = Slow
        backend = onnx_backend.OnnxBackend(source, folder, root)
    return engine.Engine(source, backend)
