"""Which setting to change when memory is short: by the estimate before a run, by the measured peak after one."""

from __future__ import annotations

import math
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from planning.architecture import Shape
from planning.memory import GIB, memory
from planning.row_lengths import Lengths
from settings.config_file import ConfigError
from settings.run_settings import Settings


def advice(shape: Shape, settings: Settings, lengths: Mapping[str, Lengths], limit: float) -> str:
    """Return the smallest change of olive-config.yaml that makes the run fit into `limit` bytes.

    The first options do not change the result: smaller batches in the evaluations and checkpointing only cost time, and
    gradient accumulation makes up for smaller batches. Shorter rows and another method are the last resort.
    """

    held_out = lengths["held_out"]

    def evaluated(settings: Settings, longest: int) -> int:
        """Return the largest per_device_eval_batch_size with which the run fits; 0 if there is none."""
        train, size = lengths["train"].cut(longest), settings.per_device_eval_batch_size
        while size:
            if memory(shape, replace(settings, per_device_eval_batch_size=size), train, held_out).total <= limit:
                return size
            size //= 2
        return 0

    whole, same = settings.max_seq_len, ", with gradient_accumulation_steps: {} to get the same result"
    checkpointed = replace(settings, gradient_checkpointing=True)
    setting = [] if settings.gradient_checkpointing else ["gradient_checkpointing: true"]
    options = [(settings, [], whole, ""), (checkpointed, setting, whole, "")]
    size = settings.per_device_train_batch_size
    while size > 1:
        size //= 2
        note = same.format(
            settings.gradient_accumulation_steps * math.ceil(settings.per_device_train_batch_size / size)
        )
        options += [
            (
                replace(one, per_device_train_batch_size=size),
                [*also, f"per_device_train_batch_size: {size}"],
                whole,
                note,
            )
            for one, also in ((settings, []), (checkpointed, setting))
        ]
    smallest, also = replace(checkpointed, per_device_train_batch_size=1), [*setting, "per_device_train_batch_size: 1"]
    length = min(whole, max(lengths["train"].tokens, default=1))
    while length > 64:
        length //= 2
        options.append((smallest, [*also, f"max_seq_len: {length}"], length, ", which cuts longer rows"))
    for option, changes, length, note in options:
        if size := evaluated(option, length):
            if size < settings.per_device_eval_batch_size:
                changes = [f"per_device_eval_batch_size: {size}", *changes]
            return f"set {' and '.join(changes)}{note}"
    qlora = replace(smallest, method="qlora", optim="paged_adamw_8bit")
    if settings.gpu and settings.method != "qlora" and evaluated(qlora, whole):
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
