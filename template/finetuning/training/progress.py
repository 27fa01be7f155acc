"""The progress of training and evaluation: bars in a terminal, lines in a log, and timings."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import psutil
import transformers
from rich import progress
from rich.console import Console


def shown(starts: Sequence[int], what: str) -> Iterable[int]:
    """Yield the numbers at which batches start, with a bar in a terminal that goes when all are done."""
    console = Console()
    return progress.track(starts, what, console=console, transient=True, disable=not console.is_terminal)


class Progress(transformers.TrainerCallback):
    """A bar in a terminal, a plain line at each evaluation in a log."""

    def __init__(self, note: Callable[..., None]) -> None:
        """`note` gets the timings while they grow: training (seconds), tokens and start_to_first_step (seconds)."""
        self.note = note
        self.console = Console()
        self.started = time.time()
        self.first_step = 0.0
        self.tokens_before = self.tokens = self.steps_before = 0
        self.values: dict[str, float] = {}
        self.bar = progress.Progress(
            progress.TextColumn("step {task.completed:.0f}/{task.total:.0f}"),
            progress.BarColumn(10),
            progress.TextColumn("{task.description}"),
            progress.TimeRemainingColumn(compact=True),
            console=self.console,
            disable=not self.console.is_terminal,
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock and the bar."""
        self.started = time.time()
        self.tokens_before, self.steps_before = state.num_input_tokens_seen, state.global_step
        self.task = self.bar.add_task("", total=state.max_steps, completed=state.global_step)
        self.bar.start()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step starts."""
        self.first_step = self.first_step or time.time()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Move the bar."""
        self.tokens = int(state.num_input_tokens_seen) - int(self.tokens_before)
        self.bar.update(self.task, completed=state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest losses and the speed: tokens of questions and answers, including the time of evaluations."""
        new = {key: logs[key] for key in ("loss", "eval_loss") if key in (logs or {})}
        self.values |= new
        if not new:
            return
        seconds = self.note_time()
        shown = "  ".join(f"{key.replace('_', ' ')} {float(value):.4f}" for key, value in self.values.items())
        shown += f"  {self.tokens / seconds:.0f} tokens/s"
        self.bar.update(self.task, description=shown)
        if "eval_loss" in new and not self.console.is_terminal:
            done = max(
                state.global_step - self.steps_before, 1
            )  # a resumed run has the steps before from another session
            left = seconds / done * (state.max_steps - state.global_step)
            line = f"step {state.global_step}/{state.max_steps}  {shown}  {left:.0f} s left"
            self.console.print(line, highlight=False, soft_wrap=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Stop the bar and leave it visible."""
        self.note_time()
        self.bar.stop()

    def note_time(self) -> float:
        """Note the timings until now, and return the seconds of the training in this session."""
        seconds = time.time() - self.started
        process_start = psutil.Process(os.getpid()).create_time()
        self.note(training=seconds, tokens=self.tokens, start_to_first_step=self.first_step - process_start)
        return seconds
