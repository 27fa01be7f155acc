"""The gradient check: does the loss change as the gradients say?

Wrong gradients raise no error. A kernel without a backward pass, for example one that a library chooses after the first
evaluation, trains a worse adapter, and the losses still look fine.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from preparing.tokens import IGNORED
from settings.config_file import ConfigError
from training.batches import Batch, answer_loss

DIRECTIONS = 4  # along a single one, the loss may hardly change by chance
SEED = 0  # of the directions, and of the dropout: it must be the same in every forward pass
# By how much a tensor is stretched, and how far right gradients may be off; measured with four architectures and LoRA,
# DoRA, LoHa and LoKr. In float32, a step of 0.01 agrees to 0.1 %. In bfloat16, one of 0.1 agrees to 11 %: a smaller one
# disappears in the rounding of the loss, a larger one bends it. Gradients of the last layer alone are off by 70 %.
STEP = {"float32": 0.01, "bfloat16": 0.1, "float16": 0.1}
ALLOWED = {"float32": 0.02, "bfloat16": 0.2, "float16": 0.2}


def check_gradients(model: Any, batch: Batch, dtype: str, context: Callable[[], Any]) -> str:
    """Return in one line how well the gradients agree with the loss. Raises ConfigError if they do not.

    `context` gives the context manager of the training's forward pass, for example autocast.
    """
    error = gradient_error(model, batch, STEP[dtype], context)
    if error <= ALLOWED[dtype]:
        return f"The gradients agree with the change of the loss to {error:.2%}."
    raise ConfigError(
        f"The gradients are wrong, without an error from any library: the loss changes otherwise than they say, by "
        f"{error:.0%}, and {dtype} explains {ALLOWED[dtype]:.0%}: try packing: false, then attn_implementation: eager, "
        "and report it with the versions of torch, transformers and peft."
    )


def gradient_error(model: Any, batch: Batch, step: float, context: Callable[[], Any] = contextlib.nullcontext) -> float:
    """Return the relative difference of the gradients from the change of the loss, along random directions.

    Each direction stretches every trained tensor by its own random factor, about 1 ± `step`. A direction that is random
    in each single weight would change the loss by far less than 16 bits resolve; the gradient's own direction would not
    show that a tensor has no gradient. `model` is a trained PEFT model: stretching the zeros of a new adapter changes
    nothing. It is evaluated first, as in a run. Its weights are as before at the end.
    """
    weights = [weight for weight in model.parameters() if weight.requires_grad]
    labels = (batch["labels"][:, 1:] != IGNORED).sum()

    def loss() -> torch.Tensor:
        torch.manual_seed(SEED)
        with context():
            return answer_loss(model, batch) / labels

    with constant_norms(model):
        model.eval()
        with torch.no_grad():
            loss()
        model.train()
        model.zero_grad()
        loss().backward()
        # the change of the loss when a tensor is stretched
        slopes = [(weight.grad * weight).sum().double().cpu() if weight.grad is not None else 0.0 for weight in weights]
        generator = torch.Generator().manual_seed(SEED)
        expected, measured = [], []
        for _ in range(DIRECTIONS):
            factors = torch.randn(len(weights), generator=generator).tolist()
            expected.append(float(sum(factor * slope for factor, slope in zip(factors, slopes, strict=True))))
            ahead, behind = (loss_at(loss, weights, [1 + sign * step * f for f in factors]) for sign in (1, -1))
            measured.append((ahead - behind) / (2 * step))
    model.zero_grad()
    difference = torch.dist(torch.tensor(expected), torch.tensor(measured))
    return float(difference / torch.tensor([expected, measured]).norm(dim=1).max())


@torch.no_grad()
def loss_at(loss: Callable[[], torch.Tensor], weights: list[Any], factors: list[float]) -> float:
    """Return the loss with each weight tensor times its factor."""
    kept = [weight.clone() for weight in weights]
    for weight, factor in zip(weights, factors, strict=True):
        weight.mul_(factor)
    value = loss().item()
    for weight, before in zip(weights, kept, strict=True):
        weight.copy_(before)
    return value


@contextlib.contextmanager
def constant_norms(model: Any) -> Iterator[None]:
    """Keep DoRA's norms of the weights at their first value: its gradients take them as constants (PEFT's dora.py)."""
    layers = [module for module in model.modules() if hasattr(module, "get_weight_norm")]
    for layer in layers:
        layer.get_weight_norm = first_value(layer.get_weight_norm)
    try:
        yield
    finally:
        for layer in layers:
            del layer.get_weight_norm


def first_value(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function that always gives what the first call gave."""
    values: list[Any] = []

    def first(*arguments: Any, **options: Any) -> Any:
        if not values:
            values.append(function(*arguments, **options))
        return values[0]

    return first
