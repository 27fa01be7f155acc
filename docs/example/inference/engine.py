"""One streaming chat engine for the console, the web page and the API: messages in, text out, piece by piece.

Engine does what is the same for every library; a backend (torch_backend.py, onnx_backend.py) computes the tokens. This
file knows neither the backends nor where models lie, so that importing it costs nothing.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from typing import Any, Protocol

for variable, value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # chatting needs no network: setup/get_model.py is what downloads
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)  # the libraries read these when they are imported, which is later

ENGINES = ("auto", "torch", "onnx")
COMPARE = "the int4 model has the adapter merged in: to compare with the base model, start with --engine torch"

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


class ChatError(Exception):
    """What is wrong, where, and what to do, for the user to read."""


class TooLongError(ChatError):
    """A conversation does not fit into what the model reads."""


@dataclass(frozen=True)
class Generation:
    """How an answer is made. Temperature 0 takes the likeliest token each time: the same answer everywhere."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # draw from the likeliest tokens that together reach this share
    top_k: int = 0  # draw from this many of the likeliest tokens; 0: from all
    repetition_penalty: float = 1.0  # above 1, what was said is less likely to be said again
    seed: int | None = None  # the same seed draws the same tokens; None: others each time
    stop: tuple[str, ...] = ()  # texts at which the answer ends; they are no part of it
    adapter: bool = True  # False: the base model answers, as it was before fine-tuning


@dataclass
class Usage:
    """What an answer took and why it ended, complete when its stream has ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"  # the model's end or a stop text; "length": it was cut


@dataclass(frozen=True)
class Source:
    """Which model to load, as models/run.json or olive-config.yaml says."""

    base: str  # a hub id, or a folder relative to the workspace
    revision: str | None
    adapter: str | None  # a folder relative to the workspace
    method: str
    dtype: str
    system_prompt: str
    run: dict[str, Any] = field(default_factory=dict)  # models/run.json; empty for the base model alone


class Backend(Protocol):
    """What an engine asks of a library."""

    description: str  # for example "torch, float32 on cpu"
    context: int  # how many tokens prompt and answer may have together
    notices: list[str]  # what the user should know about the way the model was loaded
    switchable: bool  # whether it has an adapter that can be left out of an answer

    def encode(self, messages: list[Message]) -> list[int]:
        """Render messages with the chat template, up to where the answer begins, and tokenise them."""

    def decode(self, tokens: list[int]) -> str:
        """Turn tokens into text, without special tokens."""

    def generate(self, prompt: list[int], generation: Generation) -> Generator[int, None, None]:
        """Yield the answer's tokens, without the one that ends it. Closing the generator stops the computing."""


@dataclass(frozen=True)
class Engine:
    """A loaded model. It answers one conversation at a time; others wait."""

    source: Source
    backend: Backend
    lock: threading.Lock = field(default_factory=threading.Lock)

    def stream(
        self,
        messages: list[Message],
        generation: Generation,
        notify: Callable[[str], None],
        usage: Usage | None = None,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces, one a token; closing the iterator stops the computing at once. Raises ChatError.

        A piece is empty while what was made may be the beginning of a character or of a stop text. A conversation
        without a system message gets the training's system prompt; an empty one means none at all. `notify` is called
        with a sentence when old messages are left out or the answer is cut, and `usage` is filled on the way.
        """
        if self.source.adapter and not (generation.adapter or self.backend.switchable):
            raise ChatError(f"The base model cannot answer here, as {COMPARE}.")
        usage = usage or Usage()
        prompt, room = self.fit(messages, generation.max_new_tokens, notify)
        usage.prompt_tokens = len(prompt)
        tokens: list[int] = []
        text, sent, ended = "", 0, False
        computing = self.backend.generate(prompt, replace(generation, max_new_tokens=room))
        with self.lock, contextlib.closing(computing):
            for token in computing:
                tokens.append(token)
                usage.completion_tokens = len(tokens)
                # All tokens together, as some tokenizers change the space at the start of what they decode.
                text = self.backend.decode(tokens)
                if ends := [end for stop in generation.stop if (end := text.find(stop)) >= 0]:
                    text, ended = text[: min(ends)], True
                    break
                known = len(text) - half_said(text, generation.stop)
                yield text[sent:known]
                sent = max(sent, known)
        if len(text) > sent:
            yield text[sent:]
        if len(tokens) == room and not ended:
            usage.finish_reason = "length"
            notify(f"The answer was cut at {room} tokens.")

    def fit(self, messages: list[Message], max_new_tokens: int, notify: Callable[[str], None]) -> tuple[list[int], int]:
        """Return the prompt's tokens and how many the answer may have, without the oldest turns if need be."""
        # the console and the API may be given bytes that are no text, which tokenizers refuse
        messages = [turn | {"content": turn["content"].encode(errors="replace").decode()} for turn in messages]
        given = [turn for turn in messages[:1] if turn["role"] == "system"]
        turns = messages[len(given) :]
        system = given or [{"role": "system", "content": self.source.system_prompt}]
        system = [turn for turn in system if turn["content"]]
        context = self.backend.context
        kept = min(max_new_tokens, context // 2)  # for the answer
        while len(prompt := self.backend.encode(system + turns)) > context - kept:
            questions = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
            if len(questions) < 2:
                raise TooLongError(
                    f"The message comes to {len(prompt)} tokens, but the model reads {context} and {kept} of them are "
                    "kept for the answer: shorten the message or ask for a shorter answer."
                )
            turns = turns[questions[1] :]
        if dropped := len(messages) - len(given) - len(turns):
            notify(f"The model reads {context} tokens: the oldest {dropped} messages of this chat were left out.")
        return prompt, min(max_new_tokens, context - len(prompt))


def half_said(text: str, stops: tuple[str, ...]) -> int:
    """Return how many characters at the end of the text may become another one, or the beginning of a stop text."""
    if text.endswith("\N{REPLACEMENT CHARACTER}"):  # some bytes of a character: the others follow
        return len(text)
    longest = max(map(len, stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
