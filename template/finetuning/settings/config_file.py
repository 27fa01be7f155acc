"""olive-config.yaml as a file: how it is read, on which line a setting stands, and the error that names it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from preparing.workspace import ROOT

CONFIG = ROOT / "finetuning" / "olive-config.yaml"
RESTORE = "`git checkout` or `copier recopy --trust --vcs-ref :current:` brings it back"


class Loader(yaml.SafeLoader):
    """PyYAML's loader, which also reads 2e-4 as a number: YAML 1.1 wants 2.0e-4 and makes it a text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


class ConfigError(Exception):
    """What is wrong with the settings, where, and what to do: one sentence."""


def read_file(path: Path = CONFIG) -> dict[str, Any]:
    """Return what the file holds. Raises ConfigError when it is missing, torn or without a setting the steps need."""
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
        raise ConfigError(f"{name} holds no settings: {RESTORE}.")
    need(config, "", ("input_model", "data_configs", "passes", "systems"))
    need(config["input_model"], "input_model.", ("model_path", "load_kwargs"))
    settings = the_pass(config)
    need(settings, "passes.*.", ("type", "torch_dtype", "training_args"))
    need(settings["training_args"], "training_args.", ("seed", "per_device_eval_batch_size"))
    if str(settings["type"]).lower() == "qlora":
        need(settings, "passes.*.", ("compute_dtype", "quant_type", "double_quant"))
    for data_config in entries(config["data_configs"]):
        need(data_config, "data_configs.", ("name", "load_dataset_config", "pre_process_data_config"))
        for component in ("load_dataset_config", "pre_process_data_config"):
            need(data_config[component], f"data_configs.{component}.", ("type",))
    need(config["systems"], "systems.", ("local_system",))
    need(config["systems"]["local_system"], "systems.local_system.", ("accelerators",))
    for accelerator in entries(config["systems"]["local_system"]["accelerators"]):
        need(accelerator, "systems.local_system.accelerators.", ("device",))
    return config


def entries(value: Any) -> list[Any]:
    """Return a list as it is, and what should be one and is not, or is empty, as one entry that lacks everything."""
    return value if isinstance(value, list) and value else [None]


def need(section: Any, where: str, keys: tuple[str, ...]) -> None:
    """Raise ConfigError for a setting that the steps read themselves and that has no default in Olive."""
    for key in keys:
        if not isinstance(section, dict) or section.get(key) is None:
            raise ConfigError(f"{CONFIG.name}: {where}{key} is missing: {RESTORE}.")


def the_pass(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the one pass."""
    passes = config["passes"]
    if not isinstance(passes, dict) or len(passes) != 1:
        raise ConfigError(
            "olive-config.yaml: passes holds more than one pass. Keep one; export.py has the later steps."
        )
    settings: dict[str, Any] = next(iter(passes.values()))
    return settings


def line_of(path: Path, key: str, value: Any = "") -> int:
    """Return the first line with a key and this value, or with the key; 1 when it stands on no line of its own."""
    pattern = re.compile(rf"\s*(- )?{re.escape(str(key))}\s*:")
    lines = [*enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)]
    found = [(str(value) not in line, number) for number, line in lines if pattern.match(line)]
    return min(found, default=(True, 1))[1]
