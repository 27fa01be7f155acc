"""What this machine has: GPU and driver, memory, disk, and the speed of its matrix products."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil
import subprocess
import time
from dataclasses import dataclass, replace
from typing import Any

from planning.architecture import Shape
from preparing.memory_room import container_limit
from preparing.workspace import ROOT
from settings.config_file import ConfigError
from settings.run_settings import Settings

# Oldest driver and compute capability for each CUDA; setup/gpu.py has the same, and installs PyTorch by it.
OLDEST = {"13": (580, 7.5), "12": (525, 5.0)}
CUDA_12 = "TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126 python setup/create_env.py"


@dataclass(frozen=True)
class Machine:
    """Sizes in bytes; `*_free` is what is available to a run."""

    cores: int
    ram: int
    ram_free: int
    disk_free: int
    platform: str = ""  # as in run.json
    gpu: str | None = None
    gpus: int = 0
    driver: str | None = None
    vram: int = 0
    vram_free: int = 0
    bf16: bool = False  # whether the GPU itself computes in bfloat16
    too_old: str | None = None  # what the GPU or its driver lacks for this PyTorch


def look() -> Machine:
    """Return what this machine has. Loads torch, to see the GPU as the training sees it."""
    import psutil
    import torch

    memory, used = psutil.virtual_memory(), psutil.Process().memory_info().rss  # this process will run the training
    total = min(memory.total, container_limit())
    facts: dict[str, Any] = {
        "cores": os.cpu_count() or 1,
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "ram": total,
        "ram_free": min(memory.available + used, total),
        "disk_free": shutil.disk_usage(ROOT).free,
        "too_old": too_old(torch.version.cuda, torch.cuda.is_available()),
    }
    if torch.cuda.is_available():
        index = int(os.environ.get("LOCAL_RANK", "0"))  # each of several processes has its own GPU
        free, vram = torch.cuda.mem_get_info(index)
        facts |= {"gpu": torch.cuda.get_device_name(index), "gpus": torch.cuda.device_count(), "driver": driver()}
        facts |= {"vram": vram, "vram_free": free, "bf16": torch.cuda.is_bf16_supported(including_emulation=False)}
    return Machine(**facts)


def driver() -> str | None:
    """Return the version of NVIDIA's driver, as reported by nvidia-smi."""
    return next((row[0] for row in nvidia_smi("driver_version")), None)


def nvidia_smi(fields: str) -> list[list[str]]:
    """Return the fields of each GPU as reported by nvidia-smi; none if it is missing, fails or does not know them."""
    command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=5, check=True)
    except (OSError, subprocess.SubprocessError):
        return []
    return [line.split(", ", fields.count(",")) for line in done.stdout.splitlines() if line.strip()]


def too_old(cuda: str | None, seen: bool) -> str | None:
    """Return in one sentence what the newest GPU or its driver lacks for PyTorch's CUDA; `seen`: PyTorch sees a GPU."""
    oldest = OLDEST.get((cuda or "").partition(".")[0])
    rows = nvidia_smi("driver_version,compute_cap,name") if oldest else []
    found = [(float(capability), version, name) for version, capability, name in rows if capability[:1].isdigit()]
    if oldest and not rows:  # an older nvidia-smi
        found = [(oldest[1], version, name) for version, name in nvidia_smi("driver_version,name")]
    if not oldest or not found:
        return None
    capability, version, name = max(found)
    major = version.partition(".")[0]
    old_driver = not seen and major.isdigit() and int(major) < oldest[0]
    if not old_driver and capability >= oldest[1]:
        return None
    known = f" and compute capability {capability}" if rows else ""
    return (
        f"The {name} has driver {version}{known}, and this PyTorch for CUDA {cuda} needs driver {oldest[0]} and "
        f"compute capability {oldest[1]} or newer: {'update the driver, or ' if old_driver else ''}run `{CUDA_12}`."
    )


def lacking(settings: Settings, machine: Machine) -> str | None:
    """Return a sentence about what the settings require and this machine lacks; None if it lacks nothing."""
    if settings.method == "qlora" and importlib.util.find_spec("bitsandbytes") is None:
        return (
            "type: QLoRA needs bitsandbytes, which a CPU environment lacks: set type: LoRA in olive-config.yaml, "
            "or `copier update --trust --data device=gpu` for a machine with an NVIDIA GPU."
        )
    if settings.gpu and machine.too_old:
        return machine.too_old
    if settings.gpu and machine.gpu is None:
        return (
            "PyTorch sees no NVIDIA GPU: see whether `nvidia-smi` lists it, or train on the CPU with "
            "`copier update --trust --data device=cpu`."
        )
    if settings.gpu and settings.torch_dtype == "bfloat16" and not machine.bf16:
        return (
            f"The {machine.gpu} does not compute in bfloat16: set torch_dtype and compute_dtype, if present, to "
            "float16 in olive-config.yaml (float32 for Gemma, whose numbers are too large)."
        )
    return None


def refuse(settings: Settings) -> None:
    """Raise ConfigError if this machine lacks something that the run requires, before anything is read."""
    if missing := lacking(settings, look()):
        raise ConfigError(missing)


def speed(shape: Shape, settings: Settings) -> float:
    """Measure operations per second of a matrix product as wide as the model's; takes a fraction of a second."""
    import torch

    if shape.hidden < 256:
        torch.set_num_threads(1)  # as evaluate.py does for models this small
    device = "cuda" if settings.gpu else "cpu"
    dtype = "float32" if device == "cpu" and settings.torch_dtype == "float16" else settings.torch_dtype
    rows = torch.ones(4096 if settings.gpu else 512, shape.hidden, dtype=getattr(torch, dtype), device=device)
    weight = torch.ones(shape.hidden, min(shape.intermediate, 8192), dtype=rows.dtype, device=device)
    rows @ weight  # warm-up
    fastest, started = float("inf"), time.perf_counter()
    while time.perf_counter() - started < 0.2:
        begun = time.perf_counter()
        rows @ weight
        if settings.gpu:
            torch.cuda.synchronize()
        fastest = min(fastest, time.perf_counter() - begun)  # slower ones waited for something else
    return 2 * rows.shape[0] * weight.numel() / fastest


def bfloat16_gain(shape: Shape, settings: Settings, measured: float) -> float | None:
    """Return how many times as fast this processor multiplies in bfloat16 as in float32, which `measured` is.

    None if the run does not compute in float32 on a CPU, or if its products are too small to take most of the time.
    """
    if settings.gpu or settings.torch_dtype != "float32" or shape.hidden < 256:
        return None
    return speed(shape, replace(settings, torch_dtype="bfloat16")) / measured
