"""The settings of a run as one frozen object. Names are those of olive-config.yaml, except `method` for a pass's type.

`read_settings` reads the file once; `olive_config` returns the dict for Olive, with the changes of the steps.
"""

from __future__ import annotations

import inspect
import math
import os
from collections.abc import Mapping
from copy import deepcopy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from preparing.dataset import chat_rows, chat_tokens
from settings.config_file import CONFIG, NO, RESTORE, ConfigError, line_of, read_file, the_pass

METHODS = {name.lower(): name for name in ("LoRA", "QLoRA", "DoRA", "LoHa", "LoKr")}
PARTS = ("train", "held_out")  # the names of the data_configs
METHODS_OF_LORA = ("lora", "qlora", "dora")
CHANGED_BY_STEPS = {  # of the training_args
    *("max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "optim"),
    *("eval_steps", "save_steps", "report_to"),
}
EVALUATIONS = 10  # checkpoints of a run, as eval_steps and save_steps of 0.1 make them


@dataclass(frozen=True)
class RowSettings:
    """Where the rows of a part are, how a row is read, and which rows are held out: arguments of chat_rows."""

    train_file: str | list[str] | None
    held_out_file: str | list[str] | None
    dataset_name: str | None
    dataset_split: str
    dataset_format: str
    prompt_template: str | None
    completion_template: str | None
    eval_split: int | float
    data_seed: int
    max_rows: int | None
    max_bad_rows: int | float
    encoding: str | None


@dataclass(frozen=True)
class TokenSettings:
    """How the conversations of a part are tokenised: arguments of chat_tokens."""

    system_prompt: str | None
    max_seq_len: int
    train_on: str
    max_bad_rows: int | float
    thinking: str  # auto, on or off


@dataclass(frozen=True)
class PartSettings:
    """One entry of data_configs: the rows to train on, or the held-out ones."""

    rows: RowSettings
    tokens: TokenSettings


@dataclass(frozen=True)
class Settings:
    """The settings of a run. A step that changes something makes a new object with `dataclasses.replace`."""

    # input_model and its load_kwargs
    model_path: str  # a hub id, or a folder relative to the workspace
    revision: str | None
    # passes.*
    method: str  # lora, qlora, dora, loha or lokr
    torch_dtype: str
    r: int
    lora_dropout: int | float  # 0 for LoHa and LoKr, which drop whole ranks
    target_modules: tuple[str, ...] | str | None  # None: every linear layer
    packing: bool
    early_stopping_patience: int
    eval_rows: int | None  # held-out rows per evaluation in the training; None: as many as take a tenth of it
    quant_type: str | None  # like compute_dtype and double_quant, only for QLoRA
    compute_dtype: str | None
    double_quant: bool
    # training_args
    seed: int
    num_train_epochs: int | float
    max_steps: int  # 0 or less: determined by the epochs
    per_device_train_batch_size: int
    per_device_eval_batch_size: int
    gradient_accumulation_steps: int
    gradient_checkpointing: bool | None  # None: on when memory is short
    optim: str
    eval_strategy: str
    eval_steps: int | float | None
    save_steps: int | float
    save_total_limit: int
    report_to: str | tuple[str, ...]
    # systems
    device: str  # cpu or gpu
    # data_configs
    data: Mapping[str, PartSettings]  # train and held_out
    # set by accelerate launch or torchrun
    processes: int = 1  # processes that share the rows
    sharded: bool = False  # FSDP: they share the weights too
    smoke: bool = False  # a smoke run, which checks the gradients after its training
    file: Mapping[str, Any] = field(default_factory=dict, repr=False)  # the whole file

    @property
    def gpu(self) -> bool:
        """Whether the run is on an NVIDIA GPU."""
        return self.device == "gpu"

    @property
    def max_seq_len(self) -> int:
        """Tokens at which a training row is cut."""
        return self.data["train"].tokens.max_seq_len

    @property
    def rows_a_step(self) -> int:
        """Rows per optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.processes

    def repeated_rows(self, rows: int) -> int:
        """Return how many rows an epoch takes twice: several processes train on equally many batches."""
        return -rows % (self.per_device_train_batch_size * self.processes) if self.processes > 1 else 0

    def steps(self, rows: int) -> tuple[int, int]:
        """Return the steps of a run on this many rows, and the steps of its epochs without max_steps."""
        epochs = math.ceil(math.ceil(rows / self.rows_a_step) * self.num_train_epochs)
        return (min(self.max_steps, epochs) if self.max_steps > 0 else epochs), epochs

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read the content of olive-config.yaml, with Olive's defaults for missing settings. Raises ConfigError.

        The values are not checked here: validation.py does that.
        """
        config = deepcopy(dict(config))
        model, olive_pass = config["input_model"], the_pass(config)
        arguments = olive_pass["training_args"]
        arguments |= {key: word for key, word in NO.items() if arguments.get(key) is False}
        method = str(olive_pass["type"]).lower()
        if method not in METHODS:
            raise ConfigError(
                f"{CONFIG.name}: passes.*.type {olive_pass['type']!r} is none of {', '.join(METHODS.values())}."
            )
        return cls(
            model_path=model["model_path"],
            revision=model["load_kwargs"].get("revision"),
            method=method,
            torch_dtype=olive_pass["torch_dtype"],
            r=olive_pass.get("r", 64),
            lora_dropout=olive_pass.get("lora_dropout", 0.05) if method in METHODS_OF_LORA else 0,
            target_modules=frozen(olive_pass.get("target_modules")),
            packing=olive_pass.get("packing", False),
            early_stopping_patience=olive_pass.get("early_stopping_patience", 0),
            eval_rows=olive_pass.get("eval_rows"),
            quant_type=olive_pass.get("quant_type"),
            compute_dtype=olive_pass.get("compute_dtype"),
            double_quant=olive_pass.get("double_quant", False),
            seed=arguments["seed"],
            num_train_epochs=arguments.get("num_train_epochs", 3),
            max_steps=arguments.get("max_steps", -1),
            per_device_train_batch_size=arguments.get("per_device_train_batch_size", 8),
            per_device_eval_batch_size=arguments["per_device_eval_batch_size"],
            gradient_accumulation_steps=arguments.get("gradient_accumulation_steps", 1),
            gradient_checkpointing=arguments.get("gradient_checkpointing"),
            optim=arguments.get("optim", "adamw_torch"),
            eval_strategy=arguments.get("eval_strategy", "no"),
            eval_steps=arguments.get("eval_steps"),
            save_steps=arguments.get("save_steps", 500),
            save_total_limit=arguments.get("save_total_limit") or EVALUATIONS,
            report_to=frozen(arguments.get("report_to", "none")),
            device=config["systems"]["local_system"]["accelerators"][0]["device"],
            data={part: part_settings(config, part) for part in PARTS},
            processes=int(os.environ.get("WORLD_SIZE", "1")),
            sharded=os.environ.get("ACCELERATE_USE_FSDP") == "true",
            file=config,
        )


def read_settings(path: Path = CONFIG) -> Settings:
    """Read olive-config.yaml. Raises ConfigError with the first problem and its line."""
    return Settings.of(read_file(path))


def part_settings(config: Mapping[str, Any], part: str) -> PartSettings:
    """Return the settings of `train` or `held_out`, with the defaults of chat_rows and chat_tokens."""
    for data_config in config["data_configs"]:
        if (name := data_config["name"]) not in PARTS:
            where = f"{CONFIG.name}, line {line_of(CONFIG, 'name', name)}: data_configs.name"
            raise ConfigError(f"{where} is {name!r}: choose one of {', '.join(PARTS)}.")
        if name == part:
            rows = arguments_of(chat_rows, data_config["load_dataset_config"], {"part"})
            others = {"rows", "model_path", "revision"}
            tokens = arguments_of(chat_tokens, data_config["pre_process_data_config"], others)
            if isinstance(tokens["thinking"], bool):  # YAML 1.1 reads on as true
                tokens["thinking"] = "on" if tokens["thinking"] else "off"
            return PartSettings(RowSettings(**rows), TokenSettings(**tokens))
    raise ConfigError(f"{CONFIG.name}: data_configs has no entry named {part}. {RESTORE}.")


def arguments_of(function: Any, given: Mapping[str, Any], others: set[str]) -> dict[str, Any]:
    """Return a function's arguments, as given or their defaults, without `others`."""
    parameters = inspect.signature(function).parameters.values()
    return {p.name: given.get(p.name, p.default) for p in parameters if p.name not in others}


def frozen(value: Any) -> Any:
    """Return a list as a tuple, any other value unchanged."""
    return tuple(value) if isinstance(value, list) else value


def olive_config(settings: Settings) -> dict[str, Any]:
    """Return the dict for Olive: the file's content with the changes of the steps."""
    config = deepcopy(dict(settings.file))
    olive_pass = the_pass(config)
    before = Settings.of(config)
    changed = {f.name for f in fields(settings) if getattr(settings, f.name) != getattr(before, f.name)}
    config["input_model"]["model_path"] = settings.model_path
    config["input_model"]["load_kwargs"]["revision"] = settings.revision
    olive_pass["type"] = METHODS[settings.method]
    if "device" in changed:
        config["systems"]["local_system"]["accelerators"] = [{"device": settings.device}]
    for name in changed & {"torch_dtype", "quant_type", "compute_dtype", "double_quant"}:
        olive_pass[name] = getattr(settings, name)
    for name in changed & CHANGED_BY_STEPS:
        olive_pass["training_args"][name] = getattr(settings, name)
    if settings.method != "qlora":
        for name in ("quant_type", "compute_dtype", "double_quant"):
            olive_pass.pop(name, None)
    if settings.method == "lokr":  # LoHa always does it; else the adapter is stronger when it is used than in training
        olive_pass.setdefault("rank_dropout_scale", True)
    if settings.gradient_checkpointing is None:  # Olive does not accept null
        olive_pass["training_args"].pop("gradient_checkpointing", None)
    for data_config in config["data_configs"]:
        part = settings.data[data_config["name"]]
        data_config["load_dataset_config"] |= vars(part.rows)
        data_config["pre_process_data_config"] |= vars(part.tokens)
        data_config["pre_process_data_config"] |= {"model_path": settings.model_path, "revision": settings.revision}
    return config
