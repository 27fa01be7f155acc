"""Models with layers of several kinds, or with parts for images and sound: counted, trained, chatted with, exported.

The configurations are those that the entries of the catalogue describe. No config.json of the hub was read for them:
that the repositories write every one of these numbers as it stands here is not confirmed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Run, inference_of

Invoke = Callable[..., Run]
ENTRIES = yaml.safe_load((REPOSITORY / "catalog" / "models.yml").read_text(encoding="utf-8"))["models"]
COUNTED = {entry["id"]: entry for entry in ENTRIES if entry["parameters"]}
KINDS = {"qwen3_5": "qwen3.5-2b", "gemma4": "gemma-4-e2b-it", "lfm2": "lfm2.5-1.2b-instruct"}
NAMES = {
    "layers": "num_hidden_layers",
    "hidden_size": "hidden_size",
    "intermediate_size": "intermediate_size",
    "attention_heads": "num_attention_heads",
    "key_value_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "vocabulary": "vocab_size",
    "tie_word_embeddings": "tie_word_embeddings",
    "context": "max_position_embeddings",
}


def published(entry: dict[str, Any]) -> dict[str, Any]:
    """Return the config.json that a catalogue entry describes."""
    kind, more = entry["architecture"], entry["config"] or {}
    text = {theirs: entry[ours] for ours, theirs in NAMES.items()} | more
    if kind == "lfm2":
        text |= {"block_auto_adjust_ff_dim": False}
    if not entry["text_parameters"]:
        return {"model_type": kind, "pad_token_id": None} | text
    return {"model_type": kind, "text_config": {"model_type": f"{kind}_text"} | text}


@pytest.mark.parametrize("name", COUNTED)
def test_the_model_that_transformers_makes_has_the_parameters_of_the_catalogue(workspace: Path, name: str) -> None:
    from planning.architecture import Shape
    from planning.model_facts import shape_in

    entry = COUNTED[name]
    shape = shape_in(published(entry))
    assert shape
    assert shape.weights == shape.parameters == (entry["text_parameters"] or entry["parameters"])
    assert shape.is_right and shape.blocks == Shape.of(entry).blocks


def test_all_of_gemma_4_is_loaded_and_counted_beside_its_text_model(workspace: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from planning.model_facts import shape_in
    from planning.text_model import config_of

    entry = COUNTED["gemma-4-e2b-it"]
    whole = {"use_clipped_linears": False}
    config = published(entry) | {"vision_config": whole, "audio_config": whole}
    shape = shape_in(config)
    assert shape
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config_of(config))
    assert shape.parameters + shape.beside == sum(weight.numel() for weight in model.parameters())
    # The repository also counts a number for each layer, which is not trained, and keys and values of the layers that
    # take those of others; transformers loads none of these.
    kinds, own = entry["config"]["layer_types"], entry["layers"] - entry["config"]["num_kv_shared_layers"]
    widths = [512 if kind == "full_attention" else 256 for kind in kinds]
    unused = sum(2 * entry["hidden_size"] * width + width for width in widths[own:])
    assert shape.parameters + shape.beside + entry["layers"] + unused == entry["parameters"]


def test_of_qwen3_5_the_text_model_alone_is_loaded(workspace: Path) -> None:
    from planning.model_facts import shape_in
    from planning.text_model import class_name

    config = published(COUNTED["qwen3.5-2b"]) | {"vision_config": {"depth": 24, "hidden_size": 1024}}
    shape = shape_in(config)
    assert class_name(config) == "Qwen3_5ForCausalLM"
    assert shape and shape.beside == 0


# ---- a replica of each


@pytest.fixture
def replica(workspace: Path, renders: Path, invoke: Invoke) -> Callable[[str], Path]:
    """Return the folder of a small model of an architecture in models/, as the smoke run builds it."""

    def build(kind: str) -> Path:
        from preparing.dataset import chat_rows
        from training.tiny_model import build

        folder = workspace / "models" / kind
        if not folder.is_dir():
            facts = yaml.safe_load((renders / KINDS[kind] / "setup" / "model.yaml").read_text(encoding="utf-8"))
            sample = str(workspace / "dataset" / "sample-train.jsonl")
            build(folder, facts, chat_rows("train", train_file=sample, held_out_file=sample), steps=5)
        return folder

    return build


def loaded(folder: Path) -> Any:
    """Load a replica."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("kind", KINDS)
def test_the_adapter_has_the_parameters_that_the_check_counts(
    workspace: Path, replica: Callable[[str], Path], kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    import peft

    from planning.memory import adapter_parameters
    from planning.model_facts import shape_in
    from settings.run_settings import read_settings
    from training.train import in_text_model

    monkeypatch.chdir(workspace)
    folder = replica(kind)
    shape = shape_in(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    assert shape and shape.is_right and not shape.is_uniform
    named = COUNTED[KINDS[kind]]["target_modules"]
    for targets in (tuple(named), ("q_proj", "lm_head")):
        model = loaded(folder)
        chosen = in_text_model(model, list(targets))
        model = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=chosen))
        trained = sum(weight.numel() for weight in model.parameters() if weight.requires_grad)
        settings = replace(read_settings(), r=4, target_modules=targets)
        assert adapter_parameters(shape, settings) == trained


def test_only_the_text_model_of_gemma_4_gets_adapters(replica: Callable[[str], Path]) -> None:
    from training.train import in_text_model

    model = loaded(replica("gemma4"))
    names = {name for name, _ in model.named_modules()}
    everything = in_text_model(model, "all-linear")
    assert set(everything) < names and all("language_model." in name for name in everything)
    assert any("vision_tower" in name and name.endswith("q_proj") for name in names)
    queries = in_text_model(model, ["q_proj", "lm_head", "embed_tokens"])
    assert {name.rpartition(".")[2] for name in queries} == {"q_proj", "lm_head", "embed_tokens"}
    assert not any("tower" in name for name in queries)
    assert in_text_model(model, r".*\.q_proj") == r".*\.q_proj"


@pytest.mark.parametrize(("kind", "apart"), [("qwen3_5", False), ("lfm2", False), ("gemma4", True)])
def test_rows_are_packed_where_layers_keep_them_apart_and_padded_elsewhere(
    replica: Callable[[str], Path], capsys: pytest.CaptureFixture[str], kind: str, apart: bool
) -> None:
    import peft
    import torch

    from training.train import can_pack, in_text_model

    model = loaded(replica(kind))
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=in_text_model(model, "all-linear")))
    rows = [{"input_ids": torch.randint(3, 300, (24,)).tolist()} for _ in range(2)]
    assert can_pack(model, rows) is apart
    assert ("would mix packed rows" in capsys.readouterr().out) is not apart


@pytest.mark.parametrize("kind", KINDS)
def test_it_is_checked_trained_chatted_with_and_merged(
    workspace: Path, replica: Callable[[str], Path], invoke: Invoke, kind: str
) -> None:
    replica(kind)
    changes = {
        "target_modules": COUNTED[KINDS[kind]]["target_modules"],
        "max_steps": 3,
        "save_steps": 3,
        "eval_steps": 3,
    }
    changes |= {"max_rows": 64, "packing": True}

    def edit(text: str) -> str:
        return text.replace("models/demo", f"models/{kind}")

    checked = invoke("--check", settings=changes, edit=edit)
    assert checked.status == 0, checked.err
    assert "memory   not estimated: the model is not of the dense kind" in checked.out
    assert ("of them in the text model" in checked.out) == (kind == "gemma4")
    assert ("no ONNX model: the builder does not know" in checked.out) == (kind != "lfm2")
    run = invoke("--fresh", "--keep-worse", settings=changes, edit=edit)
    assert run.status == 0, run.err
    assert ("would mix packed rows: the batches are padded" in run.out) == (kind != "gemma4")

    with inference_of(workspace):
        from engine import Generation
        from load_engine import load

        engine = load(root=workspace)
        question = [{"role": "user", "content": run.json["examples"][0]["question"]}]
        answers = ["".join(engine.stream(question, Generation(max_new_tokens=12), print)) for _ in range(2)]
        assert answers[0] == answers[1]  # the second reads what was kept of the first
    command = [sys.executable, str(workspace / "finetuning" / "export.py"), "--format", "merged", "--agreement", "1"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "100.0% of the answers are base and adapter's" in done.stdout
    shutil.rmtree(workspace / "models" / "merged")


@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_a_token_in_the_chat_is_that_of_the_layers_that_keep_keys_and_values(
    workspace: Path, replica: Callable[[str], Path], kind: str
) -> None:
    import torch

    model = loaded(replica(kind))
    cache = model(input_ids=torch.arange(5, 25)[None], use_cache=True).past_key_values
    keys = [one for one in cache.layers if getattr(one, "keys", None) is not None and one.keys.numel()]
    with inference_of(workspace):
        from torch_loading import bytes_per_token

        expected = bytes_per_token(model.config.get_text_config(), 4)
    assert sum(one.keys.nbytes + one.values.nbytes for one in keys) == 20 * expected > 0


def test_a_deprecated_model_is_named_with_a_better_one(workspace: Path, renders: Path, invoke: Invoke) -> None:
    facts = workspace / "setup" / "model.yaml"
    original = facts.read_bytes()
    try:
        shutil.copy(renders / "phi-2" / "setup" / "model.yaml", facts)
        rendered = (renders / "phi-2" / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8")
        said = " ".join(invoke("--check", edit=lambda _: rendered).out.split())
    finally:
        facts.write_bytes(original)
    assert (
        "this model is deprecated and stays valid; a better one: copier update --trust --data model=phi-4-mini" in said
    )
    assert "deprecated" not in invoke("--check").out
