"""What a run costs: disk, time and money, calculated. Estimates without a measurement are marked as rough."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from statistics import mean

from planning.architecture import Shape
from planning.facts import AzureGpu
from planning.hardware import Machine
from planning.memory import BYTES, adapter_parameters
from planning.quantizations import QUANTIZATIONS, Weights, order
from planning.row_lengths import Lengths, batches
from settings.run_settings import Settings
from training.evaluations import EVALUATED, evaluated_rows, passes

# The share of the peak that training reaches, including loading, evaluation and small matrices. Published trainings of
# dense models report a model FLOPS utilisation of 0.3 to 0.5 (PaLM, arXiv:2204.02311, table 3); fine-tuning on short
# rows stays below it, and 4-bit weights are unpacked on each use.
EFFICIENCY = {"qlora": 0.2}
OTHER_EFFICIENCY = 0.3
START = 10.0  # seconds to import the libraries and load the model
TOKEN = 130.0  # bytes per token in tokenizer.json, more than most take (the demo: 54)
ANSWERS = 200  # the maximum that evaluate.py generates
ALIKE = ("per_device_train_batch_size", "per_device_eval_batch_size", "gradient_checkpointing")  # for the same speed
LAYER_SECONDS = 1e-3  # per block and generated token, whatever its size: Python overhead and kernel launches


@dataclass(frozen=True)
class Disk:
    """Bytes on disk, part by part; the two exports are made only on request."""

    download: float
    checkpoints: float
    adapter: float
    merged_export: float
    onnx_export: float

    @property
    def run(self) -> float:
        """The bytes that the run itself writes."""
        return self.checkpoints + self.adapter


def disk(shape: Shape, settings: Settings, download: float) -> Disk:
    """Estimate the disk space of a run in bytes; `download` is the missing part of the model.

    A checkpoint is the adapter and AdamW's two moments; a new one is written before the oldest is deleted. The adapter
    exists three times while the new one replaces the old one. ONNX: the first quantisation that the export would try;
    one that keeps the answers may be larger.
    """
    weights = Weights(shape.block_weights, shape.embedding, shape.tied)
    first = QUANTIZATIONS[order(shape.architecture, weights, "cpu")[0]]
    adapter, tokenizer = adapter_parameters(shape, settings), TOKEN * shape.vocabulary
    moments = 2 if "8bit" in settings.optim else 8
    return Disk(
        download=download,
        checkpoints=(settings.save_total_limit + 1) * ((4 + moments) * adapter + tokenizer / 10),
        adapter=3 * (4 * adapter + tokenizer),
        merged_export=BYTES[settings.torch_dtype] * shape.parameters,
        onnx_export=first.size(weights, "cpu"),
    )


@dataclass(frozen=True)
class LastRun:
    """How fast the last run was on this machine with the same settings, from its run.json."""

    start: float  # seconds before the first evaluation
    row: float  # seconds in which a held-out row is evaluated, before and after the training together
    speed: float  # tokens a second in the training; one that is only evaluated is EVALUATED of a token

    def seconds(self, settings: Settings, lengths: Lengths, held_out: Lengths) -> float:
        """Return the seconds that a run takes at the same speed."""
        steps, _ = settings.steps(len(lengths.tokens))
        trained = trained_rows(settings, lengths) * mean(lengths.tokens)
        rows, every = evaluated_rows(settings, lengths.tokens, held_out.tokens)
        evaluated = EVALUATED * rows * mean(held_out.tokens) * passes(settings, steps) / every / settings.processes
        return self.start + self.row * min(len(held_out.tokens), ANSWERS) + (trained + evaluated) / self.speed


def last_run(path: Path, settings: Settings, here: Machine) -> LastRun | None:
    """Read the last run's speed; None unless it did the same on the same machine, apart from rows and steps."""
    try:
        run = json.loads(path.read_text(encoding="utf-8"))
        timings, data, machine, used = run["timings"], run["data"], run["machine"], run["config"]["training"]
        gpus = ", ".join([here.gpu] * here.gpus) if here.gpu else None
        same = (
            (run["base_model"], run["method"], run["dtype"])
            == (settings.model_path, settings.method, settings.torch_dtype),
            (machine["platform"], machine["cpu_cores"], machine["gpu"]) == (here.platform, here.cores, gpus),
            run["config"]["adapter"].get("packing", False) == settings.packing,
            used.get("processes", 1) == settings.processes,
            all(used[name] == getattr(settings, name) for name in ALIKE),
        )
        if not all(same):
            return None
        trained = timings["tokens_per_second"] * timings["training"]
        row = data["tokens"] / data["train_rows"]
        steps = round(trained / row * settings.processes / settings.rows_a_step)
        rows = used.get("eval_rows") or data["held_out_rows"]  # releases before 0.6.0 evaluated all
        times = passes(settings, steps) / used.get("eval_every", 1)
        evaluated = EVALUATED * rows * row * times / settings.processes
        return LastRun(
            start=max(timings["start_to_first_step"] - timings["before"], 0),
            row=(timings["before"] + timings["after"]) / min(data["held_out_rows"], ANSWERS),
            speed=(trained + evaluated) / timings["training"],
        )
    except (OSError, ValueError, KeyError, TypeError, ZeroDivisionError):
        return None


def trained_rows(settings: Settings, lengths: Lengths) -> float:
    """Return how many rows one process trains on, repetitions included."""
    steps, _ = settings.steps(len(lengths.tokens))
    return min(steps * settings.rows_a_step, len(lengths.tokens) * settings.num_train_epochs) / settings.processes


def operations(shape: Shape, settings: Settings, lengths: Lengths) -> float:
    """Return the floating-point operations of the training.

    Per token, a frozen weight takes two operations in the forward pass and two for the gradient of its input; adapter
    weights take six. Checkpointing runs the forward pass twice. Attention takes four per pair of tokens and feature in
    the forward pass, and twice that in the backward pass. The output layer runs only on the tokens with a label.
    """
    if not lengths.tokens:
        return 0.0
    batch = batches(lengths, settings.per_device_train_batch_size, settings.packing)
    rows = trained_rows(settings, lengths)
    tokens, labels = rows / settings.per_device_train_batch_size * batch.mean_tokens, rows * mean(lengths.labels)
    forward = 3 if settings.gradient_checkpointing else 2
    context = batch.mean_tokens / (1 if settings.packing else settings.per_device_train_batch_size)
    attention = 4 * shape.layers * shape.heads * shape.head_dim * context * (1 + forward)
    blocks = (2 * forward * shape.block_weights) + 6 * adapter_parameters(shape, settings)
    return tokens * (blocks + attention) + labels * 4 * shape.embedding


def evaluation_operations(shape: Shape, lengths: Lengths) -> float:
    """Return the operations of one pass over the held-out rows."""
    return 2.0 * (sum(lengths.tokens) * shape.block_weights + sum(lengths.labels) * shape.embedding)


def seconds(
    shape: Shape, settings: Settings, lengths: Lengths, held_out: Lengths, flops: float, measured: bool = False
) -> float:
    """Estimate the seconds of a run, from the start to the report.

    `flops` is the peak of a GPU in operations per second, or, if `measured`, the speed of a large matrix product on
    this machine; training reaches a larger share of that than of the theoretical peak.
    """
    reached = flops * (0.7 if measured else EFFICIENCY.get(settings.method, OTHER_EFFICIENCY))
    rows, every = evaluated_rows(settings, lengths.tokens, held_out.tokens)
    steps, _ = settings.steps(len(lengths.tokens))
    watched = rows / max(len(held_out.tokens), 1) * passes(settings, steps) / every
    evaluated = evaluation_operations(shape, held_out) * (2 + watched)
    rows = min(ANSWERS, len(held_out.tokens))
    longest = max(held_out.labels, default=0) + 8
    generated = math.ceil(rows / settings.per_device_eval_batch_size) * longest * shape.layers * LAYER_SECONDS
    generated += rows * longest * 2 * shape.parameters / reached
    return START + (operations(shape, settings, lengths) + evaluated) / reached + 2 * generated


def price_days(gpu: AzureGpu) -> int | None:
    """Return how many days ago a price was read; None if it is not known."""
    return (date.today() - date.fromisoformat(gpu["price"]["date"])).days if gpu["price"] else None


def dollars(gpu: AzureGpu, run_seconds: float) -> float | None:
    """Return the price of a run on one of Azure's GPUs in US dollars; None if the price is not known."""
    return gpu["price"]["usd_per_hour"] * run_seconds / 3600 if gpu["price"] else None
