"""The ONNX model: built from the merged model by Olive's ModelBuilder, ever larger, until it keeps the answers."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy
from tokenizers import Tokenizer

from exporting.agreement import Answers, Reference, agrees, agrees_at, can_agree, compare, refusal, share_of
from exporting.exported_folder import BEST, MERGED, ONNX, MadeFrom, bytes_in, put_in_place, shown
from planning.quantizations import QUANTIZATIONS, Quantization
from preparing.problems import short
from settings.config_file import ConfigError
from training.whole_files import new_folder

WAITING = {"session.intra_op.allow_spinning": "0"}  # waiting threads sleep: awake, they slow down a busy machine
PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider"}
HUB = {"hf_remote": False, "hf_token": "false"}  # otherwise the builder would trust code from the hub
FIRST = 16  # so many answers say enough about a model that is refused


@dataclass
class Tried:
    """A model that was built, and how it answers the questions that it was asked so far."""

    quantization: Quantization
    bytes: int
    answers: Answers
    figures: dict[str, Any]
    example: str

    @property
    def share(self) -> float:
        """The share of its answers that agree."""
        return share_of(self.figures)


def choose_provider(wanted: str | None) -> str:
    """Return the execution provider for the ONNX model: cuda, dml (DirectML) or cpu. Raises ConfigError.

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


def build(merged: Path, folder: Path, provider: str, quantization: Quantization = QUANTIZATIONS["int4"]) -> None:
    """Write the ONNX model of `merged` to `folder` with Olive's ModelBuilder: model, tokenizer, genai_config.json.

    What is not quantised is float16 on a GPU and float32 on a CPU. Raises NotImplementedError for an architecture that
    the builder does not know, and other errors for one that it knows only in part.
    """
    from olive.hardware.accelerator import AcceleratorSpec, Device
    from olive.hardware.constants import ExecutionProvider
    from olive.model import HfModelHandler
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.onnx.model_builder import ModelBuilder
    from onnxruntime_genai.models import builder

    device = Device.CPU if provider == "cpu" else Device.GPU
    accelerator = AcceleratorSpec(device, ExecutionProvider(PROVIDERS[provider]))
    olive_pass = create_pass_from_dict(ModelBuilder, settings_for(quantization), True, accelerator)
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(builder, "AutoConfig", old_names(builder.AutoConfig)))
        # for weights that Olive has quantised before; its embedding never shares the output layer's matrix
        patches.enter_context(mock.patch.object(ModelBuilder, "maybe_patch_quant"))
        if quantization.precision == "int8":
            patches.enter_context(mock.patch.object(builder.Model, "to_int4", in_eight_bits(builder.Model.to_int4)))
        olive_pass.run(HfModelHandler(str(merged)), str(folder))


def settings_for(quantization: Quantization) -> dict[str, Any]:
    """Return the settings of Olive's ModelBuilder."""
    if not quantization.algorithm:
        return {"precision": {"float16": "fp16", "float32": "fp32"}[quantization.precision], "extra_options": HUB}
    return {
        "precision": "int4",
        "int4_block_size": 32,
        "int4_accuracy_level": 4,  # int8 activations: fast on a CPU; ignored on a GPU
        "int4_is_symmetric": quantization.symmetric,
        "extra_options": HUB | {"int4_algo_config": quantization.algorithm},
    }


def in_eight_bits(to_int4: Any) -> Any:
    """Return the builder's method that quantises a model, for 8 bits in all layers: it has no option for that.

    Its algorithms take the bits of each layer, and those with «last» in their name have 8 for the output layer.
    """

    def to_int8(model: Any) -> Any:
        layers = (node.name for node in model.model.graph if node.op_type == "MatMul")
        bits = model.quant_attrs["int4"]["algo_config"].customized_weight_config
        bits.update({layer: {"bits": 8} for layer in layers})
        return to_int4(model)

    return to_int8


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


def build_onnx(
    reference: Reference, names: Sequence[str], agreement: float, debug: bool, made_for: MadeFrom
) -> dict[str, Any]:
    """Build models/onnx from models/merged: the first of these quantisations that keeps the answers, from the smallest.

    Returns its figures, and under `tried` those of all that were tried. Raises ConfigError if none keeps them.
    """
    tried: list[dict[str, Any]] = []
    best: Tried | None = None
    problem: NotBuiltError | None = None
    unfinished = ONNX.with_name(".onnx.new")
    try:
        for quantization in map(QUANTIZATIONS.__getitem__, names):
            try:
                one = build_and_ask(reference, quantization, agreement, debug, made_for["provider"])
            except NotBuiltError as error:
                problem = problem or error
                tried.append({"quantization": quantization.name, "problem": str(error)})
                continue
            figures = {name: one.figures[name] for name in ("rows", "answers", "close_calls")}
            tried.append({"quantization": quantization.name, "bytes": one.bytes, **figures})
            if agrees(one.figures, agreement):
                chosen = {"quantization": quantization.name, "precision": quantization.precision}
                put_in_place(unfinished, ONNX, {**made_for, **chosen})  # type: ignore[typeddict-item]
                return {**chosen, **one.figures, "tried": tried}
            print(f"  {one.share:.1%} of {one.figures['rows']} answers are base and adapter's: too few", flush=True)
            if best is None or one.share > best.share:  # of two that are as good, the smaller one
                best = one
                shutil.rmtree(BEST, ignore_errors=True)
                unfinished.rename(BEST)
        if best is None:
            raise problem or AssertionError("nothing was tried")
        ask_onnx(reference, BEST, best.answers)  # the rest, for the share that could be allowed
        figures, example = compare(reference, best.answers)
    finally:
        for folder in (unfinished, BEST):
            shutil.rmtree(folder, ignore_errors=True)
    name = best.quantization.name
    model = f"{name} model" if len(names) == 1 else f"{name} model, the best of {len(names)},"
    raise refusal(model, figures, example, agreement, f"use {shown(MERGED)}", f"--quantization {name} ")


def build_and_ask(
    reference: Reference, quantization: Quantization, agreement: float, debug: bool, provider: str
) -> Tried:
    """Build a model beside models/onnx, and ask it until too many of its answers differ. Raises ConfigError."""
    unfinished = new_folder(ONNX)
    print(f"Building the {quantization.name} model for {provider} (minutes for billions of weights)", flush=True)
    try:
        with contextlib.ExitStack() as stack:
            if not debug:  # the builder prints a line per weight
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            build(MERGED, unfinished, provider, quantization)
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # the builder does not know the model, or knows only an older form of it
        (architecture,) = json.loads((MERGED / "config.json").read_text(encoding="utf-8"))["architectures"]
        kind = ConfigError if isinstance(error, NotImplementedError) else NotBuiltError
        raise kind(
            f"ONNX Runtime GenAI's builder cannot convert {architecture} ({error}): chat with "
            f"torch, or serve {shown(MERGED)}, which is complete."
        ) from error
    print("Comparing its answers with those of base and adapter", flush=True)
    refuse_other_tokens(reference, unfinished)
    answers = ask_onnx(reference, unfinished, share=agreement)
    return Tried(quantization, bytes_in(unfinished), answers, *compare(reference, answers))


class NotBuiltError(ConfigError):
    """A model cannot be built or computed here; with another quantisation it may."""


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
                f"The ONNX model would read {differs!r} as other tokens than the training did, and is not published: "
                f"chat with torch, or use {shown(MERGED)}."
            )


def ask_onnx(reference: Reference, folder: Path, answers: Answers | None = None, share: float = 0) -> Answers:
    """Let an ONNX model answer the questions behind those that it has answered, by its own genai_config.json.

    It stops when too many answers are wrong for this share of all, but not before FIRST. Raises NotBuiltError if the
    model cannot be computed here.
    """
    answers, wrong = answers or Answers(), 0
    try:
        model = load_onnx(folder)
        for row in range(len(answers.tokens), len(reference.prompts)):
            if row >= FIRST and not can_agree(wrong, len(reference.prompts), share):
                break
            tokens, logits = answer_greedily(model, reference.prompts[row], reference.limit)
            likely = numpy.exp(logits - logits.max())
            answers.tokens.append(tokens)
            answers.first.append(likely / likely.sum())
            wrong += not agrees_at(reference, row, tokens)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise NotBuiltError(
            f"ONNX Runtime GenAI cannot compute the ONNX model here ({reason}): --provider cpu makes one for the CPU."
        ) from error
    return answers


def load_onnx(folder: Path) -> Any:
    """Load an ONNX model."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": WAITING}}}))
    return onnxruntime_genai.Model(config)


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
