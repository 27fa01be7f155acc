"""The check of a run before it starts: what it will do and need, and the one sentence when it cannot work."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import check
import cost
import machine
import yaml
from advice import advice
from check import ROOT, ConfigError
from estimate import GIB, Lengths, Settings, Shape, adapter_parameters, memory
from lengths import Tokens, count, lengths_of
from model_facts import Model, find

MARGIN = 0.85  # of the memory: above it, checkpointing is switched on where the settings leave it open
RESERVE = GIB // 4  # of the disk: the report, caches, and what else runs on this machine
LONG = 3600  # seconds: from here on, a rented GPU is shown as well
USABLE = 0.92  # of the memory that a GPU is sold with

Rows = dict[str, list[Any]]


def preview(config: dict[str, Any], show: Callable[[str, dict[str, Any]], None]) -> dict[str, Any]:
    """Find out everything, and pass each part to `show` as soon as it is known.

    Returns all parts as one dict, with `problem`: why the run cannot work, or None. Raises ConfigError and DataError
    for settings and data that cannot be read at all.
    """
    report: dict[str, Any] = {}

    def add(part: str, facts: dict[str, Any]) -> None:
        report[part] = facts
        show(part, facts)

    add("run", run_facts(config))
    here = machine.look()
    add("machine", asdict(here))
    check.validate(config)  # imports what is heavy
    rows = check.read_rows(config)
    settings = Settings.of(config)
    model = find(config)
    add("model", model_facts(model, settings))
    counted = {part: count(config, part, rows[part], model) for part in rows}
    lengths = {part: tokens.cut(settings.max_seq_len) for part, tokens in counted.items()}
    add("data", data_facts(settings, rows, counted["train"]))
    azure = yaml.safe_load((ROOT / "setup" / "azure_gpus.yaml").read_text(encoding="utf-8"))
    if model.shape and lengths["train"].tokens:
        settings = decided(model.shape, settings, config, lengths, limit(settings, here, azure))
        add("estimate", estimate_facts(config, model, settings, lengths, here, azure))
        report["azure"] = {"target": azure["target"], "gpus": azure_facts(model.shape, settings, lengths, azure)}
        if azure["target"] == "azure" or (report["estimate"]["seconds"] or LONG) >= LONG:
            show("azure", report["azure"])
    report["problem"] = problem(config, model, settings, counted, lengths, here, azure)
    return report


def run_facts(config: dict[str, Any]) -> dict[str, Any]:
    """Return what stands in the settings."""
    settings = check.pass_settings(config)
    names = {"method": "type", "rank": "r", "dtype": "torch_dtype"}
    return {"model": config["input_model"]["model_path"]} | {name: settings.get(key) for name, key in names.items()}


def model_facts(model: Model, settings: Settings) -> dict[str, Any]:
    """Return where the model is, and how large."""
    return {
        "name": model.name,
        "revision": model.revision,
        "commit": model.commit,
        "own_template": model.own_template,
        "folder": model.folder,
        "download_bytes": model.download,
        "parameters": model.parameters or (model.shape.parameters if model.shape else None),
        "trained_parameters": adapter_parameters(model.shape, settings) if model.shape else None,
    }


def row_facts(settings: Settings, rows: Rows, trained: int) -> dict[str, Any]:
    """Return how many rows there are, and how many steps it takes to go through those that are trained on."""
    steps, of_epochs = settings.steps(trained)
    return {
        "rows": {part: len(rows[part]) for part in rows},
        "steps": steps,
        "rows_a_step": settings.rows_a_step,
        "epochs": settings.epochs,
        "decided_by": "max_steps" if steps < of_epochs else "epochs",
        "steps_of_epochs": of_epochs,
        "max_steps": settings.max_steps,
        "warnings": check.repeated_rows(rows),
    }


def data_facts(settings: Settings, rows: Rows, train: Tokens) -> dict[str, Any]:
    """Return what there is to learn from."""
    ordered, total = sorted(train.tokens), sum(train.tokens)
    cut = Lengths(train.tokens, train.labels).cut(settings.max_seq_len)
    kept = sum(labels > 0 for labels in cut.labels)
    scale = train.rows / max(len(ordered), 1)
    width = max(1, -(-(ordered[-1] - ordered[0] + 1) // 12))
    return row_facts(settings, rows, round(kept * scale)) | {
        "tokens_estimated": train.estimated,
        "rows_counted": len(ordered),
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
        "truncated": round(scale * sum(tokens > settings.max_seq_len for tokens in ordered)),
        "without_answer": round(scale * (len(ordered) - kept)),
    }


def limit(settings: Settings, here: machine.Machine, azure: dict[str, Any]) -> float:
    """Return the memory that the training may fill: this GPU's, the chosen one's in Azure, or this machine's RAM.

    It is infinite where there is no GPU to hold the estimate against.
    """
    if not settings.gpu:
        return here.ram_free / settings.processes
    if azure["target"] == "azure" and here.gpu is None:
        chosen = next(gpu for gpu in azure["gpus"] if gpu["id"] == azure["gpu"])
        return USABLE * chosen["gpu_memory_gib"] * GIB
    return here.vram_free if here.gpu else math.inf


def decided(
    shape: Shape, settings: Settings, config: dict[str, Any], lengths: dict[str, Lengths], room: float
) -> Settings:
    """Decide on gradient checkpointing where the settings leave it open: on when memory is short without it."""
    if check.pass_settings(config)["training_args"].get("gradient_checkpointing") is not None:
        return settings
    plain = replace(settings, checkpointing=False)
    fits = memory(shape, plain, lengths["train"], lengths["held_out"]).total <= MARGIN * room
    return plain if fits else replace(settings, checkpointing=True)


def estimate_facts(
    config: dict[str, Any],
    model: Model,
    settings: Settings,
    lengths: dict[str, Lengths],
    here: machine.Machine,
    azure: dict[str, Any],
) -> dict[str, Any]:
    """Return memory and disk in bytes, and the time in seconds with where it comes from."""
    assert model.shape
    needed, room = memory(model.shape, settings, lengths["train"], lengths["held_out"]), limit(settings, here, azure)
    disk = cost.disk(model.shape, settings, model.download)
    seconds, source = None, "not known: no GPU here to measure"
    if not settings.gpu or here.gpu:
        speed = machine.speed(model.shape, settings)
        seconds = cost.seconds(model.shape, settings, lengths["train"], lengths["held_out"], speed, measured=True)
        source = f"rough, from a matrix product of {speed / 1e12:.3g} TFLOPS here"
        if last := cost.last_run(ROOT / "models" / "run.json", config):
            seconds, source = last.seconds(settings, lengths["train"]), "as fast as the last run"
    return {
        "memory": {part: round(size) for part, size in vars(needed).items()} | {"total": round(needed.total)},
        "memory_limit": None if math.isinf(room) else round(room),
        "gradient_checkpointing": settings.checkpointing,
        "disk": {part: round(size) for part, size in vars(disk).items()} | {"run": round(disk.run)},
        "seconds": seconds and round(seconds),
        "seconds_source": source,
    }


def azure_facts(
    shape: Shape, settings: Settings, lengths: dict[str, Lengths], azure: dict[str, Any]
) -> list[dict[str, Any]]:
    """Return for each GPU of Azure whose price is known, and for the chosen one, whether it fits, hours and dollars."""
    found = []
    for gpu in azure["gpus"]:
        if not gpu["price"] and gpu["id"] != azure["gpu"]:
            continue
        dtype = settings.dtype if settings.gpu else "bfloat16"  # as a workspace for a GPU has it
        dtype = "float16" if dtype == "bfloat16" and not gpu["bf16"] else dtype
        there = replace(settings, gpu=True, dtype=dtype)
        seconds = cost.seconds(shape, there, lengths["train"], lengths["held_out"], gpu["tflops"] * 1e12)
        found.append(
            {key: gpu[key] for key in ("id", "name", "price", "tflops_source")}
            | {
                "chosen": gpu["id"] == azure["gpu"],
                "memory": round(memory(shape, there, lengths["train"], lengths["held_out"]).total),
                "memory_limit": round(USABLE * gpu["gpu_memory_gib"] * GIB),
                "hours": round(seconds / 3600, 3),
                "dollars": cost.dollars(gpu, seconds),
            }
        )
    return found


def problem(
    config: dict[str, Any],
    model: Model,
    settings: Settings,
    counted: dict[str, Tokens],
    lengths: dict[str, Lengths],
    here: machine.Machine,
    azure: dict[str, Any],
) -> str | None:
    """Return why the run cannot work and which setting to change, in one sentence; None when it can."""
    if model.problem:
        return model.problem
    if azure["target"] != "azure" and (missing := machine.lacking(config, here)):
        return missing
    for part, tokens in counted.items():
        if complaint := cut_answers(tokens, settings, check.data_settings(config, part, "pre_process_data_config")):
            return complaint
    if model.shape is None or not lengths["train"].tokens:
        return None
    return too_large(model.shape, settings, lengths, limit(settings, here, azure), here.disk_free, model.download)


def cut_answers(tokens: Tokens, settings: Settings, options: dict[str, Any]) -> str | None:
    """Return that max_seq_len cuts off too many answers, and the length that leaves enough of them."""
    starts = sorted(t - n + 1 for t, n in zip(tokens.tokens, tokens.labels, strict=True))  # with the first label
    lost = sum(start > settings.max_seq_len for start in starts)
    allowed = int(options["max_bad_rows"] * len(starts))
    if not lost or (lost <= allowed and lost < len(starts)):
        return None
    enough = starts[len(starts) - 1 - min(allowed, len(starts) - 1)]
    return (
        f"max_seq_len {settings.max_seq_len} cuts off every answer of {lost} in {len(starts)} rows, and max_bad_rows "
        f"allows {allowed}: set max_seq_len: {enough} or more in olive-config.yaml."
    )


def too_large(
    shape: Shape, settings: Settings, lengths: dict[str, Lengths], room: float, disk_free: float, download: float
) -> str | None:
    """Return what is short, disk or memory, and what to do; None when neither is."""
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
            f"{advice(shape, settings, lengths['train'], room)}."
        )
    return None


def settle(config: dict[str, Any], tokens: dict[str, list[dict[str, list[int]]]]) -> tuple[float, str]:
    """Check memory and disk as --check does, before a run, and decide on gradient checkpointing in `config`.

    `tokens` are the rows of both parts, as chat_tokens returns them. Returns the estimate in bytes and a line for the
    screen. Raises ConfigError when the run cannot work.
    """
    model, here, settings = find(config), machine.look(), Settings.of(config)
    if model.shape is None:
        return 0.0, "not estimated: config.json names its numbers in a way of its own"
    arguments, room = check.pass_settings(config)["training_args"], limit(settings, here, {"target": "local"})
    is_open = arguments.get("gradient_checkpointing") is None
    lengths = {part: lengths_of(rows) for part, rows in tokens.items()}
    settings = decided(model.shape, settings, config, lengths, room)
    if complaint := too_large(model.shape, settings, lengths, room, here.disk_free, 0):
        raise ConfigError(complaint)
    needed = memory(model.shape, settings, lengths["train"], lengths["held_out"]).total
    line = f"about {needed / GIB:.2f} of {room / GIB:.1f} GiB"
    if is_open:
        arguments["gradient_checkpointing"] = settings.checkpointing
        line += f"; gradient checkpointing {'on, to save memory' if settings.checkpointing else 'off, not needed'}"
    return needed, line
