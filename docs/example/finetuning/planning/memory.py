"""The memory that a run needs, calculated: nothing here inspects the machine or loads a library.

Sizes are bytes and lengths tokens, unless a name says otherwise. Sources: transformers' models and PEFT's layers; the
tensors that they save for the backward pass were listed with torch.autograd.graph.saved_tensors_hooks. The template's
repository compares the sums with measured peaks (benchmarks/memory_estimate.py).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from planning.architecture import FUSED, Shape
from planning.row_lengths import Batch, Lengths, batches
from settings.run_settings import Settings
from training.pieces import piece_tokens

GIB = 2**30
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CPU_FRAMEWORK = 0.6 * GIB  # Python, torch, transformers, PEFT and Olive, imported; measured
TOKENIZER = 2 * 1024  # bytes per token of the vocabulary: the run's tokenizer and Olive's; measured
# On a CPU, tensors below 32 MiB are on the C library's heap, which fragments: zero to eight blocks' worth was measured,
# more with checkpointing, which computes each block twice.
HOLES, HOLES_CHECKPOINTING, OFF_THE_HEAP = 4, 6, 32 * 2**20
GPU_FRAMEWORK = 0.8 * GIB  # the CUDA context, its libraries' workspace, and fragmentation
ANSWER_BEYOND = 8  # tokens that evaluate.py lets an answer be longer than the expected one
BYTES_PER_TOKEN_HELD = 80  # a row's three lists of Python numbers and three int64 tensors


def adapter_parameters(shape: Shape, settings: Settings) -> int:
    """Count the adapter's weights, as PEFT makes them for each method (peft/tuners/{lora,loha,lokr}/layer.py).

    LoRA has two matrices of the rank, LoHa four; DoRA adds one magnitude per output to LoRA; LoKr factors a layer into
    a small and a large matrix, and factors the large one again if the rank is below half its narrow side.
    """
    layers = sum(
        block.count * sum(added(settings, *size) for size in targets(block.linear, settings).values())
        for block in shape.blocks
    )
    return layers + sum(added(settings, *size) for size in ends(shape, settings).values())


def added(settings: Settings, inputs: int, outputs: int) -> int:
    """Count the weights that an adapter adds to one layer."""
    if settings.method == "loha":
        return 2 * settings.r * (inputs + outputs)
    if settings.method == "lokr":
        (small_in, large_in), (small_out, large_out) = factors(inputs), factors(outputs)
        low = settings.r < max(large_out, large_in) / 2
        return small_out * small_in + (settings.r * (large_out + large_in) if low else large_out * large_in)
    return settings.r * (inputs + outputs) + (outputs if settings.method == "dora" else 0)


def ends(shape: Shape, settings: Settings) -> dict[str, tuple[int, int]]:
    """Return the layers outside the blocks that get an adapter: the embedding and the output layer, if listed."""
    if not isinstance(settings.target_modules, tuple) or settings.method == "qlora":
        return {}
    sizes = {"embed_tokens": (shape.vocabulary, shape.hidden), "lm_head": (shape.hidden, shape.vocabulary)}
    return {name: size for name, size in sizes.items() if name in settings.target_modules}


def factors(dimension: int) -> tuple[int, int]:
    """Split a dimension into its two nearest factors, the smaller first, as LoKr does with decompose_factor -1."""
    small = next(n for n in range(math.isqrt(dimension), 0, -1) if dimension % n == 0)
    return small, dimension // small


def targets(linear: dict[str, tuple[int, int]], settings: Settings) -> dict[str, tuple[int, int]]:
    """Return those linear layers of a block that get an adapter: with QLoRA all, whatever target_modules says."""
    if not isinstance(settings.target_modules, tuple) or settings.method == "qlora":
        return linear
    return {name: size for name, size in linear.items() if name in settings.target_modules}


@dataclass(frozen=True)
class Memory:
    """What is in memory at the peak of a run, part by part."""

    weights: float
    adapter: float
    gradients_and_optimizer: float
    activations: float
    logits: float
    evaluation: float  # by how much the evaluations need more than the training
    framework: float

    @property
    def total(self) -> float:
        """The sum."""
        return sum(vars(self).values())


def memory(shape: Shape, settings: Settings, lengths: Lengths, held_out: Lengths) -> Memory:
    """Estimate the peak memory of a run; of one process if there are several. `held_out` are whole rows, not cut.

    Only for a shape whose layers are all alike (`is_uniform`).

    Weights are in the configured precision, except that Olive trains float16 as float32 under autocast; QLoRA keeps the
    blocks in 4 bits with a scale per 64 weights (bitsandbytes), the rest as it is. The adapter, its gradient and
    AdamW's two moments are float32: PEFT casts adapters up (autocast_adapter_dtype).
    """
    held = 2 if settings.torch_dtype == "bfloat16" else 4
    others = shape.parameters - shape.block_weights + shape.beside
    blocks: float = held * shape.block_weights
    if settings.method == "qlora":
        scales = 1 / 64 + 4 / (64 * 256) if settings.double_quant else 4 / 64
        blocks = (0.5 + scales) * shape.block_weights
    adapter = adapter_parameters(shape, settings)
    moments = 2 if "8bit" in settings.optim else 8
    batch = batches(
        lengths,
        settings.per_device_train_batch_size,
        settings.packing,
        settings.num_train_epochs,
        piece_tokens(settings),
    )
    rows = sum(lengths.tokens) + sum(held_out.tokens)
    # the log-softmax in float32 and the gradients of both, or the logits' own in 16 bits
    logit_bytes = (12 if settings.torch_dtype == "float32" else 14) + (4 if "lm_head" in ends(shape, settings) else 0)
    share = settings.processes if settings.sharded else 1
    gathered = blocks / shape.layers if settings.sharded else 0  # the block that is currently gathered
    trained = (4 + moments) * adapter / share
    saved, logits = activations(shape, settings, batch), batch.logits * shape.vocabulary * logit_bytes
    return Memory(
        weights=(blocks + held * others) / share + gathered,
        adapter=4 * adapter / share,
        gradients_and_optimizer=trained,
        activations=saved,
        logits=logits,
        evaluation=max(evaluation(shape, settings, held_out) - trained - saved - logits, 0),
        framework=GPU_FRAMEWORK
        if settings.gpu
        else CPU_FRAMEWORK + TOKENIZER * shape.vocabulary + BYTES_PER_TOKEN_HELD * rows,
    )


def evaluation(shape: Shape, settings: Settings, held_out: Lengths) -> float:
    """Bytes that an evaluation needs beyond the model: for its losses, or for its answers, whichever is more.

    A batch of answers keeps the keys and values of all its tokens, up to the longest question and answer; one block at
    a time is copied when it grows. Losses need their logits, and the log-softmax of them in float32.
    """
    size, rows = BYTES[settings.torch_dtype], min(settings.per_device_eval_batch_size, len(held_out.tokens))
    tokens = rows * (max(held_out.tokens, default=0) + ANSWER_BEYOND)
    block = tokens * size * 2 * shape.key_value_heads * shape.head_dim
    working = tokens * size * (3 * shape.intermediate + 6 * shape.hidden)
    cut = held_out.cut(settings.max_seq_len)
    logits = batches(cut, settings.per_device_eval_batch_size, packing=False).logits * shape.vocabulary
    return working + max((shape.layers + 1) * block, logits * (8 if size == 4 else 10))


def activations(shape: Shape, settings: Settings, batch: Batch) -> float:
    """Bytes that the forward pass saves for the backward pass, and that the backward pass of one block adds.

    With gradient checkpointing only the input of each block is saved, and one block at a time is recomputed.
    """
    size = BYTES[settings.torch_dtype]
    block = batch.tokens * per_token(shape, settings, masked=batch.masked > 0) + size * batch.masked
    # autocast keeps a float16 copy of each frozen weight until the backward pass; 4-bit weights are unpacked again
    if settings.torch_dtype == "float16" and settings.method != "qlora":
        block += 2 * shape.block_weights / shape.layers
    if settings.method in ("loha", "lokr"):  # they add their product to a copy of the weight, in float32
        block += 4 * sum(inputs * outputs for inputs, outputs in targets(shape.linear, settings).values())
    working: float = batch.tokens * 4 * shape.intermediate * size
    if not settings.gpu and batch.tokens * shape.hidden * size < OFF_THE_HEAP:
        working += block * (HOLES_CHECKPOINTING if settings.gradient_checkpointing else HOLES)
    if settings.method == "qlora":  # a layer's weights, out of their 4 bits while they are multiplied
        working += 2 * max(inputs * outputs for inputs, outputs in shape.linear.values())
    mask = batch.masked  # one byte for each cell, shared by the blocks
    ends = batch.tokens * 3 * shape.hidden * 4  # the embedded tokens, the last norm's input and output
    if settings.gradient_checkpointing:
        return shape.layers * batch.tokens * shape.hidden * size + block + working + mask + ends
    return shape.layers * block + working + mask + ends


def per_token(shape: Shape, settings: Settings, masked: bool) -> float:
    """Bytes that one block saves per token.

    The frozen layers do not save their inputs. The norms save theirs in float32; attention saves queries, keys, values
    (repeated for every head if there is a mask) and its output; the MLP its gate before and after the activation, and
    up. The adapters save their inputs in float32: one per adapter if the input is cast or goes through dropout, with
    the dropout mask (a byte on a GPU, four on a CPU); otherwise adapters with the same input share one. So they do in
    training/fused_lora.py, uncast and with a mask of a byte.
    """
    size, chosen = BYTES[settings.torch_dtype], targets(shape.linear, settings)
    queries, keys = shape.heads * shape.head_dim, shape.key_value_heads * shape.head_dim
    norms = (
        4 * shape.hidden * (4 if shape.architecture.startswith("gemma") else 1 if shape.architecture == "phi" else 2)
    )
    if shape.architecture in ("qwen3", "gemma3_text"):
        norms += 4 * (queries + keys)  # the norms of queries and keys
    attention = size * (4 * queries if masked else 2 * queries + 2 * keys)
    if shape.architecture in FUSED:
        attention += size * (queries + keys)  # the values are a view of the layer's whole output
    if shape.architecture in (*FUSED, "phi"):
        attention += size * queries  # rotating a part of each head copies, and the output is copied back
    feed_forward = size * shape.intermediate * (4 if shape.architecture == "phi" else 3)
    inputs = [width for width, _ in chosen.values()]
    # of attention (Phi's MLP has the same), MLP and the last layer; attention's own output is counted above
    shared = size * ((1 if shape.architecture == "phi" else 2) * shape.hidden + shape.intermediate)
    if settings.method == "lora" and settings.torch_dtype != "float16" and not settings.gpu:
        kept = shared + sum(inputs) * bool(settings.lora_dropout)
    elif settings.torch_dtype == "float16":
        kept = sum(inputs) * (2 + (1 if settings.gpu else 4) * bool(settings.lora_dropout))
    elif settings.lora_dropout or size != 4:
        kept = sum(inputs) * (4 + (1 if settings.gpu else 4) * bool(settings.lora_dropout))
    else:
        kept = shared
    extra = size * 3 * sum(outputs for _, outputs in chosen.values()) if settings.method == "dora" else 0
    return norms + attention + feed_forward + kept + extra + 4 * settings.r * len(chosen)
