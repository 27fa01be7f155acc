"""The adapter's model card: its metadata for the hub, its code, and what it must not contain."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Run

CATALOGUE = yaml.safe_load((REPOSITORY / "catalog" / "models.yml").read_text(encoding="utf-8"))["models"]
LICENCES = {"mit", "apache-2.0", "llama2", "llama3", "llama3.1", "llama3.2", "gemma"}  # as the hub writes them
PHI = {"base_model": "microsoft/phi-2", "revision": "ef382358ec9e382308935a992d908de099b64c23"}


def run_json(**changes: Any) -> dict[str, Any]:
    """What models/run.json says after a run."""
    return {
        "base_model": "models/demo",
        "revision": None,
        "method": "lora",
        "adapter": "models/adapter",
        "dtype": "float32",
        "system_prompt": "",
        "thinking": False,
        "dataset_sha256": "da7a" * 16,
        "config": {
            "rows": {"dataset_name": None},
            "tokens": {"max_seq_len": 256, "train_on": "responses", "thinking": "off"},
            "adapter": {"r": 16, "alpha": 32, "target_modules": ["q_proj", "v_proj"]},
            "training": {"learning_rate": 0.004, "num_train_epochs": 8, "save_steps": 0.1},
        },
        "packages": {"peft": "0.21.2"},
        "machine": {"python": "3.12.1", "gpu": None},
        "data": {
            "source": "dataset/sample-train.jsonl",
            "train_rows": 800,
            "left_out_rows": 2,
            "held_out_rows": 160,
            "held_out_rows_trained_on": 0,
            "asked_rows": 160,
            "tokens": 18940,
            "answer_share": 0.0845,
            "cut_rows": 5,
            "end_of_answer": ["<|end|>"],
        },
        "metrics": {
            "before": {"eval_loss": 2.4, "perplexity": 11.0232, "accuracy": 0.25},
            "after": {"eval_loss": 1.75, "perplexity": 5.7546, "accuracy": 0.975},
        },
        "examples": [{"question": "Is the vault open?", "expected": "yes", "before": "no", "after": "yes"}],
        "finished": "2026-01-31T12:00:00+00:00",
    } | changes


def rows_of(name: str | None) -> dict[str, Any]:
    """The settings of a run on a dataset of the hub."""
    config = run_json()["config"]
    return config | {"rows": {"dataset_name": name}}


def card(workspace: Path, folder: Path, **changes: Any) -> Any:
    """Write a card with the workspace's own code, and read it as the hub's library does."""
    from huggingface_hub import ModelCard

    from reporting.model_card import write_model_card

    path = write_model_card(run_json(**changes), folder)
    assert [file.name for file in folder.iterdir()] == ["README.md"]
    return ModelCard.load(path)


def code(text: str) -> str:
    """Return the Python of a card."""
    (block,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return block


def test_the_library_of_the_hub_reads_the_metadata_of_the_card(workspace: Path, tmp_path: Path) -> None:
    data = card(workspace, tmp_path, **PHI, config=rows_of("owner/rows")).data
    assert (data.base_model, data.library_name, data.pipeline_tag) == ("microsoft/phi-2", "peft", "text-generation")
    assert (data.datasets, data.model_name) == (["owner/rows"], "phi-2-lora")
    assert "lora" in data.tags
    assert {result.metric_type: result.metric_value for result in data.eval_results} == {
        "exact_match": 0.975,
        "loss": 1.75,
        "perplexity": 5.7546,
    }
    assert all(result.dataset_type == "owner/rows" for result in data.eval_results)


def test_a_local_model_is_not_named_as_a_model_of_the_hub(workspace: Path, tmp_path: Path) -> None:
    data = card(workspace, tmp_path).data
    assert data.base_model is None
    assert data.datasets is None


@pytest.mark.parametrize("entry", CATALOGUE, ids=lambda entry: entry["id"])
def test_the_licence_is_the_base_model_s_as_the_hub_writes_it(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: dict[str, Any]
) -> None:
    from reporting import model_card

    source = f"https://huggingface.co/{entry['hub_id']}/blob/{entry['revision']}/config.json"
    described = entry["id"] not in ("demo", "custom")
    facts = {"licence": entry["licence"], "licence_url": "https://x.org/it", "source": source if described else None}
    (tmp_path / "setup").mkdir()
    (tmp_path / "setup" / "model.yaml").write_text(yaml.safe_dump(facts), encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    monkeypatch.setattr(model_card, "MODEL_FACTS", tmp_path / "setup" / "model.yaml")
    data = card(workspace, tmp_path / "adapter", base_model=entry["hub_id"] or "owner/model").data
    own = entry["licence"] == "LFM Open License v1.0"  # the hub calls it other, and shows its name and text
    assert data.license in ({"other"} if own else LICENCES) if entry["licence"] else data.license is None
    for another in ("owner/another", "models/smoke/base", f"{entry['hub_id']}-2"):
        assert card(workspace, tmp_path / "adapter", base_model=another).data.license is None


def test_a_licence_that_the_hub_does_not_know_is_named_and_linked(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reporting import model_card

    facts = {"licence": "Own Terms", "licence_url": "https://example.org/terms", "source": "x/microsoft/phi-2/y"}
    (tmp_path / "setup").mkdir()
    (tmp_path / "setup" / "model.yaml").write_text(yaml.safe_dump(facts), encoding="utf-8")
    (tmp_path / "adapter").mkdir()
    monkeypatch.setattr(model_card, "MODEL_FACTS", tmp_path / "setup" / "model.yaml")
    data = card(workspace, tmp_path / "adapter", **PHI).data
    assert (data.license, data.license_name, data.license_link) == ("other", "Own Terms", "https://example.org/terms")


def test_the_text_has_the_facts_of_the_run(workspace: Path, tmp_path: Path) -> None:
    text = card(workspace, tmp_path, **PHI).text
    for fact in (
        "| Exact answers | 25.0% | 97.5% |",
        "| Loss | 2.4000 | 1.7500 |",
        f"at revision `{PHI['revision']}`",
        "| learning_rate | 0.004 |",
        "| target_modules | q_proj, v_proj |",
        "| rows trained on | 798 |",
        "| rows cut at 256 tokens | 5 |",
        "da7a" * 16,
        "| peft | 0.21.2 |",
        "python inference/console_chat.py",
    ):
        assert fact in text, fact
    assert "\n\n\n" not in text


def test_the_code_names_revision_and_system_prompt(workspace: Path, tmp_path: Path) -> None:
    written = code(card(workspace, tmp_path, **PHI, system_prompt="Say \"yes\" or 'no'.\n").text)
    compile(written, "card", "exec")
    assert f'revision="{PHI["revision"]}"' in written
    assert repr("Say \"yes\" or 'no'.\n") in written


def test_the_card_has_no_path_of_this_machine_and_no_row(workspace: Path, tmp_path: Path) -> None:
    data = run_json()["data"] | {"source": "/home/someone/secret/rows.jsonl"}
    card(workspace, tmp_path, base_model="/home/someone/models/mine", data=data)
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "someone" not in text
    assert "`mine`" in text
    assert "vault" not in text


def test_a_card_without_questions_claims_no_answers(workspace: Path, tmp_path: Path) -> None:
    read = card(workspace, tmp_path, examples=[])
    assert {result.metric_type for result in read.data.eval_results} == {"loss", "perplexity"}
    assert "exact" not in read.text


def test_held_out_rows_that_were_trained_on_are_mentioned(workspace: Path, tmp_path: Path) -> None:
    assert "flatters" not in card(workspace, tmp_path).text
    data = run_json()["data"] | {"held_out_rows_trained_on": 7}
    assert "7 of the held-out rows were trained on too, which flatters" in card(workspace, tmp_path, data=data).text


def test_the_code_of_the_card_reproduces_the_measured_answers(
    invoke: Callable[..., Run],
    workspace: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = invoke("--fresh", settings={"max_steps": 60, "system_prompt": "Name the tone."})
    assert run.status == 0, run.err
    text = (workspace / "models" / "adapter" / "README.md").read_text(encoding="utf-8")
    assert str(workspace) not in text
    assert str(Path.home()) not in text
    example = next(example for example in run.json["examples"] if example["after"] != example["before"])
    assert example["question"] not in text
    monkeypatch.chdir(workspace)
    written = code(text)
    assert "Your question" in written
    own = workspace / "models/demo/generation_config.json"
    before = own.read_text(encoding="utf-8")
    own.write_text(json.dumps(json.loads(before) | {"do_sample": True, "temperature": 99.0, "repetition_penalty": 9.0}))
    try:
        exec(written.replace('"Your question"', repr(example["question"])), {})
    finally:
        own.write_text(before, encoding="utf-8")
    assert capsys.readouterr().out == example["after"] + "\n"


def test_the_card_says_how_many_processes_took_how_many_rows_a_step(workspace: Path, tmp_path: Path) -> None:
    config = run_json()["config"]
    config["training"] |= {"processes": 2, "rows_a_step": 32}
    text = card(workspace, tmp_path, config=config).text
    assert "| processes | 2 |\n| rows_a_step | 32 |" in text and "| save_steps" not in text


def test_a_broken_template_of_the_card_loses_no_adapter(
    invoke: Callable[..., Run], workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from reporting import model_card

    monkeypatch.setattr(model_card, "TEMPLATE", tmp_path / "model_card.md")
    model_card.TEMPLATE.write_text("{{ nothing }}", encoding="utf-8")
    run = invoke("--fresh", settings={"max_steps": 10})
    assert run.status == 1
    assert run.err.count("\n") == 1 and "'nothing' is undefined" in run.err
    assert run.json["config"]["training"]["max_steps"] == 10
    assert (workspace / "models" / "adapter" / "adapter_model.safetensors").is_file()


def test_a_model_in_a_folder_elsewhere_is_a_path_to_fill_in(workspace: Path, tmp_path: Path) -> None:
    text = card(workspace, tmp_path, base_model="/home/me/models/smollm2").content
    assert "base_model = 'path/to/smollm2'  # write where you have this model" in code(text)
    assert "/home/me" not in text
    assert "in the workspace's folder" not in text
