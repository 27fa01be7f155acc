"""The parts of a plan, as --check shows them and `--check --json` prints them. Sizes are bytes, lengths tokens."""

from __future__ import annotations

from typing import TypedDict


class RunFacts(TypedDict):
    """The main settings of the run."""

    model: str
    method: str
    rank: int
    dtype: str


class MachineFacts(TypedDict):
    """What this machine has; `*_free` is what is available to a run."""

    cores: int
    ram: int
    ram_free: int
    disk_free: int
    gpu: str | None
    gpus: int
    driver: str | None
    vram: int
    vram_free: int
    bf16: bool
    platform: str


class ModelFacts(TypedDict):
    """Where the base model is, and how large."""

    name: str
    revision: str | None
    commit: str | None
    own_template: bool
    folder: str | None
    download_bytes: int
    parameters: int | None
    text_parameters: int | None  # of these, the text model's, if there are others
    trained_parameters: int | None
    replaced_by: str | None  # the catalogue's better model, if this one is deprecated
    no_int4: str | None  # why export.py can make no ONNX model of it


class RowFacts(TypedDict):
    """How many rows there are, and how many steps the training takes."""

    rows: dict[str, int]
    steps: int
    learning_steps: int  # with a learning rate above 0
    rows_a_step: int
    epochs: float
    decided_by: str  # epochs or max_steps
    steps_of_epochs: int
    max_steps: int
    warnings: list[str]


class DataFacts(RowFacts):
    """The data of the run."""

    tokens_estimated: bool
    rows_counted: int
    tokens: dict[str, int]  # min, median, p95 and max of a row
    histogram: dict[int, int]  # first length of a bar → rows
    answer_share: float
    max_seq_len: int
    truncated: int
    without_answer: int


class EstimateFacts(TypedDict):
    """Memory, disk and time."""

    memory: dict[str, int]
    memory_limit: int | None
    gradient_checkpointing: bool
    disk: dict[str, int]
    seconds: int | None
    seconds_source: str
    bfloat16_gain: float | None  # how many times as fast this CPU multiplies in bfloat16 as in float32


class Price(TypedDict):
    """What an hour on an Azure GPU costs, and the source of the price."""

    usd_per_hour: float
    region: str
    date: str
    source: str


class AzureGpu(TypedDict):
    """A GPU in setup/azure_gpus.yaml."""

    id: str
    name: str
    gpus: int
    gpu_memory_gib: float  # as CUDA shows it
    bf16: bool
    tflops: float  # the peak in 16 bits
    tflops_float32: float
    tflops_source: str
    price: Price | None


class AzureGpus(TypedDict):
    """setup/azure_gpus.yaml: where the run takes place, on which GPU, and all GPUs that can be rented."""

    target: str  # local or azure
    gpu: str | None
    gpus: list[AzureGpu]


class AzureGpuFacts(TypedDict):
    """What the run needs, takes and costs on one of Azure's GPUs."""

    id: str
    name: str
    price: Price | None
    price_days: int | None  # how long ago it was read
    tflops_source: str
    chosen: bool
    memory: int
    memory_limit: int
    hours: float
    dollars: float | None


class AzureFacts(TypedDict):
    """The Azure GPUs with a known price, and the chosen one."""

    target: str  # local or azure
    gpus: list[AzureGpuFacts]


class Plan(TypedDict, total=False):
    """All parts; what is unknown without the network is left out."""

    run: RunFacts
    machine: MachineFacts
    model: ModelFacts
    data: DataFacts
    estimate: EstimateFacts
    azure: AzureFacts
    problem: str | None  # why the run cannot work, and what to change
