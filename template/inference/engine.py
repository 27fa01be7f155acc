"""One streaming chat engine under every face: messages in, text out, piece by piece.

`load` finds out which model is meant (models/run.json, or finetuning/olive-config.yaml for the base model alone) and
loads it with a backend, a file of its own for each library. Engine does what is the same for all of them. Backends are
imported when a model is loaded, so that importing this file costs nothing.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
import threading
import tomllib
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

for variable, value in {
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "HF_HUB_OFFLINE": "1",  # chatting needs no network: setup/get_model.py is what downloads
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
}.items():
    os.environ.setdefault(variable, value)  # the libraries read these when they are imported, which is later

ENGINES = ("auto", "torch", "onnx")
ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "setup"))
from model_folder import ModelError, find_model  # noqa: E402 - shared with setup/ and finetuning/

TUNE = "run `python finetuning/invoke_olive.py`"
BASE = "or chat with the base model: --baseonly."
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
        # a face may be given bytes that are no text, which tokenizers refuse
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


def load(baseonly: bool = False, engine: str = "auto", root: Path = ROOT) -> Engine:
    """Load the tuned model of the workspace `root`, or its base model alone. Raises ChatError, never falls back.

    `auto` takes the int4 model of finetuning/export.py where it was made from this adapter and there is no GPU, and
    says what it took and why. The base model alone is computed by torch, unless `onnx` is asked for.
    """
    if engine not in ENGINES:
        raise ChatError(f"There is no engine {engine!r}: choose one of {', '.join(ENGINES)}.")
    backend: Backend
    try:
        source = base_source(root) if baseonly else tuned_source(root)
        if not baseonly:
            check_adapter(source, root)
        folder, notices = choose(engine, source, root)
        # late, so that what is wrong is said before seconds of imports
        if folder:
            from onnx_backend import OnnxBackend

            backend = OnnxBackend(folder, root)
        else:
            base = find_model(source.base, source.revision, root).folder
            from torch_backend import TorchBackend

            backend = TorchBackend(source, base, root)
    except ModelError as error:
        raise ChatError(str(error)) from error
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    backend.notices += notices
    return Engine(source, backend)


def choose(engine: str, source: Source, root: Path) -> tuple[Path | None, list[str]]:
    """Return the folder of the ONNX model to take, None for torch, and what `auto` should say. Raises ChatError."""
    folder = root / "models" / ("onnx" if source.adapter else "onnx-base")
    if engine == "torch" or (engine == "auto" and not (source.adapter and folder.exists())):
        return None, []
    problem = problem_of_export(folder, source, root)
    if engine == "onnx":
        if problem:
            raise ChatError(f"{problem}, or use --engine torch.")
        return folder, []
    if problem:
        return None, [f"torch answers. {problem}."]
    with contextlib.suppress(OSError, ValueError):
        settings = tomllib.loads((root / "setup" / "environment.toml").read_text(encoding="utf-8"))
        mark = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if settings.get("device") == "gpu" and mark.get("provider", "cpu") == "cpu":
            return None, ["torch answers: this workspace is for a GPU, and models/onnx for a CPU (--engine onnx)."]
    return folder, ["The int4 model in models/onnx answers; --engine torch takes the adapter itself, and is slower."]


def problem_of_export(folder: Path, source: Source, root: Path) -> str:
    """Return why an ONNX folder cannot stand for the model that is meant, and what to do; "" when it can."""
    name = f"models/{folder.name}"
    make = "run `python finetuning/export.py`" if source.adapter else "run `python setup/get_model.py --onnx`"
    if not folder.exists():
        return f"There is no ONNX model in {name} yet: {make}"
    try:
        mark = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        for file, size in mark["files"].items():
            if (folder / file).stat().st_size != size:
                return f"The ONNX model in {name} is torn ({file}): {make} again"
        if mark["base_model"] != source.base:
            return f"The ONNX model in {name} was made from {mark['base_model']}, not from {source.base}: {make} again"
        if source.adapter and mark["adapter_sha256"] != sha256_of_adapter(root / source.adapter):
            return f"The ONNX model in {name} was made from another adapter than {source.adapter}: {make} again"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"The ONNX model in {name} is torn ({error}): {make} again"
    return ""


def sha256_of_adapter(folder: Path) -> str:
    """Return the hash of weights and settings, as finetuning/export.py writes it into what it makes."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update((folder / "adapter_config.json").read_bytes())
    return digest.hexdigest()


def not_installed(error: ModuleNotFoundError) -> ChatError:
    """Say which package is missing, and in which Python."""
    return ChatError(f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`.")


def tuned_source(root: Path) -> Source:
    """Read models/run.json, which a finished run of fine-tuning leaves behind."""
    try:
        run = json.loads((root / "models" / "run.json").read_text(encoding="utf-8"))
        return Source(
            base=run["base_model"],
            revision=run["revision"],
            adapter=run["adapter"],
            method=run["method"],
            dtype=run["dtype"],
            system_prompt=run["system_prompt"],
            run=run,
        )
    except FileNotFoundError:
        raise ChatError(f"No tuned model yet (models/run.json is missing): {TUNE}, {BASE}") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ChatError(f"models/run.json is torn or incomplete ({reason}): {TUNE} again, {BASE}") from error


def base_source(root: Path) -> Source:
    """Read the base model from finetuning/olive-config.yaml, in the precision that training would use."""
    config = read_yaml(root, "finetuning/olive-config.yaml")
    try:
        (chosen,) = config["passes"].values()
        data = [data.get("pre_process_data_config") or {} for data in config.get("data_configs") or []]
        return Source(
            base=config["input_model"]["model_path"],
            revision=(config["input_model"].get("load_kwargs") or {}).get("revision"),
            adapter=None,
            method=chosen["type"].lower(),
            dtype=chosen["torch_dtype"],
            system_prompt=next((settings["system_prompt"] for settings in data if settings.get("system_prompt")), ""),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ChatError(
            "finetuning/olive-config.yaml does not name the model as it should: restore it with git or "
            "`copier recopy --trust --vcs-ref :current:`."
        ) from error


def read_yaml(root: Path, file: str) -> dict[str, Any]:
    """Read a YAML file of the workspace. Raises ChatError."""
    import yaml

    try:
        return dict(yaml.safe_load((root / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ChatError(
            f"{file} cannot be read ({reason}): restore it with git or `copier recopy --trust --vcs-ref :current:`."
        ) from error


def check_adapter(source: Source, root: Path) -> None:
    """Raise ChatError unless the adapter's folder is whole and was trained on the base model of models/run.json."""
    from safetensors import SafetensorError, safe_open

    folder = root / str(source.adapter)
    try:
        trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="numpy") as weights:
            weights.keys()  # a torn file is noticed on opening
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ChatError(
            f"The adapter in {source.adapter} is missing or torn ({error}): {TUNE} again, {BASE}"
        ) from error
    # A folder may have moved with the workspace, and a downloaded model lies in the hub's cache: compare the ends.
    path = f"/{trained_on or source.base}".replace("\\", "/")
    if not path.endswith("/" + source.base.lstrip("./")) and "/models--" + source.base.replace("/", "--") not in path:
        raise ChatError(
            f"The adapter in {source.adapter} was trained on {trained_on}, but models/run.json names {source.base}: "
            f"{TUNE} again, {BASE}"
        )
