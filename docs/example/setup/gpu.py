"""Whether the NVIDIA GPU and its driver can run torch's build: asked of nvidia-smi, as torch is not installed yet."""

# Only the standard library, and nothing newer than Python 3.8, as in create_env.py.
from __future__ import annotations

import os
import re
import subprocess
from typing import NamedTuple

CUDA_12 = "https://download.pytorch.org/whl/cu126"
# Oldest driver and compute capability for each CUDA (its release notes, and PyTorch's RELEASE.md).
OLDEST = {"13": (580, 7.5), "12": (525, 5.0)}


class Gpu(NamedTuple):
    """What nvidia-smi says; `capability` is 0 where it is too old to say."""

    name: str
    driver: str
    capability: float


def gpus() -> list[Gpu]:
    """Return the GPUs that nvidia-smi lists; none if it is missing or fails."""
    for fields in ("driver_version,compute_cap,name", "driver_version,name"):  # older ones do not know compute_cap
        command = ["nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader"]
        try:
            done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=True)
        except (OSError, subprocess.SubprocessError):
            continue
        rows = [line.split(", ", fields.count(",")) for line in done.stdout.splitlines() if ", " in line]
        return [Gpu(row[-1], row[0], number(row[1])) for row in rows]
    return []


def number(text: str) -> float:
    """Return the number, 0 for another text."""
    return float(text) if re.fullmatch(r"\d+(\.\d+)?", text) else 0


def too_old(index: str) -> str:
    """Return in one sentence what a GPU or driver lacks for the torch of this index, "" if nothing or unknown."""
    cuda = re.search(r"/cu(\d\d)(\d+)", index)
    found = gpus()
    if not cuda or cuda.group(1) not in OLDEST or not found or os.environ.get("TORCH_INDEX_URL"):
        return ""
    gpu = max(found, key=lambda one: one.capability)
    version = number(gpu.driver.partition(".")[0])
    driver, capability = OLDEST[cuda.group(1)]
    old_driver, old_gpu = 0 < version < driver, 0 < gpu.capability < capability
    if not (old_driver or old_gpu):
        return ""
    has = f"driver {gpu.driver}" + (f" and compute capability {gpu.capability}" if gpu.capability else "")
    needs = f"driver {driver} and compute capability {capability} or newer"
    return f"{gpu.name} has {has}, and torch for CUDA {'.'.join(cuda.groups())} needs {needs}: {way_out(gpu, old_gpu)}."


def way_out(gpu: Gpu, old_gpu: bool) -> str:
    """Return what to do: a newer driver, torch for an older CUDA, or the CPU."""
    driver, capability = OLDEST["12"]
    ways = [] if old_gpu else ["update the driver"]
    if not 0 < gpu.capability < capability:
        newer = f", with driver {driver} or newer" if number(gpu.driver.partition(".")[0]) < driver else ""
        ways.append(f"set TORCH_INDEX_URL={CUDA_12}{newer}, and run this again")
    return ", or ".join([*ways, "use the CPU with `copier update --trust --data device=cpu`"])
