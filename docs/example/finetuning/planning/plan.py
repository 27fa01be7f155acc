"""The plan of a run: what it will do and need, part by part, as --check shows it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any, cast

import yaml

from planning import cost, hardware
from planning.architecture import Shape
from planning.facts import (
    AzureFacts,
    AzureGpuFacts,
    AzureGpus,
    DataFacts,
    EstimateFacts,
    MachineFacts,
    ModelFacts,
    Plan,
    RowFacts,
    RunFacts,
)
from planning.fit import NOT_ESTIMATED, check_count, decided, learns_nothing, lengths_seen, limit, problem
from planning.memory import GIB, adapter_parameters, memory
from planning.model_facts import Model, find
from planning.row_lengths import Lengths
from planning.schedule import learning_steps
from planning.token_counts import Tokens, count
from planning.vocabulary import unknown_tokens
from preparing.conversations import print_once, shared_system_prompt
from preparing.dataset import chat_rows
from preparing.problems import short
from preparing.thoughts import has_thought
from preparing.turns import Message
from preparing.workspace import MODELS, ROOT
from settings.run_settings import METHODS, Settings
from settings.validation import validate

LONG = 3600  # seconds: for longer runs, a rented GPU is shown as well

Rows = dict[str, list[Any]]  # train and held_out: their conversations


def plan(settings: Settings, show: Callable[[str, Any], None]) -> Plan:
    """Collect all parts, and pass each one to `show` as soon as it is known.

    Returns all parts as one dict, with `problem`: why the run cannot work, or None. Raises ConfigError and DataError
    if settings or data cannot be read at all.
    """
    report: Plan = {"run": run_facts(settings)}
    show("run", report["run"])
    here = hardware.look()
    report["machine"] = cast("MachineFacts", asdict(here))
    show("machine", report["machine"])
    validate(settings)  # heavy imports
    rows = read_rows(settings)
    settings = as_the_rows_are(settings, rows["train"])
    model = find(settings)
    report["model"] = model_facts(model, settings)
    show("model", report["model"])
    counted = {part: count(settings.data[part].tokens, rows[part], model) for part in rows}
    lengths = lengths_seen(counted, settings.max_seq_len)
    report["data"] = data_facts(settings, rows, counted["train"])
    show("data", report["data"])
    azure: AzureGpus = yaml.safe_load((ROOT / "setup" / "azure_gpus.yaml").read_text(encoding="utf-8"))
    if model.dense and lengths["train"].tokens:
        settings = decided(model.dense, settings, lengths, limit(settings, here, azure))
        report["estimate"] = estimate_facts(model.dense, model, settings, lengths, here, azure)
        show("estimate", report["estimate"])
        report["azure"] = AzureFacts(target=azure["target"], gpus=azure_facts(model, settings, lengths, azure))
        if azure["target"] == "azure" or (report["estimate"]["seconds"] or LONG) >= LONG:
            show("azure", report["azure"])
    elif report["model"]["parameters"] and not model.dense:
        show("memory", {"line": NOT_ESTIMATED})
    report["problem"] = (
        problem(model, settings, counted, lengths, here, azure)
        or learns_nothing(report["data"]["steps"], report["data"]["learning_steps"])
        or unknown_tokens(model, settings, rows)
    )
    return report


def read_rows(settings: Settings) -> Rows:
    """Read the conversations of both parts. Raises ConfigError and DataError."""
    rows = {part: chat_rows(part, **vars(data.rows)) for part, data in settings.data.items()}
    check_count(rows)
    return rows


def as_the_rows_are(settings: Settings, rows: list[list[Message]]) -> Settings:
    """Decide, by the rows to train on, what the settings leave open for both parts and for the chat.

    `thinking: auto` is on if rows have thoughts. Without a `system_prompt`, it is the one that all rows have.
    """
    thinks, system_prompt = any(map(has_thought, rows)), shared_system_prompt(rows)
    if system_prompt and not settings.data["train"].tokens.system_prompt:
        print_once(
            f"All rows have this system prompt, which chat, API and exports use too: {short(system_prompt, 200)}"
        )
        data = {
            name: replace(part, tokens=replace(part.tokens, system_prompt=system_prompt))
            for name, part in settings.data.items()
        }
        settings = replace(settings, data=data)
    data = {
        name: replace(part, tokens=replace(part.tokens, thinking="on" if thinks else "off"))
        if part.tokens.thinking == "auto"
        else part
        for name, part in settings.data.items()
    }
    return replace(settings, data=data)


def run_facts(settings: Settings) -> RunFacts:
    """Return the main settings of the run."""
    return {
        "model": settings.model_path,
        "method": METHODS[settings.method],
        "rank": settings.r,
        "dtype": settings.torch_dtype,
    }


def model_facts(model: Model, settings: Settings) -> ModelFacts:
    """Return where the model is, and how large."""
    counted = (model.shape.weights or model.shape.parameters) if model.shape else None
    parameters, text = model.parameters or counted, model.counted.parameters if model.counted else None
    return {
        "name": model.name,
        "revision": model.revision,
        "commit": model.commit,
        "own_template": model.own_template,
        "folder": model.folder,
        "download_bytes": model.download,
        "parameters": parameters,
        "text_parameters": text if text and parameters and text < 0.99 * parameters else None,
        "trained_parameters": adapter_parameters(model.counted, settings) if model.counted else None,
        "replaced_by": model.replaced_by,
        "no_int4": model.no_int4,
    }


def row_facts(settings: Settings, rows: Rows, trained: int) -> RowFacts:
    """Return how many rows there are, and how many steps the training takes."""
    steps, of_epochs = settings.steps(trained)
    return {
        "rows": {part: len(rows[part]) for part in rows},
        "steps": steps,
        "learning_steps": learning_steps(settings, steps),
        "rows_a_step": settings.rows_a_step,
        "epochs": settings.num_train_epochs,
        "decided_by": "max_steps" if steps < of_epochs else "epochs",
        "steps_of_epochs": of_epochs,
        "max_steps": settings.max_steps,
        "warnings": [*large_steps(settings, trained), *repeated_rows(rows)],
    }


def data_facts(settings: Settings, rows: Rows, train: Tokens) -> DataFacts:
    """Return rows, tokens, and what max_seq_len cuts."""
    ordered, total = sorted(train.tokens), sum(train.tokens)
    kept = sum(start <= settings.max_seq_len for start in train.first_labels)
    width = max(1, -(-(ordered[-1] - ordered[0] + 1) // 12))
    return {
        **row_facts(settings, rows, train.examples(kept)),
        "tokens_estimated": train.estimated,
        "rows_counted": train.sampled,
        "tokens": {
            "min": ordered[0],
            "median": ordered[len(ordered) // 2],
            "p95": ordered[min(len(ordered) - 1, len(ordered) * 95 // 100)],
            "max": ordered[-1],
        },
        "histogram": {
            start: sum(start <= tokens < start + width for tokens in ordered)
            for start in range(ordered[0], ordered[-1] + 1, width)
        },
        "answer_share": round(sum(train.labels) / max(total, 1), 4),
        "max_seq_len": settings.max_seq_len,
        "truncated": train.examples(sum(tokens > settings.max_seq_len for tokens in ordered)),
        "without_answer": train.examples(len(ordered) - kept),
    }


def estimate_facts(
    shape: Shape,
    model: Model,
    settings: Settings,
    lengths: dict[str, Lengths],
    here: hardware.Machine,
    azure: AzureGpus,
) -> EstimateFacts:
    """Return memory and disk in bytes, and the time in seconds with its source."""
    needed, room = memory(shape, settings, lengths["train"], lengths["held_out"]), limit(settings, here, azure)
    disk = cost.disk(shape, settings, model.download)
    seconds, source, gain = None, "not known: no GPU here to measure", None
    if not settings.gpu or here.gpu:
        speed = hardware.speed(shape, settings)
        seconds = cost.seconds(shape, settings, lengths["train"], lengths["held_out"], speed, measured=True)
        source = f"rough, from a matrix product of {speed / 1e12:.3g} TFLOPS here"
        gain = hardware.bfloat16_gain(shape, settings, speed)
        if last := cost.last_run(MODELS / "run.json", settings, here):
            seconds, source = last.seconds(settings, lengths["train"], lengths["held_out"]), "as fast as the last run"
    return {
        "memory": {part: round(size) for part, size in vars(needed).items()} | {"total": round(needed.total)},
        "memory_limit": None if math.isinf(room) else round(room),
        "gradient_checkpointing": bool(settings.gradient_checkpointing),
        "disk": {part: round(size) for part, size in vars(disk).items()} | {"run": round(disk.run)},
        "seconds": None if seconds is None else round(seconds),
        "seconds_source": source,
        "bfloat16_gain": None if gain is None else round(gain, 1),
    }


def azure_facts(model: Model, settings: Settings, lengths: dict[str, Lengths], azure: AzureGpus) -> list[AzureGpuFacts]:
    """Return whether it fits, hours and dollars for the chosen Azure GPU and each one with a known price."""
    found: list[AzureGpuFacts] = []
    shape = model.dense
    if shape is None:
        return found
    for gpu in azure["gpus"]:
        if not gpu["price"] and gpu["id"] != azure["gpu"]:
            continue
        dtype = settings.torch_dtype if settings.gpu else "bfloat16"  # the default of a GPU workspace
        if dtype == "bfloat16" and not gpu["bf16"]:
            dtype = "float16" if model.float16 else "float32"
        there = replace(settings, device="gpu", torch_dtype=dtype)
        peak = gpu["tflops_float32"] if dtype == "float32" else gpu["tflops"]
        seconds = cost.seconds(shape, there, lengths["train"], lengths["held_out"], peak * 1e12)
        found.append(
            {
                "id": gpu["id"],
                "name": gpu["name"],
                "price": gpu["price"],
                "price_days": cost.price_days(gpu),
                "tflops_source": gpu["tflops_source"],
                "chosen": gpu["id"] == azure["gpu"],
                "memory": round(memory(shape, there, lengths["train"], lengths["held_out"]).total),
                "memory_limit": round(gpu["gpu_memory_gib"] * GIB),
                "hours": round(seconds / 3600, 3),
                "dollars": cost.dollars(gpu, seconds),
            }
        )
    return found


def large_steps(settings: Settings, trained: int) -> list[str]:
    """Return a warning if one step takes more rows than there are."""
    if settings.rows_a_step <= trained or settings.gradient_accumulation_steps == 1:
        return []
    return [
        f"warning: a step takes {settings.rows_a_step} rows and there are {trained}, so an epoch is one step: lower "
        "gradient_accumulation_steps to get more."
    ]


def repeated_rows(rows: Rows) -> list[str]:
    """Return a warning about duplicate rows, and one about held-out rows that are also trained on."""
    train, held_out = ([json.dumps(row, sort_keys=True) for row in rows[part]] for part in ("train", "held_out"))
    twice, shared = len(train) - len(set(train)), len(set(held_out) & set(train))
    lines = []
    if twice:
        lines.append(f"warning: {twice} of {len(train)} rows to train on are duplicates and count more than once.")
    if shared:
        lines.append(f"warning: {shared} held-out rows are trained on too: the figures after the run will be too good.")
    return lines
