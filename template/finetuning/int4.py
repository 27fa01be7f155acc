"""The int4 model for ONNX Runtime: built of the merged one by Olive's ModelBuilder, and compared with it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider", "dml": "DmlExecutionProvider"}
COMPARED_ROWS, COMPARED_TOKENS = 64, 64  # more would take longer and change the figures by little
SETTINGS = {
    "precision": "int4",
    "int4_block_size": 32,
    "int4_accuracy_level": 4,  # int8 activations: the fast way on a CPU; a GPU does not look at it
    "extra_options": {"hf_remote": False, "hf_token": "false"},  # the builder would trust code from the hub
}


def choose_provider(wanted: str | None) -> str:
    """Return what the int4 model is to be computed with: cuda, dml (DirectML) or cpu. Raises ConfigError.

    Which of them the installed ONNX Runtime GenAI can depends on its package: onnxruntime-genai has the CPU alone.
    """
    import onnxruntime_genai
    import torch
    from check import ConfigError

    able = ["cpu"]
    if onnxruntime_genai.is_dml_available():
        able.insert(0, "dml")
    if onnxruntime_genai.is_cuda_available() and torch.cuda.is_available():
        able.insert(0, "cuda")
    if wanted and wanted not in able:
        package = {"cuda": "onnxruntime-genai-cuda", "dml": "onnxruntime-genai-directml"}[wanted]
        raise ConfigError(
            f"ONNX Runtime GenAI computes with {' or '.join(able)} here, not with {wanted}: install {package} in place "
            "of onnxruntime-genai on a machine with such a GPU, or leave --provider out."
        )
    return wanted or able[0]


def build(merged: Path, folder: Path, provider: str) -> None:
    """Let Olive's ModelBuilder write the ONNX model of `merged` into `folder`, with tokenizer and genai_config.json.

    What is not int4 is float16 for a GPU, and float32 for a CPU. Raises NotImplementedError for an architecture that
    the builder does not know, and others where it only seems to.
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
    """Return an AutoConfig whose configurations also say about RoPE what the builder asks for.

    transformers 5 moved it into rope_parameters. Where the builder finds nothing it takes a default: Phi-2 would be
    rotated wrongly, without a word, and Gemma 3 fails.
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


def compare(merged: Path, folder: Path, rows: list[Any], dtype: str) -> dict[str, Any]:
    """Let the ONNX model answer held-out rows greedily, and see whether torch would have chosen the same tokens.

    Returns `rows`; `answers`, the share of answers (up to COMPARED_TOKENS) that torch gives token for token; `tokens`,
    the share of tokens that torch chooses behind the same beginning; and `logits_max` and `logits_mean`, the absolute
    difference of the logits for the first token of an answer. `dtype` is torch's, as in models/run.json.
    """
    import numpy
    import torch
    from dataset import load_tokenizer
    from evaluate import load_model

    if not torch.cuda.is_available() and dtype == "float16":
        dtype = "float32"
    model = load_model(str(merged), None, {"type": "LoRA", "torch_dtype": dtype})
    onnx, tokenizer = load_onnx(folder), load_tokenizer(str(merged))
    context = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    alike: list[Any] = []
    differences = []
    for row in rows:
        prompt = prompt_of(tokenizer, row)[-(context - COMPARED_TOKENS) :]
        tokens, logits = answer_greedily(onnx, prompt)
        with torch.inference_mode():
            ids = torch.tensor([prompt + tokens], device=model.device)
            expected = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu().numpy()
        alike.append(expected.argmax(axis=-1) == numpy.array(tokens))
        differences.append(numpy.abs(expected[0] - logits))
    return {
        "rows": len(alike),
        "answers": round(sum(bool(row.all()) for row in alike) / len(alike), 4),
        "tokens": round(float(numpy.concatenate(alike).mean()), 4),
        "logits_max": round(float(numpy.max(differences)), 4),
        "logits_mean": round(float(numpy.mean(differences)), 4),
    }


def load_onnx(folder: Path) -> Any:
    """Load the ONNX model. Raises ConfigError where the libraries of its provider are missing."""
    import onnxruntime_genai
    from check import ConfigError

    try:
        return onnxruntime_genai.Model(str(folder))
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"ONNX Runtime GenAI cannot load the int4 model here ({reason}): --provider cpu makes one for the CPU."
        ) from error


def prompt_of(tokenizer: Any, row: list[Any]) -> list[int]:
    """Return the tokens up to the last answer of a conversation; of a plain text, its first half."""
    from dataset import NO_THINKING, tokenise

    if len(row) > 1 and row[-1]["role"] == "assistant":
        options = {"add_generation_prompt": True, "return_dict": False, **NO_THINKING}
        return list(tokenizer.apply_chat_template(list(row[:-1]), **options))
    tokens: list[int] = tokenise(tokenizer, row, "all")["input_ids"]
    return tokens[: (len(tokens) + 1) // 2]


def answer_greedily(model: Any, prompt: list[int]) -> tuple[list[int], Any]:
    """Return the ONNX model's answer in tokens, its end included, and the logits (vocabulary) of the first of them."""
    import onnxruntime_genai

    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, repetition_penalty=1.0, max_length=len(prompt) + COMPARED_TOKENS)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(prompt)
    logits = generator.get_logits()[0, -1].copy()
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, logits
