"""setup/create_env.py on machines whose GPU, driver or processor the packages are not made for."""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
SETUP = REPOSITORY / "template" / "setup"
CUDA_12 = "TORCH_INDEX_URL=https://download.pytorch.org/whl/cu126"
CPU = "copier update --trust --data device=cpu"

Make = Callable[..., Any]


def nvidia_smi(workspace: Any, *rows: str, old: bool = False) -> None:
    """Put an nvidia-smi on PATH that lists GPUs: driver, compute capability, name; `old`: it knows no capability."""
    listed = "\n".join(rows)
    short = "\n".join(f"{row.split(', ')[0]}, {row.split(', ')[2]}" for row in rows)
    fields = "*compute_cap*) echo 'Field \"compute_cap\" is not a valid field to query.'; exit 2 ;;" if old else ""
    file = workspace.programs / "nvidia-smi"
    file.write_text(f"#!/bin/sh\ncase \"$1\" in {fields} *compute_cap*) echo '{listed}' ;; *) echo '{short}' ;; esac\n")
    file.chmod(0o755)


@pytest.fixture
def workspace(make_workspace: Make) -> Any:
    """Return a workspace for a GPU, whose torch comes from torch's own index."""
    workspace = make_workspace()
    workspace.configure("venv", "gpu")
    workspace.make_wheel(workspace.wheels, "torch", "2.13.0+cu130")
    del workspace.env["TORCH_INDEX_URL"]
    return workspace


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ("580.65.06, 7.0, Tesla V100-SXM2-16GB", ["driver 580.65.06 and compute capability 7.0", CUDA_12, CPU]),
        ("535.104.05, 8.0, NVIDIA A100", ["CUDA 13.0 needs driver 580", ": update the driver, or set", CUDA_12]),
        ("470.57.02, 6.1, NVIDIA GeForce GTX 1080", [f"{CUDA_12}, with driver 525 or newer, and run this again"]),
        ("470.57.02, 3.5, Tesla K40m", [f"or newer: use the CPU with `{CPU}`."]),
    ],
)
def test_a_gpu_or_driver_that_is_too_old_is_one_sentence_before_anything_is_installed(
    workspace: Any, row: str, said: list[str]
) -> None:
    nvidia_smi(workspace, row)
    done = workspace.run()
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert not [part for part in [row.split(", ")[2], *said] if part not in done.stderr], done.stderr
    assert not (workspace.root / ".venv").exists()


def test_an_old_nvidia_smi_tells_the_driver_alone(workspace: Any) -> None:
    nvidia_smi(workspace, "470.57.02, 7.0, Tesla V100", old=True)
    done = workspace.run()
    assert done.returncode == 1 and "Tesla V100 has driver 470.57.02, and torch for CUDA 13.0 needs" in done.stderr


@pytest.mark.parametrize(
    "rows",
    [
        ["580.65.06, 7.5, Tesla T4"],
        ["580.65.06, 6.1, NVIDIA GeForce GTX 1080", "580.65.06, 8.9, NVIDIA L4"],
        ["580.65.06, [N/A], NVIDIA L4"],
    ],
)
def test_a_gpu_that_fits_and_a_machine_without_any_get_the_packages(workspace: Any, rows: list[str]) -> None:
    nvidia_smi(workspace, *rows)
    assert workspace.run().returncode == 0
    assert workspace.version("torch").startswith("2.13.0")


def installed(workspace: Any) -> tuple[str, str]:
    """Return the versions of torch and of CUDA's bindings by their metadata: compiled files of twins look alike."""
    code = "from importlib.metadata import version; print(version('torch'), version('cuda-bindings'))"
    command = [str(workspace.root / ".venv" / "bin" / "python"), "-c", code]
    torch, bindings = subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()
    return torch, bindings


def with_requirement(wheel: Path, requirement: str) -> None:
    """Add a requirement to a wheel."""
    old = wheel.rename(wheel.with_suffix(".old"))
    with zipfile.ZipFile(old) as source, zipfile.ZipFile(wheel, "w") as target:
        for name in source.namelist():
            text = source.read(name).decode()
            if name.endswith("METADATA"):
                text += f"Requires-Dist: {requirement}\n"
            target.writestr(name, re.sub(r"(METADATA),.*", r"\1,,", text) if name.endswith("RECORD") else text)
    old.unlink()


@pytest.mark.parametrize("with_uv", [True, False], ids=["uv", "pip"])
def test_torch_for_another_cuda_replaces_the_locked_one_with_its_own_libraries(
    make_workspace: Make, with_uv: bool
) -> None:
    workspace = make_workspace(with_uv=with_uv and shutil.which("uv") is not None)
    workspace.configure("venv", "gpu")
    wheels = workspace.wheels
    for wheel in wheels.glob("torch-*"):
        wheel.unlink()
    for version in ("13.0", "12.9"):
        workspace.make_wheel(wheels, "cuda_bindings", version)
    with_requirement(workspace.make_wheel(wheels, "torch", "2.13.0+cu130"), "cuda-bindings==13.0")
    lock = workspace.root / "setup" / "requirements-gpu.txt"
    lock.write_text("cuda-bindings==13.0\nsmall==1.0\ntorch==2.13.0\n")
    del workspace.env["TORCH_INDEX_URL"]
    assert workspace.run().returncode == 0
    assert installed(workspace) == ("2.13.0+cu130", "13.0")

    next(wheels.glob("torch-*")).unlink()
    with_requirement(workspace.make_wheel(wheels, "torch", "2.13.0+cu126"), "cuda-bindings==12.9")
    nvidia_smi(workspace, "535.104.05, 7.0, Tesla V100")
    workspace.env["TORCH_INDEX_URL"] = "https://127.0.0.1:1/whl/cu126"
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert installed(workspace) == ("2.13.0+cu126", "12.9")
    assert "is up to date" in workspace.run().stdout
    del workspace.env["TORCH_INDEX_URL"]
    assert "is up to date" in workspace.run().stdout  # the choice was made once


def test_the_check_and_the_setup_know_the_same_oldest_drivers_and_gpus() -> None:
    spec = importlib.util.spec_from_file_location("gpu_of_setup", SETUP / "gpu.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    check = (REPOSITORY / "template" / "finetuning" / "planning" / "hardware.py").read_text()
    assert f"OLDEST = {module.OLDEST}".replace("'", '"') in check and module.CUDA_12 in check


def test_windows_on_arm_is_told_which_python_works(
    make_workspace: Make, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    workspace = make_workspace()
    monkeypatch.syspath_prepend(workspace.root / "setup")
    for name in ("conda_environment", "gpu", "install", "installed"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    spec = importlib.util.spec_from_file_location("create_env_on_arm", workspace.root / "setup" / "create_env.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(sysconfig, "get_platform", lambda: "win-arm64")
    monkeypatch.setattr(sys, "argv", ["create_env.py"])
    assert module.main() == 1
    error = capsys.readouterr().err
    assert "Python for Windows on ARM" in error and "for x64 from python.org" in error and error.count("\n") == 1
    assert not (workspace.root / ".venv").exists()
    for device in ("cpu", "gpu"):
        assert re.search(r"^pyarrow==", (SETUP / f"requirements-{device}.txt").read_text(), re.MULTILINE)
