"""Gradients agree with the change of the loss, for each method, packed or padded, with and without checkpointing."""

from __future__ import annotations

import contextlib
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import four_bits
import pytest
from conftest import Run
from test_packing import model_and_rows

METHODS = ("lora", "dora", "loha", "lokr")
ARCHITECTURES = ("llama", "gemma3_text")  # one of them with windows, which packing masks itself


def trained(model: Any, method: str, rows: list[dict[str, list[int]]]) -> Any:
    """Return the model with an adapter that was trained for some steps: a new one has tensors of zeros."""
    import peft
    import torch

    from training.batches import answer_loss, pad

    common: dict[str, Any] = {"r": 8, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    config = {
        "loha": lambda: peft.LoHaConfig(alpha=16, rank_dropout=0.05, **common),
        "lokr": lambda: peft.LoKrConfig(alpha=16, rank_dropout=0.05, **common),
    }.get(method, lambda: peft.LoraConfig(lora_alpha=16, lora_dropout=0.05, use_dora=method == "dora", **common))()
    torch.manual_seed(2)
    torch.set_num_threads(1)
    adapted = peft.get_peft_model(model, config).train()
    optimizer = torch.optim.AdamW([weight for weight in adapted.parameters() if weight.requires_grad], lr=4e-3)
    for _ in range(10):
        batch = pad(rows, 0, adapted.device)
        loss = answer_loss(adapted, batch) / 200
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return adapted


def batch_of(adapted: Any, rows: list[dict[str, list[int]]], packing: bool, checkpointing: bool) -> Any:
    """Prepare the model as the training does, and return a batch."""
    from training import batches, train

    if checkpointing:
        adapted.enable_input_require_grads()
        adapted.gradient_checkpointing_enable({"use_reentrant": False})
    if packing:
        assert train.can_pack(adapted, rows)
        return batches.pack(rows, adapted.device)
    return batches.pad(rows, 0, adapted.device)


@pytest.mark.parametrize("checkpointing", [False, True], ids=["", "checkpointing"])
@pytest.mark.parametrize("packing", [False, True], ids=["padded", "packed"])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_gradients_agree_with_the_loss(
    workspace: Path, architecture: str, method: str, packing: bool, checkpointing: bool
) -> None:
    import torch

    from training.gradients import gradient_error

    window = {"sliding_window": 32} if architecture == "gemma3_text" else {}
    model, rows = model_and_rows(architecture, **window)
    adapted = trained(model, method, rows)
    batch = batch_of(adapted, rows, packing, checkpointing)
    before = [weight.clone() for weight in adapted.parameters()]
    assert gradient_error(adapted, batch, 0.01) < 0.005
    assert all(map(torch.equal, before, adapted.parameters()))


@pytest.mark.parametrize("method", METHODS)
def test_gradients_in_bfloat16_agree_as_far_as_its_rounding_allows(workspace: Path, method: str) -> None:
    from training.gradients import ALLOWED, STEP, gradient_error

    model, rows = model_and_rows("llama")
    adapted = trained(model.bfloat16(), method, rows)
    assert (
        gradient_error(adapted, batch_of(adapted, rows, packing=False, checkpointing=False), STEP["bfloat16"])
        < (ALLOWED["bfloat16"])
    )


def half_of_it(gradient: Any) -> Any:
    return gradient / 2


def none_of_it(gradient: Any) -> Any:
    return gradient * 0


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("wrong", [half_of_it, none_of_it])
def test_a_layer_with_wrong_gradients_is_found(workspace: Path, wrong: Callable[[Any], Any], dtype: str) -> None:
    """The first of two layers: what it would pass on to its adapters is halved or lost."""
    from settings.config_file import ConfigError
    from training.gradients import check_gradients

    model, rows = model_and_rows("llama")
    adapted = trained(model, "lora", rows)
    layer = adapted.get_base_model().model.layers[1]
    layer.register_full_backward_hook(lambda module, given, got: tuple(map(wrong, given)))
    batch = batch_of(adapted, rows, packing=False, checkpointing=False)
    with pytest.raises(
        ConfigError, match=r"^The gradients are wrong, .* than they say, by \d+%, and .* explains 2?[02]%"
    ):
        check_gradients(adapted, batch, dtype, contextlib.nullcontext)


def test_the_smoke_run_checks_them(invoke: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    from training import gradients

    run = invoke("--smoke", settings={"packing": True})
    assert run.status == 0, run.err
    (line,) = (line for line in run.out.splitlines() if line.startswith("The gradients agree with the change of the"))
    assert float(line.split()[-1].rstrip("%.")) < 0.5
    monkeypatch.setattr(gradients, "gradient_error", lambda *_: float("nan"))
    run = invoke("--smoke", "--fresh")
    assert run.status == 1
    assert run.err.startswith("error: The gradients are wrong, without an error from any library")
    assert run.err.count("\n") == 1


def in_four_bits(workspace: Path, *options: str) -> dict[str, float]:
    """Return the error of each combination with 4-bit weights, from a process that has bitsandbytes."""
    if not (four_bits.PACKAGES / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not in .cache: `make test` puts it there")
    script = Path(__file__).with_name("gradients_in_four_bits.py")
    command = [sys.executable, four_bits.__file__, *options, str(script), str(workspace)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    errors: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    assert len(errors) == 4
    return errors


def test_gradients_in_four_bits_agree_with_the_loss(workspace: Path) -> None:
    assert max(in_four_bits(workspace).values()) < 0.005


def test_the_check_finds_that_bitsandbytes_has_none_after_an_evaluation_on_some_processors(workspace: Path) -> None:
    flags = Path("/proc/cpuinfo")
    if not flags.is_file() or "avx512_bf16" not in flags.read_text(encoding="utf-8"):
        pytest.skip("this processor has no AVX512-BF16, for which bitsandbytes packs its weights")
    assert min(in_four_bits(workspace, "--packed").values()) > 0.3


def test_gradients_on_a_gpu_agree_with_the_loss(workspace: Path) -> None:
    """All that a run can choose, on the GPU's own kernels: to be run on a machine with one."""
    import torch

    if not torch.cuda.is_available():
        pytest.skip("no NVIDIA GPU on this machine")
    from training.gradients import ALLOWED, STEP, gradient_error

    errors = {}
    for dtype in ("float32", "bfloat16", "float16"):
        for method in METHODS:
            for packing in (False, True):
                for checkpointing in (False, True):
                    model, rows = model_and_rows("llama")
                    # float16 trains float32 weights under autocast
                    model = model.to("cuda", torch.bfloat16 if dtype == "bfloat16" else torch.float32)
                    adapted = trained(model, method, rows)
                    batch = batch_of(adapted, rows, packing, checkpointing)
                    autocast = lambda on=dtype == "float16": torch.autocast("cuda", torch.float16, enabled=on)  # noqa: E731
                    error = gradient_error(adapted, batch, STEP[dtype], autocast)
                    errors[f"{dtype} {method} packing={packing} checkpointing={checkpointing}"] = (
                        error,
                        ALLOWED[dtype],
                    )
    assert {name: error for name, (error, allowed) in errors.items() if not error <= allowed} == {}
