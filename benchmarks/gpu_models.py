"""What the measurements of gpu.py share: the machine, the models with random weights, their rows, the settings."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import platform
import random
from pathlib import Path
from typing import Any

from gpu_plan import REPOSITORY

GIB = 2**30
BATCH, STEPS = 16, 23  # rows a batch, about 4,096 tokens; steps of a training
SHORTEST, LONGEST = 30, 900  # tokens of a row
ADAPTER = {"r": 16, "lora_alpha": 32, "lora_dropout": 0.05}
SHOWN = ("torch", "transformers", "peft", "accelerate", "olive-ai", "bitsandbytes", "trl", "onnxruntime-genai-cuda")


class MeasureError(Exception):
    """Why there is nothing to measure, in a sentence."""


def folder(options: argparse.Namespace) -> Path:
    """Return the folder of the model."""
    return Path(options.models) / str(options.model)


def facts_of(options: argparse.Namespace) -> dict[str, Any]:
    """Return the model's facts from the catalogue; in a dry run, those of a tiny model of its architecture."""
    import yaml

    models = yaml.safe_load((REPOSITORY / "catalog" / "models.yml").read_text(encoding="utf-8"))["models"]
    facts: dict[str, Any] = next(one for one in models if one["id"] == options.model)
    if options.dry:
        grouped = facts["key_value_heads"] < facts["attention_heads"]
        facts |= {"layers": 2, "hidden_size": 64, "intermediate_size": 128, "attention_heads": 4, "head_dim": 16}
        facts |= {"key_value_heads": 2 if grouped else 4, "vocabulary": 1024, "context": 512}
    return facts


def device(options: argparse.Namespace) -> str:
    """Return the device to compute on. Raises MeasureError without a GPU, unless it is a dry run."""
    import torch

    if options.dry:
        torch.set_num_threads(1)
        if importlib.util.find_spec("bitsandbytes"):
            from bitsandbytes.nn import modules

            # it would pack the weights for the CPU, and compute wrong gradients: see tests/four_bits.py
            modules.has_avx512bf16 = lambda: False
        return "cpu"
    if not torch.cuda.is_available():
        raise MeasureError("PyTorch sees no NVIDIA GPU: see whether nvidia-smi lists it, or take --dry")
    return "cuda"


def machine(options: argparse.Namespace) -> dict[str, Any]:
    """Name the GPU, its driver, and the versions."""
    from planning import hardware

    here = hardware.look()
    gpu = f"{here.gpu}, {here.vram / GIB:.0f} GiB, driver {here.driver}" if here.gpu else "no GPU"
    versions = {"Python": platform.python_version()}
    for name in SHOWN:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    versions["FlashAttention"] = "is there" if importlib.util.find_spec("flash_attn") else "is not there"
    device(options)
    return {"machine": f"{gpu}, {here.cores} cores, {here.ram / GIB:.0f} GiB of memory", "versions": versions}


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Make the model with random weights in bfloat16, its tokenizer, and rows of text for invoke_olive.py."""
    import torch
    import transformers
    import yaml

    from training.tiny_model import build_tokenizer

    draw, facts, place = random.Random(1), facts_of(options), folder(options)
    families = yaml.safe_load((REPOSITORY / "catalog" / "chat_templates.yml").read_text(encoding="utf-8"))["families"]
    family = families[facts["chat_template"]]
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(600)]
    family["chat_template"] = family["template"]
    tokenizer = build_tokenizer(family, [[{"role": "user", "content": " ".join(words)}]])
    transformers.set_seed(1)
    config = transformers.AutoConfig.for_model(
        facts["architecture"],
        vocab_size=facts["vocabulary"],
        hidden_size=facts["hidden_size"],
        intermediate_size=facts["intermediate_size"],
        num_hidden_layers=facts["layers"],
        num_attention_heads=facts["attention_heads"],
        num_key_value_heads=facts["key_value_heads"],
        head_dim=facts["head_dim"],
        max_position_embeddings=facts["context"],
        original_max_position_embeddings=facts["context"],  # another number means LongRoPE to Phi-3's tools
        tie_word_embeddings=facts["tie_word_embeddings"],
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    with torch.device(device(options)):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    if not options.dry and model.num_parameters() != facts["parameters"]:
        raise MeasureError(f"it has {model.num_parameters()} parameters, and in the catalogue {facts['parameters']}")
    model.save_pretrained(place)
    tokenizer.save_pretrained(place)
    for name, count, most in (("rows", 96, 8 if options.dry else 120), ("held-out", 4, 6)):
        texts = [" ".join(draw.choices(words, k=draw.randint(3, most))) for _ in range(2 * count)]
        pairs = zip(texts[::2], texts[1::2], strict=True)
        rows = [[{"role": "user", "content": one}, {"role": "assistant", "content": other}] for one, other in pairs]
        (place / f"{name}.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return {"text": f"{model.num_parameters() / 1e9:.2f} billion random weights"}


def draw_rows(options: argparse.Namespace) -> list[dict[str, list[int]]]:
    """Return rows of random tokens, of which 20 to 80 % at the end are labels; most rows are short."""
    draw, vocabulary = random.Random(1), facts_of(options)["vocabulary"]
    longest = LONGEST // 9 if options.dry else LONGEST
    rows = []
    for _ in range(BATCH * STEPS):
        length = round(SHORTEST * (longest / SHORTEST) ** draw.random())
        ids = draw.choices(range(300, vocabulary), k=length)  # those before are bytes and marks
        asked = round(length * draw.uniform(0.2, 0.8))
        rows.append({"input_ids": ids, "labels": [-100] * asked + ids[asked:]})
    return rows


def configured(options: argparse.Namespace, **arguments: Any) -> dict[str, Any]:
    """Return the content of olive-config.yaml as a GPU workspace has it; `arguments` go to training_args."""
    from settings.config_file import read_file, the_pass

    config = read_file()
    config["input_model"]["model_path"] = str(folder(options))
    config["input_model"]["load_kwargs"]["revision"] = None
    config["systems"]["local_system"]["accelerators"] = [{"device": "cpu" if options.dry else "gpu"}]
    olive_pass = the_pass(config)
    olive_pass |= {"type": "QLoRA" if options.method == "qlora" else "LoRA", "torch_dtype": options.dtype}
    olive_pass |= {"r": ADAPTER["r"], "alpha": ADAPTER["lora_alpha"], "lora_dropout": ADAPTER["lora_dropout"]}
    olive_pass |= {"packing": True, "target_modules": facts_of(options)["target_modules"]}
    if options.method == "qlora":
        del olive_pass["target_modules"]
        olive_pass |= {"quant_type": "nf4", "double_quant": True, "compute_dtype": options.dtype}
    in_8_bits = options.method == "qlora" and not options.dry  # bitsandbytes' optimizers need a GPU
    olive_pass["training_args"] |= {
        "learning_rate": 2e-4,
        "num_train_epochs": 1,
        "optim": "paged_adamw_8bit" if in_8_bits else "adamw_torch",
        "per_device_train_batch_size": BATCH,
        "per_device_eval_batch_size": 4,
        "gradient_checkpointing": False,
        **arguments,
    }
    return config
