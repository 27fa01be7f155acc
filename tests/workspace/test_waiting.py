"""Threads that wait for others sleep, unless the user wants them awake: awake, they slow down a busy machine."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import inference_of

TRAINING = ("finetuning/invoke_olive.py", "--check")
CHAT = ("inference/console_chat.py", "--baseonly", "--engine", "torch", "--prompt", "the", "--max-new-tokens", "1")


def shown_by_openmp(workspace: Path, command: tuple[str, ...], **more: str) -> list[str]:
    """Return how often PyTorch's threads look for work before they sleep, as libgomp says when it is loaded."""
    left_out = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"OMP_DISPLAY_ENV": "verbose"} | more
    done = subprocess.run([sys.executable, *command], cwd=workspace, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return [line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line]


@pytest.mark.skipif(sys.platform != "linux", reason="libgomp is Linux's OpenMP library")
@pytest.mark.parametrize("command", [TRAINING, CHAT], ids=["training", "chat"])
def test_waiting_threads_sleep_unless_the_user_wants_them_awake(
    workspace: Path, demo: None, command: tuple[str, ...]
) -> None:
    assert shown_by_openmp(workspace, command) == ["0"]
    assert shown_by_openmp(workspace, command, GOMP_SPINCOUNT="1000") == ["1000"]


@pytest.fixture(scope="module")
def demo(workspace: Path) -> None:
    """Build the demo model, which the chat takes."""
    command = [sys.executable, "-m", "training.tiny_model"]
    subprocess.run(command, cwd=workspace / "finetuning", check=True, capture_output=True)


def test_onnx_waits_as_torch_does(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with inference_of(workspace):
        from onnx_backend import waiting

        for policy, spins in (("PASSIVE", "0"), ("active", "1")):
            monkeypatch.setenv("OMP_WAIT_POLICY", policy)
            assert waiting() == {"session.intra_op.allow_spinning": spins}
