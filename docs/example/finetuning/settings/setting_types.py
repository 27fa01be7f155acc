"""The type of every setting: validation.py checks the file with it, and the JSON schema gives it to editors.

Types are read from the code that uses the settings; this file adds what that code does not specify.
"""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

from annotated_types import Ge, Gt, Le, Lt

from preparing.dataset import chat_rows, chat_tokens
from settings.config_file import NO
from settings.value_types import as_yaml, within

CHOICES = {
    "name": ("train", "held_out"),
    "train_on": ("responses", "all"),
    "thinking": ("auto", "on", "off", True, False),  # YAML 1.1 reads on and off as true and false
    "dataset_format": ("auto", "messages", "sharegpt", "alpaca", "prompt-completion", "columns", "text"),
    "torch_dtype": ("float32", "bfloat16", "float16"),
    "compute_dtype": ("float32", "bfloat16", "float16"),
    "quant_type": ("nf4", "fp4"),
    "attn_implementation": ("sdpa", "eager", "flash_attention_2"),
    "device": ("cpu", "gpu"),
    # values that transformers would refuse in the middle of a run, or misinterpret
    **dict.fromkeys(
        ("log_level", "log_level_replica"), ("detail", "debug", "info", "warning", "error", "critical", "passive")
    ),
    "train_sampling_strategy": ("random", "sequential", "group_by_length", "batch_rebalance"),
}
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")
STEPS = Annotated[int, Ge(1)] | Annotated[float, Gt(0), Lt(1)]  # a number of steps, or a share of them
# types that the libraries do not declare, or declare too broadly
TYPES: dict[str, Any] = {
    "report_to": Literal[("none", *TRACKERS)] | list[Literal[TRACKERS]],  # type: ignore[valid-type]
    "debug": Literal["", "underflow_overflow"] | list[Literal["underflow_overflow"]],
    "dataloader_multiprocessing_context": Literal["fork", "spawn", "forkserver"] | None,
    "deepspeed": bool | str | dict[str, Any] | None,  # true: Olive's own settings
    "fsdp": bool | str | list[str] | None,
    "trackio_static_space_id": str | bool | None,
    "evaluators": dict[str, dict[str, Any]],
    "evaluator": str | dict[str, Any] | None,
    **dict.fromkeys(("host", "target"), Literal["local_system"] | dict[str, Any] | None),
    **dict.fromkeys(("train_data_config", "eval_data_config"), str),
    **dict.fromkeys(("save_steps", "logging_steps"), STEPS),
    "eval_steps": STEPS | None,
}
# Olive's level that the file omits, its search (each setting has one value), and arguments passed to the functions
NO_SETTINGS = ("engine", "search_strategy", "rows", "return")
# outside of these limits, a run would fail, learn nothing, or silently lose rows
LIMITS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("r", "max_rows", "eval_rows", "max_seq_len", "gradient_accumulation_steps"), (Ge(1),)),
    **dict.fromkeys(("per_device_train_batch_size", "per_device_eval_batch_size"), (Ge(1),)),
    "torch_empty_cache_steps": (Ge(1),),
    **dict.fromkeys(("alpha", "num_train_epochs", "learning_rate"), (Gt(0),)),
    **dict.fromkeys(("lora_dropout", "rank_dropout", "module_dropout", "adam_beta1", "adam_beta2"), (Ge(0), Lt(1))),
    **dict.fromkeys(("weight_decay", "adam_epsilon", "max_grad_norm", "warmup_steps"), (Ge(0),)),
    **dict.fromkeys(("eval_split", "early_stopping_patience", "dataloader_num_workers"), (Ge(0),)),
    "max_bad_rows": (Ge(0), Le(1)),
    **dict.fromkeys(("seed", "data_seed"), (Ge(0), Le(2**32 - 1))),
}


@cache
def setting_types(method: str) -> dict[str, dict[str, Any]]:
    """Return, for each section of olive-config.yaml, its possible settings and the type of each.

    This includes settings that allowed.py refuses. Imports Olive and transformers, which takes seconds.
    """
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.passes.pytorch.lora import HFTrainingArguments
    from olive.workflows.run.config import RunConfig, RunEngineConfig
    from transformers import TrainingArguments

    from settings.olive_pass import pass_class

    passes = pass_class(method)._default_config(DEFAULT_CPU_ACCELERATOR)
    types = {
        "": types_of(RunConfig) | types_of(RunEngineConfig),
        # the evaluation before and after the training does not know Olive's own settings for these
        "input_model": {"type": str, "model_path": str, "load_kwargs": dict},
        "load_kwargs": {"revision": str | None, "attn_implementation": str},
        "data_configs": dict.fromkeys(("name", "user_script", "script_dir"), str)
        | dict.fromkeys(("load_dataset_config", "pre_process_data_config"), dict),
        "load_dataset_config": {"type": str} | get_type_hints(chat_rows),
        "pre_process_data_config": {"type": str} | get_type_hints(chat_tokens),
        "passes.*": {"type": str} | {key: type_of(parameter) for key, parameter in passes.items()},
        "training_args": types_of(HFTrainingArguments) | get_type_hints(TrainingArguments),
        "systems": {"local_system": dict},
        "local_system": {"type": str, "accelerators": list[dict[str, Any]]},
        "accelerators": {"device": str},
    }
    return {
        section: {key: narrowed(key, kind) for key, kind in kinds.items() if key not in NO_SETTINGS}
        for section, kinds in types.items()
    }


def types_of(model: Any) -> dict[str, Any]:
    """Return the types of the fields of a pydantic model."""
    return {name: field.annotation for name, field in model.model_fields.items()}


def type_of(parameter: Any) -> Any:
    """Return the type of a parameter of Olive's pass; null is allowed if it is the default."""
    return parameter.type_ | None if parameter.type_ and parameter.default_value is None else parameter.type_


def narrowed(key: str, kind: Any) -> Any:
    """Return the type of a setting, narrowed by what the library does not specify."""
    if key in CHOICES:
        return Literal[CHOICES[key]]
    kind = within(TYPES.get(key) or as_yaml(kind), LIMITS.get(key, ()))
    if key not in NO:
        return kind
    return Literal[(*get_args(kind), False)] if get_origin(kind) is Literal else kind | Literal[False]
