"""Which setting to change when memory is short: by the estimate before a run, by the measured peak after one."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from planning.architecture import Shape
from planning.memory import GIB, memory
from planning.row_lengths import Lengths
from settings.config_file import ConfigError
from settings.run_settings import Settings


def advice(shape: Shape, settings: Settings, lengths: Lengths, limit: float) -> str:
    """Return the smallest change of olive-config.yaml that makes the run fit into `limit` bytes.

    The first options do not change the result: checkpointing only costs time, and gradient accumulation makes up for
    smaller batches. Shorter rows and another method are the last resort.
    """
    checkpointed = replace(settings, gradient_checkpointing=True)
    if not settings.gradient_checkpointing and memory(shape, checkpointed, lengths).total <= limit:
        return "set gradient_checkpointing: true"
    before = "" if settings.gradient_checkpointing else "gradient_checkpointing: true and "
    size = settings.per_device_train_batch_size
    while size > 1:
        size //= 2
        for candidate, prefix in ((settings, ""), (checkpointed, before)):
            if memory(shape, replace(candidate, per_device_train_batch_size=size), lengths).total <= limit:
                steps = settings.gradient_accumulation_steps * math.ceil(settings.per_device_train_batch_size / size)
                return (
                    f"set {prefix}per_device_train_batch_size: {size}, with gradient_accumulation_steps: {steps} to "
                    "get the same result"
                )
    smallest = replace(checkpointed, per_device_train_batch_size=1)
    length = min(settings.max_seq_len, max(lengths.tokens, default=1))
    while length > 64:
        length //= 2
        if memory(shape, smallest, lengths.cut(length)).total <= limit:
            return f"set {before}per_device_train_batch_size: 1 and max_seq_len: {length}, which cuts longer rows"
    if (
        settings.gpu
        and settings.method != "qlora"
        and memory(shape, replace(smallest, method="qlora", optim="paged_adamw_8bit"), lengths).total <= limit
    ):
        return "use QLoRA: `copier update --trust --data method=qlora`"
    return "no setting makes it fit: choose a smaller model or a larger machine"


def out_of_memory(estimated: float | None, peak: float, settings: Settings, evaluating: bool) -> str:
    """Return the message for a run out of GPU memory: the estimate, the peak (bytes), and what to change.

    `evaluating`: it happened in an evaluation, which needs no memory for gradients.
    """
    if evaluating and settings.per_device_eval_batch_size > 1:
        change = f"set per_device_eval_batch_size: {settings.per_device_eval_batch_size // 2}"
    elif evaluating:
        change = "drop the longest of the held-out rows, or choose a smaller model"
    elif not settings.gradient_checkpointing:
        change = "set gradient_checkpointing: true"
    elif settings.per_device_train_batch_size > 1:
        half = settings.per_device_train_batch_size // 2
        steps = settings.gradient_accumulation_steps * math.ceil(settings.per_device_train_batch_size / half)
        change = f"set per_device_train_batch_size: {half} and gradient_accumulation_steps: {steps}"
    else:
        change = f"set max_seq_len: {max(16, settings.max_seq_len // 2)}, or choose a smaller model"
    known = f"{estimated / GIB:.1f} GiB were estimated and " if estimated else ""
    where = " in an evaluation" if evaluating else ""
    return f"The GPU's memory is full{where}: {known}{peak / GIB:.1f} GiB were in use; {change} in olive-config.yaml."


@contextmanager
def explained(settings: Settings, estimated: float) -> Iterator[None]:
    """Turn a GPU out-of-memory error into ConfigError: estimate, peak, and the setting to change."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        import torch

        # before, in the middle of, or after the training
        evaluating = any(call.name == "evaluate" for call in traceback.extract_tb(error.__traceback__))
        peak = torch.cuda.max_memory_allocated()
        raise ConfigError(out_of_memory(estimated, peak, settings, evaluating)) from error
