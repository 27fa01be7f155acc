"""The smoke run: the same settings on a tiny replica of the model, offline, in seconds."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import yaml

from preparing.dataset import chat_rows
from preparing.workspace import MODEL_FACTS, ROOT, SAMPLE
from settings.run_settings import PartSettings, Settings
from training.tiny_model import build

ROWS = 64
STEPS = 10


def shrink(settings: Settings, results: Path) -> Settings:
    """Build the replica in results/base and return the settings of a short run with it on the CPU.

    The data is the configured file, or the sample if that would need a download.
    """
    if settings.data["train"].rows.dataset_name:
        print("The smoke run uses the sample instead of the Hugging Face dataset: it needs no network.")
    if settings.method == "qlora":
        print("The smoke run trains with LoRA instead of QLoRA: 4-bit weights need the GPU.")
    if settings.report_to != "none":
        print("The smoke run reports only to models/smoke/report: it needs no network.")
    short = replace(
        settings,
        model_path=(results / "base").relative_to(ROOT).as_posix(),
        revision=None,
        method="lora" if settings.method == "qlora" else settings.method,
        torch_dtype="float32",
        device="cpu",
        max_steps=STEPS,
        per_device_train_batch_size=8,
        gradient_accumulation_steps=1,
        optim="adamw_torch",
        eval_steps=STEPS // 2,
        save_steps=STEPS // 2,
        report_to="none",
        smoke=True,
        data={part: shrink_part(settings.data[part]) for part in settings.data},
    )
    facts = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))
    build(results / "base", facts, chat_rows("train", **vars(short.data["train"].rows)), steps=STEPS)
    return short


def shrink_part(part: PartSettings) -> PartSettings:
    """Use only the first rows, and the sample if the data is on the hub."""
    rows = replace(part.rows, max_rows=ROWS)
    if rows.dataset_name:
        rows = replace(rows, dataset_name=None, train_file=str(SAMPLE), held_out_file=None, dataset_format="messages")
    # the replica's tokenizer needs more tokens per row than the model's: its cuts mean nothing
    return PartSettings(rows, replace(part.tokens, max_bad_rows=1))
