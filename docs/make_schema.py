"""Write template/finetuning/olive-config.schema.json from what the validation uses; with --check only compare.

Runs in a workspace's environment, as it asks Olive and transformers for their settings. What a setting means is said by
its comment in olive-config.yaml.jinja, or else by the library that takes it.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections import defaultdict
from collections.abc import Iterable
from copy import deepcopy
from dataclasses import fields
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
FINETUNING = ROOT / "template" / "finetuning"
SCHEMA = FINETUNING / "olive-config.schema.json"
sys.path.insert(0, str(FINETUNING))

from settings.allowed import fixed_values, reasons  # noqa: E402
from settings.config_file import NEEDED, NEEDED_BY_QLORA  # noqa: E402
from settings.run_settings import METHODS  # noqa: E402
from settings.setting_types import setting_types  # noqa: E402
from settings.startup import leave_out, quiet  # noqa: E402
from settings.value_types import adapter  # noqa: E402

Schema = dict[str, Any]
SECTIONS = {
    "input_model": "The model to fine-tune.",
    "load_kwargs": "How the model is loaded.",
    "data_configs": "Two entries: the rows to train on, and the held-out rows.",
    "load_dataset_config": "Where the rows are, how a row is read, and which rows are held out.",
    "pre_process_data_config": "How conversations become tokens.",
    "passes": "One pass: how the adapter is built and trained.",
    "training_args": "Arguments of transformers.TrainingArguments.",
    "systems": "The machine of the run.",
    "accelerators": "The device of the run.",
}
FIXED = "The steps rely on this value."
ONLY = "Only for `olive run`. "
PARTS = ("train", "held_out")
# what is said twice in the file: nothing that a schema can compare, except for part
SAME = {
    "load_dataset_config": {"part": "The same as name."},
    "pre_process_data_config": {
        "model_path": "The same as in input_model.",
        "revision": "The same as in input_model.load_kwargs.",
    },
}


def main() -> int:
    """Write the schema, or compare it with what it should be."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 when the schema is stale")
    check = parser.parse_args().check
    quiet()
    leave_out("torchmetrics")
    text = compact(schema()) + "\n"
    name = SCHEMA.relative_to(ROOT).as_posix()
    if SCHEMA.is_file() and SCHEMA.read_text(encoding="utf-8") == text:
        print(f"{name} is current.")
        return 0
    if check:
        print(f"{name}: not what the validation says; run `make docs`.", file=sys.stderr)
        return 1
    unfinished = SCHEMA.with_suffix(".new")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(SCHEMA)
    print(f"Written: {name}")
    return 0


def schema() -> Schema:
    """Return the schema of olive-config.yaml, the same for every answer. Draft 7 is what all editors know."""
    sections = {name: section(name) for name in setting_types("lora")}
    nest(sections["input_model"], "load_kwargs", sections["load_kwargs"])
    for name in ("load_dataset_config", "pre_process_data_config"):
        nest(sections["data_configs"], name, sections[name])
    sections["data_configs"]["allOf"] = [
        when("name", {"const": part}, within("load_dataset_config", within("part", {"const": part}))) for part in PARTS
    ]
    nest(sections["local_system"], "accelerators", one_of_a_kind(sections["accelerators"]))
    nest(sections["systems"], "local_system", sections["local_system"])
    top = sections[""]
    nest(top, "input_model", sections["input_model"])
    nest(top, "systems", sections["systems"])
    entries = {"type": "array", "items": sections["data_configs"], "minItems": 2, "maxItems": 2}
    entries["allOf"] = [{"contains": {**within("name", {"const": part}), "required": ["name"]}} for part in PARTS]
    nest(top, "data_configs", entries)
    passes = {"type": "object", "minProperties": 1, "maxProperties": 1, "additionalProperties": one_pass()}
    nest(top, "passes", passes)
    top["properties"] |= {"passes": top["properties"].pop("passes"), "systems": top["properties"].pop("systems")}
    return {
        "$schema": "http://json-schema.org/draft-07/schema#",
        "description": "Every setting of the fine-tuning. Made by `make docs`; do not edit.",
        **top,
    }


def compact(value: Any, indent: str = "") -> str:
    """Return JSON in which what fits a line stands on one."""
    line = json.dumps(value, ensure_ascii=False)
    if not isinstance(value, dict | list) or len(line) <= 100:
        return line
    deeper = indent + "  "
    if isinstance(value, list):
        return "[\n" + ",\n".join(deeper + compact(each, deeper) for each in value) + f"\n{indent}]"
    items = (f"{deeper}{json.dumps(key)}: {compact(each, deeper)}" for key, each in value.items())
    return "{\n" + ",\n".join(items) + f"\n{indent}}}"


def one_pass() -> Schema:
    """Return the schema of the pass: what any method takes, then what one of them does not take, or needs."""
    types = {method: setting_types(method)["passes.*"] for method in METHODS}
    every = {key: kind for kinds in types.values() for key, kind in kinds.items()}
    assert all(every[key] == kind for kinds in types.values() for key, kind in kinds.items())
    refused = {method: reasons(method)["passes.*"] for method in METHODS}
    by_all = {
        key: why
        for keys in refused.values()
        for key, why in keys.items()
        if all(key in refused[method] or key not in types[method] for method in METHODS)
    }
    found = section("passes.*", every, by_all)
    nest(found, "training_args", section("training_args"))
    special: dict[tuple[str, ...], Schema] = defaultdict(dict)  # methods → what is said of settings for these alone
    for key in (key for key in every if key not in by_all):
        reason = {method: refused[method].get(key) for method in METHODS if key in types[method]}
        taking = [method for method, why in reason.items() if why is None]
        if len(taking) == len(METHODS):
            continue
        special[tuple(taking)][key] = found["properties"][key]
        found["properties"][key] = {"doNotSuggest": True}
        for why in {why for why in reason.values() if why}:
            special[tuple(method for method in reason if reason[method] == why)][key] = never(cannot(key, why))
        lacking = tuple(method for method in METHODS if method not in reason)
        special[lacking][key] = never(f"{key} is for {' and '.join(METHODS[method] for method in reason)} only.")
    found["properties"]["type"] = {
        **described("passes.*", "type", True),
        "type": "string",
        "anyOf": [{"enum": [*METHODS.values()]}, any_case(METHODS)],
    }
    found["allOf"] = [when("type", any_case(of), {"properties": settings}) for of, settings in special.items() if of]
    found["allOf"].append(when("type", any_case(["qlora"]), {"required": [*NEEDED_BY_QLORA]}))
    return found


def any_case(names: Iterable[str]) -> Schema:
    """Return the schema of one of these names in small or large letters, as Olive takes them."""
    patterns = ("".join(f"[{letter.upper()}{letter}]" for letter in name) for name in names)
    return {"pattern": f"^({'|'.join(patterns)})$"}


def section(name: str, types: dict[str, Any] | None = None, refused: dict[str, str] | None = None) -> Schema:
    """Return the schema of a section: each setting with its type and meaning, and which are needed."""
    types = setting_types("lora")[name] if types is None else types
    refused = reasons("lora").get(name, {}) if refused is None else refused
    fixed = {
        key: value for where, _, values in fixed_values(SKELETON) if where == name for key, value in values.items()
    }
    fixed = {key: value for key, value in fixed.items() if key not in SAME.get(name, ())}
    needed = {*NEEDED.get(name, ()), *fixed, *SAME.get(name, ())} - {"revision"}
    properties = {}
    for key in (*types, *(key for key in refused if key not in types)):
        if key in refused:
            properties[key] = never(cannot(key, refused[key]))
        elif key in fixed:
            properties[key] = {"description": FIXED, "const": fixed[key]}
        else:
            properties[key] = {**described(name, key, key in needed), **value_schema(types[key])}
    required = {"required": [key for key in properties if key in needed]} if needed else {}
    return {"type": "object", "properties": properties, **required, "additionalProperties": False}


def value_schema(kind: Any) -> Schema:
    """Return the schema of a value, without what says nothing."""
    made: Schema = deepcopy(adapter(kind).json_schema())
    options = made.pop("anyOf", [made])
    for option in options:
        for each in (option, option.get("items", {}), option.get("additionalProperties", {})):
            if each is not True and each.get("additionalProperties") is True:
                del each["additionalProperties"]
    if all([*option] == ["type"] for option in options):
        kinds = [option["type"] for option in options]
        return {"type": kinds if len(kinds) > 1 else kinds[0]}
    return {"anyOf": options} if len(options) > 1 else made


def nest(outer: Schema, key: str, inner: Schema) -> None:
    """Put the schema of a section where it stands in the file."""
    outer["properties"][key] = {"description": SECTIONS[key], **inner} if key in SECTIONS else inner


def one_of_a_kind(item: Schema) -> Schema:
    """Return the schema of a list with one entry."""
    return {"type": "array", "items": item, "minItems": 1, "maxItems": 1}


def within(key: str, value: Schema) -> Schema:
    """Return the schema of settings that have this one."""
    return {"properties": {key: value}}


def when(key: str, value: Schema, then: Schema) -> Schema:
    """Return a condition: where a setting has this value, the other schema holds too."""
    return {"if": {**within(key, value), "required": [key]}, "then": then}


def never(text: str) -> Schema:
    """Return the schema of a setting that must not stand there. Editors show the text, and do not suggest it."""
    return {"not": {}, "deprecationMessage": text, "doNotSuggest": True}


def cannot(key: str, why: str) -> str:
    """Return the sentence of the validation for a refused setting."""
    return f"{key} cannot be set: {why}."


# ---------------------------------------------------------------------------------------------- What a setting means

SKELETON: dict[str, Any] = {
    "input_model": {"model_path": None, "load_kwargs": {}},
    "data_configs": [{"name": "train"}],
    "passes": {"finetune": {}},
    "systems": {},
}


def described(name: str, key: str, needed: bool) -> Schema:
    """Return the meaning of a setting, and the default of the library where the file need not have the setting."""
    meaning, default = meanings().get((name, key), ("", None))
    text = SAME.get(name, {}).get(key) or comments().get((name, key)) or meaning
    found: Schema = {"description": text} if text else {}
    return found if needed or default is None else {**found, "default": default}


@cache
def comments() -> dict[tuple[str, str], str]:
    """Return the comments behind the settings of olive-config.yaml.jinja, by section and name."""
    found = {}
    parents: list[tuple[int, str]] = []
    for line in (FINETUNING / "olive-config.yaml.jinja").read_text(encoding="utf-8").splitlines():
        if setting := re.match(r"( *)(- )?(?:\{\{ \"\" if .+? \}\})?(<<|\w+):(.*)", line):
            indent = len(setting[1]) + len(setting[2] or "")
            parents = [parent for parent in parents if parent[0] < indent]
            name = next((parent for _, parent in reversed(parents) if parent != "<<"), "")
            found["passes.*" if name == "finetune" else name, setting[3]] = setting[4].partition("  # ")[2]
            parents.append((indent, setting[3]))
    return found


@cache
def meanings() -> dict[tuple[str, str], tuple[str, Any]]:
    """Return what the libraries say of their settings, and their defaults, by section and name."""
    from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
    from olive.passes.pytorch.lora import HFTrainingArguments
    from olive.workflows.run.config import RunConfig, RunEngineConfig
    from transformers import TrainingArguments

    from settings.olive_pass import pass_class

    found = {
        ("training_args", field.name): (field.metadata.get("help"), field.default)
        for field in fields(TrainingArguments)
    }
    for name, model in (("training_args", HFTrainingArguments), ("", RunConfig), ("", RunEngineConfig)):
        found |= {(name, key): (field.description, field.default) for key, field in model.model_fields.items()}
    for method in reversed(METHODS):
        passes = pass_class(method)._default_config(DEFAULT_CPU_ACCELERATOR)
        found |= {("passes.*", key): (one.description, one.default_value) for key, one in passes.items()}
    found["training_args", "gradient_checkpointing"] = ("", None)  # the run decides where the file does not
    return {
        place: (
            f"{ONLY if not place[0] else ''}{' '.join((text or '').replace('%%', '%').split())}",
            default if isinstance(default, str | int | float) else None,
        )
        for place, (text, default) in found.items()
    }


if __name__ == "__main__":
    sys.exit(main())
