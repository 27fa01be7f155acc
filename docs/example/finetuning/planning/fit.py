"""Whether a run fits into memory and disk, and its answers into max_seq_len; if not, what to change."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from planning import cost, hardware
from planning.advice import advice
from planning.architecture import Shape
from planning.facts import AzureGpus
from planning.memory import GIB, memory
from planning.model_facts import Model, find
from planning.row_lengths import Lengths
from planning.schedule import learning_steps
from planning.token_counts import Tokens, tokens_of
from planning.vocabulary import beyond
from preparing.tokenised import Tokenised
from preparing.workspace import ROOT
from settings.config_file import ConfigError
from settings.run_settings import Settings

LEAST_ROWS = 8  # to train on; one held-out row is enough for a figure, however uncertain
MARGIN = 0.85  # of the memory: above it, checkpointing is switched on unless the settings decide
RESERVE = GIB // 4  # of the disk: the report, caches, and other programs on this machine
NOT_ESTIMATED = (
    "not estimated: the model is not of the dense kind whose needs are known (it has experts, or layers of several "
    "kinds)"
)


def limit(settings: Settings, here: hardware.Machine, azure: AzureGpus | None) -> float:
    """Return the memory available to the training in bytes: of this GPU, the chosen Azure GPU, or this machine's RAM.

    It is infinite if there is no GPU to compare the estimate with.
    """
    if not settings.gpu:
        return here.ram_free / settings.processes
    if azure and azure["target"] == "azure" and here.gpu is None:
        chosen = next(gpu for gpu in azure["gpus"] if gpu["id"] == azure["gpu"])
        return chosen["gpu_memory_gib"] * GIB
    return here.vram_free if here.gpu else math.inf


def lengths_seen(counted: Mapping[str, Tokens], longest: int) -> dict[str, Lengths]:
    """Return the lengths that a run sees: training cuts its rows at `longest`; held-out questions are asked whole."""
    return {"train": counted["train"].trained_on(longest), "held_out": counted["held_out"].trained_on(sys.maxsize)}


def decided(shape: Shape, settings: Settings, lengths: dict[str, Lengths], room: float) -> Settings:
    """Decide on gradient checkpointing if the settings leave it open: on if memory is short without it."""
    if settings.gradient_checkpointing is not None:
        return settings
    plain = replace(settings, gradient_checkpointing=False)
    fits = memory(shape, plain, lengths["train"], lengths["held_out"]).total <= MARGIN * room
    return plain if fits else replace(settings, gradient_checkpointing=True)


def problem(
    model: Model,
    settings: Settings,
    counted: dict[str, Tokens],
    lengths: dict[str, Lengths],
    here: hardware.Machine,
    azure: AzureGpus,
) -> str | None:
    """Return why the run cannot work and which setting to change, in one sentence; None if it can work."""
    if model.problem:
        return model.problem
    if azure["target"] != "azure" and (missing := hardware.lacking(settings, here)):
        return missing
    if complaint := overflows(model, settings) or cut_answers(counted, settings, model.context):
        return complaint
    if model.dense is None or not lengths["train"].tokens:
        return weights_too_large(model, settings, limit(settings, here, azure))
    return too_large(model.dense, settings, lengths, limit(settings, here, azure), here.disk_free, model.download)


def overflows(model: Model, settings: Settings) -> str | None:
    """Return the error if the model's numbers are too large for the precision; None otherwise."""
    if settings.torch_dtype != "float16" or model.float16:
        return None
    kind = model.shape.architecture if model.shape else model.name
    return (
        f"torch_dtype: float16 is too small for the numbers in {kind}, which would answer nothing: "
        "set torch_dtype, and compute_dtype if present, to bfloat16, or to float32 on a GPU without bfloat16."
    )


def cut_answers(counted: Mapping[str, Tokens], settings: Settings, context: int | None) -> str | None:
    """Return the error if max_seq_len is too long for the model or cuts off too many answers; None otherwise.

    The length that it names is enough for both parts. `context` is what the model reads, in tokens, if it is known.
    """
    longest = settings.max_seq_len
    if context and longest > context and any(length > context for part in counted.values() for length in part.tokens):
        return (
            f"max_seq_len {longest} is more than the {context} tokens that the model reads: set max_seq_len: {context} "
            "in olive-config.yaml."
        )
    enough, complaint = 0, ""
    for part, tokens in counted.items():
        starts = sorted(tokens.first_labels)
        lost = sum(start > longest for start in starts)
        allowed = int(settings.data[part].tokens.max_bad_rows * len(starts))
        if lost and (lost > allowed or lost == len(starts)) and not complaint:
            complaint = (
                f"max_seq_len {longest} cuts off every answer of {lost} in {len(starts)} rows, and max_bad_rows allows "
                f"{allowed}: "
            )
        enough = max(enough, starts[len(starts) - 1 - min(allowed, len(starts) - 1)] if starts else 0)
    if not complaint:
        return None
    if context and enough > context:
        beyond = sum(start > context for tokens in counted.values() for start in tokens.first_labels)
        return (
            f"{complaint}the model reads {context} tokens, and {beyond} rows have no answer before that: shorten or "
            "drop these rows, or raise max_bad_rows in olive-config.yaml."
        )
    return f"{complaint}set max_seq_len: {enough} or more in olive-config.yaml."


def too_large(
    shape: Shape, settings: Settings, lengths: dict[str, Lengths], room: float, disk_free: float, download: float
) -> str | None:
    """Return what is short, disk or memory, and what to do; None if neither is."""
    disk = cost.disk(shape, settings, download)
    if disk.run + download + RESERVE > disk_free:
        needed, free = (disk.run + download + RESERVE) / GIB, disk_free / GIB
        return (
            f"{ROOT}: {free:.2f} GiB of disk are free and the run needs {needed:.2f}: free some, or set "
            "save_total_limit: 1 in olive-config.yaml."
        )
    needed = memory(shape, settings, lengths["train"], lengths["held_out"]).total
    if needed > room:
        kind = "GPU memory" if settings.gpu else "memory"
        return (
            f"The run needs about {needed / GIB:.1f} GiB of {kind} and {room / GIB:.1f} are free: "
            f"{advice(shape, settings, lengths, room)}."
        )
    return None


def weights_too_large(model: Model, settings: Settings, room: float) -> str | None:
    """Return that the weights alone are larger than the memory, `room` bytes, for a model that is not estimated."""
    count = (model.shape and model.shape.weights and model.shape.weights + model.shape.beside) or model.parameters or 0
    # with QLoRA at least this: bitsandbytes leaves experts as they are
    needed = count * (0.5 if settings.method == "qlora" else 2 if settings.torch_dtype == "bfloat16" else 4)
    share = settings.processes if settings.sharded else 1
    if needed / share <= room:
        return None
    return (
        f"The weights alone take {needed / share / GIB:.1f} GiB of memory and {room / GIB:.1f} are free: choose a "
        "smaller model or a larger machine."
    )


def settle(settings: Settings, found: Mapping[str, Tokenised]) -> tuple[Settings, float, str]:
    """Check lengths, memory and disk as --check does, before a run, and decide on gradient checkpointing.

    `found` are the rows of both parts. Returns the settings, the estimate in bytes, and
    a line that describes it. Raises ConfigError if the run cannot work.
    """
    model, here = find(settings), hardware.look()
    tokens = {part: rows.examples for part, rows in found.items()}
    counted = {part: tokens_of(rows) for part, rows in found.items()}
    steps, _ = settings.steps(len(tokens["train"]))
    complaint = (
        model.problem
        or overflows(model, settings)
        or cut_answers(counted, settings, model.context)
        or learns_nothing(steps, learning_steps(settings, steps))
        or beyond(model, (row["input_ids"] for rows in tokens.values() for row in rows))
    )
    if complaint:
        raise ConfigError(complaint)
    room = limit(settings, here, None)
    if model.dense is None:
        if complaint := weights_too_large(model, settings, room):
            raise ConfigError(complaint)
        return settings, 0.0, NOT_ESTIMATED
    lengths = lengths_seen(counted, settings.max_seq_len)
    settled = decided(model.dense, settings, lengths, room)
    if complaint := too_large(model.dense, settled, lengths, room, here.disk_free, 0):
        raise ConfigError(complaint)
    needed = memory(model.dense, settled, lengths["train"], lengths["held_out"]).total
    line = f"about {needed / GIB:.2f} of {room / GIB:.1f} GiB"
    if settings.gradient_checkpointing is None:
        on = settled.gradient_checkpointing
        line += f"; gradient checkpointing {'on, to save memory' if on else 'off, not needed'}"
    return settled, needed, line


def learns_nothing(steps: int, learning: int) -> str | None:
    """Return the error if no step has a learning rate above 0, so that the run would train nothing; None otherwise."""
    if learning or not steps:
        return None
    its = "its only step has" if steps == 1 else f"all its {steps} steps have"
    return (
        f"The run would train nothing: {its} the learning rate 0: set warmup_steps: 0, or take more steps (max_steps, "
        "num_train_epochs, a lower gradient_accumulation_steps), in olive-config.yaml."
    )


def check_count(rows: Mapping[str, list[Any]]) -> None:
    """Raise ConfigError if there are too few rows to learn from."""
    if len(rows["train"]) < LEAST_ROWS:
        raise ConfigError(
            f"{len(rows['train'])} rows to train on are too few to learn from: add rows until there are {LEAST_ROWS}, "
            "or see whether max_rows or eval_split in olive-config.yaml leaves too many out."
        )
