"""The dimensions of a decoder that determine its memory and time, read from config.json or setup/model.yaml."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

# Their hidden states exceed the 65,504 that float16 holds: 103,821 was measured in Gemma 3 270M (transformers#39972).
OVERFLOW_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text")
FUSED = ("phi3",)  # architectures with one layer for queries, keys and values, and one for gate and up


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder that determine its memory and time."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the output layer shares the embedding
    context: int | None = None  # tokens that it reads; None: not said
    weights: int | None = None  # all of the model, as transformers makes it; None: not counted

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Shape:
        """Read a model's config.json, or the facts of setup/model.yaml. Raises KeyError and TypeError."""
        heads = facts.get("num_attention_heads") or facts["attention_heads"]
        hidden = facts["hidden_size"]
        return cls(
            architecture=facts.get("model_type") or facts["architecture"],
            layers=facts.get("num_hidden_layers") or facts["layers"],
            hidden=hidden,
            intermediate=int(facts["intermediate_size"]),  # a list in Gemma 3n, which raises TypeError
            heads=heads,
            key_value_heads=facts.get("num_key_value_heads") or facts.get("key_value_heads") or heads,
            head_dim=facts.get("head_dim") or hidden // heads,
            vocabulary=facts.get("vocab_size") or facts["vocabulary"],
            tied=bool(facts.get("tie_word_embeddings")),
            context=facts.get("max_position_embeddings") or facts.get("context"),
        )

    @property
    def is_right(self) -> bool:
        """Whether a decoder of these dimensions is the model: one with experts or other layers has other weights."""
        return self.weights is None or math.isclose(self.parameters, self.weights, rel_tol=0.01)

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of one block: name → (features in, features out)."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        wide, narrow = self.intermediate, self.hidden
        if self.architecture in FUSED:
            attention = {"qkv_proj": (narrow, queries + 2 * keys), "o_proj": (queries, narrow)}
            return attention | {"gate_up_proj": (narrow, 2 * wide), "down_proj": (wide, narrow)}
        attention = {"q_proj": (narrow, queries), "k_proj": (narrow, keys), "v_proj": (narrow, keys)}
        if self.architecture == "phi":
            return attention | {"dense": (queries, narrow), "fc1": (narrow, wide), "fc2": (wide, narrow)}
        feed_forward = {"gate_proj": (narrow, wide), "up_proj": (narrow, wide), "down_proj": (wide, narrow)}
        return attention | {"o_proj": (queries, narrow)} | feed_forward

    @property
    def block_weights(self) -> int:
        """Weights of all linear layers in all blocks."""
        return self.layers * sum(inputs * outputs for inputs, outputs in self.linear.values())

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the output layer unless it is tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, each counted once, without norms and biases (less than a thousandth)."""
        return self.block_weights + self.embedding * (1 if self.tied else 2)
