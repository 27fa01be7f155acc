"""Checkpoints to resume an interrupted run from: marked when they are complete, checked before they are used."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import torch
import transformers

from training.processes import RANK, share
from training.whole_files import write_json

SIZES = "sizes.json"  # written to a complete checkpoint: its files and their sizes in bytes


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest complete checkpoint and print its name. Incomplete ones are deleted."""
    newest = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if newest is None and is_whole(checkpoint):
            newest = checkpoint
        elif not is_whole(checkpoint) and RANK == 0:
            shutil.rmtree(checkpoint)
    if newest:
        print(f"Resuming from {newest.name} of an interrupted run (--fresh starts over)")
    return str(newest) if newest else None


def is_whole(checkpoint: Path) -> bool:
    """Return whether every file has the size that was recorded when the checkpoint was complete."""
    try:
        sizes = json.loads((checkpoint / SIZES).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


class Checkpoints(transformers.TrainerCallback):
    """Mark checkpoints when they are complete, and save one more when the run is stopped.

    As a context manager, it makes the first Ctrl-C or SIGTERM save and stop after the step; a second stops at once.
    """

    stopped_by: int = 0  # the signal's number

    def __enter__(self) -> None:
        self.handlers = {number: signal.signal(number, self.stop) for number in (signal.SIGINT, signal.SIGTERM)}

    def __exit__(self, *error: object) -> None:
        for number, handler in self.handlers.items():
            signal.signal(number, handler)

    def stop(self, number: int, frame: Any) -> None:
        """Remember the signal until the step is done."""
        self.stopped_by = number
        signal.signal(number, self.handlers[signal.Signals(number)])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Save and stop if any of the processes received a signal."""
        if args.world_size > 1:  # a signal reaches them at different times, but all must stop after the same step
            signals = torch.tensor(self.stopped_by, device=args.device)
            torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
            self.stopped_by = int(signals)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Record the sizes of a checkpoint's files, once all are written.

        Not for the last checkpoint: resuming from it would train one step too many.
        """
        share()  # each process writes its own random state
        if not state.is_world_process_zero:
            return
        if state.global_step >= state.max_steps or (control.should_training_stop and not self.stopped_by):
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
        write_json(checkpoint / SIZES, sizes)
