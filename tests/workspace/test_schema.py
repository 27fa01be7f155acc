"""The schema for editors accepts what the validation accepts, for every setting that either of them knows."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from copy import deepcopy
from pathlib import Path
from typing import Any, get_args

import pytest
from conftest import REPOSITORY

SCHEMA = REPOSITORY / "template" / "finetuning" / "olive-config.schema.json"
METHODS = ("LoRA", "QLoRA", "DoRA", "LoHa", "LoKr")
SECTIONS = (
    *("", "input_model", "load_kwargs", "data_configs", "load_dataset_config", "pre_process_data_config"),
    *("training_args", "systems", "local_system", "accelerators"),
)
CASES = [*((section, "LoRA") for section in SECTIONS), *(("passes.*", method) for method in METHODS)]
VALUES = (
    *(None, True, False, "text", "0.5", 0, 1, -1, 3, 0.5, 1.5, 2**32),
    *([], ["text"], [3], [{}], {}, {"key": 1}, {"key": {}}),
)
# What the schema takes and the validation does not.
EXCEPTIONS = {
    "it stands twice in the file, and both must be the same": {
        *("input_model.model_path", "pre_process_data_config.model_path"),
        *("load_kwargs.revision", "pre_process_data_config.revision"),
    },
    "another setting must allow it": {".evaluator", "training_args.dataloader_prefetch_factor"},
    "a package is needed that is not installed": {
        "training_args.report_to",
        "training_args.deepspeed",
        "training_args.optim",
    },
    "several processes must share the run": {"training_args.ddp_backend"},
    "Olive and transformers judge what is in it": {
        *(".host", ".target", "training_args.accelerator_config", "training_args.fsdp"),
        "training_args.gradient_checkpointing_kwargs",
    },
}

Config = dict[str, Any]
Verdicts = Callable[[Config], tuple[bool, bool]]


@pytest.fixture(scope="module")
def verdicts(workspace: Path) -> Iterator[Verdicts]:
    """Return a function that says whether the schema, and whether the validation, takes the content of a file."""
    sys.path.append(str(REPOSITORY / ".cache" / "fastjsonschema"))
    import fastjsonschema

    from settings.config_file import ConfigError, check_sections
    from settings.run_settings import Settings
    from settings.validation import validate

    by_schema = fastjsonschema.compile(json.loads(SCHEMA.read_text()), use_default=False)

    def both(config: Config) -> tuple[bool, bool]:
        takes = [True, True]
        try:
            by_schema(deepcopy(config))
        except fastjsonschema.JsonSchemaValueException:
            takes[0] = False
        try:
            check_sections(config)
            validate(Settings.of(config))
        except ConfigError:  # another exception would be a defect
            takes[1] = False
        return takes[0], takes[1]

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(workspace)  # the paths in the file are relative to it
        yield both


def config_of(method: str) -> Config:
    """Return the content of the rendered file, for a method."""
    from settings.config_file import read_file

    config = read_file()
    settings = config["passes"]["finetune"]
    settings["type"] = method
    if method == "QLoRA":
        del settings["target_modules"]
        settings |= {"quant_type": "nf4", "double_quant": True, "compute_dtype": "float32"}
    if method in ("LoHa", "LoKr"):
        settings["rank_dropout"] = settings.pop("lora_dropout")
    settings["training_args"]["load_best_model_at_end"] = False  # it ties eval_strategy and save_strategy together
    return config


def section_of(config: Config, name: str) -> Config:
    """Return a section of the file; of data_configs the first."""
    from settings.config_file import sections

    return next(section for found, section in sections(config) if found == name)


def choices(kind: Any) -> Iterator[Any]:
    """Return the values that a type names."""
    for part in get_args(kind):
        yield from choices(part) if get_args(part) else [part] if isinstance(part, str) else []


def disagreements(verdicts: Verdicts, section: str, method: str) -> dict[str, list[Any]]:
    """Return the values of each setting of a section that only one of the two takes; assert that one is right."""
    from settings.allowed import reasons
    from settings.setting_types import setting_types

    base, found = config_of(method), {}
    types, refused = setting_types(method.lower())[section], reasons(method.lower()).get(section, {})
    for key in (*types, *refused.keys() - types.keys(), "unknown"):
        here = section_of(base, section)
        values = [*VALUES, *choices(types.get(key)), *([here[key]] if key in here else [])]
        right = 0
        for value in values:
            config = deepcopy(base)
            section_of(config, section)[key] = value
            by_schema, by_validation = verdicts(config)
            right += by_schema and by_validation
            if by_schema != by_validation:
                found.setdefault(f"{section}.{key}", []).append((value, by_schema, by_validation))
        assert bool(right) == (key in types and key not in refused), f"{section}.{key}: {right} of {len(values)}"
    return found


@pytest.fixture(scope="module")
def found() -> dict[str, list[Any]]:
    """All that the cases below disagree about."""
    return {}


@pytest.mark.parametrize(("section", "method"), CASES)
def test_the_schema_accepts_the_values_that_the_validation_accepts(
    verdicts: Verdicts, found: dict[str, list[Any]], section: str, method: str
) -> None:
    known = set().union(*EXCEPTIONS.values())
    disagreed = disagreements(verdicts, section, method)
    found |= disagreed
    assert {path: values for path, values in disagreed.items() if path not in known} == {}
    assert all(by_schema for values in disagreed.values() for _, by_schema, _ in values)


def test_every_exception_is_needed(found: dict[str, list[Any]]) -> None:
    assert set(found) == set().union(*EXCEPTIONS.values())


@pytest.mark.parametrize("method", METHODS)
def test_the_schema_needs_the_settings_that_the_validation_needs(verdicts: Verdicts, method: str) -> None:
    from settings.config_file import sections

    base = config_of(method)
    assert verdicts(deepcopy(base)) == (True, True)
    for number, (name, section) in enumerate(sections(base)):
        for key in section:
            config = deepcopy(base)
            del [*sections(config)][number][1][key]
            by_schema, by_validation = verdicts(config)
            assert by_schema == by_validation or f"{name}.{key}" == "load_kwargs.revision", f"{name}.{key}"


def two_passes(config: Config) -> None:
    config["passes"]["other"] = config["passes"]["finetune"]


def no_pass(config: Config) -> None:
    config["passes"] = {}


def a_part_missing(config: Config) -> None:
    del config["data_configs"][1]


def a_part_twice(config: Config) -> None:
    config["data_configs"].append(config["data_configs"][0])


def one_part_twice_and_the_other_missing(config: Config) -> None:
    config["data_configs"][1] = config["data_configs"][0]


def two_devices(config: Config) -> None:
    config["systems"]["local_system"]["accelerators"] *= 2


def two_systems(config: Config) -> None:
    config["systems"]["other"] = config["systems"]["local_system"]


def the_rows_of_the_other_part(config: Config) -> None:
    config["data_configs"][1]["load_dataset_config"]["part"] = "train"


def an_unknown_method(config: Config) -> None:
    config["passes"]["finetune"]["type"] = "AdaLoRA"


@pytest.mark.parametrize(
    "change",
    [
        *(two_passes, no_pass, a_part_missing, a_part_twice, one_part_twice_and_the_other_missing, two_devices),
        *(two_systems, the_rows_of_the_other_part, an_unknown_method),
    ],
)
def test_schema_and_validation_refuse_a_wrong_structure(verdicts: Verdicts, change: Callable[[Config], None]) -> None:
    config = config_of("LoRA")
    change(config)
    assert verdicts(config) == (False, False)


def other_order(config: Config) -> None:
    config["data_configs"].reverse()


def other_name(config: Config) -> None:
    config["passes"] = {"mine": config["passes"]["finetune"]}


def small_letters(config: Config) -> None:
    config["passes"]["finetune"]["type"] = "lora"


@pytest.mark.parametrize("change", [other_order, other_name, small_letters])
def test_schema_and_validation_accept_equivalent_structures(
    verdicts: Verdicts, change: Callable[[Config], None]
) -> None:
    config = config_of("LoRA")
    change(config)
    assert verdicts(config) == (True, True)


@pytest.mark.parametrize(
    ("section", "key", "value", "words"),
    [
        ("passes.*", "r", "many", ": passes.*.r is 'many': write a whole number from 1."),
        ("passes.*", "r", 0, ": passes.*.r is 0: write a whole number from 1."),
        ("passes.*", "alpha", "32", ": passes.*.alpha is '32': write a number above 0."),
        ("passes.*", "lora_dropout", 1, ": passes.*.lora_dropout is 1: write a number from 0 below 1."),
        ("passes.*", "target_modules", 3, ": passes.*.target_modules is 3: write a list of values, each text or null."),
        ("load_dataset_config", "max_rows", -1, "max_rows is -1: write a whole number from 1 or null."),
        ("load_kwargs", "attn_implementation", None, "choose one of sdpa, eager, flash_attention_2."),
        ("load_kwargs", "revision", 2024, ": load_kwargs.revision is 2024: write text or null."),
        ("training_args", "load_best_model_at_end", "false", "is 'false': write true or false."),
        ("training_args", "eval_strategy", "never", "is 'never': choose one of \"no\", steps, epoch, false."),
        ("training_args", "lr_scheduler_type", "linnear", "is 'linnear': choose one of linear, cosine,"),
        ("training_args", "logging_steps", 1.5, "write a whole number from 1 or a number above 0 below 1."),
        ("training_args", "debug", "all", 'write "", underflow_overflow or a list of values, each underflow_overflow.'),
        ("training_args", "data_seed", 2**32, "write a whole number from 0 to 4294967295 or null."),
        ("training_args", "deepspeed", 3, "write true or false, text, settings of its own, indented below it or null."),
        ("training_args", "unknown_thing", 1, "unknown_thing is not a setting: remove it, or see the file's comments."),
        ("training_args", "hub_tokens", 1, "hub_tokens is not a setting: remove it, or see the file's comments."),
        ("accelerators", "device", "npu", ": accelerators.device is 'npu': choose one of cpu, gpu."),
        ("", "input_model", 3, ": input_model is 3: its settings stand below it, indented."),
        ("", "data_configs", {}, ": data_configs is {}: each of its entries begins with a dash."),
        ("", "passes", {}, ": passes holds no passes. Keep one; export.py has the later steps."),
        ("input_model", "load_kwargs", None, ": input_model.load_kwargs is missing: "),
    ],
)
def test_a_wrong_value_is_refused_with_what_to_write(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, section: str, key: str, value: Any, words: str
) -> None:
    from settings.config_file import ConfigError, check_sections
    from settings.run_settings import Settings
    from settings.validation import validate

    monkeypatch.chdir(workspace)
    config = config_of("LoRA")
    section_of(config, section)[key] = value
    with pytest.raises(ConfigError) as error:
        check_sections(config)
        validate(Settings.of(config))
    assert words in str(error.value)
    assert str(error.value).startswith("olive-config.yaml")


def test_a_whole_number_with_a_point_is_accepted_only_by_the_schema(verdicts: Verdicts) -> None:
    """Draft 7 says so; Olive would say that it gets a float."""
    config = config_of("LoRA")
    config["passes"]["finetune"]["r"] = 16.0
    assert verdicts(config) == (True, False)


@pytest.mark.parametrize("number", ["2e-4", "2E-4", "2.0e-4", "0.0002", "1", "+1", ".5"])
def test_a_number_in_yaml_1_2_is_also_a_number_for_the_run(number: str) -> None:
    import yaml

    from settings.config_file import Loader

    assert yaml.load(number, Loader) == float(number)


def test_every_setting_in_the_schema_is_explained() -> None:
    unexplained = []

    def look(schema: dict[str, Any], path: str) -> None:
        for key, inner in schema.get("properties", {}).items():
            said = {"description", "deprecationMessage", "doNotSuggest"} & set(inner)
            if not said and "if" not in schema:
                unexplained.append(f"{path}.{key}")
            look(inner, f"{path}.{key}")
        for name in ("items", "additionalProperties"):
            if isinstance(schema.get(name), dict):
                look(schema[name], path)

    look(json.loads(SCHEMA.read_text()), "")
    assert unexplained == [".data_configs.name", ".systems.local_system"]


def test_the_schema_is_current(tmp_path: Path) -> None:
    script = """
import sys
sys.path.insert(0, "docs")
import make_schema
from pathlib import Path
sys.argv[1:] = ["--check"]
current = make_schema.main()
make_schema.ROOT, make_schema.SCHEMA = Path(sys.argv[0]), Path(sys.argv[0]) / "stale.json"
make_schema.SCHEMA.write_text("{}")
stale = make_schema.main()
del sys.argv[1:]
made = make_schema.main()
print(current, stale, made, make_schema.SCHEMA.read_text() == Path(FILE).read_text())
"""
    script = script.replace("sys.argv[0]", repr(str(tmp_path))).replace("FILE", repr(str(SCHEMA)))
    done = subprocess.run(
        [sys.executable, "-B", "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines()[-1] == "0 1 0 True", done.stdout + done.stderr
    assert done.stderr == "stale.json: not what the validation says; run `make docs`.\n"
