"""Check every setting and value against what Olive, transformers and this workspace accept."""

from __future__ import annotations

import difflib
import importlib.util
import shlex
import sys
import tempfile
from pathlib import Path
from typing import Any, get_type_hints

from settings.allowed import fixed_values, reasons
from settings.combinations import conflict, training_arguments
from settings.config_file import CONFIG, ConfigError, line_of, sections
from settings.run_settings import Settings, olive_config
from settings.setting_types import TRACKERS, setting_types
from settings.value_types import complaint, written

REMOVE = "remove it, or see the file's comments."


def validate(settings: Settings, path: Path = CONFIG) -> None:
    """Raise ConfigError for settings that are unknown, without effect or of the wrong type.

    Olive only warns about an unknown key and ignores it: a misspelt setting would train with its default.
    """
    check_report_to(settings, path)
    refused, types = reasons(settings.method), setting_types(settings.method)
    for section, keys in sections(settings.file):
        for key, value in keys.items():
            if wrong := complaint_about(key, value, types[section], refused.get(section, {})):
                where = f"{path.name}, line {line_of(path, key, value)}: {section}.{key}".replace(": .", ": ")
                raise ConfigError(f"{where} {wrong}")
    for section, keys, expected in fixed_values(settings.file):
        for key, value in expected.items():
            if keys.get(key) != value:
                where = f"{path.name}, line {line_of(path, key, keys.get(key))}: {section}.{key}"
                raise ConfigError(f"{where} is {keys.get(key)!r}: write {written(value)}, which the steps rely on.")
    check_types(settings, path)
    validate_values(settings, path)


def complaint_about(key: str, value: Any, types: dict[str, Any], refused: dict[str, str]) -> str | None:
    """Return what is wrong with a setting and what to do, to follow its name; None if nothing is wrong."""
    if key in refused:
        return f"cannot be set: {refused[key]}."
    if key not in types:
        nearest = difflib.get_close_matches(str(key), [name for name in types if name not in refused], n=1)
        return f"is not a setting: {f'did you mean {nearest[0]}?' if nearest else REMOVE}"
    wrong = complaint(types[key], value)
    return f"is {value!r}: {wrong}." if wrong else None


def check_report_to(settings: Settings, path: Path) -> None:
    """Raise ConfigError for an unknown name in report_to, or for a package that is not installed."""
    chosen = settings.report_to
    shown = list(chosen) if isinstance(chosen, tuple) else chosen
    where = f"{path.name}, line {line_of(path, 'report_to')}: training_args.report_to"
    for name in chosen if isinstance(chosen, tuple) else [chosen]:
        if name == "all":  # would send the figures to every installed service
            raise ConfigError(f"{where} is all: name what you want, some of {', '.join(TRACKERS)}.")
        if name not in (*TRACKERS, "none") or (name == "none" and chosen != "none"):
            raise ConfigError(f"{where} is {shown!r}: choose none, or one or some of {', '.join(TRACKERS)}.")
        if name != "none" and importlib.util.find_spec(name) is None:
            install = f"{shlex.quote(sys.executable)} -m pip install {name}"
            raise ConfigError(f"{where} needs {name}, which is not installed: run `{install}`, or set report_to: none.")


def check_types(settings: Settings, path: Path) -> None:
    """Refuse the first value whose type differs from the settings object's. Raises ConfigError."""
    parts = [group for part in settings.data.values() for group in (part.rows, part.tokens)]
    for group in (settings, *parts):
        for name, kind in get_type_hints(type(group)).items():
            value = getattr(group, name)
            if name not in ("data", "file") and (wrong := complaint(kind, value)):
                raise ConfigError(f"{path.name}, line {line_of(path, name, value)}: {name} is {value!r}: {wrong}.")


def validate_values(settings: Settings, path: Path) -> None:
    """Validate the values with Olive and transformers. Raises ConfigError with the first error."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.passes.olive_pass import create_pass_from_dict
    from olive.workflows.run.config import RunConfig
    from pydantic import ValidationError

    from settings.olive_pass import pass_class

    if found := conflict(settings):
        key, reason = found
        raise ConfigError(f"{path.name}, line {line_of(path, key)}: {key} {reason}.")
    try:
        run_config = RunConfig.model_validate(olive_config(settings))
        ((chosen,),) = run_config.passes.values()
        with tempfile.TemporaryDirectory() as folder:
            chosen.config["training_args"] |= {"output_dir": folder, "use_cpu": True}
            create_pass_from_dict(pass_class(settings.method), chosen.config, True, DEFAULT_CPU_ACCELERATOR)
        check_optimizer(settings, training_arguments(settings), path)
    except ValidationError as error:
        problem = error.errors()[0]
        key = next((part for part in reversed(problem["loc"]) if line_of(path, str(part)) > 1), problem["loc"][0])
        message = f"{key}: {problem['msg'].lower()}, not {problem['input']!r}."
        raise ConfigError(f"{path.name}, line {line_of(path, str(key))}: {message}") from error
    except (ValueError, TypeError, AssertionError, ImportError, OSError) as error:
        raise ConfigError(f"{path.name}: {' '.join(str(error).split())}") from error


def check_optimizer(settings: Settings, arguments: Any, path: Path) -> None:
    """Raise ConfigError for an optimizer whose package is not installed, unless the GPU for it is elsewhere."""
    import torch
    from transformers import Trainer

    if settings.gpu and not torch.cuda.is_available():
        return
    try:
        Trainer.get_optimizer_cls_and_kwargs(arguments)
    except (ImportError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split()).rstrip(".!")
        if "install" in reason:  # others are about the model, which is not loaded here
            raise ConfigError(
                f"{path.name}, line {line_of(path, 'optim')}: optim {settings.optim} cannot be used here ({reason}): "
                "choose adamw_torch, or install what it needs."
            ) from error
