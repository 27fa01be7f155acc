"""The fast backend for a CPU: the small model that finetuning/export.py makes, in ONNX Runtime GenAI.

It does not import torch or transformers, which would take longer than the first answer: the chat template is rendered
and tokenised here, to the same tokens as in the training.
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import onnxruntime_genai
from tokenizers import Tokenizer

from chat_template import ChatTemplate
from engine import ChatError, Generation, Source
from prompt_cost import Pieces, free_memory, refuse_too_large, same_start
from sources import precision_of, read_yaml

# attributes of the tokenizer that a chat template may use
MARKS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


AHEAD = 2048  # tokens of later turns, at most, for which memory is taken with a conversation's first
READY_MADE = "onnx-base"  # the folder of get_model.py --onnx
PACKAGES = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}
# up to this many tokens, ONNX Runtime GenAI rotates positions of such models the same; beyond it computes all anew
SAME_ROTATION = {"phi3": 4096, "phimoe": 4096, "phi3small": 8196}


class Kept(NamedTuple):
    """What was computed for the last conversation, and the options that cannot change any more.

    Only the prompt is used again, and two tokens at least are computed: ONNX Runtime rounds a single token, as those of
    an answer, otherwise than several together, and an answer would depend on what was asked before.
    """

    generator: Any
    prompt: list[int]
    options: dict[str, Any]
    room: int  # tokens


class OnnxBackend:
    """An ONNX Runtime GenAI model."""

    switchable = False  # the adapter is merged into the weights

    def __init__(self, source: Source, folder: Path, root: Path) -> None:
        """Load model, tokenizer and chat template from a folder in the workspace `root`. Raises ChatError."""
        self.tokenizer = ChatTokenizer(folder, root, source)
        try:
            settings = read_json(folder / "genai_config.json")["model"]
            self.context, self.vocabulary = int(settings["context_length"]), int(settings["vocab_size"])
            ends = settings["eos_token_id"]
            self.same_rotation = SAME_ROTATION.get(settings["type"], self.context)
            decoder = settings["decoder"]
            # keys and values: float32 on a CPU
            numbers = 2 * decoder["num_hidden_layers"] * decoder["num_key_value_heads"] * decoder["head_size"]
            self.token_bytes = 4 * int(numbers)
            named = [name for one in decoder["session_options"]["provider_options"] for name in one]
            provider = named[0] if named else available_provider(folder, root)
            config = onnxruntime_genai.Config(str(folder))
            if not named and provider != "cpu":  # without this, a folder for GPUs runs on the CPU
                config.clear_providers()
                config.append_provider(provider)
            config.overlay(json.dumps({"model": {"decoder": {"session_options": waiting()}}}))
            self.model = onnxruntime_genai.Model(config)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise damaged(folder, root, error) from error
        except RuntimeError as error:
            if provider == "cpu":
                raise damaged(folder, root, error) from error
            raise ChatError(
                f"ONNX Runtime cannot compute with {provider} here ({str(error).splitlines()[0]}), which the model in "
                f"models/{folder.name} is for: use --engine torch."
            ) from error
        self.stops = {*source.stops, *(ends if isinstance(ends, list) else [ends])}
        self.render, self.encode, self.decode = self.tokenizer.render, self.tokenizer.encode, self.tokenizer.decode
        self.description = f"ONNX Runtime, {precision_of(folder)} weights on {provider}"
        self.on_cpu = provider == "cpu"
        self.can_keep = provider in ("cpu", "cuda")  # the others cannot rewind
        self.kept: Kept | None = None
        self.pieces = Pieces(least=32)
        self.notices: list[str] = []

    def generate(self, prompt: list[int], generation: Generation) -> Generator[int | None, None, None]:
        """Yield the answer's tokens as they are generated, and before them None after each piece of the prompt.

        Closing the generator stops the computation; what was read until then is kept.
        """
        # set all options: the model's own may sample or penalise repetition, which the evaluation did not do
        seeded = generation.temperature > 0 and generation.seed is not None
        options: dict[str, Any] = {
            "do_sample": generation.temperature > 0,
            "temperature": generation.temperature or 1.0,
            "top_p": generation.top_p,
            # a value above the vocabulary size would crash the runtime
            "top_k": generation.top_k if generation.top_k < self.vocabulary else 0,
            "repetition_penalty": generation.repetition_penalty,
            "random_seed": (generation.seed or 0) % 2**31 if seeded else -1,  # the most bits it accepts
        }
        try:
            begun = self.begin(prompt, generation.max_new_tokens, options)
            known, generator = len(begun.prompt), begun.generator
            # in one piece where positions change with the length, or where the provider may take no second piece
            in_one = not self.can_keep or len(prompt) > self.same_rotation
            for piece in [prompt[known:]] if in_one else self.pieces.of(prompt[known:]):
                generator.append_tokens(piece)
                known += len(piece)
                if self.can_keep:
                    self.kept = begun._replace(prompt=prompt[:known])
                if known < len(prompt):
                    yield None
            for _ in range(generation.max_new_tokens):
                generator.generate_next_token()
                token = int(generator.get_next_tokens()[0])
                if token in self.stops:
                    return
                yield token
        except Exception:  # not when the answer is stopped: what was computed until then is right
            self.kept = None
            raise

    def begin(self, prompt: list[int], max_new_tokens: int, options: dict[str, Any]) -> Kept:
        """Return the last conversation's generator if that began with the same tokens, or a new one. Raises ChatError.

        A new one takes the memory for all tokens of prompt and answer at once.
        """
        needed = len(prompt) + max_new_tokens
        kept, self.kept = self.kept, None
        if (
            kept
            and kept.options == options
            and options["random_seed"] < 0  # a seed's draws begin with a new generator
            and needed <= kept.room
            and len(prompt) <= self.same_rotation >= kept.generator.token_count()
        ):
            same = max(0, min(same_start(kept.prompt, prompt), len(prompt) - 2))
            with contextlib.suppress(RuntimeError):  # some kinds of models cannot rewind
                kept.generator.rewind_to(same)
                return kept._replace(prompt=prompt[:same])
        del kept  # its memory is needed
        room, free = needed, free_memory() if self.on_cpu else sys.maxsize  # the runtime itself knows a GPU's memory
        refuse_too_large(needed, self.token_bytes, free)
        if self.can_keep:
            room = min(needed + min(needed, AHEAD), self.context, max(needed, free // max(1, 2 * self.token_bytes)))
        settings = onnxruntime_genai.GeneratorParams(self.model)
        settings.set_search_options(max_length=room, **options)
        return Kept(onnxruntime_genai.Generator(self.model, settings), [], options, room)


class ChatTokenizer:
    """Conversations → tokens and back, like transformers with the same files."""

    def __init__(self, folder: Path, root: Path, source: Source) -> None:
        """Read tokenizer and chat template. A base model has no template: the one in setup/model.yaml is used."""
        try:
            settings = read_json(folder / "tokenizer_config.json")
            self.tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            template, file = settings.get("chat_template"), folder / "chat_template.jinja"
            if file.is_file():
                template = file.read_text(encoding="utf-8")
        except Exception as error:  # tokenizers raises no more specific error
            raise damaged(folder, root, error) from error
        marks = {name: settings[name] for name in MARKS if settings.get(name)}
        marks = {name: mark["content"] if isinstance(mark, dict) else mark for name, mark in marks.items()}
        template = template or read_yaml(root, "setup/model.yaml")["chat_template"]
        self.render = ChatTemplate(str(template), marks, source).render

    def encode(self, text: str) -> list[int]:
        """Tokenise a rendered text, as the training did."""
        return list(self.tokenizer.encode(text, add_special_tokens=False).ids)

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens to text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


def available_provider(folder: Path, root: Path) -> str:
    """Return the execution provider of a folder whose genai_config.json names none. Raises ChatError.

    export.py makes such a folder for the CPU. For a ready-made one setup/model.yaml says which providers it is for; the
    first that the installed package has is taken.
    """
    if folder.name != READY_MADE:
        return "cpu"
    mark = read_json(folder / "export.json")
    ready = read_yaml(root, "setup/model.yaml").get("onnx") or {"folders": []}
    wanted = next((one["providers"] for one in ready["folders"] if one["folder"] == mark.get("folder")), ["cpu"])
    here = {"cuda": onnxruntime_genai.is_cuda_available(), "dml": onnxruntime_genai.is_dml_available(), "cpu": True}
    for provider in wanted:
        if here[provider]:
            return str(provider)
    packages = [PACKAGES[provider] for provider in wanted]
    raise ChatError(
        f"The model in models/{folder.name} is for {' or '.join(wanted)}, and ONNX Runtime GenAI has only "
        f"{' and '.join(name for name in here if here[name])} here: install {' or '.join(packages)} instead, run "
        "`python setup/get_model.py --onnx` again, which takes the model for this machine, or use --engine torch."
    )


def waiting() -> dict[str, str]:
    """Return the session option that decides whether waiting threads stay awake, as OMP_WAIT_POLICY does for torch."""
    awake = os.environ.get("OMP_WAIT_POLICY", "").upper() == "ACTIVE"
    return {"session.intra_op.allow_spinning": "1" if awake else "0"}


def damaged(folder: Path, root: Path, error: Exception) -> ChatError:
    """Return the error for a damaged ONNX folder."""
    where = folder.relative_to(root).as_posix()
    again = "finetuning/export.py" if folder.name == "onnx" else "setup/get_model.py --onnx"
    return ChatError(
        f"The ONNX model in {where} is damaged ({error}): delete it and run `python {again}` again, or use "
        "--engine torch."
    )


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file."""
    return dict(json.loads(path.read_text(encoding="utf-8")))
