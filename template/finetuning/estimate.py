"""The memory that a run needs, by arithmetic alone: nothing here looks at the machine or loads a library.

Sizes are bytes, lengths tokens, unless a name says otherwise. Sources: transformers' models and PEFT's layers, whose
tensors kept for the backward pass were listed with torch.autograd.graph.saved_tensors_hooks; the repository of the
template holds the sums against measured peaks (benchmarks/memory_estimate.py).
"""

from __future__ import annotations

import math
import os
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
FUSED = ("phi3",)  # architectures with one layer for queries, keys and values, and one for gate and up
CPU_FRAMEWORK = 0.55 * GIB  # Python, torch, transformers, PEFT and Olive, imported; measured
# On a CPU, tensors below 32 MiB lie on the C library's heap, where freed ones leave holes that the next ones do not
# fit: none to eight blocks' worth was measured, more with checkpointing, which computes each block twice.
HOLES, HOLES_CHECKPOINTING, OFF_THE_HEAP = 4, 6, 32 * 2**20
GPU_FRAMEWORK = 0.8 * GIB  # the CUDA context, its libraries' work space, and what the allocator cannot use
BYTES_PER_TOKEN_HELD = 80  # a row's three lists of Python numbers and three int64 tensors
EVALUATIONS = 10  # of the held-out loss in a run, see eval_steps
ANSWERS = 200  # evaluate.py generates so many at most


@dataclass(frozen=True)
class Shape:
    """The numbers of a decoder that its memory and time follow from."""

    architecture: str
    layers: int
    hidden: int
    intermediate: int
    heads: int
    key_value_heads: int
    head_dim: int
    vocabulary: int
    tied: bool  # the output layer shares the embedding

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> Shape:
        """Read a model's config.json, or the facts of setup/model.yaml. Raises KeyError for a key that is missing."""
        heads = facts.get("num_attention_heads") or facts["attention_heads"]
        hidden = facts["hidden_size"]
        return cls(
            architecture=facts.get("model_type") or facts["architecture"],
            layers=facts.get("num_hidden_layers") or facts["layers"],
            hidden=hidden,
            intermediate=facts["intermediate_size"],
            heads=heads,
            key_value_heads=facts.get("num_key_value_heads") or facts.get("key_value_heads") or heads,
            head_dim=facts.get("head_dim") or hidden // heads,
            vocabulary=facts.get("vocab_size") or facts["vocabulary"],
            tied=bool(facts.get("tie_word_embeddings")),
        )

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
        """Weights of the embedding, and as many again of an output layer of its own."""
        return self.vocabulary * self.hidden

    @property
    def parameters(self) -> int:
        """All weights, each counted once; norms and biases, less than a thousandth, are left out."""
        return self.block_weights + self.embedding * (1 if self.tied else 2)


@dataclass(frozen=True)
class Settings:
    """The settings of olive-config.yaml that memory, disk and time hang on."""

    method: str  # lora, qlora, dora, loha or lokr
    dtype: str
    gpu: bool
    rank: int
    dropout: float
    target_modules: tuple[str, ...] | None  # None: every linear layer
    batch_size: int
    eval_batch_size: int
    accumulation: int
    epochs: float
    max_steps: int  # 0 or less: the epochs decide
    packing: bool
    checkpointing: bool
    optimizer: str
    max_seq_len: int
    double_quant: bool
    kept: int  # checkpoints on disk
    processes: int = 1  # that share the rows
    sharded: bool = False  # FSDP: they share the weights too

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> Settings:
        """Read olive-config.yaml, with Olive's defaults for what it leaves out."""
        settings = next(iter(config["passes"].values()))
        arguments = settings.get("training_args") or {}
        tokens = config["data_configs"][0]["pre_process_data_config"]
        targets = settings.get("target_modules")
        return cls(
            method=str(settings["type"]).lower(),
            dtype=settings["torch_dtype"],
            gpu=config["systems"]["local_system"]["accelerators"][0]["device"] == "gpu",
            rank=settings.get("r", 64),
            dropout=settings.get("lora_dropout", 0.05) if settings["type"].lower() in ("lora", "qlora", "dora") else 0,
            target_modules=tuple(targets) if isinstance(targets, list) else None,
            batch_size=arguments.get("per_device_train_batch_size", 8),
            eval_batch_size=arguments.get("per_device_eval_batch_size", 8),
            accumulation=arguments.get("gradient_accumulation_steps", 1),
            epochs=arguments.get("num_train_epochs", 3),
            max_steps=arguments.get("max_steps", -1),
            packing=bool(settings.get("packing")),
            checkpointing=bool(arguments.get("gradient_checkpointing")),
            optimizer=arguments.get("optim", "adamw_torch"),
            max_seq_len=tokens.get("max_seq_len", 1024),
            double_quant=bool(settings.get("double_quant")),
            kept=arguments.get("save_total_limit") or EVALUATIONS,
            processes=int(os.environ.get("WORLD_SIZE", "1")),  # of accelerate launch or torchrun
            sharded=os.environ.get("ACCELERATE_USE_FSDP") == "true",
        )

    @property
    def rows_a_step(self) -> int:
        """Rows that one step learns from."""
        return self.batch_size * self.accumulation * self.processes

    def steps(self, rows: int) -> tuple[int, int]:
        """Return the steps of a run on so many rows, and those that its epochs alone would give."""
        epochs = math.ceil(math.ceil(rows / self.rows_a_step) * self.epochs)
        return (min(self.max_steps, epochs) if self.max_steps > 0 else epochs), epochs


@dataclass(frozen=True)
class Lengths:
    """Tokens and labels (the tokens that are learnt) of each row, as max_seq_len leaves them."""

    tokens: Sequence[int]
    labels: Sequence[int]

    def cut(self, longest: int) -> Lengths:
        """Cut all rows at a length; the answers, at the end, lose what is cut."""
        pairs = list(zip(self.tokens, self.labels, strict=True))
        return Lengths([min(t, longest) for t, _ in pairs], [max(n - max(t - longest, 0), 0) for t, n in pairs])


@dataclass(frozen=True)
class Batch:
    """The largest batch of a run in each respect, and the average one."""

    tokens: int  # padding included
    logits: int  # positions at which logits are computed
    masked: int  # cells of the attention mask: rows × longest row squared
    mean_tokens: float


def batches(lengths: Lengths, size: int, packing: bool, epochs: float = 1) -> Batch:
    """Deal the rows into batches as the Trainer does, at random, and take the largest.

    The order is another one than the run's, so that the largest batch is one that may be expected, not the very one.
    A packed batch is as long as its rows together and needs no mask. A padded one is as long as its longest row, times
    its rows, and has logits in every column in which some row has an answer, taken to stand at the row's end.
    """
    order, draw = list(range(len(lengths.tokens))), random.Random(0)
    tokens = logits = masked = total = count = 0
    for _ in range(max(1, min(math.ceil(epochs), 20_000 // max(len(order), 1)))):
        draw.shuffle(order)
        for start in range(0, len(order), size):
            rows = [(lengths.tokens[row], lengths.labels[row]) for row in order[start : start + size]]
            longest = max(length for length, _ in rows)
            if packing:
                width, answers = sum(length for length, _ in rows), sum(labels for _, labels in rows)
            else:
                width, answers = len(rows) * longest, len(rows) * columns(rows)
                masked = max(masked, len(rows) * longest**2 if len(rows) > 1 else 0)
            tokens, logits = max(tokens, width), max(logits, answers)
            total, count = total + width, count + 1
    return Batch(tokens, logits, masked, total / max(count, 1))


def columns(rows: Sequence[tuple[int, int]]) -> int:
    """Count the columns in which some row has an answer: rows are (length, labels), with the labels at the end."""
    found, first = 0, max(length for length, _ in rows)
    for length, labels in sorted(rows, reverse=True):
        found += max(min(length, first) - (length - labels), 0)
        first = min(first, length - labels)
    return found


def adapter_parameters(shape: Shape, settings: Settings) -> int:
    """Count the adapter's weights, as PEFT makes them for each method (peft/tuners/{lora,loha,lokr}/layer.py).

    LoRA has two matrices of the rank, LoHa four, DoRA one magnitude for each output beside LoRA's; LoKr factors a layer
    into a small matrix and a large one, which is itself factored where the rank is below half its narrow side.
    """
    total = 0
    for inputs, outputs in targets(shape, settings).values():
        if settings.method == "loha":
            total += 2 * settings.rank * (inputs + outputs)
        elif settings.method == "lokr":
            (small_in, large_in), (small_out, large_out) = factors(inputs), factors(outputs)
            low = settings.rank < max(large_out, large_in) / 2
            large = settings.rank * (large_out + large_in) if low else large_out * large_in
            total += small_out * small_in + large
        else:
            total += settings.rank * (inputs + outputs) + (outputs if settings.method == "dora" else 0)
    return total * shape.layers


def factors(dimension: int) -> tuple[int, int]:
    """Split a dimension into its two nearest factors, the smaller first, as LoKr does with decompose_factor -1."""
    small = next(n for n in range(math.isqrt(dimension), 0, -1) if dimension % n == 0)
    return small, dimension // small


def targets(shape: Shape, settings: Settings) -> dict[str, tuple[int, int]]:
    """Return the linear layers of a block that get an adapter: QLoRA takes all, whatever target_modules says."""
    if settings.target_modules is None or settings.method == "qlora":
        return shape.linear
    return {name: size for name, size in shape.linear.items() if name in settings.target_modules}


@dataclass(frozen=True)
class Memory:
    """What is held at the peak of the training, part by part."""

    weights: float
    adapter: float
    gradients_and_optimizer: float
    activations: float
    logits: float
    framework: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(vars(self).values())


def memory(shape: Shape, settings: Settings, lengths: Lengths, held_out: Lengths | None = None) -> Memory:
    """Estimate the peak of a run, of one of its processes where there are several.

    Weights stand in the configured precision, float16 excepted, which Olive trains in float32 under autocast; QLoRA
    holds the blocks in 4 bits with a scale for 64 weights (bitsandbytes), the rest as it is. The adapter, its gradient
    and AdamW's two moments are float32: PEFT casts adapters up (autocast_adapter_dtype).
    """
    held = 2 if settings.dtype == "bfloat16" else 4
    others = shape.parameters - shape.block_weights
    blocks: float = held * shape.block_weights
    if settings.method == "qlora":
        scales = 1 / 64 + 4 / (64 * 256) if settings.double_quant else 4 / 64
        blocks = (0.5 + scales) * shape.block_weights
    adapter = adapter_parameters(shape, settings)
    moments = 2 if "8bit" in settings.optimizer else 8
    batch = batches(lengths, settings.batch_size, settings.packing, settings.epochs)
    logits = batch.logits
    if held_out:  # without gradients, half as much is held for each logit
        logits = max(logits, batches(held_out, settings.eval_batch_size, packing=False).logits // 2)
    rows = sum(lengths.tokens) + (sum(held_out.tokens) if held_out else 0)
    # the log-softmax in float32 and the gradients of both, or the logits' own in 16 bits
    logit_bytes = 12 if settings.dtype == "float32" else 14
    share = settings.processes if settings.sharded else 1
    gathered = blocks / shape.layers if settings.sharded else 0  # the block whose turn it is
    return Memory(
        weights=(blocks + held * others) / share + gathered,
        adapter=4 * adapter / share,
        gradients_and_optimizer=(4 + moments) * adapter / share,
        activations=activations(shape, settings, batch),
        logits=logits * shape.vocabulary * logit_bytes,
        framework=GPU_FRAMEWORK if settings.gpu else CPU_FRAMEWORK + BYTES_PER_TOKEN_HELD * rows,
    )


def activations(shape: Shape, settings: Settings, batch: Batch) -> float:
    """What the forward pass keeps for the backward pass, and what the backward pass of one block adds.

    With gradient checkpointing the input of each block is kept, and one block at a time is computed again.
    """
    size = BYTES[settings.dtype]
    block = batch.tokens * per_token(shape, settings, masked=batch.masked > 0) + size * batch.masked
    # autocast keeps a float16 copy of each frozen weight until the backward pass; 4-bit weights are unpacked anew
    if settings.dtype == "float16" and settings.method != "qlora":
        block += 2 * shape.block_weights / shape.layers
    if settings.method in ("loha", "lokr"):  # they add their product to a copy of the weight, in float32
        block += 4 * sum(inputs * outputs for inputs, outputs in targets(shape, settings).values())
    working: float = batch.tokens * 4 * shape.intermediate * size
    if not settings.gpu and batch.tokens * shape.hidden * size < OFF_THE_HEAP:
        working += block * (HOLES_CHECKPOINTING if settings.checkpointing else HOLES)
    if settings.method == "qlora":  # a layer's weights, out of their 4 bits while they are multiplied
        working += 2 * max(inputs * outputs for inputs, outputs in shape.linear.values())
    mask = batch.masked  # one byte for each cell, shared by the blocks
    ends = batch.tokens * 3 * shape.hidden * 4  # the embedded tokens, the last norm's input and output
    if settings.checkpointing:
        return shape.layers * batch.tokens * shape.hidden * size + block + working + mask + ends
    return shape.layers * block + working + mask + ends


def per_token(shape: Shape, settings: Settings, masked: bool) -> float:
    """Bytes that one block keeps of one token.

    The frozen layers keep nothing of their inputs. The norms keep theirs in float32; attention keeps queries, keys,
    values (repeated for every head where there is a mask) and its output; the MLP its gate before and after the
    activation, and up. The adapters keep their inputs in float32: one for each adapter where these are cast or
    dropped out, with the dropout's mask (a byte on a GPU, four on a CPU), else one shared by those with one input.
    """
    size, chosen = BYTES[settings.dtype], targets(shape, settings)
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    norms = (
        4 * shape.hidden * (4 if shape.architecture.startswith("gemma") else 1 if shape.architecture == "phi" else 2)
    )
    if shape.architecture in ("qwen3", "gemma3_text"):
        norms += 4 * (queries + keys)  # of queries and keys
    attention = size * (4 * queries if masked else 2 * queries + 2 * keys)
    if shape.architecture in FUSED:
        attention += size * (queries + keys)  # the values are a view of the layer's whole output
    if shape.architecture in (*FUSED, "phi"):
        attention += size * queries  # rotating a part of each head copies, and the output is copied back
    feed_forward = size * shape.intermediate * (4 if shape.architecture == "phi" else 3)
    inputs = [width for width, _ in chosen.values()]
    if settings.dtype == "float16":
        kept = sum(inputs) * (2 + (1 if settings.gpu else 4) * bool(settings.dropout))
    elif settings.dropout or size != 4:
        kept = sum(inputs) * (4 + (1 if settings.gpu else 4) * bool(settings.dropout))
    else:
        kept = 4 * (2 * shape.hidden + shape.intermediate)  # what attention and MLP start with, and the last layer
    extra = size * 3 * sum(outputs for _, outputs in chosen.values()) if settings.method == "dora" else 0
    return norms + attention + feed_forward + kept + extra + 4 * settings.rank * len(chosen)
