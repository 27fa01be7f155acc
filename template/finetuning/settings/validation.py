"""The check of every setting and value against what Olive, transformers and this workspace take."""

from __future__ import annotations

import difflib
import importlib.util
import shlex
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

from settings.allowed import CHOICES, fixed_values, known_keys, reasons
from settings.config_file import CONFIG, ConfigError, line_of
from settings.run_settings import Settings, olive_config

TRACKERS = ("tensorboard", "mlflow", "wandb", "trackio")


def validate(settings: Settings, path: Path = CONFIG) -> None:
    """Refuse settings that are unknown, without effect or of the wrong type. Raises ConfigError.

    Olive only warns about a key that it does not know, and ignores it: a misspelt setting would train with its default.
    """
    refused = reasons(settings.method)
    for section, keys, known in known_keys(settings.file, settings.method):
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
    for section, keys, expected in fixed_values(settings.file):
        for key, value in expected.items():
            if keys.get(key) != value:
                where = f"{path.name}, line {line_of(path, key, keys.get(key))}: {section}.{key}"
                raise ConfigError(f"{where} is {keys.get(key)!r}: write {value!r}, which the steps rely on.")
    check_report_to(settings, path)
    check_types(settings, path)
    validate_values(settings, path)


def check_report_to(settings: Settings, path: Path) -> None:
    """Refuse what no run can report to: an unknown name, a package that is not installed. Raises ConfigError."""
    chosen = settings.report_to
    shown = list(chosen) if isinstance(chosen, tuple) else chosen
    where = f"{path.name}, line {line_of(path, 'report_to')}: training_args.report_to"
    for name in chosen if isinstance(chosen, tuple) else [chosen]:
        if name == "all":  # would send the figures wherever a package happens to be installed
            raise ConfigError(f"{where} is all: name what you want, some of {', '.join(TRACKERS)}.")
        if name not in (*TRACKERS, "none") or (name == "none" and chosen != "none"):
            raise ConfigError(f"{where} is {shown!r}: choose none, or one or some of {', '.join(TRACKERS)}.")
        if name != "none" and importlib.util.find_spec(name) is None:
            install = f"{shlex.quote(sys.executable)} -m pip install {name}"
            raise ConfigError(f"{where} needs {name}, which is not installed: run `{install}`, or set report_to: none.")


def check_types(settings: Settings, path: Path) -> None:
    """Refuse the first value of another type than the settings object says. Raises ConfigError."""
    from pydantic import TypeAdapter, ValidationError

    parts = [group for part in settings.data.values() for group in (part.rows, part.tokens)]
    for group in (settings, *parts):
        for name, kind in get_type_hints(type(group)).items():
            if name in ("data", "file"):
                continue
            value = getattr(group, name)
            try:
                TypeAdapter(kind).validate_python(value, strict=True)
            except ValidationError as error:
                where = f"{path.name}, line {line_of(path, name, value)}: {name}"
                raise ConfigError(f"{where}: {error.errors()[0]['msg'].lower()}, not {value!r}.") from error


def validate_values(settings: Settings, path: Path) -> None:
    """Let Olive and transformers judge the values. Raises ConfigError with the first complaint."""
    import tempfile

    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.passes.pytorch.lora import HFTrainingArguments
    from olive.workflows.run.config import RunConfig
    from pydantic import ValidationError
    from transformers import TrainingArguments

    from settings.olive_pass import pass_class

    config = olive_config(settings)
    (olive_pass,) = config["passes"].values()
    arguments = olive_pass["training_args"]
    if settings.early_stopping_patience and settings.eval_strategy == "no":
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
        run_config = RunConfig.model_validate(config)
        ((chosen,),) = run_config.passes.values()
        with tempfile.TemporaryDirectory() as folder:
            chosen.config["training_args"] |= {"output_dir": folder, "use_cpu": True}
            create_pass_from_dict(pass_class(settings.method), chosen.config, True, DEFAULT_CPU_ACCELERATOR)
            # what does not fit the class, Olive takes as a plain dict: build it once more to hear why
            HFTrainingArguments.model_validate(chosen.config["training_args"]).create_training_args()
    except ValidationError as error:
        problem = error.errors()[0]
        key = next((part for part in reversed(problem["loc"]) if line_of(path, str(part)) > 1), problem["loc"][0])
        message = f"{key}: {problem['msg'].lower()}, not {problem['input']!r}."
        raise ConfigError(f"{path.name}, line {line_of(path, str(key))}: {message}") from error
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(f"{path.name}: {str(error).splitlines()[0]}") from error
