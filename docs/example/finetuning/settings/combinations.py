"""Settings that are right by themselves and refused together: by transformers, before or in the middle of a run."""

from __future__ import annotations

import inspect
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

from settings.config_file import the_pass
from settings.run_settings import Settings, olive_config

BY_LOSS = ("reduce_lr_on_plateau", "greedy")  # learning rate schedulers that follow the held-out loss
Arguments = Mapping[str, Any]  # the training_args, as transformers names them
LARGE = 1_000_000  # as in transformers, which compares shares of the steps as whole numbers


def conflict(settings: Settings) -> tuple[str, str] | None:
    """Return the setting to change, and the sentence that follows its name; None if all go together."""
    given = the_pass(settings.file)["training_args"]
    defaults = {
        "save_strategy": "steps",
        "logging_steps": 500,
        "lr_scheduler_type": "constant",
        "load_best_model_at_end": False,
    }
    return next(conflicts(settings, defaults | {key: value for key, value in given.items() if value is not None}), None)


def conflicts(settings: Settings, given: Arguments) -> Iterator[tuple[str, str]]:
    """Yield each conflict, as `conflict` returns it. `given` are the training_args with the defaults they need."""
    evaluates, saves = settings.eval_strategy, given["save_strategy"]
    if settings.early_stopping_patience and evaluates == "no":
        yield "early_stopping_patience", "needs evaluations: set eval_strategy: steps"
    if given["lr_scheduler_type"] in BY_LOSS and evaluates == "no":
        yield "lr_scheduler_type", f"{given['lr_scheduler_type']} needs evaluations: set eval_strategy: steps"
    if saves == "best" and evaluates == "no":
        yield "save_strategy", "best needs evaluations: set eval_strategy: steps, or save_strategy: steps"
    if given["load_best_model_at_end"] and saves != "best":
        if evaluates != saves:
            yield (
                "load_best_model_at_end",
                f"needs a checkpoint of each evaluation, but eval_strategy is {evaluates} and save_strategy {saves}: "
                "set both to the same, or load_best_model_at_end: false",
            )
        steps = settings.eval_steps or given["logging_steps"]  # as transformers chooses them
        if evaluates == saves == "steps" and not is_multiple(settings.save_steps, steps):
            yield (
                "save_steps",
                f"{settings.save_steps} is no multiple of eval_steps {steps}, which load_best_model_at_end needs: set "
                "both to the same, or load_best_model_at_end: false",
            )
    if given.get("dataloader_prefetch_factor") is not None and not given.get("dataloader_num_workers"):
        yield "dataloader_prefetch_factor", "needs processes that load rows: set dataloader_num_workers: 1 or more"
    if given.get("fsdp") and settings.processes == 1:
        yield "fsdp", "needs several processes: remove it, and use accelerate launch --config_file finetuning/fsdp.yaml"
    if given.get("deepspeed") and given.get("fsdp"):
        yield "deepspeed", "and fsdp exclude each other: remove one of them"
    unknown = [key for key in given.get("gradient_checkpointing_kwargs") or {} if key not in checkpointing_options()]
    if unknown:
        known = ", ".join(checkpointing_options())
        yield "gradient_checkpointing_kwargs", f"has no option {unknown[0]}: choose some of {known}"


def is_multiple(saved: float, evaluated: float) -> bool:
    """Return whether every checkpoint of save_steps follows an evaluation, as transformers decides it."""
    if (saved < 1) != (evaluated < 1):
        return False  # a share of the steps, and a number of them
    return saved % evaluated == 0 or (saved < 1 and (saved * LARGE) % (evaluated * LARGE) == 0)


def checkpointing_options() -> list[str]:
    """Return the options of PyTorch's gradient checkpointing."""
    from torch.utils.checkpoint import checkpoint

    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    return [
        p.name for p in inspect.signature(checkpoint).parameters.values() if p.kind in kinds and p.name != "function"
    ]


def training_arguments(settings: Settings) -> Any:
    """Return transformers' TrainingArguments. Raises ValueError and others for what it refuses.

    Olive takes what does not fit its class as a plain dict: only this gives the error.
    """
    from olive.passes.pytorch.lora import HFTrainingArguments

    arguments = the_pass(olive_config(settings))["training_args"]
    arguments |= {"output_dir": tempfile.gettempdir(), "use_cpu": True}
    return HFTrainingArguments.model_validate(arguments).create_training_args()
