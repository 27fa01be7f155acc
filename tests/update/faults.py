"""Updates of a workspace in which something fails at some moment."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import plumbum
import pytest

from .draws import git

Copy = Callable[..., Path]
FAULTS = {"": 86, "locked": 1, "editor": 3, "killed": 6, "no room for a copy": 2, "stopped at the end": 2}
LARGEST = 200_000  # bytes that a file may have where there is no room


@dataclass
class Outcome:
    """How an update ended."""

    status: int
    said: str
    killed: bool = False


@contextmanager
def variables(**values: str) -> Iterator[None]:
    """Set variables, also of what Copier starts."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in values.items():
            patch.setenv(name, value)
            patch.setitem(plumbum.local.env, name, value)
        yield


def run(
    rng: random.Random,
    workspace: Path,
    update: Copy,
    tag: str,
    answers: dict[str, Any],
    fault: str,
    capfd: pytest.CaptureFixture[str],
) -> Outcome:
    """Update, with the fault that was drawn."""
    folder = workspace / git(workspace, "rev-parse", "--git-dir").strip()
    if fault in ("killed", "no room for a copy"):
        return as_process(rng, workspace, folder, tag, answers, fault)
    stop = threading.Event()
    others = {"editor": hold_lock, "stopped at the end": spoil}
    other = threading.Thread(
        target=others.get(fault, lambda *_: None), args=(folder, stop, random.Random(rng.random()))
    )
    other.start()
    if fault == "locked":
        (folder / "index.lock").touch()
    capfd.readouterr()
    try:
        update(workspace, tag, **answers)
        return Outcome(0, capfd.readouterr().err)
    except Exception as error:
        said = capfd.readouterr().err.strip()
        # Copier says what a task of the template's exits with; that is no second sentence of ours
        return Outcome(1, said or f"{error}")
    finally:
        stop.set()
        other.join()
        if fault == "locked":
            (folder / "index.lock").unlink(missing_ok=True)


def spoil(folder: Path, stop: threading.Event, _: random.Random) -> None:
    """Let the last step of an update fail: there is a file where it makes a folder."""
    while not stop.wait(0.01):
        for pending in folder.glob("copier-finetune/*/pending"):
            with suppress(OSError):
                pending.with_name(pending.read_text()).joinpath("new").touch(exist_ok=False)
                return


def hold_lock(folder: Path, stop: threading.Event, rng: random.Random) -> None:
    """Hold the lock of the index for moments, as an editor does that looks after a repository."""
    lock = folder / "index.lock"
    while not stop.wait(rng.uniform(0, 0.4)):
        try:
            lock.touch(exist_ok=False)
        except FileExistsError:
            continue
        stop.wait(rng.uniform(0, 0.3))
        lock.unlink(missing_ok=True)


def as_process(
    rng: random.Random, workspace: Path, folder: Path, tag: str, answers: dict[str, Any], fault: str
) -> Outcome:
    """Update in a process of its own, which is killed at some moment or may not write a file beyond a size."""
    command = [sys.executable, "-m", "copier", "update", "--trust", "--defaults", "--skip-tasks", "--vcs-ref", tag]
    command += [word for name, value in answers.items() for word in ("-d", f"{name}={value}")]
    late, wait = rng.random() < 0.8, rng.uniform(0, 3)

    def limited() -> None:
        if fault != "killed":
            resource.setrlimit(resource.RLIMIT_FSIZE, (LARGEST, LARGEST))

    with tempfile.TemporaryFile("w+") as said:
        process = subprocess.Popen(
            command, cwd=workspace, stdout=said, stderr=said, start_new_session=True, preexec_fn=limited
        )
        killed = False
        if fault == "killed":
            while late and process.poll() is None and not list(folder.glob("copier-finetune/*/pending")):
                time.sleep(0.005)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                killed = True
        process.wait(120)
        said.seek(0)
        moment = f"\n(killed {'after the copy ' * late}{wait:.2f} s)" * killed
        return Outcome(process.returncode, said.read() + moment, killed)
