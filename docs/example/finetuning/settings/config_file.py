"""olive-config.yaml as a file: reading it, finding the line of a setting, and the error that names it."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from preparing.workspace import ROOT

CONFIG = ROOT / "finetuning" / "olive-config.yaml"
RESTORE = "`git checkout` or `copier recopy --trust --vcs-ref :current:` brings it back"
# settings that the steps read themselves and that have no default in Olive
NEEDED = {
    "": ("input_model", "data_configs", "passes", "systems"),
    "input_model": ("model_path", "load_kwargs"),
    "data_configs": ("name", "load_dataset_config", "pre_process_data_config"),
    "passes.*": ("type", "torch_dtype", "training_args"),
    "training_args": ("seed", "per_device_eval_batch_size"),
    "systems": ("local_system",),
    "local_system": ("accelerators",),
    "accelerators": ("device",),
}
# of the training_args: YAML reads an unquoted no as false
NO = {"eval_strategy": "no", "save_strategy": "no", "logging_strategy": "no", "report_to": "none"}
NEEDED_BY_QLORA = ("compute_dtype", "quant_type", "double_quant")


class Loader(yaml.SafeLoader):
    """PyYAML's loader that also reads 2e-4 as a number: YAML 1.1 requires 2.0e-4 and takes the other for text."""


Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9.]+[eE][-+]?[0-9]+$"), list("-+0123456789.")
)


class ConfigError(Exception):
    """What is wrong with the settings, where, and what to do: one sentence."""


def read_file(path: Path = CONFIG) -> dict[str, Any]:
    """Return the file's content. Raises ConfigError if it is missing, damaged or lacks a needed setting."""
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
    check_sections(config)
    return config


def check_sections(config: Mapping[str, Any]) -> None:
    """Raise ConfigError for the first missing section or setting that the steps need."""
    for name, section in sections(config):
        check_present(section, f"{name}." if name else "", NEEDED.get(name, ()))
        if name == "passes.*" and str(section["type"]).lower() == "qlora":
            check_present(section, "passes.*.", NEEDED_BY_QLORA)


def sections(config: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield each section of the file: its name in messages, and its settings. Raises ConfigError if one is none."""
    yield "", config
    model = inner(config, "input_model")
    yield "input_model", model
    yield "load_kwargs", inner(model, "load_kwargs", "input_model.")
    for data_config in entries(config, "data_configs"):
        yield "data_configs", data_config
        for name in ("load_dataset_config", "pre_process_data_config"):
            yield name, inner(data_config, name, "data_configs.")
    olive_pass = the_pass(config)
    yield "passes.*", olive_pass
    yield "training_args", inner(olive_pass, "training_args", "passes.*.")
    systems = inner(config, "systems")
    yield "systems", systems
    local_system = inner(systems, "local_system", "systems.")
    yield "local_system", local_system
    for accelerator in entries(local_system, "accelerators", "local_system."):
        yield "accelerators", accelerator


def inner(section: Mapping[str, Any], key: str, where: str = "") -> dict[str, Any]:
    """Return the settings below a key. Raises ConfigError if it is missing or has none."""
    check_present(section, where, (key,))
    found = section[key]
    if not isinstance(found, dict):
        raise ConfigError(f"{CONFIG.name}: {where}{key} is {found!r}: its settings stand below it, indented.")
    return found


def entries(section: Mapping[str, Any], key: str, where: str = "") -> list[dict[str, Any]]:
    """Return the entries of a list of sections. Raises ConfigError if it is missing, empty or not such a list."""
    check_present(section, where, (key,))
    found = section[key]
    if not isinstance(found, list) or not found or not all(isinstance(entry, dict) for entry in found):
        raise ConfigError(f"{CONFIG.name}: {where}{key} is {found!r}: each of its entries begins with a dash.")
    return found


def check_present(section: Mapping[str, Any], where: str, keys: tuple[str, ...]) -> None:
    """Raise ConfigError for a setting that the steps read themselves and that has no default in Olive."""
    for key in keys:
        if section.get(key) is None:
            raise ConfigError(f"{CONFIG.name}: {where}{key} is missing: {RESTORE}.")


def the_pass(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the one pass."""
    passes = inner(config, "passes")
    if len(passes) != 1:
        raise ConfigError(
            f"{CONFIG.name}: passes holds {len(passes) or 'no'} passes. Keep one; export.py has the later steps."
        )
    return inner(passes, next(iter(passes)), "passes.")


def line_of(path: Path, key: str, value: Any = "") -> int:
    """Return the first line with a key and this value, or with the key; 1 if no line starts with the key."""
    pattern = re.compile(rf"\s*(- )?{re.escape(str(key))}\s*:")
    lines = [*enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)]
    found = [(str(value) not in line, number) for number, line in lines if pattern.match(line)]
    return min(found, default=(True, 1))[1]
