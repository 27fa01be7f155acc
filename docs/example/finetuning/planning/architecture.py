"""The dimensions of a decoder that determine its memory and time, read from config.json or setup/model.yaml."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Their hidden states exceed the 65,504 that float16 holds: 103,821 was measured in Gemma 3 270M (transformers#39972).
# The catalogue says it of its own models: float16 in setup/model.yaml.
OVERFLOW_IN_FLOAT16 = ("gemma2", "gemma3", "gemma3_text", "gemma4", "gemma4_text")
FUSED = ("phi3",)  # architectures with one layer for queries, keys and values, and one for gate and up
QWEN35, GEMMA4 = ("qwen3_5", "qwen3_5_text"), ("gemma4", "gemma4_text")
FOUR_NORMS = ("gemma2", "gemma3", "gemma3_text")  # before and after attention and MLP
NORMED_HEADS = ("qwen3", "gemma3", "gemma3_text")  # queries and keys have a norm each
# What decides the layers of an architecture with several kinds, by the names in config.json.
SEVERAL_KINDS = (
    "layer_types",
    "full_attn_idxs",
    "full_attention_interval",
    "conv_L_cache",
    "linear_num_key_heads",
    "linear_num_value_heads",
    "linear_key_head_dim",
    "linear_value_head_dim",
    "linear_conv_kernel_dim",
    "global_head_dim",
    "hidden_size_per_layer_input",
    "vocab_size_per_layer_input",
    "num_kv_shared_layers",
    "use_double_wide_mlp",
)


@dataclass(frozen=True)
class Block:
    """Layers of one kind."""

    count: int
    linear: dict[str, tuple[int, int]]  # its linear layers: name → (features in, features out)
    others: int  # weights of a layer outside of them: norms, biases, convolutions

    @property
    def weights(self) -> int:
        """Weights of the linear layers of one of them."""
        return sum(inputs * outputs for inputs, outputs in self.linear.values())


@dataclass(frozen=True)
class Shape:
    """The dimensions of a decoder that determine its memory and time; of a multimodal model, its text model's."""

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
    beside: int = 0  # weights that are loaded beside the text model, for images or sound, and not trained
    config: Mapping[str, Any] = field(default_factory=dict, hash=False)  # SEVERAL_KINDS, as far as the model has them

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Shape:
        """Read a model's config.json, or the facts of setup/model.yaml. Raises KeyError and TypeError."""
        heads = facts.get("num_attention_heads") or facts["attention_heads"]
        hidden = facts["hidden_size"]
        return cls(
            architecture=facts.get("model_type") or facts["architecture"],
            layers=facts.get("num_hidden_layers") or facts["layers"],
            hidden=hidden,
            intermediate=intermediate_of(facts),
            heads=heads,
            key_value_heads=facts.get("num_key_value_heads") or facts.get("key_value_heads") or heads,
            head_dim=facts.get("head_dim") or hidden // heads,
            vocabulary=facts.get("vocab_size") or facts["vocabulary"],
            tied=bool(facts.get("tie_word_embeddings")),
            context=facts.get("max_position_embeddings") or facts.get("context"),
            config=several_kinds(facts.get("config") or facts),
        )

    @property
    def is_right(self) -> bool:
        """Whether a decoder of these dimensions is the model: one with experts or other layers has other weights."""
        return self.weights is None or math.isclose(self.parameters, self.weights, rel_tol=0.01)

    @property
    def is_uniform(self) -> bool:
        """Whether all its layers are of the kind whose memory is known: attention and an MLP, the same in each."""
        return self.architecture not in (*QWEN35, *GEMMA4, "lfm2")

    @property
    def blocks(self) -> list[Block]:
        """The kinds of layers, and how many there are of each."""
        if self.architecture == "lfm2":
            return lfm2(self)
        if self.architecture in QWEN35:
            return qwen35(self)
        if self.architecture in GEMMA4:
            return gemma4(self)
        return [Block(self.layers, self.linear, norms(self) + biases(self))]

    @property
    def linear(self) -> dict[str, tuple[int, int]]:
        """The linear layers of a block with attention and an MLP: name → (features in, features out)."""
        queries, keys = self.heads * self.head_dim, self.key_value_heads * self.head_dim
        wide, narrow = self.intermediate, self.hidden
        if self.architecture in FUSED:
            attention = {"qkv_proj": (narrow, queries + 2 * keys), "o_proj": (queries, narrow)}
            return attention | {"gate_up_proj": (narrow, 2 * wide), "down_proj": (wide, narrow)}
        attention = {"q_proj": (narrow, queries), "k_proj": (narrow, keys), "v_proj": (narrow, keys)}
        if self.architecture == "phi":
            return attention | {"dense": (queries, narrow), "fc1": (narrow, wide), "fc2": (wide, narrow)}
        return attention | {"o_proj": (queries, narrow)} | mlp(narrow, wide)

    @property
    def block_weights(self) -> int:
        """Weights of all linear layers in all blocks."""
        return sum(block.count * block.weights for block in self.blocks)

    @property
    def embedding(self) -> int:
        """Weights of the embedding, and of the output layer unless it is tied."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights of the text model, each counted once."""
        ends = self.embedding * (1 if self.tied else 2) + self.hidden  # and the last norm
        if self.architecture == "phi":
            ends += self.hidden + self.vocabulary  # the biases of that norm and of the output layer
        if self.architecture in GEMMA4 and (width := self.config.get("hidden_size_per_layer_input", 0)):
            per_layer = self.layers * width
            ends += self.config["vocab_size_per_layer_input"] * per_layer + self.hidden * per_layer + width
        return self.block_weights + sum(block.count * block.others for block in self.blocks) + ends


def several_kinds(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return SEVERAL_KINDS, as far as a model has them. transformers writes Gemma 4's wide heads layer by layer."""
    found = {key: facts[key] for key in SEVERAL_KINDS if facts.get(key) is not None}
    if (layers := facts.get("per_layer_config")) and (wide := next(iter(layers.values())).get("head_dim")):
        found.setdefault("global_head_dim", wide)
    return found


def intermediate_of(facts: Mapping[str, Any]) -> int:
    """Return the width of the MLP. Raises KeyError, and TypeError for Gemma 3n, which has a list."""
    width = int(facts.get("block_ff_dim") or facts["intermediate_size"])
    if not facts.get("block_auto_adjust_ff_dim"):
        return width
    width = int(int(2 * width / 3) * (facts.get("block_ffn_dim_multiplier") or 1.0))  # as Lfm2MLP does
    multiple = facts.get("block_multiple_of") or 256
    return int(-(-width // multiple) * multiple)


def mlp(narrow: int, wide: int) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a gated MLP."""
    return {"gate_proj": (narrow, wide), "up_proj": (narrow, wide), "down_proj": (wide, narrow)}


def norms(shape: Shape) -> int:
    """Count the weights of the norms of a dense block."""
    if shape.architecture == "phi":
        return 2 * shape.hidden  # one, with a bias
    heads = 2 * shape.head_dim if shape.architecture in NORMED_HEADS else 0
    return (4 if shape.architecture in FOUR_NORMS else 2) * shape.hidden + heads


def biases(shape: Shape) -> int:
    """Count the biases of the linear layers of a dense block."""
    biased = {"phi": set(shape.linear), "qwen2": {"q_proj", "k_proj", "v_proj"}}.get(shape.architecture, set())
    return sum(outputs for name, (_, outputs) in shape.linear.items() if name in biased)


def kinds(shape: Shape) -> list[str]:
    """Return the kind of each layer, as `layer_types` of config.json names it."""
    given = shape.config
    if "layer_types" in given:
        return list(given["layer_types"])
    if "full_attn_idxs" in given:
        return ["full_attention" if i in given["full_attn_idxs"] else "conv" for i in range(shape.layers)]
    every = given.get("full_attention_interval", 4)
    return ["linear_attention" if (i + 1) % every else "full_attention" for i in range(shape.layers)]


def lfm2(shape: Shape) -> list[Block]:
    """Return the layers of LFM2: short convolutions, and attention in some (transformers' modeling_lfm2.py)."""
    narrow, wide = shape.hidden, shape.intermediate
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    feed_forward = {"w1": (narrow, wide), "w3": (narrow, wide), "w2": (wide, narrow)}
    convolution = {"in_proj": (narrow, 3 * narrow), "out_proj": (narrow, narrow)}
    attention = {"q_proj": (narrow, queries), "k_proj": (narrow, keys), "v_proj": (narrow, keys)}
    attention |= {"out_proj": (queries, narrow)}
    found = Counter(kinds(shape))
    return [
        Block(found["conv"], convolution | feed_forward, 2 * narrow + narrow * shape.config["conv_L_cache"]),
        Block(found["full_attention"], attention | feed_forward, 2 * narrow + 2 * shape.head_dim),
    ]


def qwen35(shape: Shape) -> list[Block]:
    """Return the layers of Qwen3.5: Gated DeltaNet, and gated attention in some (modeling_qwen3_5.py)."""
    narrow, given, found = shape.hidden, shape.config, Counter(kinds(shape))
    heads, keys = given["linear_num_value_heads"], given["linear_num_key_heads"] * given["linear_key_head_dim"]
    values = heads * given["linear_value_head_dim"]
    delta = {"in_proj_qkv": (narrow, 2 * keys + values), "in_proj_z": (narrow, values)}
    delta |= {"in_proj_b": (narrow, heads), "in_proj_a": (narrow, heads), "out_proj": (values, narrow)}
    # the convolution, two numbers for each head, and the norm of a head
    others = given["linear_conv_kernel_dim"] * (2 * keys + values) + 2 * heads + given["linear_value_head_dim"]
    attention = {name: size for name, size in shape.linear.items() if name not in mlp(narrow, shape.intermediate)}
    attention["q_proj"] = (narrow, 2 * shape.heads * shape.head_dim)  # each head's query and gate
    both = mlp(narrow, shape.intermediate)
    return [
        Block(found["linear_attention"], delta | both, 2 * narrow + others),
        Block(found["full_attention"], attention | both, 2 * narrow + 2 * shape.head_dim),
    ]


def gemma4(shape: Shape) -> list[Block]:
    """Return the layers of Gemma 4 without experts: two widths of heads, some without keys (modeling_gemma4.py)."""
    narrow, given = shape.hidden, shape.config
    own = shape.layers - given.get("num_kv_shared_layers", 0)  # the later ones take keys and values of earlier ones
    found: Counter[tuple[bool, bool]] = Counter()
    for i, kind in enumerate(kinds(shape)):
        found[kind == "full_attention", i < own] += 1
    blocks = []
    for (full, has_keys), count in found.items():
        width = given.get("global_head_dim", shape.head_dim) if full else shape.head_dim
        queries, keys = shape.heads * width, shape.key_value_heads * width
        attention = {"q_proj": (narrow, queries), "o_proj": (queries, narrow)}
        attention |= {"k_proj": (narrow, keys), "v_proj": (narrow, keys)} if has_keys else {}
        double = given.get("use_double_wide_mlp") and not has_keys
        linear = attention | mlp(narrow, shape.intermediate * (2 if double else 1))
        others = 4 * narrow + (2 if has_keys else 1) * width
        if per_layer := given.get("hidden_size_per_layer_input", 0):
            linear |= {"per_layer_input_gate": (narrow, per_layer), "per_layer_projection": (per_layer, narrow)}
            others += narrow
        blocks.append(Block(count, linear, others))
    return blocks
