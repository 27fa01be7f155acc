"""--check: what it counts, what it refuses, how it looks; and the arithmetic of its estimates against PyTorch."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from hub import SUNDRIES, Hub

Invoke = Callable[..., Run]
CONFIG = {
    "model_type": "llama",
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 1000,
    "tie_word_embeddings": False,
    "max_position_embeddings": 2048,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}


def checked(run: Run) -> dict[str, Any]:
    """Return the one JSON object on stdout."""
    assert run.out.count("\n") == 1, run.out
    report: dict[str, Any] = json.loads(run.out)
    return report


@pytest.fixture
def machine_of(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Let the check see another machine."""
    from planning import hardware

    def change(**facts: Any) -> None:
        here = replace(hardware.look(), **facts)
        monkeypatch.setattr(hardware, "look", lambda: here)

    return change


@pytest.fixture
def settings(workspace: Path) -> Any:
    """Return the settings of the demo."""
    return settings_with({})


def settings_with(olive_pass: dict[str, Any], arguments: dict[str, Any] | None = None, device: str = "cpu") -> Any:
    """Return the settings of the demo with other ones for the pass, its training_args and the device."""
    from settings.config_file import read_file, the_pass
    from settings.run_settings import Settings

    config = read_file()
    config["systems"]["local_system"]["accelerators"][0]["device"] = device
    the_pass(config).update(olive_pass)
    the_pass(config)["training_args"] |= arguments or {}
    return Settings.of(config)


def test_the_check_says_what_there_is_in_plain_lines(invoke: Invoke, workspace: Path) -> None:
    run = invoke("--check")
    assert run.status == 0, run.err
    labels = " ".join(line.split()[0] for line in run.out.splitlines() if not line.startswith(" "))
    assert labels.startswith("model method device memory disk base adapter data length tokens answers cut memory disk")
    assert "400 steps of 16 rows: 8 epochs" in run.out
    assert "no row is longer than max_seq_len 256" in run.out
    assert "gradient checkpointing off" in run.out
    assert run.out.splitlines()[-1].endswith("Next: python finetuning/invoke_olive.py")


def test_json_is_one_object_and_agrees_with_the_rows(invoke: Invoke, workspace: Path) -> None:
    from planning import token_counts
    from preparing.dataset import chat_rows
    from preparing.tokens import IGNORED, load_tokenizer, tokenise

    invoke("--smoke", settings={"max_steps": 1})
    report = checked(invoke("--check", "--json"))
    rows = chat_rows("train", train_file=str(workspace / "dataset/sample-train.jsonl"), held_out_file="x")
    tokenizer = token_counts.demo_tokenizer()
    if (workspace / "models" / "demo").is_dir():
        tokenizer = load_tokenizer(str(workspace / "models" / "demo"))
    labels = [one["labels"] for row in rows for one in tokenise(tokenizer, row)]
    lengths = sorted(map(len, labels))
    data = report["data"]
    assert data["rows"] == {"train": 800, "held_out": 160}
    assert data["tokens"] | {"p95": 0} == {"min": lengths[0], "median": lengths[400], "p95": 0, "max": lengths[-1]}
    assert sum(data["histogram"].values()) == 800
    learnt = sum(label != IGNORED for row in labels for label in row)
    assert data["answer_share"] == pytest.approx(learnt / sum(lengths), abs=1e-4)
    assert report["problem"] is None
    memory = report["estimate"]["memory"]
    assert memory["total"] == pytest.approx(sum(memory.values()) - memory["total"], abs=10)


def test_json_needs_the_check(invoke: Invoke) -> None:
    assert invoke("--json").status == 2


def test_json_holds_the_sentence_for_wrong_settings_too(invoke: Invoke) -> None:
    run = invoke("--check", "--json", edit=lambda text: text.replace("learning_rate:", "learning_rat:"))
    assert run.status == 1
    assert "did you mean learning_rate?" in checked(run)["problem"]
    assert run.err.startswith("error: ")


def test_max_steps_and_epochs_say_which_of_them_decides(invoke: Invoke) -> None:
    shorter = checked(invoke("--check", "--json", settings={"max_steps": 20}))["data"]
    assert (shorter["steps"], shorter["decided_by"], shorter["steps_of_epochs"]) == (20, "max_steps", 400)
    longer = checked(invoke("--check", "--json", settings={"max_steps": 1000}))["data"]
    assert (longer["steps"], longer["decided_by"]) == (400, "epochs")
    said = invoke("--check", settings={"max_steps": 1000}).out
    assert "epochs end the run before max_steps 1000" in " ".join(said.split())


def test_cut_rows_are_counted_and_a_cut_of_every_answer_is_refused(invoke: Invoke) -> None:
    run = invoke("--check", "--json", settings={"max_seq_len": 24, "max_bad_rows": 0.9})
    data = checked(run)["data"]
    assert run.status == 0 and 0 < data["without_answer"] <= data["truncated"] < 800
    run = invoke("--check", settings={"max_seq_len": 16})
    assert run.status == 1
    assert "max_seq_len 16 cuts off every answer of 795 in 800 rows" in run.err
    enough = int(run.err.split("set max_seq_len: ")[1].split()[0])
    assert invoke("--check", settings={"max_seq_len": enough}).status == 0
    assert invoke("--check", settings={"max_seq_len": enough - 1}).status == 1


def test_memory_that_is_short_names_the_setting_that_makes_it_fit(
    invoke: Invoke, machine_of: Callable[..., None]
) -> None:
    needed = checked(invoke("--check", "--json"))["estimate"]["memory"]
    room = needed["total"] - needed["activations"] // 3
    machine_of(ram_free=room)
    run = invoke("--check", settings={"gradient_checkpointing": False})
    assert run.status == 1 and run.err.count("\n") == 1
    assert "The run needs about" in run.err
    setting = run.err.split("set ")[1].split(",")[0].split(".")[0]
    name, value = setting.split(": ")
    assert name in ("gradient_checkpointing", "per_device_train_batch_size")
    fitting = invoke("--check", settings={"gradient_checkpointing": False, name: json.loads(value)})
    assert fitting.status == 0, fitting.err
    machine_of(ram_free=2**29)
    assert "choose a smaller model or a larger machine" in invoke("--check").err


def test_a_run_refuses_what_the_check_refuses(invoke: Invoke, machine_of: Callable[..., None]) -> None:
    machine_of(ram_free=2**29)
    run = invoke()
    assert run.status == 1 and "The run needs about" in run.err and "Evaluating" not in run.out
    machine_of(ram_free=2**40, disk_free=10**6)
    assert "GiB of disk are free and the run needs" in invoke("--check").err


def test_without_the_gpu_that_is_asked_for_the_needs_are_said_all_the_same(invoke: Invoke) -> None:
    run = invoke("--check", "--json", edit=lambda text: text.replace("device: cpu", "device: gpu"))
    report = checked(run)
    assert run.status == 1 and "PyTorch sees no NVIDIA GPU" in report["problem"]
    assert report["estimate"]["memory_limit"] is None and report["estimate"]["memory"]["total"] > 0


def test_a_gpu_that_is_too_small_is_named_with_its_driver(
    invoke: Invoke, machine_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planning import hardware

    machine_of(gpu="NVIDIA T4", gpus=1, driver="550.1", vram=16 * 2**30, vram_free=2**29)
    monkeypatch.setattr(hardware, "speed", lambda *_: 1e13)
    run = invoke("--check", edit=lambda text: text.replace("device: cpu", "device: gpu"))
    assert run.status == 1 and "NVIDIA T4, driver 550.1" in run.out
    assert "GiB of GPU memory and 0.5 are free" in run.err


def nvidia_smi(folder: Path, name: str, driver: str, capability: str) -> str:
    """Write an nvidia-smi that lists one GPU, as an older one without compute_cap if "" is given; return a PATH."""
    folder.mkdir()
    asked = 'case "$1" in *compute_cap*) '
    asked += f'echo "{driver}, {capability}, {name}" ;; ' if capability else "echo 'is not a valid field'; exit 2 ;; "
    asked += f'*version,name) echo "{driver}, {name}" ;; *) echo "{driver}" ;; esac'
    (folder / "nvidia-smi").write_text(f"#!/bin/sh\n{asked}\n")
    (folder / "nvidia-smi").chmod(0o755)
    return str(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="the programs on PATH are shell scripts")
@pytest.mark.parametrize(
    ("name", "driver", "capability", "seen", "said"),
    [
        (
            "Tesla V100",
            "580.65.06",
            "7.0",
            True,
            "has driver 580.65.06 and compute capability 7.0, and this PyTorch for",
        ),
        ("NVIDIA A100", "535.104.05", "8.0", False, "or newer: update the driver, or run `TORCH_INDEX_URL=https://"),
        ("NVIDIA A100", "535.104.05", "8.0", True, None),  # with NVIDIA's packages for forward compatibility
        (
            "Quadro",
            "470.57",
            "",
            False,
            "The Quadro has driver 470.57, and this PyTorch for CUDA 13.0 needs driver 580",
        ),
        ("NVIDIA L4", "580.65.06", "8.9", True, None),
        ("NVIDIA L4", "580.65.06", "[N/A]", True, None),
    ],
)
def test_a_driver_or_gpu_that_is_too_old_for_pytorch_is_said_with_both_numbers(
    workspace: Path,
    machine_of: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    name: str,
    driver: str,
    capability: str,
    seen: bool,
    said: str | None,
) -> None:
    from planning import hardware

    monkeypatch.chdir(workspace)
    monkeypatch.setenv("PATH", nvidia_smi(tmp_path / "programs", name, driver, capability))
    found = hardware.too_old("13.0", seen)
    assert found is None if said is None else found and said in found
    assert hardware.driver() == driver and hardware.too_old(None, seen) is None
    machine_of(gpu=name, gpus=1, bf16=True, too_old=found)
    assert hardware.lacking(settings_with({}, device="gpu"), hardware.look()) == found


@pytest.mark.parametrize("bf16", [True, False])
def test_bfloat16_is_refused_on_a_gpu_that_does_not_compute_in_it(
    workspace: Path, machine_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch, bf16: bool
) -> None:
    from planning import hardware

    monkeypatch.chdir(workspace)
    machine_of(gpu="NVIDIA T4", gpus=1, bf16=bf16)
    assert hardware.lacking(settings_with({}, device="gpu"), hardware.look()) is None
    said = hardware.lacking(settings_with({"torch_dtype": "bfloat16"}, device="gpu"), hardware.look())
    assert said is None if bf16 else said and "NVIDIA T4 does not compute in bfloat16: set torch_dtype" in said


def test_gradient_checkpointing_that_nobody_set_is_switched_on_when_memory_is_short(
    workspace: Path, settings: Any, machine_of: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planning import fit
    from preparing.tokenised import Tokenised

    monkeypatch.chdir(workspace)
    row = {"input_ids": [7] * 30, "labels": [-100] * 20 + [7] * 10}
    found = {part: Tokenised([[]] * count, [[row]] * count, 256) for part, count in (("train", 64), ("held_out", 8))}

    def decided(**facts: Any) -> tuple[Any, str]:
        machine_of(**facts)
        settled, _, line = fit.settle(settings, found)
        return settled.gradient_checkpointing, line

    assert settings.gradient_checkpointing is None
    at_ease, line = decided(ram_free=2**40)
    assert at_ease is False and "off, not needed" in line
    lengths = fit.lengths_seen({part: fit.tokens_of(rows) for part, rows in found.items()}, settings.max_seq_len)
    shape = fit.find(settings).shape
    assert shape
    needed = fit.memory(shape, settings, lengths["train"], lengths["held_out"]).total
    pressed, line = decided(ram_free=int(needed / fit.MARGIN) - 1)
    assert pressed is True and "on, to save memory" in line


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3", "phi3", "phi", "gemma3_text", "granite"])
def test_what_autograd_keeps_of_a_token_is_what_the_estimate_says(
    architecture: str, dropout: float, dtype: str, settings: Any
) -> None:
    import torch

    from planning.architecture import Shape
    from planning.memory import per_token

    kept = kept_by_autograd(architecture, dropout, getattr(torch, dtype), tokens=64)
    shape = Shape.of(CONFIG | {"model_type": architecture})
    settings = replace(settings, torch_dtype=dtype, lora_dropout=dropout, target_modules=None)
    assert per_token(shape, settings, masked=False) == pytest.approx(kept, rel=0.08)


def kept_by_autograd(architecture: str, dropout: float, dtype: Any, tokens: int) -> float:
    """Return the bytes that a forward pass of one block keeps of one token: what three blocks keep more than one."""
    import peft
    import torch
    import transformers

    from training.fused_lora import fuse

    sizes = []
    for layers in (1, 3):
        config = transformers.AutoConfig.for_model(
            **CONFIG | {"model_type": architecture, "num_hidden_layers": layers, "use_cache": False}
        )
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
        lora = peft.LoraConfig(r=16, lora_dropout=dropout, target_modules="all-linear", task_type="CAUSAL_LM")
        model = peft.get_peft_model(model, lora).train()
        fuse(model)
        weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
        seen: dict[int, Any] = {}

        def keep(tensor: Any, weights: set[int] = weights, seen: dict[int, Any] = seen) -> Any:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in weights:
                seen[storage.data_ptr()] = storage
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model.base_model.model.model(input_ids=torch.ones(1, tokens, dtype=torch.long))
        assert output is not None
        sizes.append(sum(storage.nbytes() for storage in seen.values()) / tokens)
    return (sizes[1] - sizes[0]) / 2


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_the_adapter_has_as_many_weights_as_are_counted(method: str, settings: Any) -> None:
    import peft
    import transformers

    from planning.architecture import Shape
    from planning.memory import adapter_parameters

    config = transformers.AutoConfig.for_model(**CONFIG)
    model = transformers.AutoModelForCausalLM.from_config(config)
    options: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    adapter = {
        "lora": lambda: peft.LoraConfig(**options),
        "dora": lambda: peft.LoraConfig(use_dora=True, **options),
        "loha": lambda: peft.LoHaConfig(**options),
        "lokr": lambda: peft.LoKrConfig(**options),
    }[method]()
    model = peft.get_peft_model(model, adapter)
    counted = adapter_parameters(Shape.of(CONFIG), replace(settings, method=method, r=8, target_modules=None))
    assert counted == sum(weight.numel() for weight in model.parameters() if weight.requires_grad)


def test_a_padded_batch_counts_its_padding_and_a_packed_one_does_not(workspace: Path) -> None:
    from planning.row_lengths import Lengths, batches

    rows = Lengths([bytes(5) + b"\1" * 5, bytes(35) + b"\1" * 5])
    assert (batches(rows, 2, packing=True).tokens, batches(rows, 2, packing=False).tokens) == (50, 80)
    assert (batches(rows, 2, packing=True).logits, batches(rows, 2, packing=False).logits) == (10, 20)
    rows = Lengths([bytes(35) + b"\1" * 5, bytes(33) + b"\1" * 5])
    assert batches(rows, 2, packing=False).logits == 14  # columns 33 to 39, in both rows
    turns = (bytes(15) + b"\1" * 5) * 2  # an answer in the middle, and one at the end
    assert Lengths([turns]).cut(30).labels == [5], "the first answer stays"
    assert Lengths([turns]).cut(15).masks == [], "without an answer, a row is left out"
    assert batches(Lengths([turns, bytes(30) + b"\1" * 10]), 2, packing=False).logits == 30
    assert batches(rows, 1, packing=False).masked == 0


def test_of_a_batch_in_pieces_the_largest_piece_counts(workspace: Path) -> None:
    from planning.row_lengths import Lengths, batches

    rows = Lengths([bytes(15) + b"\1" * 5] * 6)
    assert batches(rows, 6, packing=True, piece=60) == replace(batches(rows, 3, packing=True), mean_tokens=120)
    assert batches(rows, 6, packing=True, piece=7).tokens == 20, "a row is not divided"
    draw = random.Random(0)
    for _ in range(300):
        lengths = [draw.randint(1, 60) for _ in range(draw.randint(1, 12))]
        rows, size, piece = Lengths([b"\1" * length for length in lengths]), draw.randint(1, 12), draw.randint(1, 90)
        whole, divided = batches(rows, size, packing=True), batches(rows, size, packing=True, piece=piece)
        assert divided.mean_tokens == whole.mean_tokens
        assert min(whole.tokens, max(lengths)) <= divided.tokens <= max(piece, *lengths)
        assert divided.logits == divided.tokens


@pytest.mark.parametrize(
    ("changes", "advice"),
    [
        ({"gradient_checkpointing": False}, "set gradient_checkpointing: true"),
        (
            {"gradient_checkpointing": True, "per_device_train_batch_size": 4},
            "set per_device_train_batch_size: 2 and gradient_accumulation_steps: 2",
        ),
        ({"gradient_checkpointing": True, "per_device_train_batch_size": 1}, "set max_seq_len: 128"),
    ],
)
def test_a_full_gpu_is_told_with_estimate_peak_and_the_setting_to_change(
    workspace: Path, changes: dict[str, Any], advice: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch

    from planning.advice import explained
    from settings.config_file import ConfigError

    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 15 * 2**30)
    with pytest.raises(ConfigError) as error, explained(settings_with({}, changes), 12.5 * 2**30):
        raise torch.OutOfMemoryError("CUDA out of memory.")
    assert "12.5 GiB were estimated and 15.0 GiB were in use" in str(error.value)
    assert advice in str(error.value)


@pytest.mark.parametrize(
    ("day", "shown"),
    [
        ("2026-12-31", "in eastus, 2026-10-02, prices.azure.com"),
        ("2027-01-01", "2026-10-02, 91 days ago, prices.azure"),
    ],
)
def test_a_run_in_azure_is_held_against_the_chosen_gpu_and_priced(
    invoke: Invoke, workspace: Path, monkeypatch: pytest.MonkeyPatch, day: str, shown: str
) -> None:
    from datetime import date

    from planning import cost

    class Day(date):
        @classmethod
        def today(cls) -> Day:
            return cls.fromisoformat(day)

    monkeypatch.setattr(cost, "date", Day)
    facts = workspace / "setup" / "azure_gpus.yaml"
    original = facts.read_text(encoding="utf-8")
    try:
        facts.write_text(
            original.replace('target: "local"', 'target: "azure"').replace("gpu: null", "gpu: serverless-t4")
        )
        run = invoke("--check", edit=lambda text: text.replace("device: cpu", "device: gpu"))
    finally:
        facts.write_text(original, encoding="utf-8")
    assert run.status == 0, run.err
    assert "chosen   NVIDIA T4 16 GB, serverless: about" in run.out
    assert shown in run.out and "rough" in run.out


def test_a_table_fits_a_terminal_of_eighty_columns(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from planning import show_plan

    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setenv("TTY_COMPATIBLE", "1")
    facts = {"name": "a/b", "revision": None, "commit": None, "folder": None, "download_bytes": 2**33}
    facts |= {"parameters": 10**9, "trained_parameters": 10**7, "own_template": False, "no_int4": None}
    facts |= {"text_parameters": 8 * 10**8, "replaced_by": "a-better-one"}
    show_plan.show("model", facts)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) > 2 and any("get_model" in line for line in lines)


def test_the_first_line_comes_before_anything_heavy_is_imported(workspace: Path) -> None:
    code = """
import sys
sys.argv = ["invoke_olive.py", "--check"]
sys.path.insert(0, sys.path.pop(0) or "finetuning")
import invoke_olive
from planning import show_plan
def show(part, facts):
    assert not {"torch", "transformers", "olive", "datasets"} & set(sys.modules), sorted(sys.modules)
    print(part, facts["model"])
    raise SystemExit(7)
show_plan.show = show
invoke_olive.main()
"""
    environment = {"PYTHONPATH": str(workspace / "finetuning"), "PATH": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (7, "run models/demo\n"), done.stderr


# --------------------------------------------------------------------------------------- models that are not here


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """Serve a hub on this machine that has me/tiny and me/gated; their weights are zeros."""
    from huggingface_hub import constants

    weights = tmp_path / "model.safetensors"
    with weights.open("wb") as file:
        file.truncate(120 * 2**20)
    model = {"config.json": json.dumps(CONFIG).encode(), "tokenizer.json": b"{}", "model.safetensors": weights}
    old = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"9"}
    with Hub() as server:
        server.add("me/tiny", SUNDRIES | model | {"pytorch_model.bin": b"9"})
        server.add("me/gated", SUNDRIES | model, gated=True)
        server.add("me/old", SUNDRIES | old)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
        monkeypatch.delenv("HF_TOKEN", raising=False)
        yield server


def test_a_model_that_is_not_here_is_sized_by_the_hub_and_is_no_error(invoke: Invoke, hub: Hub) -> None:
    run = invoke("--check", edit=lambda text: text.replace("models/demo", "me/tiny"))
    assert run.status == 0, run.err
    assert "a download of 0.12 GiB: python setup/get_model.py" in run.out
    assert "estimated from characters" in run.out
    assert "Next: python setup/get_model.py" in run.out
    assert len(hub.asked) == 2, "a few KB: the model's facts and its config.json"


def test_old_weights_are_refused_before_they_are_fetched(invoke: Invoke, hub: Hub) -> None:
    run = invoke("--check", edit=lambda text: text.replace("models/demo", "me/old"))
    assert run.status == 1 and "me/old has its weights as pytorch_model.bin alone" in run.err


def test_a_vision_model_is_refused_by_the_check_and_by_get_model_before_its_weights_are_fetched(
    invoke: Invoke, workspace: Path, hub: Hub, tmp_path: Path
) -> None:
    vision = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": CONFIG}
    files = {"config.json": json.dumps(vision).encode(), "tokenizer.json": b"{}", "model.safetensors": bytes(9)}
    hub.add("me/vision", SUNDRIES | files)
    words = "me/vision is a Mistral3ForConditionalGeneration around llama, which transformers does not load"
    run = invoke("--check", edit=lambda text: text.replace("models/demo", "me/vision"))
    assert run.status == 1 and words in run.err
    config = workspace / "finetuning" / "olive-config.yaml"
    before = config.read_text(encoding="utf-8")
    config.write_text(before.replace("models/demo", "me/vision"), encoding="utf-8")
    try:
        environment = os.environ | {"HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "0"}
        command = [sys.executable, str(workspace / "setup" / "get_model.py")]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    finally:
        config.write_text(before, encoding="utf-8")
    assert done.returncode == 1 and words in done.stderr
    assert not hub.sent["model.safetensors"]


def test_a_gated_model_without_a_token_is_refused(invoke: Invoke, hub: Hub) -> None:
    run = invoke("--check", edit=lambda text: text.replace("models/demo", "me/gated"))
    assert run.status == 1
    assert "me/gated is gated: accept its licence on" in run.err and "HF_TOKEN" in run.err


def test_a_model_that_the_hub_does_not_know_is_refused(invoke: Invoke, hub: Hub) -> None:
    run = invoke("--check", edit=lambda text: text.replace("models/demo", "you/nothing"))
    assert run.status == 1 and "you/nothing does not exist on the hub or is private" in run.err


def test_offline_the_check_says_what_it_cannot_know_and_goes_on(invoke: Invoke) -> None:
    started = time.monotonic()
    run = invoke("--check", edit=lambda text: text.replace("models/demo", "me/tiny"))
    assert run.status == 0 and "needs not known" in run.out
    assert time.monotonic() - started < 8


def test_a_hub_that_never_answers_does_not_hold_the_check(
    workspace: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    from planning import model_facts

    silent = threading.Event()
    monkeypatch.setattr(model_facts, "ask_hub", lambda *_: silent.wait(60))
    monkeypatch.setattr(model_facts, "WAIT", 0.1)
    model = model_facts.elsewhere("me/tiny", None, {"source": None})
    silent.set()
    assert (model.shape, model.download, model.problem) == (None, 0, None)


def test_what_is_not_a_model_of_known_shape_has_no_estimate(workspace: Path) -> None:
    from planning import model_facts

    assert model_facts.shape_in({"model_type": "mamba", "d_model": 8}) is None
    assert model_facts.shape_in({"model_type": "gemma3n_text"}) is None  # a list of intermediate sizes
    assert model_facts.shape_in({"text_config": CONFIG, "model_type": "gemma3"})


IN_THE_CATALOGUE = ("llama", "mistral", "phi", "phi3", "qwen2", "qwen3", "smollm3", "gemma3_text", "granite")
OTHER_DENSE = ("gemma", "gemma2", "olmo", "olmo2", "olmo3", "cohere", "glm", "glm4", "stablelm")
NOT_DENSE = ("starcoder2", "gpt_neox", "arcee", "recurrent_gemma", "qwen3_next", "olmo_hybrid")
EXPERTS = {  # with the numbers of the real models, and their weights as published, in billions
    "OLMoE-1B-7B": ({"model_type": "olmoe", "intermediate_size": 1024}, 6.92),
    "Qwen3-30B-A3B": ({"model_type": "qwen3_moe", "num_hidden_layers": 48, "head_dim": 128}, 30.5),
    "Mixtral-8x7B": ({"model_type": "mixtral"}, 46.7),
    "gpt-oss-120b": ({"model_type": "gpt_oss"}, 117),
}


@pytest.mark.parametrize("kind", [*IN_THE_CATALOGUE, *OTHER_DENSE, *NOT_DENSE])
def test_an_estimate_counts_the_weights_within_a_hundredth_or_there_is_none(workspace: Path, kind: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from planning.model_facts import shape_in

    config = AutoConfig.for_model(kind)
    with torch.device("meta"):
        weights = sum(weight.numel() for weight in AutoModelForCausalLM.from_config(config).parameters())
    shape = shape_in(json.loads(config.to_json_string(use_diff=False)))
    assert shape and shape.is_right == (abs(shape.parameters / weights - 1) < 0.01) == (kind not in NOT_DENSE)


@pytest.mark.parametrize("name", EXPERTS)
def test_a_model_with_experts_has_all_its_weights_and_no_estimate(workspace: Path, name: str) -> None:
    from planning.model_facts import shape_in

    changes, billions = EXPERTS[name]
    shape = shape_in(changes)
    assert shape and shape.weights
    assert shape.weights / 1e9 == pytest.approx(billions, rel=0.01)
    assert not shape.is_right


def test_a_run_on_a_model_with_experts_is_not_said_to_fit(
    workspace: Path, invoke: Invoke, machine_of: Callable[..., None]
) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig

    from training.tiny_model import build_demo

    build_demo()
    tokenizer = AutoTokenizer.from_pretrained(workspace / "models" / "demo")
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = MixtralConfig(vocab_size=len(tokenizer), num_key_value_heads=2, num_local_experts=4, **sizes)
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(workspace / "models" / "experts")
    tokenizer.save_pretrained(workspace / "models" / "experts")
    changes = {"model_path": "models/experts"}
    run = invoke("--check", settings=changes)
    assert run.status == 0, run.err
    assert "memory   not estimated: the model is not of the dense kind" in run.out
    assert "fits" not in run.out
    assert run.out.endswith(
        "Nothing speaks against this run, but its memory is not known. Next: python finetuning/invoke_olive.py\n"
    )
    weights = 4 * sum(weight.numel() for weight in model.parameters())
    machine_of(ram_free=weights - 1)
    for arguments in (("--check",), ()):
        run = invoke(*arguments, settings=changes)
        assert run.status == 1
        assert "The weights alone take 0.0 GiB of memory and 0.0 are free: choose a smaller model" in run.err
    machine_of(ram_free=weights)
    assert invoke("--check", settings=changes).status == 0
