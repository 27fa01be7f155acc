"""LoRA's layer as one operation of autograd: for a CPU, where PEFT's steps take most of the memory.

The result is PEFT's, base_layer(x) + scaling * lora_B(lora_A(dropout(x))). PEFT keeps the input after the dropout, and
the dropout's mask, four bytes for each number and anew for each adapter; in bfloat16 it computes the adapter in
float32. Here, adapters with the same input share it, the mask takes a byte, sums are made in place, and the products of
the adapter are in the base layer's precision. Random bits are drawn 64 at a time: PyTorch's own mask of a CPU takes
a tenth of a step.
"""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from peft.tuners.lora.layer import Linear


def fuse(model: Any) -> int:
    """Replace the forward pass of each plain LoRA layer of a PEFT model on a CPU. Returns how many they are.

    DoRA, quantised weights, other precisions and other kinds of layers stay as PEFT computes them.
    """
    layers = [layer for layer in model.modules() if is_plain(layer)]
    for layer in layers:
        layer.forward = partial(forward, layer)
    return len(layers)


def is_plain(layer: Any) -> bool:
    """Return whether a layer is LoRA in float32 on a linear layer in float32 or bfloat16 on a CPU, and nothing else."""
    if type(layer) is not Linear or type(layer.base_layer) is not torch.nn.Linear or layer.lora_variant:
        return False
    base = layer.base_layer.weight
    adapters = [part.weight for parts in (layer.lora_A, layer.lora_B) for part in parts.values()]
    return (
        len(layer.active_adapters) == 1
        and not layer.lora_bias[layer.active_adapters[0]]
        and base.dtype in (torch.float32, torch.bfloat16)
        and all(weight.dtype == torch.float32 for weight in adapters)
        and all(weight.device.type == "cpu" for weight in (base, *adapters))
    )


def forward(layer: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute a layer's output; x has the shape (..., inputs)."""
    if layer.disable_adapters or layer.merged:
        return Linear.forward(layer, x)
    (name,) = layer.active_adapters
    dropout = getattr(layer.lora_dropout[name], "p", 0.0) if layer.training else 0.0  # nn.Identity without dropout
    base, down, up = layer.base_layer, layer.lora_A[name].weight, layer.lora_B[name].weight
    output: torch.Tensor = FusedLora.apply(x, base.weight, base.bias, down, up, layer.scaling[name], dropout)
    return output


class FusedLora(torch.autograd.Function):
    """x W^T + bias + scale * dropout(x) down^T up^T, with gradients for x, down and up."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        down: torch.Tensor,
        up: torch.Tensor,
        scale: float,
        dropout: float,
    ) -> torch.Tensor:
        """Compute the output; the shapes are x (..., inputs), down (rank, inputs) and up (outputs, rank)."""
        rows = x.flatten(0, -2)
        ctx.scale = scale / (1 - dropout)
        keep = draw_mask(rows.shape, dropout) if dropout else None
        small = dropped(rows, keep) @ down.T.to(x.dtype)
        output = torch.nn.functional.linear(rows, weight, bias).addmm_(small, (up.T * ctx.scale).to(x.dtype))
        ctx.save_for_backward(x, weight, down, up, small, keep)
        return output.view(*x.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[Any, ...]:
        """Compute the gradients of x, down and up; those of down and up are float32, as these are."""
        x, weight, down, up, small, keep = ctx.saved_tensors
        rows, gradient = x.flatten(0, -2), gradients[0].flatten(0, -2)
        back = gradient @ (up * ctx.scale).to(x.dtype)
        of_x = None
        if ctx.needs_input_grad[0]:  # the first layer's input is the embedding, which is not trained
            of_x = (gradient @ weight).add_(dropped(back @ down.to(x.dtype), keep)).view_as(x)
        of_down, of_up = (back.T @ dropped(rows, keep)).float(), (small.T @ gradient).T.float() * ctx.scale
        return of_x, None, None, of_down, of_up, None, None


def draw_mask(shape: torch.Size, dropout: float) -> torch.Tensor:
    """Draw which numbers the dropout keeps: 16 random bits for each."""
    count = math.prod(shape)
    bits = torch.empty(math.ceil(count / 4), dtype=torch.int64).random_(-(2**63), None).view(torch.int16)
    return (bits[:count] >= round(dropout * 2**16) - 2**15).view(shape)


def dropped(rows: torch.Tensor, keep: torch.Tensor | None) -> torch.Tensor:
    """Return the numbers that the mask keeps, and 0 for the others."""
    return rows if keep is None else torch.where(keep, rows, 0.0)
