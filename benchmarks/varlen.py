"""Attention within each row of a packed batch in one call: PyTorch's kernel for rows of different lengths.

attend_all_rows has the signature of attend_row_by_row in template/finetuning/training/batches.py, so that it could take
its place. PyTorch has the kernel (FlashAttention) for GPUs only; register_cpu_kernel adds a slow one that follows its
documentation, so that everything around the kernel can be tried on a CPU.
"""

from __future__ import annotations

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import varlen

WIDEST = 256  # a head in FlashAttention, which also needs a multiple of 8
# Fewer heads for keys than for queries: the kernel takes them, since PyTorch 2.12 only if asked to.
ASKS_FOR_GROUPS = "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters


def attend_all_rows(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: Any, **options: Any
) -> tuple[torch.Tensor, None]:
    """Attend within each row of a packed batch, in one call.

    query, key and value have the shape (1, heads, tokens, head width); the result (1, tokens, heads, head width). What
    the kernel cannot do (float32, dropout, wide heads) is done row by row.
    """
    ends, window = options.get("row_ends"), options.get("sliding_window")
    if ends is None:
        raise ValueError("packed_sdpa takes packed batches only")
    dtype, width = computed_in(query), query.shape[-1]
    if dtype == torch.float32 or options.get("dropout") or width > WIDEST or width % 8 or width != value.shape[-1]:
        from training.batches import attend_row_by_row

        return attend_row_by_row(module, query, key, value, mask, **options)
    query, key, value = (states.to(dtype).transpose(1, 2)[0] for states in (query, key, value))
    groups = {"enable_gqa": query.shape[1] != key.shape[1]} if ASKS_FOR_GROUPS else {}
    starts, longest = row_starts(tuple(ends), query.device)
    attended = varlen.varlen_attn(
        query,
        key,
        value,
        starts,
        starts,
        longest,
        longest,
        scale=options.get("scaling"),
        window_size=(window - 1 if window else -1, 0),
        **groups,
    )
    return attended[None], None


def computed_in(query: torch.Tensor) -> torch.dtype:
    """Return the precision in which attention is computed: autocast does not reach the kernel."""
    kind = query.device.type
    autocast = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if autocast else query.dtype


@lru_cache(maxsize=2)  # for all layers of a step: each copy to the GPU would wait for it
def row_starts(ends: tuple[int, ...], device: torch.device) -> tuple[torch.Tensor, int]:
    """Return where each row starts, and where the last one ends (int32), and the longest row's length."""
    starts = [0, *ends]
    longest = max(end - start for start, end in zip(starts, ends, strict=False))
    return torch.tensor(starts, dtype=torch.int32, device=device), longest


def register_cpu_kernel() -> None:
    """Add a kernel for CPUs, forward and backward: a mask over the whole batch, and float32."""
    varlen._varlen_attn.register_kernel("cpu", forward)
    varlen._varlen_attn_backward.register_kernel("cpu", backward)


def named(operator: Any, values: tuple[Any, ...]) -> dict[str, Any]:
    """Return an operator's arguments by name: releases of PyTorch have them in different places."""
    return dict(zip((one.name for one in operator._opoverload._schema.arguments), values, strict=False))


def shares(given: dict[str, Any]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, float]:
    """Return each token's share of the others (heads, tokens, tokens), query, key and value by head, and the scale."""
    query, key, value = (given[name].float().transpose(0, 1) for name in ("query", "key", "value"))
    key, value = (states.repeat_interleave(len(query) // len(states), dim=0) for states in (key, value))
    scale = given.get("scale") or query.shape[-1] ** -0.5
    places = torch.arange(query.shape[1])
    rows = torch.bucketize(places, given["cu_seq_q"][1:].long(), right=True)
    back = places[:, None] - places  # how many tokens before the one that attends
    left, right = given.get("window_size") or (-1, -1)
    right = 0 if given.get("is_causal") else right
    seen = rows[:, None] == rows
    if left >= 0:
        seen &= back <= left
    if right >= 0:
        seen &= -back <= right
    scores = (query @ key.transpose(1, 2) * scale).masked_fill(~seen, -torch.inf)
    return scores.softmax(dim=-1), query, key, value, scale


def forward(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the attended values (tokens, heads, head width) and two tensors that only CUDA's backward pass reads."""
    given = named(varlen._varlen_attn, values)
    weights, _, _, value, _ = shares(given)
    heads, tokens = weights.shape[:2]
    attended = (weights @ value).transpose(0, 1).contiguous().to(given["query"].dtype)
    return attended, torch.zeros(heads, tokens), torch.zeros(2, dtype=torch.uint64)


def backward(*values: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the gradients of query, key and value."""
    given = named(varlen._varlen_attn_backward, values)
    weights, query, key, value, scale = shares(given)
    gradient = given["grad_out"].float().transpose(0, 1)
    of_weights = gradient @ value.transpose(1, 2)
    of_scores = weights * (of_weights - (of_weights * weights).sum(dim=-1, keepdim=True)) * scale
    found = (of_scores @ key, of_scores.transpose(1, 2) @ query, weights.transpose(1, 2) @ gradient)
    heads = given["key"].shape[1]
    groups = (given["query"].shape[1], heads, heads)
    return tuple(  # type: ignore[return-value]
        one.unflatten(0, (count, -1)).sum(dim=1).transpose(0, 1).contiguous().to(given["query"].dtype)
        for one, count in zip(found, groups, strict=True)
    )
