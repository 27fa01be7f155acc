"""The measurement of gpu.py that compares attention in one call (varlen.py) with the workspace's, row by row."""

from __future__ import annotations

import argparse
import statistics
import time
from itertools import accumulate
from types import SimpleNamespace
from typing import Any

import torch
import varlen
from gpu_models import BATCH, MeasureError, device, draw_rows, facts_of
from gpu_plan import NAMES

from training.batches import attend_row_by_row

WAYS = {"loop": attend_row_by_row, "varlen": varlen.attend_all_rows}
WINDOW = 128  # tokens, in the measurement with a window


def attention(options: argparse.Namespace) -> dict[str, Any]:
    """Return time and error of both ways for the shapes of the models. Raises MeasureError if varlen errs more."""
    on, rows = device(options), []
    if on == "cpu":
        varlen.register_cpu_kernel()
    for options.model in NAMES:
        facts = facts_of(options)
        lengths = [len(row["input_ids"]) for row in draw_rows(options)[:BATCH]]
        for dtype, window in ((torch.bfloat16, None), (torch.float16, None), (torch.bfloat16, WINDOW)):
            window = window and min(window, max(lengths) // 2)
            heads = f"{facts['attention_heads']} / {facts['key_value_heads']} heads of {facts['head_dim']}"
            title = f"{NAMES[options.model]}: {heads}, {sum(lengths)} tokens in {len(lengths)} rows, {dtype}"
            title = title.replace("torch.", "") + (f", window {window}" if window else "")
            rows.append({"what": title, **compared(facts, lengths, dtype, window, on)})
    if wrong := [row["what"] for row in rows if not row["varlen_error"] <= 2 * row["loop_error"]]:
        raise MeasureError(f"varlen errs more than twice as much as the loop, see gpu.log: {'; '.join(wrong)}")
    return {"rows": rows}


def compared(
    facts: dict[str, Any], lengths: list[int], dtype: torch.dtype, window: int | None, on: str
) -> dict[str, float]:
    """Return for both ways the milliseconds of a forward and backward pass, and the error of result and gradients.

    The error is the largest of the four, relative to the loop's in float32 (Frobenius norms).
    """
    heads, groups, width = facts["attention_heads"], facts["key_value_heads"], facts["head_dim"]
    torch.manual_seed(1)
    states = [torch.randn(1, count, sum(lengths), width, device=on, dtype=dtype) for count in (heads, groups, groups)]
    gradient = torch.randn(1, sum(lengths), heads, width, device=on, dtype=dtype)
    module = SimpleNamespace(num_key_value_groups=heads // groups, is_causal=True)

    def run(attend: Any, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
        options = {"row_ends": list(accumulate(lengths)), "sliding_window": window, "scaling": width**-0.5}
        output, _ = attend(module, *inputs, None, dropout=0.0, **options)
        return [output.detach(), *torch.autograd.grad(output, inputs, gradient.to(output.dtype))]

    exact = run(attend_row_by_row, [one.float().requires_grad_() for one in states])
    figures = {}
    for name, attend in WAYS.items():
        inputs = [one.clone().requires_grad_() for one in states]
        pairs = zip(run(attend, inputs), exact, strict=True)
        errors = [((found.float() - right).norm() / right.norm()).item() for found, right in pairs]
        times = []
        for _ in range(3 if on == "cpu" else 20):
            started = time.perf_counter()
            run(attend, inputs)
            if on == "cuda":
                torch.cuda.synchronize()
            times.append(time.perf_counter() - started)
        figures |= {f"{name}_ms": 1000 * statistics.median(times), f"{name}_error": max(errors)}
        print(facts["id"], dtype, window, name, errors)
    return figures
