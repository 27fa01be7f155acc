"""The int4 model for ONNX Runtime: built from the merged model by Olive's ModelBuilder, and compared with it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
from tokenizers import Tokenizer

from exporting.agreement import Answers, Reference, check
from exporting.exported_folder import MERGED, ONNX, MadeFrom, put_in_place, shown
from preparing.problems import short
from settings.config_file import ConfigError
from training.whole_files import new_folder

WAITING = {"session.intra_op.allow_spinning": "0"}  # waiting threads sleep: awake, they slow down a busy machine
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider"}
SETTINGS = {
    "precision": "int4",
    "int4_block_size": 32,
    "int4_accuracy_level": 4,  # int8 activations: fast on a CPU; ignored on a GPU
    "extra_options": {"hf_remote": False, "hf_token": "false"},  # otherwise the builder would trust code from the hub
}


def choose_provider(wanted: str | None) -> str:
    """Return the execution provider for the int4 model: cuda, dml (DirectML) or cpu. Raises ConfigError.

    The installed package of ONNX Runtime GenAI decides which are available: onnxruntime-genai supports only the CPU.
    """
    import onnxruntime_genai
    import torch

    able = ["cpu"]
    if onnxruntime_genai.is_dml_available():
        able.insert(0, "dml")
    if onnxruntime_genai.is_cuda_available() and torch.cuda.is_available():
        able.insert(0, "cuda")
    if wanted and wanted not in able:
        package = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}[wanted]
        raise ConfigError(
            f"ONNX Runtime GenAI computes with {' or '.join(able)} here, not with {wanted}: install {package} instead "
            "of onnxruntime-genai on a machine with such a GPU, or leave --provider out."
        )
    return wanted or able[0]


def build(merged: Path, folder: Path, provider: str) -> None:
    """Write the ONNX model of `merged` to `folder` with Olive's ModelBuilder: model, tokenizer, genai_config.json.

    What is not int4 is float16 on a GPU and float32 on a CPU. Raises NotImplementedError for an architecture that the
    builder does not know, and other errors for one that it knows only in part.
    """
    from olive.hardware.accelerator import AcceleratorSpec, Device
    from olive.hardware.constants import ExecutionProvider
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.model_builder import ModelBuilder
    from onnxruntime_genai.models import builder

    device = Device.CPU if provider == "cpu" else Device.GPU
    accelerator = AcceleratorSpec(device, ExecutionProvider(PROVIDERS[provider]))
    olive_pass = create_pass_from_dict(ModelBuilder, SETTINGS, True, accelerator)
    with mock.patch.object(builder, "AutoConfig", old_names(builder.AutoConfig)):
        olive_pass.run(HfModelHandler(str(merged)), str(folder))


def old_names(auto_config: Any) -> Any:
    """Return an AutoConfig whose configurations also have the RoPE attributes that the builder reads.

    transformers 5 moved them into rope_parameters. If the builder does not find them, it uses defaults: Phi-2 is then
    silently rotated wrongly, and Gemma 3 fails.
    """

    class OldNames(auto_config):
        @classmethod
        def from_pretrained(cls, *arguments: Any, **options: Any) -> Any:
            config = super().from_pretrained(*arguments, **options)
            rope = getattr(config, "rope_parameters", None) or {}
            if "full_attention" in rope:
                config.rope_theta = rope["full_attention"]["rope_theta"]
                config.rope_local_base_freq = rope["sliding_attention"]["rope_theta"]
            elif "partial_rotary_factor" in rope:
                config.partial_rotary_factor = rope["partial_rotary_factor"]
            return config

    return OldNames


def build_int4(reference: Reference, agreement: float, debug: bool, made_for: MadeFrom) -> dict[str, Any]:
    """Build models/onnx from models/merged and return how well it agrees. Raises ConfigError if it is too little."""
    unfinished = new_folder(ONNX)
    try:
        with contextlib.ExitStack() as stack:
            if not debug:  # the builder prints a line per weight
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            build(MERGED, unfinished, made_for["provider"])
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # the builder does not know the model, or knows only an older form of it
        (architecture,) = json.loads((MERGED / "config.json").read_text(encoding="utf-8"))["architectures"]
        raise ConfigError(
            f"ONNX Runtime GenAI's builder cannot convert {architecture} ({error}): chat with "
            f"torch, or serve {shown(MERGED)}, which is complete."
        ) from error
    print("Comparing its answers with those of base and adapter", flush=True)
    try:
        refuse_other_tokens(reference, unfinished)
        answers = ask_onnx(reference, unfinished)
        figures = check("int4", reference, answers, agreement, f"four bits lose too much of it; use {shown(MERGED)}")
    except ConfigError:
        shutil.rmtree(unfinished)
        raise
    put_in_place(unfinished, ONNX, made_for)
    return figures


def refuse_other_tokens(reference: Reference, folder: Path) -> None:
    """Raise ConfigError if the tokenizer of a folder reads the questions otherwise than the training did.

    The chat reads tokenizer.json with the library tokenizers; transformers changes what some files say.
    """
    written = Tokenizer.from_file(str(folder / "tokenizer.json"))
    for text in map(reference.tokenizer.decode, reference.prompts):
        trained = reference.tokenizer(text, add_special_tokens=False)["input_ids"]
        if (read := written.encode(text, add_special_tokens=False).ids) != trained:
            place = len(os.path.commonprefix([read, trained]))  # noqa: RUF071 (of two lists)
            differs = short(reference.tokenizer.decode(trained[place:]) or text, 40)
            raise ConfigError(
                f"The int4 model would read {differs!r} as other tokens than the training did, and is not published: "
                f"chat with torch, or use {shown(MERGED)}."
            )


def load_onnx(folder: Path) -> Any:
    """Load the ONNX model. Raises ConfigError if the libraries of its provider are missing."""
    import onnxruntime_genai

    try:
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": WAITING}}}))
        return onnxruntime_genai.Model(config)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"ONNX Runtime GenAI cannot load the int4 model here ({reason}): --provider cpu makes one for the CPU."
        ) from error


def ask_onnx(reference: Reference, folder: Path) -> Answers:
    """Let the ONNX model answer the questions, by its own genai_config.json. Raises ConfigError."""
    model, answers = load_onnx(folder), Answers()
    for prompt in reference.prompts:
        tokens, logits = answer_greedily(model, prompt, reference.limit)
        likely = numpy.exp(logits - logits.max())
        answers.tokens.append(tokens)
        answers.first.append(likely / likely.sum())
    return answers


def answer_greedily(model: Any, prompt: list[int], limit: int) -> tuple[list[int], Any]:
    """Return the ONNX model's answer tokens, with the end token, and the logits (vocabulary) of the first one."""
    import onnxruntime_genai

    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, repetition_penalty=1.0, max_length=len(prompt) + limit)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(prompt)
    logits = generator.get_logits()[0, -1].astype("float32")
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, logits
