"""The memory and time of a run, its evaluations included: estimated, what advice names, what the last run tells."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

Invoke = Callable[..., Run]
GIB = 2**30
PHI3 = {"model_type": "phi3", "hidden_size": 3072, "intermediate_size": 8192, "num_hidden_layers": 32}
PHI3 |= {"num_attention_heads": 32, "vocab_size": 32064, "max_position_embeddings": 4096}
GEMMA = {"model_type": "gemma3_text", "hidden_size": 1152, "intermediate_size": 6912, "num_hidden_layers": 26}
GEMMA |= {"num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 256, "vocab_size": 262144}
GEMMA |= {"tie_word_embeddings": True, "max_position_embeddings": 32768}


def settings_with(**changes: Any) -> Any:
    """Return the settings of the demo with other values."""
    from settings.run_settings import read_settings

    return replace(read_settings(), **{"target_modules": None, "gradient_checkpointing": False, **changes})


def rows(tokens: int, labels: int, count: int = 32) -> Any:
    """Return the lengths of rows that are all alike."""
    from planning.row_lengths import Lengths

    return Lengths([bytes(tokens - labels) + b"\1" * labels] * count)


# ---- memory


# A block has queries and output of 64 × 64, keys and values of 64 × 32, and three layers of 64 × 160: 43,008 weights,
# 544 inputs and 576 outputs; an adapter of rank 8 adds 8,960 to it. The embedding has 32,000, seven norms 64 each.
SMALL = {"model_type": "llama", "hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 500, "tie_word_embeddings": True}
CPU = {"method": "lora", "torch_dtype": "float32", "device": "cpu", "lora_dropout": 0.0, "r": 8}
GPU = CPU | {"torch_dtype": "bfloat16", "device": "gpu"}


@pytest.mark.parametrize(
    ("architecture", "settings", "masked", "expected"),
    [
        # norms, attention, feed-forward, inputs that the adapters keep, and what is between their matrices
        ("llama", CPU, False, 512 + 768 + 1920 + 1152 + 224),
        ("llama", CPU, True, 512 + 1024 + 1920 + 1152 + 224),
        ("llama", CPU | {"lora_dropout": 0.1}, False, 512 + 768 + 1920 + 1152 + 544 + 224),
        ("llama", CPU | {"lora_dropout": 0.1, "method": "dora"}, False, 512 + 768 + 1920 + 544 * 8 + 576 * 12 + 224),
        ("llama", GPU, False, 512 + 384 + 960 + 544 * 4 + 224),
        ("llama", GPU | {"lora_dropout": 0.1}, False, 512 + 384 + 960 + 544 * 5 + 224),
        ("llama", GPU | {"torch_dtype": "float16"}, False, 512 + 384 + 960 + 544 * 2 + 224),
        ("llama", GPU | {"torch_dtype": "float16", "lora_dropout": 0.1}, False, 512 + 384 + 960 + 544 * 3 + 224),
        ("llama", GPU | {"method": "dora"}, False, 512 + 384 + 960 + 544 * 4 + 576 * 6 + 224),
        ("qwen3", CPU, False, 512 + 384 + 768 + 1920 + 1152 + 224),
        ("gemma3_text", CPU, False, 1024 + 384 + 768 + 1920 + 1152 + 224),
        ("phi3", CPU, False, 512 + 768 + 384 + 256 + 1920 + 1152 + 128),  # its layers are fused: four adapters
        ("llama", CPU | {"torch_dtype": "bfloat16"}, False, 512 + 384 + 960 + 576 + 224),
        ("phi", CPU, False, 256 + 768 + 256 + 2560 + 896 + 192),  # no gate, one input for both: six adapters
    ],
)
def test_what_a_block_keeps_of_a_token_is_the_sum_by_hand(
    workspace: Path, architecture: str, settings: dict[str, Any], masked: bool, expected: int
) -> None:
    from planning.architecture import Shape
    from planning.memory import per_token

    assert per_token(Shape.of(SMALL | {"model_type": architecture}), settings_with(**settings), masked) == expected


@pytest.mark.parametrize(
    ("settings", "masked", "expected"),
    [
        # three blocks of 100 tokens, one at work with the holes in the heap, the mask, and what lies around the blocks
        (CPU, 0, 3 * 457_600 + 256_000 + 4 * 457_600 + 76_800),
        (CPU, 5000, 3 * 503_200 + 256_000 + 4 * 503_200 + 5000 + 76_800),
        (CPU | {"gradient_checkpointing": True}, 0, 76_800 + 457_600 + 256_000 + 6 * 457_600 + 76_800),
        (GPU, 0, 3 * 425_600 + 128_000 + 76_800),
        (GPU | {"method": "qlora"}, 0, 3 * 425_600 + 128_000 + 2 * 10_240 + 76_800),
        (GPU | {"torch_dtype": "float16"}, 0, 3 * (316_800 + 2 * 43_008) + 128_000 + 76_800),
        (GPU | {"method": "loha"}, 0, 3 * (425_600 + 4 * 43_008) + 128_000 + 76_800),
    ],
)
def test_what_the_blocks_keep_is_the_sum_by_hand(
    workspace: Path, settings: dict[str, Any], masked: int, expected: int
) -> None:
    from planning.architecture import Shape
    from planning.memory import activations
    from planning.row_lengths import Batch

    assert activations(Shape.of(SMALL), settings_with(**settings), Batch(100, 0, masked, 100.0)) == expected


@pytest.mark.parametrize(
    ("settings", "weights", "adapter"),
    [
        (CPU, 4 * 161_472, 26_880),
        (GPU, 2 * 161_472, 26_880),
        (GPU | {"torch_dtype": "float16"}, 4 * 161_472, 26_880),
        (GPU | {"method": "dora"}, 2 * 161_472, 26_880 + 3 * 576),
        (GPU | {"method": "qlora", "double_quant": False}, 64_512 + 8064 + 64_896, 26_880),
        (GPU | {"method": "qlora", "double_quant": True}, 64_512 + 2016 + 31.5 + 64_896, 26_880),
    ],
)
@pytest.mark.parametrize(("optim", "moments"), [("adamw_torch", 8), ("paged_adamw_8bit", 2)])
def test_weights_adapter_and_files_are_the_sums_by_hand(
    workspace: Path, settings: dict[str, Any], weights: float, adapter: int, optim: str, moments: int
) -> None:
    from planning.architecture import Shape
    from planning.cost import disk
    from planning.memory import memory

    chosen = settings_with(**settings, optim=optim, save_total_limit=2)
    needed = memory(Shape.of(SMALL), chosen, rows(50, 10), rows(50, 10))
    assert (needed.weights, needed.adapter) == (weights, 4 * adapter)
    assert needed.gradients_and_optimizer == (4 + moments) * adapter
    files = disk(Shape.of(SMALL), chosen, 7.0)
    assert files.checkpoints == 3 * ((4 + moments) * adapter + 6500)
    assert files.adapter == 3 * (4 * adapter + 65_000) and files.download == 7
    assert files.merged_export == {"float32": 4, "bfloat16": 2, "float16": 2}[settings["torch_dtype"]] * 161_472
    assert files.onnx_export == 1.125 * 161_024  # in 8 bits, with which the export begins


def test_answers_to_long_questions_are_in_the_estimate(workspace: Path) -> None:
    """Keys and values by hand: 8 rows of 3,008 tokens, 32 blocks, 2 × 3,072 features, 2 bytes."""
    from planning.architecture import Shape
    from planning.memory import memory

    shape = Shape.of(PHI3)
    settings = settings_with(method="qlora", torch_dtype="bfloat16", device="gpu", per_device_train_batch_size=1)
    settings = replace(settings, per_device_eval_batch_size=8, gradient_checkpointing=True)
    short, long = (memory(shape, settings, rows(200, 50), rows(held_out, 50)) for held_out in (200, 3000))
    kept = 8 * 3008 * 32 * 2 * 3072 * 2
    assert 0 < long.total - kept - long.weights - long.framework < 3 * GIB  # one block at work
    assert short.total < long.total - 0.8 * kept


def test_evaluations_count_only_where_they_need_more_than_the_training(workspace: Path) -> None:
    from planning.architecture import Shape
    from planning.memory import memory

    shape = Shape.of(GEMMA)
    settings = settings_with(per_device_train_batch_size=8, per_device_eval_batch_size=1)
    assert memory(shape, settings, rows(250, 100), rows(100, 20)).evaluation == 0
    many = replace(settings, per_device_train_batch_size=1, per_device_eval_batch_size=64)
    needed = memory(shape, many, rows(250, 100), rows(250, 100, 64))
    assert needed.evaluation > 0
    # 64 rows of 100 answer tokens: the logits of their losses, and the log-softmax, in float32
    assert needed.total - needed.weights > 64 * 100 * 262144 * 8


def test_questions_are_asked_whole_and_trained_on_cut(workspace: Path) -> None:
    from planning.fit import lengths_seen
    from planning.token_counts import Tokens

    masks = [b"\0" * 90 + b"\1" * 10, b"\0" * 20 + b"\1" * 80]
    counted = {part: Tokens(masks, 2, 2, estimated=False) for part in ("train", "held_out")}
    lengths = lengths_seen(counted, 50)
    assert (lengths["train"].tokens, lengths["held_out"].tokens) == ([50], [100, 100])


HELD = """
import re
from pathlib import Path
from training.free_memory import free_memory

def held():
    return int(re.findall(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text())[0]) / 1024

class Model:
    pass

model, kept = Model(), []
model.itself, model.weights = model, []
for _ in range(2000):
    model.weights.append(bytearray(100_000))
    kept.append(bytearray(1000))  # as long-lived objects lie between the weights
start = held()
del model
between = held()
free_memory()
print(start - between, between - held())
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc; other systems return memory by themselves")
def test_memory_that_nobody_uses_goes_back_to_the_system(workspace: Path) -> None:
    """200 MB in small pieces, in an object that refers to itself: a model and its Trainer are such."""
    done = subprocess.run(
        [sys.executable, "-c", HELD], cwd=workspace / "finetuning", capture_output=True, text=True, check=True
    )
    by_itself, freed = map(float, done.stdout.split())
    assert by_itself < 10 and freed > 150, done.stdout


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_adapters_on_the_embedding_and_the_output_layer_are_counted(workspace: Path, method: str) -> None:
    import peft
    import torch
    import transformers

    from planning.memory import adapter_parameters
    from planning.model_facts import shape_in

    chosen = ("q_proj", "lm_head", "embed_tokens")
    config = transformers.LlamaConfig(vocab_size=1000, hidden_size=64, intermediate_size=96, num_hidden_layers=2)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
        lora = peft.LoraConfig(r=8, target_modules=list(chosen), use_dora=method == "dora")
        trained = sum(
            weight.numel() for weight in peft.get_peft_model(model, lora).parameters() if weight.requires_grad
        )
    shape = shape_in(config.to_dict())
    assert shape
    assert adapter_parameters(shape, replace(settings_with(method=method, r=8), target_modules=chosen)) == trained


# ---- advice


@pytest.mark.parametrize("room", [10, 8, 7, 6])
def test_what_the_advice_names_makes_the_run_fit(workspace: Path, room: int) -> None:
    from planning.advice import advice
    from planning.architecture import Shape
    from planning.memory import memory

    shape, lengths = Shape.of(GEMMA), {"train": rows(250, 60), "held_out": rows(250, 60)}
    settings = settings_with(per_device_train_batch_size=8, per_device_eval_batch_size=32)
    assert memory(shape, settings, lengths["train"], lengths["held_out"]).total > 10 * GIB
    said = advice(shape, settings, lengths, room * GIB)
    changes = {name: json.loads(value) for name, value in re.findall(r"(\w+): (\w+)", said)}
    longest = changes.pop("max_seq_len", settings.max_seq_len)
    changed = replace(settings, **changes)
    assert memory(shape, changed, lengths["train"].cut(longest), lengths["held_out"]).total <= room * GIB, said


def test_the_batch_of_the_evaluations_is_named_alone_where_that_helps(workspace: Path) -> None:
    from planning.advice import advice
    from planning.architecture import Shape
    from planning.memory import memory

    shape, lengths = Shape.of(GEMMA), {"train": rows(150, 30), "held_out": rows(250, 100)}
    settings = settings_with(per_device_train_batch_size=1, per_device_eval_batch_size=32)
    less = memory(shape, replace(settings, per_device_eval_batch_size=16), lengths["train"], lengths["held_out"])
    assert advice(shape, settings, lengths, less.total + 1) == "set per_device_eval_batch_size: 16"


def test_a_batch_of_two_is_halved_too(workspace: Path) -> None:
    from planning.advice import advice
    from planning.architecture import Shape
    from planning.memory import memory

    shape, lengths = Shape.of(GEMMA), {"train": rows(150, 30), "held_out": rows(150, 30, 1)}
    settings = settings_with(per_device_train_batch_size=2, per_device_eval_batch_size=1)
    settings = replace(settings, gradient_checkpointing=True)
    one = memory(shape, replace(settings, per_device_train_batch_size=1), lengths["train"], lengths["held_out"])
    said = advice(shape, settings, lengths, one.total + 1)
    assert said.startswith("set per_device_train_batch_size: 1, with gradient_accumulation_steps") and "seq" not in said


def test_a_full_disk_is_told_with_both_numbers(workspace: Path) -> None:
    from planning.architecture import Shape
    from planning.fit import RESERVE, too_large

    shape, lengths = Shape.of(SMALL), {"train": rows(50, 10), "held_out": rows(50, 10)}
    needed = (1_504_740 + 3 * 2**30 + RESERVE) / GIB  # what the run writes, as above, and the model to fetch
    settings = settings_with(**CPU, save_total_limit=2, optim="adamw_torch")
    said = too_large(shape, settings, lengths, 64 * GIB, 1.25 * GIB, 3 * GIB)
    assert said and f"1.25 GiB of disk are free and the run needs {needed:.2f}:" in said
    assert too_large(shape, settings, lengths, 64 * GIB, 99 * GIB, 3 * GIB) is None


@pytest.mark.parametrize(("train_on", "learned"), [("responses", 21), ("all", 11 + 21 + 31)])
def test_without_a_tokenizer_the_answers_to_learn_are_estimated_from_their_length(
    workspace: Path, train_on: str, learned: int
) -> None:
    from planning.token_counts import CHARACTERS, guess

    texts = [int(count * CHARACTERS + 0.999) * "a" for count in (10, 20, 30)]
    roles = ({"role": "user"}, {"role": "assistant"}, {"role": "assistant", "learn": False})
    row = [role | {"content": text} for role, text in zip(roles, texts, strict=True)]
    assert sum(guess(row, train_on)) == learned


def test_the_operations_of_an_evaluation_are_the_sum_by_hand(workspace: Path) -> None:
    from planning.architecture import Shape
    from planning.cost import evaluation_operations

    # 32 rows of 50 tokens go through the blocks, the 10 answer tokens of each through the output layer
    assert evaluation_operations(Shape.of(SMALL), rows(50, 10)) == 2 * (1600 * 129_024 + 320 * 32_000)


def test_duplicates_are_counted_once_each(workspace: Path) -> None:
    from planning.plan import repeated_rows

    rows = {"train": [[name] for name in "aabbc"], "held_out": [["c"], ["d"]]}
    twice, shared = repeated_rows(rows)
    assert "2 of 5 rows to train on are duplicates" in twice and "1 held-out rows are trained on too" in shared


# ---- as fast as the last run

TIMINGS = {"start_to_first_step": 130.0, "before": 100.0, "training": 1000.0, "after": 120.0, "tokens_per_second": 40.0}


@pytest.fixture
def last(workspace: Path, tmp_path: Path) -> Callable[..., Any]:
    """Return what the plan takes from a run.json, with other values in it."""
    from planning import cost, hardware

    here, settings = hardware.look(), settings_with()

    def read(changes: dict[str, Any] | None = None, machine: dict[str, Any] | None = None) -> Any:
        run = {
            "base_model": settings.model_path,
            "method": settings.method,
            "dtype": settings.torch_dtype,
            "timings": TIMINGS,
            "machine": {"platform": here.platform, "cpu_cores": here.cores, "gpu": None} | (machine or {}),
            "data": {"tokens": 80_000, "train_rows": 800, "held_out_rows": 300},
            "config": {
                "adapter": {"packing": settings.packing},
                "training": {
                    "per_device_train_batch_size": settings.per_device_train_batch_size,
                    "per_device_eval_batch_size": settings.per_device_eval_batch_size,
                    "gradient_checkpointing": False,
                    "processes": 1,
                },
            },
        }
        for name, value in (changes or {}).items():
            *path, key = name.split("/")
            place: Any = run
            for part in path:
                place = place[part]
            place[key] = value
        (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
        return cost.last_run(tmp_path / "run.json", settings, here)

    return read


@pytest.mark.parametrize(
    "changes",
    [
        {"base_model": "another"},
        {"method": "dora"},
        {"dtype": "bfloat16"},
        {"machine/gpu": "NVIDIA H100"},
        {"machine/cpu_cores": 999},
        {"machine/platform": "Windows 11, AMD64"},
        {"config/adapter/packing": True},
        {"config/training/per_device_train_batch_size": 1},
        {"config/training/per_device_eval_batch_size": 1},
        {"config/training/gradient_checkpointing": True},
        {"config/training/processes": 2},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_run_that_did_something_else_says_nothing_about_this_one(
    last: Callable[..., Any], changes: dict[str, Any]
) -> None:
    assert last() is not None
    assert last(changes) is None


def test_a_run_on_two_gpus_tells_the_time_of_another_on_two(
    last: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from planning import cost

    read = cost.last_run

    def on_two(path: Path, settings: Any, machine: Any) -> Any:
        return read(path, settings, replace(machine, gpu="NVIDIA L4", gpus=2))

    monkeypatch.setattr(cost, "last_run", on_two)
    assert last({"machine/gpu": "NVIDIA L4, NVIDIA L4"}) is not None
    assert last({"machine/gpu": "NVIDIA L4"}) is None


def test_a_trial_of_few_steps_tells_the_time_of_the_whole_run(last: Callable[..., Any], workspace: Path) -> None:
    """A trained token takes 2 units of time, one that is only evaluated 1: a trial is mostly evaluation."""
    settings = settings_with(eval_rows=300)
    train, held_out = rows(100, 20, 800), rows(100, 20, 300)

    def training(steps: int) -> float:
        return 2e-3 * steps * settings.rows_a_step * 100 + 10 * 1e-3 * 300 * 100

    tokens = 20 * settings.rows_a_step * 100
    timings = TIMINGS | {"training": training(20), "tokens_per_second": tokens / training(20)}
    steps, _ = settings.steps(800)
    expected = 30 + 220 / 200 * 200 + training(steps)
    assert last({"timings": timings}).seconds(settings, train, held_out) == pytest.approx(expected, rel=0.02)
    # without held-out rows to speak of, the evaluations take no time
    few = last({"timings": timings}).seconds(settings, train, rows(100, 20, 1))
    assert few == pytest.approx(30 + 220 / 200 + 2e-3 * steps * settings.rows_a_step * 100, rel=0.02)


@pytest.mark.parametrize("steps", [10, 40, 400, -1])
@pytest.mark.parametrize("epochs", [1, 3, 0.5])
@pytest.mark.parametrize("held_out", [3, 30, 1000])
@pytest.mark.parametrize("tokens", [20, 100, 2000])
def test_the_evaluations_in_the_training_take_a_tenth_of_it_or_there_is_one_of_32_rows(
    workspace: Path, steps: int, epochs: float, held_out: int, tokens: int
) -> None:
    """A trained token takes 2 units of time, one that is only evaluated 1; there are ten evaluations at most."""
    from training.evaluations import evaluated_rows

    settings = settings_with(max_steps=steps, num_train_epochs=epochs, per_device_train_batch_size=8)
    settings = replace(settings, gradient_accumulation_steps=1, eval_strategy="steps", eval_steps=0.1)
    settings = replace(settings, early_stopping_patience=0)
    rows_read, every = evaluated_rows(settings, [100] * 800, [tokens] * held_out)
    trained = 100 * (min(8 * steps, 800 * epochs) if steps > 0 else 800 * epochs)

    def share(rows: int, times: int) -> float:
        return rows * times * tokens / (rows * times * tokens + 2 * trained)

    times = 1 + 9 // every  # those that are left out are counted from the end
    assert min(32, held_out) <= rows_read <= held_out
    assert share(rows_read, times) <= 0.1 or times == 1
    assert rows_read in (32, held_out) or every == 1
    if every == 1 and rows_read < held_out:
        assert share(rows_read + 1, 10) > 0.1, "more rows would do"
    assert evaluated_rows(replace(settings, eval_rows=2), [100] * 800, [tokens] * held_out) == (2, 1)
    assert evaluated_rows(replace(settings, eval_rows=10**9), [100] * 800, [tokens] * held_out) == (held_out, 1)
