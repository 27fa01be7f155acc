"""What gpu.py measures, in which order, and which wheels that needs."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

from demo_run import TRL

REPOSITORY = Path(__file__).resolve().parents[1]
LOCK = REPOSITORY / "template" / "setup" / "requirements-gpu.txt"
LLAMA, QWEN, PHI = "llama-3.2-3b-instruct", "qwen3-0.6b", "phi-3-mini-4k-instruct"
NAMES = {LLAMA: "Llama-3.2-3B", QWEN: "Qwen3-0.6B", PHI: "Phi-3-mini"}
# Beside torch, transformers, peft and accelerate; older releases of these come without the first line.
TRAINING = """
pydantic pydantic-core annotated-types typing-inspection rich markdown-it-py mdurl pygments
olive-ai datasets alembic colorlog dill lightning-utilities mako ml-dtypes multiprocess onnx onnx-ir onnxscript
opentelemetry-api opentelemetry-sdk opentelemetry-semantic-conventions optuna pandas prompt-toolkit protobuf pyarrow
python-dateutil questionary sqlalchemy torchmetrics tzdata wcwidth xxhash
"""
WHEELS = {
    "the workspace's training": TRAINING.split(),
    "QLoRA": ["bitsandbytes"],
    "TRL": [TRL],
    "int4 chat": ["onnxruntime-genai-cuda", "onnxruntime-gpu==1.31.1", "flatbuffers"],  # 1.32.0 is not there for CUDA
}
SAME_VERSION = {"onnxruntime-genai-cuda": "onnxruntime-genai"}  # its build for CUDA
PLATFORMS = [f"manylinux_2_{minor}_x86_64" for minor in (28, 27, 26, 24, 17)] + ["manylinux2014_x86_64"]
FIGURES = "figures: "  # how the line begins with which a measurement ends
ON_A_CPU = "speed, and memory against the estimate, of a GPU"
STAND_IN = "PyTorch's kernel: a CPU has none, and another takes its place"


@dataclass(frozen=True)
class Measurement:
    """A step of gpu_measure.py: what it measures, with which options, and how many seconds it may take."""

    name: str
    step: str
    title: str
    seconds: int
    options: tuple[str, ...] = ()
    unproven: str = ON_A_CPU  # what it does not show on a CPU

    @property
    def model(self) -> str | None:
        """The model that must have been made before."""
        return self.options[self.options.index("--model") + 1] if "--model" in self.options else None


def training(step: str, model: str, method: str, *more: str) -> Measurement:
    """Return the measurement of a training: `step` is ours, bare or trl."""
    who = {"ours": "ours", "bare": "bare loop", "trl": "TRL"}[step]
    shown = {"qlora": "QLoRA", "lora": "LoRA"}[method]
    precision = "float16" if "float16" in more else "bfloat16"
    attention = ", varlen" if "varlen" in more else ""
    name = "-".join([step, model.split("-")[0], method, *more[1::2]])
    title = f"{who}: {shown}, {NAMES[model]}, {precision}{attention}"
    unproven = ON_A_CPU + ("; bitsandbytes' kernels and paged_adamw_8bit" if method == "qlora" else "")
    unproven += f"; {STAND_IN}" if attention else ""
    options = ("--model", model, "--method", method, *more)
    return Measurement(name, step, title, 75, options, unproven)


def prepared(model: str) -> Measurement:
    """Return the step that makes a model with random weights."""
    name = f"make-{model.split('-')[0]}"
    return Measurement(name, "prepare", f"{NAMES[model]} made", 90, ("--model", model), "its size")


# In the order of their importance: what comes first is measured if the time is short.
PLAN = (
    Measurement("machine", "machine", "machine", 90, unproven="what a GPU and its driver are called"),
    Measurement("attention", "attention", "attention", 75, unproven=f"{STAND_IN}; speed"),
    prepared(LLAMA),
    training("ours", LLAMA, "qlora"),
    training("ours", LLAMA, "lora"),
    training("bare", LLAMA, "qlora"),
    training("trl", LLAMA, "qlora"),
    training("ours", LLAMA, "lora", "--attention", "varlen"),
    prepared(QWEN),
    Measurement(
        "resumed",
        "resume",
        "a run killed and resumed",
        120,
        ("--model", QWEN, "--method", "qlora"),
        "paged_adamw_8bit, and CUDA's random state",
    ),
    Measurement("full", "full", "a run that is out of memory", 75, ("--model", QWEN), "that CUDA's error is caught"),
    training("bare", LLAMA, "lora"),
    training("trl", LLAMA, "lora"),
    training("ours", QWEN, "qlora"),
    training("ours", QWEN, "lora"),
    training("ours", QWEN, "lora", "--dtype", "float16"),
    Measurement("chat", "chat", "int4 chat", 150, ("--model", QWEN), "CUDA's provider, and speed"),
    prepared(PHI),
    training("ours", PHI, "qlora"),
    training("ours", PHI, "lora"),
    training("bare", PHI, "qlora"),
    training("ours", LLAMA, "qlora", "--attention", "varlen"),
)


def chosen(names: list[str]) -> list[Measurement]:
    """Return the measurements of these names, and what they need: their models, and the name of the machine."""
    models = {one.model for one in PLAN if one.name in names}
    needed = {one.name for one in PLAN if one.step == "machine" or (one.step == "prepare" and one.model in models)}
    return [one for one in PLAN if one.name in {*names, *needed}]


def locked() -> dict[str, str]:
    """Return name → version of the lock of a GPU workspace; the newest where Pythons differ."""
    return dict(re.findall(r"^([a-z0-9-]+)==([^ ]+)", LOCK.read_text(encoding="utf-8"), re.MULTILINE))


def pins() -> dict[str, str]:
    """Return name → name==version of all wheels."""
    versions, found = locked(), {}
    for wheel in (wheel for several in WHEELS.values() for wheel in several):
        name = wheel.partition("==")[0]
        found[name] = wheel if "==" in wheel else f"{name}=={versions[SAME_VERSION.get(name, name)]}"
    return found


def download(folder: str, python: str, have: str) -> str:
    """Return the command that fills a folder; each line of `have` begins with the name of what needs no wheel."""
    names = {re.sub(r"[-_.]+", "-", name).lower() for name in re.findall(r"^([A-Za-z0-9][\w.-]*)", have, re.MULTILINE)}
    target = ["--python-version", python, "--implementation", "cp"]
    target += [part for platform in PLATFORMS for part in ("--platform", platform)]
    wanted = [pin for name, pin in pins().items() if name not in names]
    command = ["python3", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", *target, "-d", folder, *wanted]
    return shlex.join(command)
