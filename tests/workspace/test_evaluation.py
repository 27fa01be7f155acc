"""The evaluation on held-out rows: which are asked, what it costs, and in which precision."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run

LABELS = ("fear", "joy", "sadness")


@pytest.fixture(scope="module")
def evaluated(workspace: Path) -> Callable[..., Any]:
    """Evaluate the demo's base model on rows, with settings changed; returns what reporting/evaluate.py does."""
    os.chdir(workspace)
    from dataclasses import replace

    from planning.model_facts import base_model
    from preparing.tokens import load_tokenizer, tokenise
    from reporting.evaluate import evaluate
    from settings.run_settings import read_settings

    def run(rows: list[Any], normalizer: Any = None, **changes: Any) -> Any:
        settings = replace(read_settings(), **changes)
        folder = str(base_model(settings).folder)
        tokenizer = load_tokenizer(folder)
        tokenizer.backend_tokenizer.normalizer = normalizer
        examples = [one for row in rows for one in tokenise(tokenizer, row)]
        return evaluate(settings, tokenizer, folder, None, rows, examples)

    return run


@pytest.fixture(scope="module")
def loaded(workspace: Path) -> tuple[Any, Any]:
    """The demo's base model, and its tokenizer."""
    os.chdir(workspace)
    from planning.model_facts import base_model
    from preparing.tokens import load_tokenizer
    from reporting.evaluate import load_base
    from settings.run_settings import read_settings

    folder = str(base_model(read_settings()).folder)
    return load_base(folder, "float32"), load_tokenizer(folder)


def row(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


# ---- which rows are asked


def test_rows_sorted_by_label_are_asked_in_the_share_of_each_label(
    workspace: Path, evaluated: Callable[..., Any], tmp_path: Path
) -> None:
    from preparing.dataset import chat_rows

    file = tmp_path / "sorted.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": f"row {i}", "completion": LABELS[i // 1000]}) for i in range(3000)))
    rows = chat_rows("held_out", str(file), eval_split=0.1)
    held_out = Counter(one[-1]["content"] for one in rows)
    asked = Counter(one[-1]["content"] for one in evaluated(rows).questions)
    assert asked.total() == 200
    for label in LABELS:
        assert asked[label] / 200 == pytest.approx(held_out[label] / len(rows), abs=0.01)


def test_rows_that_follow_a_pattern_are_asked_as_fairly(workspace: Path) -> None:
    from preparing.dataset import spread

    rows = [LABELS[i % 2] for i in range(400)]  # every second one would be a single label
    assert 70 <= Counter(spread(rows, 200))["joy"] <= 130
    assert spread(rows, 200) == spread(rows, 200) and spread(rows[:3], 10) == rows[:3]


# ---- what it costs


def test_one_long_answer_does_not_stretch_the_others(loaded: tuple[Any, Any]) -> None:
    from preparing.chat_template import ends_of_answer
    from preparing.tokens import last_answer
    from reporting.evaluate import generate

    model, tokenizer = loaded
    model.lm_head.weight.data[ends_of_answer(tokenizer)] = 0  # it never ends an answer
    rows = [row(f"row {i}", "joy") for i in range(199)]
    rows.insert(77, row("the long one", " ".join(["a row of words"] * 40)))
    expected: Any = [last_answer(tokenizer, one, thinking=False)[1] for one in rows]
    steps: list[int] = []
    hook = model.register_forward_pre_hook(lambda *_: steps.append(1))
    answers = generate(model, tokenizer, expected, 4)
    hook.remove()
    lengths = [one.end - one.start for one in expected]
    short, long = sorted(lengths)[198] + 8, max(lengths) + 8
    assert len(steps) <= 50 * short + long < 50 * long / 5
    alone = generate(model, tokenizer, [expected[3], expected[77]], 1)
    assert answers[3].startswith(alone[0]) and answers[77] == alone[1]  # each in its place


def test_a_question_longer_than_the_model_reads_is_cut_at_its_start_and_counted(
    loaded: tuple[Any, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    from preparing.tokens import last_answer
    from reporting.evaluate import generate

    model, tokenizer = loaded
    context = model.config.max_position_embeddings
    rows = [row("some words " * context, "joy"), row("short", "fear")]
    expected: Any = [last_answer(tokenizer, one, thinking=False)[1] for one in rows]
    longest: list[int] = []
    hook = model.register_forward_pre_hook(
        lambda _, __, options: longest.append(options["position_ids"].max().item()), with_kwargs=True
    )
    generate(model, tokenizer, expected, 1)
    hook.remove()
    assert max(longest) < context
    said = f"1 of 2 questions are longer than the {context} tokens that the model reads, and were cut at their start."
    assert said in capsys.readouterr().out


@pytest.mark.parametrize("moment", ["evaluation", "training's evaluation", "training"])
def test_out_of_memory_names_the_setting_of_what_ran(
    evaluated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    from dataclasses import replace

    import torch

    from planning.advice import explained
    from reporting import evaluate
    from settings.config_file import ConfigError
    from settings.run_settings import read_settings
    from training import batches
    from training.answer_trainer import AnswerTrainer

    def full(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    for module, name in ((evaluate, "load_base"), (batches, "answer_loss")):
        monkeypatch.setattr(module, name, full)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 2**34)
    settings = replace(read_settings(), gradient_checkpointing=False, per_device_eval_batch_size=32)
    trainer: Any = object.__new__(AnswerTrainer)
    trainer.model_wrapped = torch.nn.Linear(1, 1)
    with pytest.raises(ConfigError) as error, explained(settings, 2**33):
        if moment == "evaluation":
            evaluated([row("one", "joy")])
        elif moment == "training":
            trainer.compute_loss(None, {})
        else:
            from types import SimpleNamespace

            trainer.args, trainer.piece = SimpleNamespace(device="cpu"), math.inf
            trainer.compute_loss_context_manager = torch.no_grad
            trainer.get_eval_dataloader = lambda: [{"labels": torch.zeros(1, 2, dtype=torch.int64)}]
            trainer._prepare_inputs = lambda batch: batch
            trainer.evaluate()
    change = "gradient_checkpointing: true" if moment == "training" else "per_device_eval_batch_size: 16"
    where = "" if moment == "training" else " in an evaluation"
    assert str(error.value) == (
        f"The GPU's memory is full{where}: 8.0 GiB were estimated and 16.0 GiB were in use; set {change} in "
        "olive-config.yaml."
    )


# ---- what the figures mean


@pytest.mark.parametrize(
    ("right", "asked", "low", "high"),
    # Wilson's score interval, from the tables of R's binom.confint
    [(0, 10, 0, 0.2775), (5, 10, 0.2366, 0.7634), (10, 10, 0.7225, 1), (190, 200, 0.9104, 0.9726)],
)
def test_the_share_of_exact_answers_has_wilsons_interval(
    workspace: Path, right: int, asked: int, low: float, high: float
) -> None:
    from reporting.evaluate import interval

    assert interval(right, asked) == [pytest.approx(low, abs=2e-4), pytest.approx(high, abs=2e-4)]


def test_an_expected_answer_in_another_unicode_form_can_be_exact(
    workspace: Path, evaluated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Qwen's tokenizers write é as one character: a model can answer it in no other form."""
    import unicodedata

    from tokenizers.normalizers import NFC

    from reporting import evaluate

    monkeypatch.setattr(evaluate, "generate", lambda *_: [unicodedata.normalize("NFC", "très")])
    assert evaluated([row("how", unicodedata.normalize("NFD", "très"))], NFC()).metrics["accuracy"] == 1


# ---- precision


def test_a_base_model_whose_loss_is_not_a_number_is_not_trained(
    evaluated: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reporting import evaluate
    from settings.config_file import ConfigError

    load = evaluate.load_base

    def overflowing(*arguments: Any) -> Any:
        model = load(*arguments)
        model.model.norm.weight.data *= 1e38
        return model

    monkeypatch.setattr(evaluate, "load_base", overflowing)
    with pytest.raises(ConfigError, match=r"not a number in torch_dtype: float32, .* set torch_dtype: float32 in"):
        evaluated([row("one", "joy")])


@pytest.mark.parametrize(
    ("dtype", "gpu", "able", "weights"),
    [
        ("float32", False, False, "float32"),
        ("bfloat16", False, False, "float32"),
        ("bfloat16", False, True, "bfloat16"),
        ("bfloat16", True, False, "bfloat16"),
        ("float16", True, True, "float32"),  # as Olive trains it
        ("float16", False, True, "float32"),
    ],
)
def test_an_evaluation_computes_as_the_training_and_not_in_what_a_processor_lacks(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, gpu: bool, able: bool, weights: str
) -> None:
    import torch

    from reporting import evaluate

    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: able)
    assert evaluate.weights_in(dtype) == weights
    context = evaluate.computing_in(dtype)
    assert isinstance(context, torch.autocast) == (dtype == "float16" and gpu)


@pytest.mark.parametrize(("model_type", "refused"), [("gemma2", True), ("gemma3_text", True), ("llama", False)])
def test_float16_is_refused_for_models_that_exceed_it(workspace: Path, model_type: str, refused: bool) -> None:
    from dataclasses import replace

    from planning.fit import overflows
    from planning.model_facts import find, holds
    from settings.run_settings import read_settings

    os.chdir(workspace)
    settings = read_settings()
    model = find(settings)
    shape = replace(model.shape, architecture=model_type)
    model = replace(model, shape=shape, float16=holds(model.name, shape, {}))
    assert overflows(model, settings) is None
    said = overflows(model, replace(settings, torch_dtype="float16"))
    assert bool(said) == refused
    assert not said or f"float16 is too small for the numbers in {model_type}, which would answer nothing: set" in said


def test_the_catalogue_s_word_on_float16_stands_before_the_architecture_s(workspace: Path) -> None:
    from planning.architecture import Shape
    from planning.model_facts import holds

    sizes = {"hidden_size": 8, "intermediate_size": 8, "layers": 1, "attention_heads": 1, "vocabulary": 8}
    shape = Shape.of(sizes | {"architecture": "llama"})
    facts = {"source": "https://huggingface.co/me/large-numbers/blob/main/config.json", "float16": False}
    assert not holds("me/large-numbers", shape, facts)
    assert holds("me/another", shape, facts)


def test_device_cpu_hides_the_gpus_before_pytorch_looks_for_them(workspace: Path) -> None:
    program = """
import os, sys
sys.path.insert(0, "finetuning")
sys.argv = ["invoke_olive.py", "--check"]
import invoke_olive
from planning import hardware
def look():
    import torch
    print("torch" in before, repr(os.environ.get("CUDA_VISIBLE_DEVICES")), file=sys.stderr)
    raise SystemExit
before = sys.modules.copy()
hardware.look = look
invoke_olive.main()
"""
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": "0"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=workspace, env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr.splitlines()[-1] == "False ''", done.stderr


@pytest.mark.parametrize("arguments", ["--check", "--fresh"])
def test_a_model_that_exceeds_float16_is_refused_by_check_and_run(
    invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch, arguments: str
) -> None:
    from planning import model_facts

    monkeypatch.setattr(model_facts, "OVERFLOW_IN_FLOAT16", ("phi3",))  # as the demo
    run = invoke(arguments, settings={"torch_dtype": "float16"})
    assert run.status == 1 and "torch_dtype: float16 is too small for the numbers in phi3" in run.err
