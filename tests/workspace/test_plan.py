"""What the plan knows before a run: whether it learns, loads and knows every token, and which settings clash."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY, Run

Invoke = Callable[..., Run]
ENTRIES = yaml.safe_load((REPOSITORY / "catalog" / "models.yml").read_text(encoding="utf-8"))["models"]
ARCHITECTURES = sorted({entry["architecture"] for entry in ENTRIES})


def refused(run: Run, *words: str) -> None:
    assert run.status == 1, run.out
    assert run.err.startswith("error: ") and run.err.count("\n") == 1, run.err
    for word in words:
        assert word in run.err


# ---- steps that learn

ONE_STEP = {"max_steps": 1}
SCHEDULES = [
    {"lr_scheduler_type": "linear", "warmup_steps": 0.03},
    {"lr_scheduler_type": "linear", "warmup_steps": 0},
    {"lr_scheduler_type": "cosine", "warmup_steps": 3},
    {"lr_scheduler_type": "cosine_with_restarts", "warmup_steps": 1, "lr_scheduler_kwargs": {"num_cycles": 3}},
    {"lr_scheduler_type": "polynomial", "warmup_steps": 2, "lr_scheduler_kwargs": {"lr_end": 0.0, "power": 2.0}},
    {"lr_scheduler_type": "constant", "warmup_steps": 5},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 5},
    {"lr_scheduler_type": "constant_with_warmup", "warmup_steps": 40},
    {"lr_scheduler_type": "inverse_sqrt", "warmup_steps": 2},
    {"lr_scheduler_type": "reduce_lr_on_plateau", "warmup_steps": 0},
    {"lr_scheduler_type": "warmup_stable_decay", "warmup_steps": 2, "lr_scheduler_kwargs": {"num_decay_steps": 3}},
]


def settings_with(arguments: dict[str, Any]) -> Any:
    """Return the settings of the demo with other training_args."""
    from settings.config_file import read_file, the_pass
    from settings.run_settings import Settings

    config = read_file()
    the_pass(config)["training_args"] |= arguments
    return Settings.of(config)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda schedule: f"{schedule['lr_scheduler_type']}")
def test_the_steps_that_learn_are_those_in_which_the_trainer_has_a_learning_rate(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, schedule: dict[str, Any]
) -> None:
    """Compared with transformers.Trainer itself, on a model of one weight."""
    import torch
    import transformers

    from planning.schedule import learning_steps
    from settings.combinations import training_arguments

    monkeypatch.chdir(workspace)
    settings = settings_with(schedule | {"max_steps": 10, "gradient_checkpointing": False})
    rates = []

    class Model(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, x: Any = None, labels: Any = None) -> Any:
            return {"loss": (self.weight * x).sum(), "logits": x}

    class Rates(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *_: Any, optimizer: Any = None, **options: Any) -> None:
            rates.append(optimizer.param_groups[0]["lr"])

    arguments = training_arguments(settings)
    arguments.output_dir, arguments.save_strategy, arguments.eval_steps = str(tmp_path), "no", 5
    arguments.load_best_model_at_end, arguments.per_device_train_batch_size = False, 1
    rows = [{"x": torch.ones(1), "labels": torch.ones(1)}] * 100
    trainer = transformers.Trainer(Model(), arguments, train_dataset=rows, eval_dataset=rows[:1], callbacks=[Rates()])
    trainer.train()
    assert len(rates) == 10
    assert learning_steps(settings, 10) == sum(rate > 0 for rate in rates)


def test_the_plan_says_how_many_steps_learn(invoke: Invoke) -> None:
    run = invoke("--check", "--json")
    assert json.loads(run.out)["data"]["learning_steps"] == 388 + 11, "the first of 12 steps of warm-up has the rate 0"
    assert "399 of them with a learning rate above 0" in invoke("--check").out
    assert "of them with a learning rate" not in invoke("--check", settings={"warmup_steps": 0}).out


@pytest.mark.parametrize("arguments", [("--check",), ()])
@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (ONE_STEP, "its only step has the learning rate 0: set warmup_steps: 0"),
        ({"gradient_accumulation_steps": 1000, "num_train_epochs": 1}, "its only step has the learning rate 0"),
    ],
)
def test_a_run_that_would_train_nothing_is_refused(
    invoke: Invoke, workspace: Path, arguments: tuple[str, ...], settings: dict[str, Any], words: str
) -> None:
    refused(invoke(*arguments, settings=settings), "The run would train nothing: ", words)


def test_a_warm_up_that_swallows_the_steps_still_learns_but_for_the_first(invoke: Invoke) -> None:
    data = json.loads(invoke("--check", "--json", settings={"warmup_steps": 1000, "max_steps": 3}).out)["data"]
    assert (data["steps"], data["learning_steps"]) == (3, 2)


def test_one_step_of_all_rows_learns_without_a_warm_up_and_is_warned_about(invoke: Invoke, workspace: Path) -> None:
    changes = {"gradient_accumulation_steps": 1000, "num_train_epochs": 1, "warmup_steps": 0, "save_steps": 1}
    run = invoke("--keep-worse", settings=changes | {"eval_steps": 1, "logging_steps": 1})
    assert run.status == 0, run.err
    assert "1 steps of 16000 rows" in run.out
    assert "warning: a step takes 16000 rows and there are 800, so an epoch is one step" in " ".join(run.out.split())


@pytest.mark.parametrize("method", ["LoRA", "DoRA", "LoHa", "LoKr"])
def test_an_adapter_that_did_not_move_is_an_error_and_the_former_one_stays(
    invoke: Invoke, workspace: Path, method: str
) -> None:
    def of(method: str) -> Callable[[str], str]:
        def edit(text: str) -> str:
            text = text.replace("type: LoRA", f"type: {method}")
            return text.replace("lora_dropout", "rank_dropout") if method in ("LoHa", "LoKr") else text

        return edit

    few = {"max_steps": 2, "save_steps": 1, "eval_steps": 1, "logging_steps": 1, "max_rows": 40, "warmup_steps": 0}
    few |= {"weight_decay": 0.1}
    assert invoke("--fresh", "--keep-worse", settings=few, edit=of(method)).status == 0
    weights = (workspace / "models" / "adapter" / "adapter_model.safetensors").read_bytes()
    # 1e-60 is above 0, and too small for a weight in float32
    run = invoke("--fresh", settings=few | {"learning_rate": 1e-60}, edit=of(method))
    refused(run, "The training changed no weight of the adapter", "models/adapter stays as it was")
    assert (workspace / "models" / "adapter" / "adapter_model.safetensors").read_bytes() == weights


def test_a_run_whose_best_step_changed_nothing_is_an_error_that_says_so(invoke: Invoke) -> None:
    worse = {"max_steps": 3, "save_steps": 1, "eval_steps": 1, "logging_steps": 1, "warmup_steps": 1}
    run = invoke("--fresh", settings=worse | {"learning_rate": 10.0})
    refused(run, "the lowest held-out loss is that of step 1 of 3", "load_best_model_at_end: false")
    last = worse | {"learning_rate": 10.0, "load_best_model_at_end": False}
    assert invoke("--fresh", "--keep-worse", settings=last).status == 0


def test_max_steps_0_leaves_the_end_to_the_epochs(invoke: Invoke, workspace: Path) -> None:
    run = invoke(settings={"max_steps": 0, "num_train_epochs": 1, "max_rows": 40})
    assert run.status == 0, run.err
    assert "3 steps of 16 rows" in run.out and "step 3/3" in run.out


def test_the_check_counts_the_steps_of_the_run_also_where_answers_are_cut_off(
    invoke: Invoke, workspace: Path, tmp_path: Path
) -> None:
    turns = [{"role": role, "content": "good " * 12} for role in ("user", "assistant")]
    lost = [turns[0] | {"content": "good " * 90}, turns[1]]
    rows = [lost] * 7 + [turns] * 10 + [turns * 4] * 20  # of the last ones, some answers are cut off
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    file = str(tmp_path / "rows.jsonl")
    changes: dict[str, Any] = {"train_file": file, "held_out_file": file, "max_seq_len": 64, "max_bad_rows": 0.5}
    changes |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 3, "num_train_epochs": 1.5}
    changes |= {"max_steps": 100}  # more than the epochs have
    data = json.loads(invoke("--check", "--json", settings=changes).out)["data"]
    assert (data["truncated"], data["without_answer"]) == (27, 7)
    assert data["steps"] == 8  # of 30 rows, 6 a step: 5 an epoch
    run = invoke("--keep-worse", settings=changes)
    assert run.status == 0, run.err
    assert "8 steps of 6 rows" in run.out and "step 8/8" in run.out


# ---- tokens that the model does not know


@pytest.fixture
def grown(invoke: Invoke, workspace: Path) -> Callable[..., None]:
    """Make models/grown: the demo with a token more in its tokenizer than the model has."""

    def make(token: str, pad: bool = False) -> None:
        from transformers import AutoTokenizer

        if not (workspace / "models" / "demo").is_dir():
            invoke("--smoke")  # its folder is of the same kind
        demo = workspace / "models" / ("demo" if (workspace / "models" / "demo").is_dir() else "smoke/base")
        folder = workspace / "models" / "grown"
        shutil.copytree(demo, folder, dirs_exist_ok=True)
        tokenizer = AutoTokenizer.from_pretrained(demo)
        tokenizer.add_special_tokens({"pad_token": token}) if pad else tokenizer.add_tokens([token])
        tokenizer.save_pretrained(folder)

    return make


def in_grown(text: str) -> str:
    return text.replace("models/demo", "models/grown")


@pytest.mark.parametrize("arguments", [("--check",), ()])
def test_a_token_of_the_rows_that_the_model_lacks_is_refused(
    invoke: Invoke, grown: Callable[..., None], arguments: tuple[str, ...]
) -> None:
    grown("flatmate")
    run = invoke(*arguments, edit=in_grown)
    refused(run, "models/grown is larger than its model: a token of the rows, 'flatmate'", "end at 1023")


def test_a_pad_token_that_the_model_lacks_is_refused(invoke: Invoke, grown: Callable[..., None]) -> None:
    grown("<padding>", pad=True)
    refused(invoke("--check", edit=in_grown), "the pad token, '<padding>', has the id 1024")


def test_an_added_token_that_no_row_has_does_no_harm(invoke: Invoke, grown: Callable[..., None]) -> None:
    grown("<no row has this>")
    run = invoke("--check", edit=in_grown)
    assert run.status == 0, run.err


def test_the_chat_refuses_a_special_token_that_the_model_lacks(workspace: Path, grown: Callable[..., None]) -> None:
    from conftest import inference_of

    grown("<padding>", pad=True)
    config = workspace / "finetuning" / "olive-config.yaml"
    before = config.read_text(encoding="utf-8")
    config.write_text(in_grown(before), encoding="utf-8")
    try:
        with inference_of(workspace):
            from engine import ChatError
            from load_engine import load

            with pytest.raises(ChatError, match=r"'<padding>' has the id 1024, and the embeddings end at 1023"):
                load(baseonly=True, root=workspace)
            grown("<no prompt has this>")
            assert load(baseonly=True, root=workspace)
    finally:
        config.write_text(before, encoding="utf-8")


# ---- kinds of models

TEXT = {"model_type": "ministral3", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 1024}
VISION = {"architectures": ["Mistral3ForConditionalGeneration"], "model_type": "mistral3", "text_config": TEXT}


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_every_architecture_of_the_catalogue_is_loaded_and_exported(workspace: Path, architecture: str) -> None:
    from planning.text_model import class_name, no_int4, refused

    config = {"model_type": architecture}
    assert str(class_name(config)).endswith(("ForCausalLM", "Gemma4ForConditionalGeneration"))
    assert refused("it", config) is None
    assert (no_int4(config) is None) == (architecture not in ("qwen3_5", "gemma4"))


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (VISION, "is a Mistral3ForConditionalGeneration around ministral3, which transformers does not load as a text"),
        ({"model_type": "qwen2_5_vl"}, "is a qwen2_5_vl, which transformers does not load as a text model"),
        ({"model_type": "t5"}, "(t5) is an encoder with a decoder"),
        ({"model_type": "whisper"}, "(whisper) is an encoder with a decoder"),
        ({"model_type": "bert", "architectures": ["BertForMaskedLM"]}, "is a BertForMaskedLM, which does not generate"),
        ({"model_type": "llama", "architectures": ["LlamaForSequenceClassification"]}, "does not generate text"),
        (
            {"model_type": "odd9", "auto_map": {"AutoModel": "x.Y"}},
            "runs only with code of its own, which is never run",
        ),
        ({"model_type": "odd9"}, "does not know odd9"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "gptq"}}, "is quantised already (gptq)"),
        ({"model_type": "llama", "quantization_config": {"quant_method": "awq"}}, "is quantised already (awq)"),
    ],
)
def test_a_model_that_cannot_be_trained_is_called_what_it_is(
    workspace: Path, config: dict[str, Any], words: str
) -> None:
    from planning.text_model import refused

    said = refused("me/it", config)
    assert said and words in said and said.startswith("me/it ") and said.endswith(".") and "\n" not in said


def test_a_refused_kind_is_a_kind_that_transformers_refuses(workspace: Path) -> None:
    from transformers import AutoModelForCausalLM

    from planning.text_model import config_of

    with pytest.raises(ValueError, match="Unrecognized configuration class"):
        AutoModelForCausalLM.from_config(config_of(VISION))


def test_a_vision_model_whose_text_part_is_loaded_is_trained_but_not_exported_to_int4(
    invoke: Invoke, workspace: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Gemma3Config

    from planning.text_model import no_int4
    from preparing.tokens import load_tokenizer

    invoke("--smoke")
    base = workspace / "models" / "smoke" / "base"
    tokenizer = load_tokenizer(str(base))
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    text = sizes | {"vocab_size": 1024, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 512}
    text |= {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = Gemma3Config(text_config=text, vision_config=sizes | {"image_size": 28, "patch_size": 14})
    torch.manual_seed(0)
    folder = workspace / "models" / "seeing"
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    changes = {"target_modules": None, "max_steps": 3, "save_steps": 3, "eval_steps": 3, "max_rows": 64}

    def edit(text: str) -> str:
        return text.replace("models/demo", "models/seeing")

    checked = invoke("--check", settings=changes, edit=edit)
    assert checked.status == 0, checked.err
    assert "no ONNX model: the builder does not know Gemma3ForConditionalGeneration" in checked.out
    assert no_int4(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    run = invoke(settings=changes, edit=edit)
    assert run.status == 0, run.err


def test_old_weights_are_converted_as_the_page_says(
    invoke: Invoke, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch
    from safetensors.torch import load_file

    from preparing.workspace import ModelError, find_model

    invoke("--smoke")
    old, new = workspace / "models" / "old", workspace / "models" / "new"
    shutil.copytree(workspace / "models" / "smoke" / "base", old)
    weights = load_file(old / "model.safetensors")
    torch.save(weights, old / "pytorch_model.bin")
    (old / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"pytorch_model\.bin alone.*from_pretrained, then save_pretrained"):
        find_model("models/old", None, workspace)
    page = (REPOSITORY / "docs" / "how-to" / "another-model.md").read_text(encoding="utf-8")
    monkeypatch.chdir(workspace)
    exec(page.split("```python\n")[1].split("```")[0], {})
    assert find_model("models/new", None, workspace).folder == new
    converted = load_file(new / "model.safetensors")
    assert all(torch.equal(converted[name], weight) for name, weight in weights.items())


# ---- settings that do not go together


def unquoted(key: str, value: str) -> Callable[[str], str]:
    import re

    return lambda text: re.sub(rf"(?m)^(\s*{key}:) \w+", rf"\1 {value}", text)


@pytest.mark.parametrize("no", ["no", "off", "false", "No", '"no"'])
def test_no_needs_no_quotes(invoke: Invoke, no: str) -> None:
    def edit(text: str) -> str:
        return unquoted("eval_strategy", no)(unquoted("save_strategy", no)(text))

    run = invoke("--check", edit=edit)
    assert run.status == 0, run.err


def test_a_run_without_evaluations_and_checkpoints_makes_an_adapter(invoke: Invoke, workspace: Path) -> None:
    def edit(text: str) -> str:
        return unquoted("report_to", "no")(unquoted("eval_strategy", "no")(unquoted("save_strategy", "no")(text)))

    shutil.rmtree(workspace / "models" / "checkpoints", ignore_errors=True)
    run = invoke("--fresh", "--keep-worse", settings={"max_steps": 4}, edit=edit)
    assert run.status == 0, run.err
    assert not list((workspace / "models" / "checkpoints").glob("*/checkpoints/checkpoint-*"))


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (
            {"eval_strategy": "no"},
            "load_best_model_at_end needs a checkpoint of each evaluation, but eval_strategy is no and save_strategy "
            "steps: set both to the same, or load_best_model_at_end: false.",
        ),
        ({"eval_strategy": "epoch"}, "but eval_strategy is epoch and save_strategy steps"),
        ({"save_steps": 0.25}, "save_steps 0.25 is no multiple of eval_steps 0.1, which load_best_model_at_end needs"),
        ({"save_steps": 100}, "save_steps 100 is no multiple of eval_steps 0.1"),
        ({"save_steps": 30, "eval_steps": 20}, "save_steps 30 is no multiple of eval_steps 20"),
        (
            {"lr_scheduler_type": "reduce_lr_on_plateau", "eval_strategy": "no"},
            "lr_scheduler_type reduce_lr_on_plateau needs evaluations: set eval_strategy: steps.",
        ),
        ({"save_strategy": "best", "eval_strategy": "no"}, "save_strategy best needs evaluations"),
        ({"lr_scheduler_type": "cosine_with_min_lr"}, "lr_scheduler_type cosine_with_min_lr does not take these"),
        ({"lr_scheduler_type": "warmup_stable_decay"}, "lr_scheduler_type warmup_stable_decay does not take these"),
        ({"lr_scheduler_type": "polynomial", "learning_rate": 1e-8}, "lr_scheduler_type polynomial does not take"),
        ({"optim": "galore_adamw"}, "optim galore_adamw"),
        ({"optim": "schedule_free_adamw"}, "optim schedule_free_adamw cannot be used here"),
    ],
)
def test_settings_that_do_not_go_together_are_told_in_the_words_of_the_file(
    invoke: Invoke, changes: dict[str, Any], words: str
) -> None:
    run = invoke("--check", settings=changes)
    refused(run, "olive-config.yaml, line ", words)
    assert "--" not in run.err


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("dataloader_prefetch_factor: 2", "dataloader_prefetch_factor needs processes that load rows"),
        ("fsdp: full_shard", "fsdp needs several processes"),
        ("gradient_checkpointing_kwargs: {reentrant: false}", "gradient_checkpointing_kwargs has no option reentrant"),
        ("lr_scheduler_kwargs: {cycles: 3}", "lr_scheduler_type linear does not take these settings"),
    ],
)
def test_a_setting_that_the_file_does_not_have_is_told_too(invoke: Invoke, line: str, words: str) -> None:
    run = invoke("--check", edit=lambda text: text.replace("      seed: 42", f"      {line}\n      seed: 42"))
    refused(run, "olive-config.yaml, line ", words)


def test_other_refusals_are_told_whole_on_one_line(invoke: Invoke) -> None:
    added = "      accelerator_config: {split_batches: maybe, no_such_key: 1}\n      seed: 42"
    run = invoke("--check", edit=lambda text: text.replace("      seed: 42", added))
    refused(run, "olive-config.yaml: ", "no_such_key")
