"""Packed rows do not see each other: each has the same loss as alone, in the code that trains."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

LENGTHS = (3, 200, 17, 64, 5, 120)


def model_and_rows(architecture: str, **options: Any) -> tuple[Any, list[dict[str, list[int]]]]:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(1)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        initializer_range=0.2,  # so that what a token sees matters
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    rows = []
    for length in LENGTHS:
        ids = torch.randint(3, 300, (length,)).tolist()
        rows.append({"input_ids": ids, "labels": [-100] * (length // 2) + ids[length // 2 :]})
    return model, rows


def mean_losses(model: Any, rows: list[dict[str, list[int]]], packed: bool) -> list[float]:
    """Return the mean loss of each row: alone, or in one packed batch of all."""
    import torch

    from training import batches

    losses = []
    with torch.inference_mode():
        for row in rows:
            only = [one if one is row else one | {"labels": [-100] * len(one["labels"])} for one in rows]
            loss = batches.answer_loss(model, batches.pack(only) if packed else batches.pad([row], 0))
            losses.append(loss.item() / sum(label != -100 for label in row["labels"][1:]))
    return losses


@pytest.mark.parametrize("attention", ["each row alone", "one mask"])
@pytest.mark.parametrize(
    "architecture", ["phi3", "phi", "llama", "mistral", "qwen2", "qwen3", "smollm3", "gemma3_text", "granite"]
)
def test_each_packed_example_has_the_loss_it_has_alone(workspace: Path, architecture: str, attention: str) -> None:
    from training import train

    # a window that some rows are longer than
    window = {"sliding_window": 32} if architecture in ("phi3", "mistral", "gemma3_text") else {}
    model, rows = model_and_rows(architecture, **window)
    alone = mean_losses(model, rows, packed=False)
    if attention == "each row alone":
        train.pack_attention(model)
        assert model.config._attn_implementation == "packed_sdpa"
    assert mean_losses(model, rows, packed=True) == pytest.approx(alone, abs=1e-4)


def test_rows_that_see_each_other_have_another_loss(workspace: Path) -> None:
    """The test above could not fail if the loss of these models did not depend on what a token sees."""
    import torch

    from training import batches, train

    model, rows = model_and_rows("llama")
    train.pack_attention(model)
    batch = batches.pack(rows)
    with torch.inference_mode():
        apart = batches.answer_loss(model, batch).item()
        together = batches.answer_loss(model, batch | {"row_ends": [sum(LENGTHS)]}).item()
    assert together != pytest.approx(apart, abs=1e-1)


def test_a_packed_batch_has_no_padding_and_all_rows(workspace: Path) -> None:
    from training import batches

    _, rows = model_and_rows("llama")
    batch = batches.pack(rows)
    assert batch["input_ids"].shape == batch["labels"].shape == batch["position_ids"].shape == (1, sum(LENGTHS))
    assert batch["row_ends"][-1] == sum(LENGTHS)
    assert (batch["labels"] != -100).sum() == sum(sum(label != -100 for label in row["labels"][1:]) for row in rows)
    assert "attention_mask" not in batch


@pytest.mark.parametrize("keeps_columns", [True, False])
def test_the_loss_of_a_padded_batch_is_that_of_its_rows(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, keeps_columns: bool
) -> None:
    import torch

    from training import batches

    model, rows = model_and_rows("llama")
    monkeypatch.setattr(batches, "takes_columns", lambda model: keeps_columns)
    with torch.inference_mode():
        together = batches.answer_loss(model, batches.pad(rows, 0)).item()
        alone = sum(batches.answer_loss(model, batches.pad([row], 0)).item() for row in rows)
        # as transformers counts it, from all logits
        whole = [model(input_ids=torch.tensor([r["input_ids"]]), labels=torch.tensor([r["labels"]])) for r in rows]
        counts = [sum(label != -100 for label in row["labels"][1:]) for row in rows]
    assert together == pytest.approx(alone, rel=1e-5)
    assert together == pytest.approx(sum(out.loss.item() * n for out, n in zip(whole, counts, strict=True)), rel=1e-5)


@pytest.mark.parametrize(("architecture", "apart"), [("llama", True), ("gemma3_text", True), ("lfm2", False)])
def test_a_model_that_mixes_packed_rows_is_detected_and_its_rows_are_padded(
    workspace: Path, capsys: pytest.CaptureFixture[str], architecture: str, apart: bool
) -> None:
    import peft

    from training import train

    layers = {"layer_types": ["conv", "full_attention"]} if architecture == "lfm2" else {}
    model, rows = model_and_rows(architecture, **layers)
    adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
    assert train.can_pack(adapted, rows) is apart
    assert ("would mix packed rows" in capsys.readouterr().out) is not apart
    assert (model.config._attn_implementation == "packed_sdpa") is apart


@pytest.mark.parametrize("most", [1, 64, 100, 200, 10**6])
def test_a_batch_in_pieces_has_the_loss_and_the_gradients_of_the_whole(workspace: Path, most: int) -> None:
    import torch

    from training import batches, train

    model, rows = model_and_rows("llama")
    rows[2]["labels"] = [-100] * LENGTHS[2]  # a row that fills up a batch
    train.pack_attention(model)
    whole = batches.pack(rows)
    pieces = list(batches.divide(whole, most))
    sizes = [piece["row_ends"] for piece in pieces]
    assert [piece["input_ids"].shape[1] for piece in pieces] == [ends[-1] for ends in sizes]
    assert all(ends[-1] <= most or len(ends) == 1 for ends in sizes), "only one row may be longer"
    assert [end - start for ends in sizes for start, end in pairwise([0, *ends])] == [*LENGTHS]
    assert torch.equal(torch.cat([piece["labels"] for piece in pieces], dim=1), whole["labels"])

    def slopes(parts: list[Any]) -> list[Any]:
        model.zero_grad()
        losses = [batches.answer_loss(model, part) for part in parts]
        for loss in losses:
            loss.backward()
        return [torch.stack(losses).sum().detach(), *(weight.grad.clone() for weight in model.parameters())]

    for one, other in zip(slopes(pieces), slopes([whole]), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_padded_batch_is_not_divided(workspace: Path) -> None:
    from training import batches

    _, rows = model_and_rows("llama")
    batch = batches.pad(rows, 0)
    assert list(batches.divide(batch, 8)) == [batch]
