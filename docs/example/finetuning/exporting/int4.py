"""The int4 model for ONNX Runtime: built from the merged model by Olive's ModelBuilder, and compared with it."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

from exporting.agreement import compare
from exporting.exported_folder import MERGED, ONNX, MadeFrom, put_in_place, shown
from exporting.tuned_model import held_out_rows
from reporting.run_record import RunRecord
from settings.config_file import ConfigError
from training.whole_files import new_folder

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


def build_int4(run: RunRecord, agreement: float, debug: bool, made_for: MadeFrom) -> dict[str, Any]:
    """Build models/onnx from models/merged and return how well they agree. Raises ConfigError if it is too little."""
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
    print("Comparing it with the merged model on held-out rows", flush=True)
    figures = compare(MERGED, unfinished, held_out_rows(run), run["dtype"], run.get("thinking", False))
    if figures["tokens"] < agreement:
        shutil.rmtree(unfinished)
        raise ConfigError(
            f"The int4 model chooses {figures['tokens']:.1%} of the answer tokens as the merged model does, less than "
            f"the {agreement:.0%} that are wanted: use {shown(MERGED)}, or allow it with --agreement."
        )
    put_in_place(unfinished, ONNX, made_for)
    return figures
