"""How the weights of an ONNX model can be stored: what each way takes on disk, and which the export tries, in order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Weights(NamedTuple):
    """How many weights a model has."""

    layers: int
    embedding: int
    tied: bool  # the output layer shares the embedding

    @property
    def total(self) -> int:
        """All of them."""
        return self.layers + self.embedding * (1 if self.tied else 2)


@dataclass(frozen=True)
class Quantization:
    """One way to store the weights. Sizes are bytes per weight, with the scale of each block of 32 weights."""

    name: str
    precision: str  # of most weights: int4, int8, float16 or float32
    algorithm: str  # of ONNX Runtime GenAI's builder, int4_algo_config; "" if nothing is quantised
    layers: float
    output_layer: float
    shares: bool  # a model with one matrix for embedding and output layer keeps one

    @property
    def symmetric(self) -> bool:
        """Whether the blocks have no zero points. k_quant always writes them: read as symmetric, they are garbage."""
        return not self.algorithm.startswith("k_quant")

    def size(self, weights: Weights, provider: str) -> float:
        """Return the bytes on disk. An embedding with a matrix of its own is not quantised."""
        own = 0 if weights.tied and self.shares else 4 if provider == "cpu" else 2
        return self.layers * weights.layers + (self.output_layer + own) * weights.embedding


QUANTIZATIONS = {
    one.name: one
    for one in (
        Quantization("int4", "int4", "default", 0.625, 0.625, shares=False),
        Quantization("int4-rtn", "int4", "rtn_last", 0.625, 1.125, shares=True),
        Quantization("int4-kquant", "int4", "k_quant_last", 0.641, 1.157, shares=True),
        Quantization("int4-mixed", "int4", "k_quant_mixed", 0.75, 1.157, shares=True),
        Quantization("int8", "int8", "rtn_last", 1.125, 1.125, shares=True),
        Quantization("float16", "float16", "", 2, 2, shares=True),
        Quantization("float32", "float32", "", 4, 4, shares=True),
    )
}


@dataclass(frozen=True)
class Measured:
    """What to try with a family of models, after what benchmarks/int4.py measured; see benchmarks/README.md."""

    family: str  # model_type in config.json
    largest: float  # weights; larger models of the family were not measured
    order: tuple[str, ...]


MEASURED = (
    Measured("llama", 0.4e9, ("int8", "float32")),  # SmolLM2-135M, tuned in five ways
    Measured("gemma3_text", 0.4e9, ("int4-rtn", "int8", "float32")),  # Gemma 3 270M
)
LARGE = 2e9  # weights: beyond, a float32 model is of no use beside models/merged


def order(family: str, weights: Weights, provider: str) -> tuple[str, ...]:
    """Return the names of the quantisations to try, from small to large.

    Models that were not measured begin with 4 bits: one that shares its embedding with 8 bits for that, which is
    smaller, one that does not with 4 bits for all. With zero points (k_quant), some processors without AVX-512 compute
    wrongly (onnxruntime#29853), so those have to be asked for by name.
    """
    unquantised = "float32" if provider == "cpu" else "float16"
    if provider == "dml":  # nobody has tried 8 bits there
        return ("int4", unquantised)
    for one in MEASURED if provider == "cpu" else ():
        if one.family == family and weights.total <= one.largest:
            return one.order
    names = ("int4-rtn" if weights.tied else "int4", "int8")
    return (*names, unquantised) if weights.total <= LARGE else names


def room(names: Sequence[str], weights: Weights, provider: str) -> float:
    """Return the bytes on disk that trying these takes: the best so far is kept beside the one that is built."""
    return sum(sorted(QUANTIZATIONS[name].size(weights, provider) for name in names)[-2:])
