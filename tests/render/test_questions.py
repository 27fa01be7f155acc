"""The questions: their names, their defaults, their refusals, and how many of them are asked."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pexpect
import pytest
import yaml

Answer = Callable[..., dict[str, Any]]
Render = Callable[..., Path]
Questions = dict[str, dict[str, Any]]

# Users' answers files hold these names: none is ever removed or renamed.
# fmt: off
CONTRACT = {
    "project_name", "model", "custom_model_id", "custom_model_revision", "device", "platform", "target",
    "azure_location", "azure_resource_group", "azure_gpu", "method", "dataset_source", "dataset_path",
    "dataset_name", "dataset_split", "dataset_format", "prompt_template", "completion_template", "system_prompt",
    "environment", "conda_env_name", "download_model", "advanced", "max_seq_len", "packing", "train_on", "epochs",
    "max_steps", "learning_rate", "lora_r", "lora_alpha", "lora_dropout", "train_batch_size", "eval_batch_size",
    "gradient_accumulation_steps", "gradient_checkpointing", "eval_split", "early_stopping_patience",
    "compute_dtype", "quant_type", "double_quant", "seed", "data_seed",
}
# fmt: on
COLUMNS = 80
# The mark that Copier puts before a question takes two columns and a blank, and the last column stays free.
FIRST_LINE, LATER_LINES = COLUMNS - 4, COLUMNS - 1

HUB = {"dataset_source": "huggingface", "dataset_name": "owner/rows"}
FILE = {"dataset_source": "file", "dataset_path": "dataset/rows.jsonl"}
CUSTOM = {"model": "custom", "custom_model_id": "owner/model"}
AZURE = {"model": "phi-2", "target": "azure"}
TEMPLATES = FILE | {"dataset_format": "columns"}

REFUSED: list[tuple[dict[str, Any], str]] = [
    *[({"project_name": name}, "3 to 32 of a-z 0-9 -: type my-ft") for name in ("ab", "Ünder", "1st", "my_ft", "my-")],
    ({"project_name": "a" * 33}, "3 to 32 of a-z 0-9 -: type my-ft"),
    ({"project_name": "my-ft\n"}, "3 to 32 of a-z 0-9 -: type my-ft"),
    *[({"project_name": name}, "a reserved name: type my-ft") for name in ("base", "root", "con", "com1")],
    *[
        ({"model": "custom", "custom_model_id": name}, "type owner/name or ../folder")
        for name in ("", "gpt2", "a/b/c", "owner/na me", "owner/", "../a\nb", "owner/name\n", "../a\x85", "../\udcff")
    ],
    ({"model": "custom", "custom_model_id": "../a "}, "space at an end: type ../folder"),
    ({"model": "custom", "custom_model_id": "../`a`"}, "no `: type ../folder"),
    *[(CUSTOM | {"custom_model_revision": name}, "type main, or a commit") for name in ("a b", "-b", "a/../b")],
    ({"platform": "macos", "device": "gpu"}, "a Mac has no CUDA: choose cpu, or target azure"),
    (AZURE | {"device": "cpu"}, "Azure jobs run on a GPU: choose gpu"),
    ({"device": "cpu", "method": "qlora"}, "needs an NVIDIA GPU: choose lora"),
    ({"model": "phi-2", "platform": "macos", "method": "qlora"}, "needs an NVIDIA GPU: choose lora"),
    (AZURE | {"azure_gpu": "serverless-t4", "azure_location": "northeurope"}, "'northeurope' is not in"),
    *[(AZURE | {"azure_resource_group": name}, "type a name like rg-me") for name in ("ends.with.", "-n", "--yes")],
    *[
        (FILE | {"dataset_path": path}, "type dataset/train.jsonl")
        for path in ("", "  ", "a\nb", "a\x00b", "a\x85b", "a\u2028b", "\udcff.csv", "a\uffff")
    ],
    *[(FILE | {"dataset_path": path}, "space at an end: type data.jsonl") for path in (" a.jsonl", "a.jsonl\xa0")],
    (FILE | {"dataset_path": "`a`.jsonl"}, "no `: type dataset/train.jsonl"),
    *[(HUB | {"dataset_name": name}, "type owner/name") for name in ("rows", "a/b/c", "a b/c", "a/b\n")],
    (HUB | {"dataset_split": "train; rm"}, "type train"),
    *[
        ({"dataset_format": name}, "the sample holds messages: choose auto")
        for name in ("sharegpt", "alpaca", "prompt-completion", "columns", "text")
    ],
    (TEMPLATES | {"prompt_template": "no column"}, "no {column}: type {question}"),
    (TEMPLATES | {"completion_template": "{}"}, "no {column}: type {answer}"),
    *[
        (TEMPLATES | {"prompt_template": "{a}" + odd}, "unprintable: type {question}")
        for odd in ("\x7f", "\r", "\ud800")
    ],
    *[(TEMPLATES | {"completion_template": "{a}" + odd}, "unprintable: type {answer}") for odd in ("\0", "\u2029")],
    *[({"conda_env_name": name}, "type letters, digits, . _ -") for name in ("", "a:b", "a b", 'a"b', "a" * 65)],
    *[({"conda_env_name": name}, "no . or - at an end: type my-ft") for name in ("-n", "--prefix", ".", "..", "a.")],
    *[({"conda_env_name": name}, "a reserved name: type my-ft") for name in ("base", "root", "Nul", "con.x")],
    *[
        ({"system_prompt": f"a{odd}b"}, "a control character: type text")
        for odd in ("\x07", "\x85", "\u2028", "\udfff")
    ],
    *[({"max_seq_len": tokens}, "16 to 512: type 512") for tokens in (15, 513)],
    ({"model": "phi-2", "max_seq_len": 2049}, "16 to 2048: type 1024"),
    *[({"epochs": value}, "1 to 100: type 3") for value in (0, 101)],
    *[({"max_steps": value}, "0 to 1000000: type 0") for value in (-1, 1000001)],
    *[({"learning_rate": value}, "0.0000001 to 0.1: type 0.0002") for value in (0, 0.2, "nan", "inf", -1)],
    *[({"lora_r": value}, "1 to 512: type 16") for value in (0, 513)],
    *[({"lora_alpha": value}, "1 to 1024: type 32") for value in (0, 1025)],
    ({"learning_rate": "0.00001234567"}, "10 decimals at most: type 0.0002"),
    *[({"lora_dropout": value}, "0 to 0.9: type 0.05") for value in (-0.1, 1, "nan")],
    ({"lora_dropout": "0.12345678901"}, "10 decimals at most: type 0.05"),
    *[({"train_batch_size": value}, "1 to 256: type 4") for value in (0, 257)],
    *[({"eval_batch_size": value}, "1 to 256: type 4") for value in (0, 257)],
    *[({"gradient_accumulation_steps": value}, "1 to 512: type 4") for value in (0, 513)],
    *[(FILE | {"eval_split": value}, "0.01 to 0.5, or rows: type 0.1") for value in (0, 0.6, 1.5, "nan")],
    *[({"early_stopping_patience": value}, "0 to 100: type 0") for value in (-1, 101)],
    *[({"seed": value}, "0 to 4294967295: type 42") for value in (-1, 2**32)],
    *[({"data_seed": value}, "0 to 4294967295: type 42") for value in (-1, 2**32)],
    *[
        ({name: "neither"}, f"Invalid choice for '{name}': 'neither' is not in")
        for name in ("model", "device", "platform", "target", "method", "dataset_source", "environment", "train_on")
    ],
    ({"compute_dtype": "int8"}, "'int8' is not in"),
    (AZURE | {"quant_type": "int8"}, "'int8' is not in"),
    (AZURE | {"azure_gpu": "h100"}, "'h100' is not in"),
]


def test_every_name_of_the_contract_is_a_question_and_no_other_is_recorded(questions: Questions) -> None:
    recorded = [
        name
        for name, details in questions.items()
        if details.get("when", True) is not False and "secret" not in details
    ]
    assert sorted(recorded) == sorted(CONTRACT)


def test_a_question_says_what_it_is_in_two_lines_of_a_terminal(questions: Questions) -> None:
    for name in CONTRACT:
        lines = re.sub(r"\{%.*?%\}", "", questions[name]["help"]).split("\n")
        widths = [len(re.sub(r"\{\{.*?\}\}", "1.1", line)) for line in lines]
        assert len(lines) <= 2, name
        assert widths[0] <= FIRST_LINE, name
        assert max(widths) <= LATER_LINES, name


@pytest.mark.parametrize(("answers", "words"), REFUSED, ids=[str(number) for number, _ in enumerate(REFUSED)])
def test_an_invalid_answer_is_refused_in_a_message_that_fits_the_terminal(
    answers: dict[str, Any], words: str, answer: Answer
) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as refusal:
        answer(**answers)
    if "Validation error" in str(refusal.value):
        assert len(str(refusal.value)) <= COLUMNS


def test_every_question_with_invalid_answers_has_a_refusal_here(questions: Questions) -> None:
    refused = {name for answers, _ in REFUSED for name in answers}
    free = {name for name in CONTRACT if questions[name]["type"] in {"str", "int", "float"}}
    assert free <= refused


@pytest.mark.parametrize(
    ("source", "missing"), [("file", "dataset_path"), ("huggingface", "dataset_name"), ("custom", "custom_model_id")]
)
def test_an_answer_without_a_sensible_default_is_required(source: str, missing: str, answer: Answer) -> None:
    with pytest.raises(ValueError, match=f'Question "{missing}" is required'):
        answer(**({"model": source} if source == "custom" else {"dataset_source": source}))


def test_the_demo_trains_on_the_cpu_with_settings_of_its_own(answer: Answer) -> None:
    answers = answer()
    expected = {
        "model": "demo",
        "device": "cpu",
        "method": "lora",
        "dataset_source": "sample",
        "max_seq_len": 256,
        "learning_rate": 0.004,
        "lora_dropout": 0,
        "train_batch_size": 16,
        "compute_dtype": "float32",
        "gradient_checkpointing": False,
    }
    assert {name: answers[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (
            {"platform": "linux"},
            {"device": "gpu", "method": "qlora", "compute_dtype": "bfloat16", "train_batch_size": 4},
        ),
        ({"platform": "macos"}, {"device": "cpu", "method": "lora", "compute_dtype": "float32", "train_batch_size": 2}),
        ({"platform": "macos", "target": "azure"}, {"device": "gpu", "method": "qlora"}),
        ({"target": "azure", "azure_gpu": "serverless-t4"}, {"compute_dtype": "float16"}),
        ({"target": "azure", "azure_gpu": "serverless-a100"}, {"compute_dtype": "bfloat16"}),
        ({"target": "azure", "azure_gpu": "dedicated-nc24-a100"}, {"azure_location": "northeurope"}),
        ({"platform": "linux", "device": "cpu"}, {"method": "lora", "gradient_checkpointing": False}),
        ({}, {"epochs": 3, "max_steps": 0, "learning_rate": 0.0002, "max_seq_len": 1024, "lora_r": 16, "seed": 42}),
    ],
)
def test_the_defaults_follow_the_other_answers(given: dict[str, Any], expected: dict[str, Any], answer: Answer) -> None:
    answers = answer(model="phi-2", **given)
    assert {name: answers[name] for name in expected} == expected


@pytest.mark.parametrize(
    ("folder", "name"),
    [
        ("my-ft", "my-ft"),
        ("My Fine_Tuning!", "my-fine-tuning"),
        ("2026 tone", "tone"),
        ("日本", "finetuning"),
        ("x", "finetuning"),
        ("base", "finetuning"),
        ("a" * 31 + "-bc", "a" * 31),
    ],
)
def test_the_name_comes_from_the_folder(folder: str, name: str, worker: Callable[..., Any]) -> None:
    asked = worker(Path(folder), {})
    asked._ask()
    assert asked.answers.combined["project_name"] == name


def test_dependent_defaults_change_with_the_other_answers(render: Render, tmp_path: Path) -> None:
    def settings() -> dict[str, Any]:
        config = yaml.safe_load((tmp_path / "ws/finetuning/olive-config.yaml").read_text())["passes"]["finetune"]
        names = "learning_rate", "num_train_epochs", "per_device_train_batch_size", "gradient_checkpointing"
        return {name: config["training_args"].get(name) for name in names} | {"type": config["type"]}

    render(tmp_path / "ws", epochs=5)
    demo = settings()
    render(tmp_path / "ws", model="phi-2", device="gpu")  # over the demo, as an update does
    assert demo == {
        "type": "LoRA",
        "learning_rate": 0.004,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 16,
        "gradient_checkpointing": None,  # the estimate decides, whatever the model
    }
    assert settings() == {
        "type": "QLoRA",
        "learning_rate": 0.0002,
        "num_train_epochs": 5,
        "per_device_train_batch_size": 4,
        "gradient_checkpointing": None,
    }
    render(tmp_path / "ws", model="phi-2", device="gpu", gradient_checkpointing=False)
    assert settings()["gradient_checkpointing"] is False


def test_an_answer_to_a_question_that_is_not_asked_changes_nothing(render: Render, tmp_path: Path) -> None:
    for name, unused in {
        "model": {"custom_model_id": "owner/model", "custom_model_revision": "other"},
        "data": {"dataset_path": "rows.jsonl", "dataset_name": "owner/rows"},
        "format": {"prompt_template": "{a}", "completion_template": "{b}"},
        "azure": {"azure_resource_group": "other"},
        "rows": {"dataset_split": "other", "eval_split": 0.3, "dataset_format": "messages"},
        "conda": {"conda_env_name": "other", "environment": "venv"},
    }.items():
        plain, given = render(tmp_path / "ws"), render(tmp_path / name / "ws", **unused)
        for path in ("finetuning/olive-config.yaml", "setup/model.yaml", "setup/conda-environment.yml"):
            assert (given / path).read_text() == (plain / path).read_text(), name


def test_unusual_valid_answers_are_rendered_unchanged(render: Render, tmp_path: Path) -> None:
    awkward = 'He said: "it\'s {{ 7 * 7 }} # 50 %", {% raw %} \\n <b> – ü 日本 😀'
    answers = {
        "system_prompt": awkward,
        "dataset_source": "file",
        "dataset_path": f"C:\\data\\{awkward}.jsonl",
        "dataset_format": "columns",
        "prompt_template": awkward + " {phrase}",
        "completion_template": "{tone}: " + awkward,
        "learning_rate": 0.00002,
        "conda_env_name": "1.0",
        "project_name": "null",
    }
    workspace = render(tmp_path / "ws", **answers)
    config = yaml.safe_load((workspace / "finetuning/olive-config.yaml").read_text(encoding="utf-8"))
    rows = config["data_configs"][0]["load_dataset_config"]
    assert rows["train_file"] == answers["dataset_path"]
    assert rows["prompt_template"] == answers["prompt_template"]
    assert rows["completion_template"] == answers["completion_template"]
    assert config["data_configs"][0]["pre_process_data_config"]["system_prompt"] == awkward
    assert config["passes"]["finetune"]["training_args"]["learning_rate"] == 0.00002
    assert yaml.safe_load((workspace / "setup/conda-environment.yml").read_text())["name"] == "1.0"
    recorded = yaml.safe_load((workspace / ".copier-answers.yml").read_text(encoding="utf-8"))
    assert {name: recorded[name] for name in answers} == answers


@pytest.mark.parametrize(("answer", "written"), [(0.25, "0.25"), (200, "200")])
def test_held_out_rows_are_a_share_or_a_number(render: Render, tmp_path: Path, answer: float, written: str) -> None:
    workspace = render(tmp_path / "ws", dataset_source="file", dataset_path="rows.jsonl", eval_split=answer)
    config = (workspace / "finetuning/olive-config.yaml").read_text(encoding="utf-8")
    assert f" eval_split: {written}  #" in config


def test_the_model_file_holds_the_catalogue_s_facts_to_the_letter(
    models: dict[str, dict[str, Any]], template: Path, render: Render, tmp_path: Path
) -> None:
    families = yaml.safe_load((template / "catalog/chat_templates.yml").read_text(encoding="utf-8"))["families"]
    for name, entry in models.items():
        answers = {"custom_model_id": "owner/model"} if name == "custom" else {}
        facts = yaml.safe_load((render(tmp_path / "ws", model=name, **answers) / "setup/model.yaml").read_text())
        family = families[entry["chat_template"]]
        expected = {key: value for key, value in entry.items() if key in facts} | {
            "name": answers.get("custom_model_id", entry["name"]),
            "chat_template": family["template"],
            "special_tokens": family["special_tokens"],
        }
        page, licence = f"https://huggingface.co/{entry['hub_id']}/blob/{entry['revision']}", entry["licence_text"]
        from_hub = name not in ("demo", "custom")
        expected["licence_url"] = f"{page}/{licence}" if licence and not licence.startswith("https:") else licence
        expected["source"] = f"{page}/config.json" if from_hub else None
        assert facts == expected
        assert not set(entry) - set(facts) - {"hub_id", "revision", "instruct", "deprecated", "licence_text", "checked"}


def test_a_custom_model_is_a_pinned_repository_or_a_folder_without_revision(answer: Answer) -> None:
    hub = answer(model="custom", custom_model_id="owner/model", custom_model_revision="v1")
    assert (hub["hub_id"], hub["revision"]) == ("owner/model", "v1")
    for folder in ("../my-model", "/data/model", "~/model", "C:\\models\\mine"):
        own = answer(model="custom", custom_model_id=folder)
        assert (own["hub_id"], own["revision"]) == (folder, None)


ENTER, DOWN = "\r", "\x1b[B"


def prompts(template: Path, folder: Path, questions: Questions, keys: dict[str, str]) -> tuple[list[str], str]:
    """Answer Copier in a terminal of 80 columns with `keys`, else Enter. Return the questions met and all it showed."""
    first_lines = {
        details["help"].split("\n")[0].strip(): name for name, details in questions.items() if "help" in details
    }
    child = pexpect.spawn(
        str(Path(sys.executable).with_name("copier")),
        ["copy", "--skip-tasks", str(template), str(folder)],
        env=os.environ | {"PROMPT_TOOLKIT_NO_CPR": "1", "TERM": "xterm-256color", "COLUMNS": str(COLUMNS)},
        dimensions=(50, COLUMNS),
        encoding="utf-8",
        timeout=60,
    )
    met: list[str] = []
    shown = ""
    ends = ["Copying from template version", pexpect.EOF]
    while True:
        open_lines = [line for line, name in first_lines.items() if name not in met]
        index = child.expect_exact(open_lines + ends)
        shown += str(child.before) + (child.after if isinstance(child.after, str) else "")
        if index >= len(open_lines):
            break
        met.append(first_lines[open_lines[index]])
        child.expect_exact("\x1b[?7h")  # the end of the drawing: the question waits for its answer
        shown += child.before
        child.send(keys.get(met[-1], ENTER))
    shown += child.read() or ""
    child.close()
    assert child.exitstatus == 0, shown
    return met, shown


def test_the_default_asks_seven_questions_and_says_what_comes_next(
    template: Path, questions: Questions, render: Render, tmp_path: Path
) -> None:
    render(tmp_path / "ws", epochs=5)  # an answer given once is not asked for again
    met, shown = prompts(template, tmp_path / "ws", questions, {})
    assert met == ["project_name", "model", "target", "device", "dataset_source", "environment", "advanced"]
    assert yaml.safe_load((tmp_path / "ws/.copier-answers.yml").read_text())["epochs"] == 5
    assert "python finetuning/invoke_olive.py --check" in shown
    assert "python3 setup/create_env.py" in shown or os.name == "nt"


def test_a_model_of_the_catalogue_and_a_file_ask_nine_questions(
    template: Path, questions: Questions, tmp_path: Path
) -> None:
    keys = {"model": DOWN * 2 + ENTER, "dataset_source": DOWN + ENTER, "dataset_path": "rows.jsonl" + ENTER}
    met, _ = prompts(template, tmp_path / "ws", questions, keys)
    assert met == [
        *["project_name", "model", "target", "device", "dataset_source", "dataset_path"],
        *["environment", "download_model", "advanced"],
    ]
    recorded = yaml.safe_load((tmp_path / "ws/.copier-answers.yml").read_text())
    assert (recorded["model"], recorded["dataset_path"]) == ("llama-3-8b", "rows.jsonl")


def test_advanced_asks_every_question_that_applies(template: Path, questions: Questions, tmp_path: Path) -> None:
    met, _ = prompts(template, tmp_path / "ws", questions, {"advanced": "y"})
    without_meaning = {
        *{name for name in CONTRACT if name.startswith(("azure_", "custom_model_"))},
        *["dataset_path", "dataset_name", "dataset_split", "dataset_format", "prompt_template", "completion_template"],
        *["platform", "download_model", "eval_split", "quant_type", "double_quant"],
    }
    assert sorted(met) == sorted(CONTRACT - without_meaning)


def test_no_trust_is_needed_without_tasks_and_the_quick_worker_writes_what_the_command_writes(
    template: Path, render: Render, tmp_path: Path
) -> None:
    command = [str(Path(sys.executable).with_name("copier")), "copy", "--defaults"]
    wanted = ["-d", "model=phi-2", "-d", "device=gpu", str(template), str(tmp_path / "a/ws")]
    refused = subprocess.run([*command, *wanted], capture_output=True, text=True)
    assert (refused.returncode, "--trust" in refused.stderr) == (4, True)
    subprocess.run([*command, "--skip-tasks", *wanted], check=True, capture_output=True)
    render(tmp_path / "b/ws", model="phi-2", device="gpu")
    contents = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
        for folder in (tmp_path / "a/ws", tmp_path / "b/ws")
    ]
    assert contents[0] == contents[1]
