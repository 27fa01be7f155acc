"""LoRA's layer as one operation: the same output and the same gradients as PEFT's own.

How much less memory it takes is tested with the estimate, in test_check.py."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest


def layer(dropout: float = 0.0, bias: bool = True, **options: Any) -> Any:
    """Return a PEFT model of one linear layer, with an adapter that is not zero."""
    import peft
    import torch

    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(24, 40, bias=bias))
    settings = {"r": 4, "lora_alpha": 12, "lora_dropout": dropout, "target_modules": ["0"]} | options
    model = peft.get_peft_model(model, peft.LoraConfig(**settings))  # type: ignore[arg-type]
    for weight in model.parameters():
        if weight.requires_grad:
            torch.nn.init.normal_(weight)
    return model


def results(model: Any, x: Any) -> list[Any]:
    """Return the output, and the gradients of the input and of the adapter's two matrices."""
    import torch

    x = x.clone().requires_grad_()
    output = model(x)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    return [output, x.grad, *(weight.grad for weight in model.parameters() if weight.requires_grad)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(24,), (5, 24), (1, 7, 24), (3, 4, 24)])
@pytest.mark.parametrize("options", [{}, {"use_rslora": True}])
def test_without_dropout_it_is_what_peft_computes(
    workspace: Path, bias: bool, shape: tuple[int, ...], options: dict[str, Any]
) -> None:
    import torch

    from training.fused_lora import fuse

    theirs = layer(bias=bias, **options)
    ours = copy.deepcopy(theirs)
    assert fuse(ours) == 1
    x = torch.randn(max(shape, (1, 24), key=len))
    for one, other in zip(results(ours, x), results(theirs, x), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)  # they add in another order


def test_in_bfloat16_it_is_as_near_to_float32_as_bfloat16_is(workspace: Path) -> None:
    import torch

    from training.fused_lora import fuse

    exact = layer().double()
    rounded = copy.deepcopy(exact).float()
    rounded.base_model.model[0].base_layer.to(torch.bfloat16)
    assert fuse(rounded) == 1
    x = torch.randn(64, 24)
    found, right = results(rounded, x.bfloat16()), results(exact, x.double())
    assert [one.dtype for one in found] == [torch.bfloat16] * 2 + [torch.float32] * 2, "the adapter stays in float32"
    for one, other in zip(found, right, strict=True):
        assert torch.dist(one.double(), other) / other.norm() < 2**-7  # a number of bfloat16 is off by 2^-9


def test_with_dropout_it_is_the_formula_with_the_same_mask(workspace: Path) -> None:
    import torch

    from training import fused_lora

    model = layer(dropout=0.25)
    assert fused_lora.fuse(model) == 1
    x = torch.randn(2, 9, 24)
    torch.manual_seed(3)
    found = results(model, x)
    torch.manual_seed(3)
    mask = fused_lora.draw_mask(torch.Size((18, 24)), 0.25).view(2, 9, 24)
    lora = model.base_model.model[0]
    down, up = lora.lora_A["default"].weight, lora.lora_B["default"].weight
    down.grad = up.grad = None

    def formula(x: Any) -> Any:
        return lora.base_layer(x) + 3 * (x * mask / 0.75) @ down.T @ up.T

    leaf = x.clone().requires_grad_()
    output = formula(leaf)
    output.backward(torch.linspace(-1, 1, output.numel()).view_as(output))
    for one, other in zip(found, [output, leaf.grad, down.grad, up.grad], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dropout", [0.01, 0.05, 0.5, 0.999])
def test_the_mask_keeps_the_share_that_the_dropout_says_everywhere_alike(workspace: Path, dropout: float) -> None:
    import torch

    from training.fused_lora import draw_mask

    torch.manual_seed(1)
    mask = draw_mask(torch.Size((1001, 999)), dropout)  # no multiple of the four numbers of a draw
    assert mask.shape == (1001, 999)
    deviation = (dropout * (1 - dropout) / mask.numel()) ** 0.5
    assert abs(1 - mask.double().mean().item() - dropout) < 5 * deviation
    for place in range(4):  # of a draw
        part = mask.flatten()[place::4]
        assert abs(1 - part.double().mean().item() - dropout) < 10 * deviation
    neighbours = (mask.flatten()[1:] ^ mask.flatten()[:-1]).double().mean().item()
    assert neighbours == pytest.approx(2 * dropout * (1 - dropout), abs=10 * deviation)
    torch.manual_seed(1)
    assert torch.equal(mask, draw_mask(torch.Size((1001, 999)), dropout))


def test_an_evaluation_has_no_dropout_and_a_switched_off_adapter_changes_nothing(workspace: Path) -> None:
    import torch

    from training.fused_lora import fuse

    model = layer(dropout=0.9)
    theirs = copy.deepcopy(model).eval()
    fuse(model)
    x = torch.randn(6, 24)
    torch.testing.assert_close(model.eval()(x), theirs(x))
    with model.disable_adapter():
        assert torch.equal(model(x), model.base_model.model[0].base_layer(x))


@pytest.mark.parametrize("case", ["dora", "bias", "float16", "adapter in bfloat16", "conv", "two adapters"])
def test_other_layers_stay_as_peft_computes_them(workspace: Path, case: str) -> None:
    import peft
    import torch

    from training.fused_lora import fuse

    if case == "conv":
        model = torch.nn.Sequential(torch.nn.Conv1d(3, 4, 2))
        made: Any = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["0"]))
    elif case == "two adapters":
        made = layer()
        made.add_adapter("other", peft.LoraConfig(r=2, target_modules=["0"]))
        made.base_model.set_adapter(["default", "other"])
    else:
        options: dict[str, dict[str, Any]] = {"dora": {"use_dora": True}, "bias": {"lora_bias": True}}
        made = layer(**options.get(case, {}))
        if case == "float16":
            made.base_model.model[0].base_layer.to(torch.float16)
        elif case == "adapter in bfloat16":
            made = made.to(torch.bfloat16)
    assert fuse(made) == 0
