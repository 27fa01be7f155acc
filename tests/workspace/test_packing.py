"""Packed rows do not see each other: each has the loss it has alone."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.mark.parametrize("architecture", ["phi3", "phi", "llama", "mistral", "qwen3", "smollm3", "gemma3_text"])
def test_each_packed_example_has_the_loss_it_has_alone(workspace: Path, architecture: str) -> None:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, DataCollatorWithFlattening

    torch.manual_seed(1)
    config = AutoConfig.for_model(
        architecture,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        head_dim=16,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32).eval()
    model.config.use_cache = False
    rows = []
    for length in (3, 200, 17, 64, 5, 120):
        ids = torch.randint(3, 300, (length,))
        labels = ids.clone()
        labels[: length // 2] = -100
        rows.append({"input_ids": ids, "labels": labels})

    batch = DataCollatorWithFlattening()([{key: ids.tolist() for key, ids in row.items()} for row in rows])
    assert "attention_mask" not in batch
    assert batch["input_ids"].shape[1] == sum(len(row["labels"]) for row in rows), "no padding, and no row is dropped"
    with torch.inference_mode():
        packed = model(input_ids=batch["input_ids"], position_ids=batch["position_ids"]).logits[0]
        start = 0
        for row in rows:
            length = len(row["labels"])
            alone = model(input_ids=row["input_ids"][None]).logits[0]
            losses = [
                torch.nn.functional.cross_entropy(logits[:-1], row["labels"][1:])
                for logits in (packed[start : start + length], alone)
            ]
            assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-4)
            start += length
