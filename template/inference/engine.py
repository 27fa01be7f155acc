"""One streaming chat engine for the console, the web page and the API: messages in, pieces of text out.

Engine contains what is independent of the library; a backend (torch_backend.py, onnx_backend.py) computes the tokens.
This file imports neither the backends nor the paths of models, so importing it is cheap.
"""

from __future__ import annotations

import contextlib
import os
import re
from bisect import bisect_left
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from datetime import date, datetime
from typing import Any, Protocol

for variable, value in {
    "HF_HUB_OFFLINE": "1",  # chatting needs no network: setup/get_model.py downloads
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)  # the libraries read these when they are imported, later

ENGINES = ("auto", "torch", "onnx")
COLDEST = 0.01  # temperature above 0: a lower one divides by almost nothing, which ends the ONNX Runtime's process
LIKELIEST = 1000  # the most tokens that one is sampled from: ONNX Runtime needs up to 70 ms to sort a whole vocabulary
LIMITS: dict[str, tuple[float, float]] = {
    "max_new_tokens": (1, 10_000_000),
    "temperature": (0, 2),
    "top_p": (1e-6, 1),
    "top_k": (0, 1_000_000),
    "repetition_penalty": (0.1, 10),
    "seed": (-(2**63), 2**63 - 1),
}
MOST_STOPS, LONGEST_STOP = 4, 1000  # texts, and characters of each
MOST_MESSAGES = 1000  # in a conversation: rendering many thousands of them takes minutes
NO_MEMORY = re.compile(r"out.?of.?memory|not enough memory|allocate memory|bad.?alloc|MemoryError", re.IGNORECASE)
BROKEN = re.compile(r"AcceleratorError|CUDA error|device-side assert")  # after it, the GPU answers this process no more
AGAIN = "start this program again."
COMPARE = "the ONNX model has the adapter merged in: to compare with the base model, start with --engine torch"

Message = dict[str, str]  # {"role": "system" | "user" | "assistant", "content": text}


# characters that move the cursor, end a line or turn the direction of writing
CONTROLS = re.compile(r"[\0-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


def visible(text: str) -> str:
    """Return a text that others have written as a terminal may show it: control characters as escapes like \\u001b.

    In a terminal they could forge or hide lines, or write to the clipboard.
    """
    return CONTROLS.sub(lambda found: f"\\u{ord(found[0]):04x}", text.replace("\r\n", "\n"))


class ChatError(Exception):
    """An error for the user: what is wrong, where, and what to do."""

    def __init__(self, text: str) -> None:
        super().__init__(visible(text))


class TooLongError(ChatError):
    """A conversation does not fit into the model's context."""


class BrokenError(ChatError):
    """The model cannot answer any more."""


@dataclass(frozen=True)
class Generation:
    """Generation settings. Temperature 0 is greedy: the same answer everywhere."""

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0  # sample from the likeliest tokens that together reach this probability
    top_k: int = 0  # sample from this many of the likeliest tokens; 0: LIKELIEST, which is also the most
    repetition_penalty: float = 1.0  # above 1: tokens are less likely to be repeated
    seed: int | None = None  # the same seed samples the same tokens; None: different ones each time
    stop: tuple[str, ...] = ()  # texts that end the answer; they are not part of it
    adapter: bool = True  # False: the base model answers, without fine-tuning

    def check(self) -> None:
        """Raise ChatError for a value that no backend can compute with."""
        for name, (low, high) in LIMITS.items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:  # also what is not a number
                raise ChatError(f"{name} is {value!r:.20}: choose {low:,} to {high:,}.")
        if len(self.stop) > MOST_STOPS or any(not 0 < len(text) <= LONGEST_STOP for text in self.stop):
            raise ChatError(f"Choose at most {MOST_STOPS} stop texts, each of 1 to {LONGEST_STOP:,} characters.")
        if 0 < self.temperature < COLDEST:
            raise ChatError(f"temperature is {self.temperature:g}: choose 0 (greedy), or {COLDEST:g} or more.")


@dataclass
class Usage:
    """Token counts of an answer and why it ended; complete when its stream has ended."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish_reason: str = "stop"  # end token or stop text; "length": it was cut


@dataclass(frozen=True)
class Source:
    """Which model to load, from models/run.json or olive-config.yaml."""

    base: str  # a hub id, or a folder relative to the workspace
    revision: str | None
    adapter: str | None  # a folder relative to the workspace
    method: str
    dtype: str
    system_prompt: str
    run: dict[str, Any] = field(default_factory=dict)  # models/run.json; empty for the base model alone
    thinking: bool = False  # whether the model is asked with thoughts, as it was trained
    stops: tuple[int, ...] = ()  # tokens that end an answer, as the training found them; empty: the backend finds them
    date: date | None = None  # of the training, for chat templates that write it; None: today
    quantization: dict[str, Any] = field(default_factory=dict)  # quant_type, double_quant, compute_dtype; for QLoRA

    def strftime_now(self, form: str) -> str:
        """Return the date that a chat template writes: the training's, so that a chat asks what was trained."""
        return (self.date or datetime.now()).strftime(form)


class Backend(Protocol):
    """The interface of a backend."""

    description: str  # for example "torch, float32 on cpu"
    context: int  # maximum tokens of prompt and answer together
    notices: list[str]  # for the user, about how the model was loaded
    switchable: bool  # whether it has an adapter that can be disabled per answer

    def render(self, messages: list[Message]) -> str:
        """Render messages with the chat template, up to the start of the answer. Raises ChatError."""

    def encode(self, text: str) -> list[int]:
        """Tokenise a rendered text, as the training did."""

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens to text, without special tokens."""

    def generate(self, prompt: list[int], generation: Generation) -> Generator[int | None, None, None]:
        """Yield the answer's tokens without the end token, and before them None after each piece of the prompt.

        Closing the generator stops the computation.
        """


@dataclass(frozen=True)
class Engine:
    """A loaded model. It answers one conversation at a time."""

    source: Source
    backend: Backend

    def stream(
        self,
        messages: list[Message],
        generation: Generation,
        notify: Callable[[str], None],
        usage: Usage | None = None,
        may_drop: bool = True,
    ) -> Generator[str, None, None]:
        """Yield the answer in pieces, one per token; closing the iterator stops the computation. Raises ChatError.

        A piece is empty while the prompt is read, and while the text may be the beginning of a character or a stop
        text. A conversation without a system message gets the training's system prompt; an empty one means no system
        prompt. `notify` is called with a sentence if old messages are left out or the answer is cut, and `usage` is
        filled meanwhile. A conversation that is too long loses its oldest turns if it `may_drop` them.
        """
        if self.source.adapter and not (generation.adapter or self.backend.switchable):
            raise ChatError(f"The base model cannot answer here, as {COMPARE}.")
        generation.check()
        usage = usage or Usage()
        prompt, room = self.fit(messages, generation.max_new_tokens, notify, may_drop)
        usage.prompt_tokens = len(prompt)
        tokens: list[int] = []
        text, sent, ended = "", 0, False
        top_k = min(generation.top_k or LIKELIEST, LIKELIEST)
        computing = self.backend.generate(prompt, replace(generation, max_new_tokens=room, top_k=top_k))
        try:
            with contextlib.closing(computing):
                for token in computing:
                    if token is None:
                        yield ""
                        continue
                    tokens.append(token)
                    usage.completion_tokens = len(tokens)
                    # All tokens together, since some tokenizers change the space at the start of decoded text.
                    text = self.backend.decode(tokens)
                    if ends := [end for stop in generation.stop if (end := text.find(stop)) >= 0]:
                        text, ended = text[: min(ends)], True
                        break
                    known = len(text) - half_said(text, generation.stop)
                    yield text[sent:known]
                    sent = max(sent, known)
        except Exception as error:
            explain(error)
            raise
        if len(text) > sent:
            yield text[sent:]
        if len(tokens) == room and not ended:
            usage.finish_reason = "length"
            notify(f"The answer was cut at {room} tokens.")

    def fit(
        self, messages: list[Message], max_new_tokens: int, notify: Callable[[str], None], may_drop: bool = True
    ) -> tuple[list[int], int]:
        """Return the prompt's tokens and the answer's maximum tokens.

        A conversation that is too long loses its oldest turns if it may, and otherwise raises TooLongError.
        """
        if len(messages) > MOST_MESSAGES:
            raise TooLongError(too_many(len(messages)))
        # console and API input may contain bytes that are not text, which tokenizers refuse
        messages = [turn | {"content": turn["content"].encode(errors="replace").decode()} for turn in messages]
        given = [turn for turn in messages[:1] if turn["role"] == "system"]
        turns = messages[len(given) :]
        system = given or [{"role": "system", "content": self.source.system_prompt}]
        system = [turn for turn in system if turn["content"]]
        self.refuse_dropped(system + turns)
        context = self.backend.context
        kept = min(max_new_tokens, context // 2)  # reserved for the answer

        def prompt_from(turn: int) -> list[int]:
            return self.backend.encode(self.backend.render(system + turns[turn:]))

        prompt = prompt_from(0)
        if len(prompt) > context - kept:
            starts = [i for i, turn in enumerate(turns) if turn["role"] == "user"][1:]
            if starts and not may_drop:
                raise TooLongError(
                    f"The conversation comes to {len(prompt)} tokens, but the model reads {context} and {kept} of them "
                    "are kept for the answer: leave out its oldest messages, or ask for a shorter answer."
                )
            # halving: encoding once for each turn would take seconds
            first = bisect_left(starts, True, key=lambda turn: len(prompt_from(turn)) <= context - kept)
            dropped = starts[first] if first < len(starts) else starts[-1] if starts else 0
            prompt = prompt_from(dropped)
            if first == len(starts):
                raise TooLongError(
                    f"The message comes to {len(prompt)} tokens, but the model reads {context} and {kept} of them are "
                    "kept for the answer: shorten the message or ask for a shorter answer."
                )
            notify(f"The model reads {context} tokens: the oldest {dropped} messages of this chat were left out.")
        return prompt, min(max_new_tokens, context - len(prompt))

    def refuse_dropped(self, messages: list[Message]) -> None:
        """Raise ChatError if the chat template leaves a message out: the model would never read it."""
        marks = [f"message {i} of this conversation" for i in range(len(messages))]
        marked = [turn | {"content": mark} for turn, mark in zip(messages, marks, strict=True)]
        text = self.backend.render(marked)
        for turn, mark in zip(messages, marks, strict=True):
            if turn["content"].strip() and mark not in text:
                what = "system prompt" if turn["role"] == "system" else f"turn of the {turn['role']}"
                raise ChatError(
                    f"The model's chat template leaves out the {what}, so the model would not read it: leave it out "
                    "too, or write it into a question."
                )


def explain(error: Exception) -> None:
    """Raise ChatError for an error of a backend that a user can do something about."""
    reason = f"{type(error).__name__}: {error}"
    if isinstance(error, ChatError):
        return
    if NO_MEMORY.search(reason):
        error.__traceback__ = None  # it keeps the variables of all functions: among them the cache that was too large
        raise ChatError("The memory is full: ask for a shorter answer, or clear the chat.") from error
    if BROKEN.search(reason):
        first = str(error).strip().partition("\n")[0].rstrip(".")
        raise BrokenError(f"The GPU has failed ({first}): {AGAIN}") from error


def too_many(messages: int) -> str:
    """Return what to do about a conversation of so many messages."""
    return f"A conversation has at most {MOST_MESSAGES:,} messages, and this has {messages:,}: leave out its oldest."


def half_said(text: str, stops: tuple[str, ...]) -> int:
    """Return how many characters at the end of the text may be incomplete, or the beginning of a stop text."""
    if text.endswith("\N{REPLACEMENT CHARACTER}"):  # an incomplete character: the other bytes follow
        return len(text)
    longest = max(map(len, stops), default=0)
    for length in range(min(longest - 1, len(text)), 0, -1):
        if any(stop.startswith(text[-length:]) for stop in stops):
            return length
    return 0
