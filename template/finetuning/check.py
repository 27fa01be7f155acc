"""The check before a run: settings, model and environment. It says what is wrong, where, and what to do."""

from __future__ import annotations

import difflib
import importlib.util
import inspect
import json
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from schema import CHOICES, METHOD, fixed_values, known_keys, reasons

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "setup"))
from model_folder import DEMO, Found  # noqa: E402 - shared with setup/ and inference/
from model_folder import ModelMissingError as ModelMissingError  # noqa: E402
from model_folder import find_model as find_model  # noqa: E402

CONFIG = ROOT / "finetuning" / "olive-config.yaml"
LEAST_ROWS = 8  # to train on; of held-out rows one is enough for a figure, however unsure
TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")


class Loader(yaml.SafeLoader):
    """PyYAML's loader, which also reads 2e-4 as a number: YAML 1.1 wants 2.0e-4 and makes it a text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


class ConfigError(Exception):
    """What is wrong with the settings, where, and what to do: one sentence."""


def read_config(path: Path = CONFIG) -> dict[str, Any]:
    """Read olive-config.yaml. Raises ConfigError when it is missing or torn."""
    name = path.name
    if not path.is_file():
        raise ConfigError(
            f"{path} is missing: `copier recopy --trust --vcs-ref :current:` brings it back, and asks before it "
            "replaces anything else."
        )
    try:
        config = yaml.load(path.read_text(encoding="utf-8"), Loader)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise ConfigError(
            f"{name}, line {line}: {error.problem}. Repair the line, or `git checkout` the file."
        ) from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ConfigError(f"{name} is not a text file in YAML: {error}. `git checkout` brings it back.") from None
    if not isinstance(config, dict):
        raise ConfigError(
            f"{name} holds no settings: `git checkout` or `copier recopy --trust --vcs-ref :current:` brings it back."
        )
    need(config, "", ("input_model", "data_configs", "passes", "systems"))
    need(config["input_model"], "input_model.", ("model_path", "load_kwargs"))
    settings = pass_settings(config)
    need(settings, "passes.*.", ("type", "torch_dtype", "training_args"))
    need(settings["training_args"], "training_args.", ("seed", "per_device_eval_batch_size"))
    if settings["training_args"].get("gradient_checkpointing") is None:
        settings["training_args"].pop("gradient_checkpointing", None)  # the estimate decides; Olive takes no null
    if str(settings["type"]).lower() == "qlora":
        need(settings, "passes.*.", ("compute_dtype", "quant_type", "double_quant"))
    return config


def need(section: dict[str, Any], where: str, keys: tuple[str, ...]) -> None:
    """Raise ConfigError for a setting that the steps read themselves and that has no default in Olive."""
    for key in keys:
        if section.get(key) is None:
            raise ConfigError(
                f"{CONFIG.name}: {where}{key} is missing: `git checkout` or "
                "`copier recopy --trust --vcs-ref :current:` brings it back."
            )


def pass_settings(config: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the one pass."""
    passes = config["passes"]
    if not isinstance(passes, dict) or len(passes) != 1:
        raise ConfigError(
            "olive-config.yaml: passes holds more than one pass. Keep one; export.py has the later steps."
        )
    settings: dict[str, Any] = next(iter(passes.values()))
    return settings


def data_settings(config: dict[str, Any], part: str, component: str) -> dict[str, Any]:
    """Return the arguments of chat_rows (component load_dataset_config) or chat_tokens (pre_process_data_config)."""
    from dataset import chat_rows, chat_tokens

    function: Any = {"load_dataset_config": chat_rows, "pre_process_data_config": chat_tokens}[component]
    parameters = inspect.signature(function).parameters.values()
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    for data_config in config["data_configs"]:
        if data_config.get("name") == part:
            return defaults | {key: value for key, value in data_config[component].items() if key != "type"}
    raise ConfigError(
        f"olive-config.yaml: data_configs has no entry named {part}. `git checkout` or "
        "`copier recopy --trust --vcs-ref :current:` brings it back."
    )


def validate(config: dict[str, Any], path: Path = CONFIG) -> None:
    """Refuse settings that are unknown, without effect or of the wrong type. Raises ConfigError.

    Olive only warns about a key that it does not know, and ignores it: a misspelt setting would train with its default.
    """
    method = pass_method(config)
    refused = reasons(method)
    for section, keys, known in known_keys(config, method):
        for key in keys:
            where = f"{path.name}, line {line_of(path, key, keys[key])}: {section}.{key}".replace(": .", ": ")
            if why := refused.get(section, {}).get(key):
                raise ConfigError(f"{where} cannot be set: {why}.")
            if key not in known:
                nearest = difflib.get_close_matches(key, known, n=1)
                advice = f"did you mean {nearest[0]}?" if nearest else "remove it, or see the file's comments."
                raise ConfigError(f"{where} is not a setting: {advice}")
            if key in CHOICES and keys[key] not in CHOICES[key]:
                raise ConfigError(f"{where} is {keys[key]!r}: choose one of {', '.join(CHOICES[key])}.")
    for section, keys, expected in fixed_values(config):
        for key, value in expected.items():
            if keys.get(key) != value:
                where = f"{path.name}, line {line_of(path, key, keys.get(key))}: {section}.{key}"
                raise ConfigError(f"{where} is {keys.get(key)!r}: write {value!r}, which the steps rely on.")
    check_report_to(config, path)
    validate_values(config, path)


def check_report_to(config: dict[str, Any], path: Path) -> None:
    """Refuse what no run can report to: an unknown name, a package that is not installed. Raises ConfigError."""
    chosen = pass_settings(config)["training_args"].get("report_to", "none")
    where = f"{path.name}, line {line_of(path, 'report_to')}: training_args.report_to"
    for name in chosen if isinstance(chosen, list) else [chosen]:
        if name == "all":  # would send the figures wherever a package happens to be installed
            raise ConfigError(f"{where} is all: name what you want, some of {', '.join(TRACKERS)}.")
        if name not in (*TRACKERS, "none") or (name == "none" and chosen != "none"):
            raise ConfigError(f"{where} is {chosen!r}: choose none, or one or some of {', '.join(TRACKERS)}.")
        if name != "none" and importlib.util.find_spec(name) is None:
            install = f"{shlex.quote(sys.executable)} -m pip install {name}"
            raise ConfigError(f"{where} needs {name}, which is not installed: run `{install}`, or set report_to: none.")


def pass_method(config: dict[str, Any]) -> str:
    """Return the method in small letters. Raises ConfigError when there is no such method."""
    method = str(pass_settings(config)["type"])
    if method.lower() not in METHOD:
        raise ConfigError(f"{CONFIG.name}: passes.*.type {method!r} is none of LoRA, QLoRA, DoRA, LoHa, LoKr.")
    return method.lower()


def validate_values(config: dict[str, Any], path: Path) -> None:
    """Let Olive and transformers judge the values. Raises ConfigError with the first complaint."""
    import tempfile
    from copy import deepcopy

    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.pytorch.lora import HFTrainingArguments
    from olive.workflows.run.config import RunConfig
    from pydantic import ValidationError
    from train import METHODS, Training
    from transformers import TrainingArguments

    settings = pass_settings(config)
    arguments = settings["training_args"]
    if settings.get("early_stopping_patience") and arguments.get("eval_strategy", "no") == "no":
        line = line_of(path, "early_stopping_patience")
        raise ConfigError(
            f"{path.name}, line {line}: early_stopping_patience needs evaluations: set eval_strategy: steps."
        )
    for field in fields(TrainingArguments):
        value = arguments.get(field.name)
        if type(field.default) in (int, float) and value is not None and type(value) not in (int, float):
            line = line_of(path, field.name)
            raise ConfigError(f"{path.name}, line {line}: training_args.{field.name} is {value!r}: write a number.")
    try:
        run_config = RunConfig.model_validate(deepcopy(config))  # Olive changes the dict it is given
        ((chosen,),) = run_config.passes.values()
        with tempfile.TemporaryDirectory() as folder:
            chosen.config["training_args"] |= {"output_dir": folder, "use_cpu": True}
            pass_class: Any = type(chosen.type, (Training, METHODS[chosen.type.lower()]), {})
            create_pass_from_dict(pass_class, chosen.config, True, DEFAULT_CPU_ACCELERATOR)
            # what does not fit the class, Olive takes as a plain dict: build it once more to hear why
            HFTrainingArguments.model_validate(chosen.config["training_args"]).create_training_args()
    except ValidationError as error:
        problem = error.errors()[0]
        key = next((part for part in reversed(problem["loc"]) if line_of(path, str(part)) > 1), problem["loc"][0])
        message = f"{key}: {problem['msg'].lower()}, not {problem['input']!r}."
        raise ConfigError(f"{path.name}, line {line_of(path, str(key))}: {message}") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path.name}: {str(error).splitlines()[0]}") from error


def line_of(path: Path, key: str, value: Any = "") -> int:
    """Return the first line with a key and this value, or with the key; 1 when it stands on no line of its own."""
    pattern = re.compile(rf"\s*(- )?{re.escape(str(key))}\s*:")
    lines = [*enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)]
    found = [(str(value) not in line, number) for number, line in lines if pattern.match(line)]
    return min(found, default=(True, 1))[1]


def repeated_rows(rows: dict[str, list[Any]]) -> list[str]:
    """Return a line for rows that stand twice, and one for held-out rows that are trained on too."""
    train, held_out = ([json.dumps(row, sort_keys=True) for row in rows[part]] for part in ("train", "held_out"))
    twice, shared = len(train) - len(set(train)), len(set(held_out) & set(train))
    lines = []
    if twice:
        lines.append(
            f"warning: {twice} of {len(train)} rows to train on stand there more than once and count as often."
        )
    if shared:
        lines.append(f"warning: {shared} held-out rows are trained on too: the figures after the run will flatter it.")
    return lines


def check_count(rows: dict[str, list[Any]]) -> None:
    """Refuse fewer rows than a model can learn anything from. Raises ConfigError."""
    if len(rows["train"]) < LEAST_ROWS:
        raise ConfigError(
            f"{len(rows['train'])} rows to train on are too few to learn from: add rows until there are {LEAST_ROWS}, "
            f"or see whether max_rows or eval_split in {CONFIG.name} leaves too many out."
        )


def read_rows(config: dict[str, Any]) -> dict[str, list[Any]]:
    """Read the conversations of both parts, `train` and `held_out`. Raises ConfigError and DataError."""
    from dataset import chat_rows

    rows = {part: chat_rows(**data_settings(config, part, "load_dataset_config")) for part in ("train", "held_out")}
    check_count(rows)
    return rows


def tokenise_rows(config: dict[str, Any], rows: dict[str, list[Any]]) -> dict[str, list[dict[str, list[int]]]]:
    """Tokenise both parts with the model on this machine, as the training and the evaluations see them."""
    from dataset import chat_tokens

    return {part: chat_tokens(rows[part], **data_settings(config, part, "pre_process_data_config")) for part in rows}


def base_model(config: dict[str, Any]) -> Found:
    """Return where the base model is; builds the demo model when it is missing. Raises ModelError."""
    model, revision = model_named(config)
    if model == DEMO and not (ROOT / DEMO).exists():
        from tiny_model import build_demo

        build_demo()
    return find_model(model, revision, ROOT)


def model_named(config: Mapping[str, Any]) -> tuple[str, str | None]:
    """Return the base model's folder or hub id, and its revision, as the settings name them."""
    revision = (config["input_model"].get("load_kwargs") or {}).get("revision")
    return str(config["input_model"]["model_path"]), None if revision is None else str(revision)
