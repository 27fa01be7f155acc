"""The evaluations in the training: how many there are, and how many held-out rows each reads."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean

from settings.run_settings import Settings

EVALUATED = 1 / 2  # of a trained token's time: frozen weights take as many operations backward as forward
EVALUATION_SHARE = 0.1  # of the training's time, unless eval_rows is set
FEWEST_ROWS = 32  # of an evaluation: the best step of fewer would be chosen by chance


def passes(settings: Settings, steps: int) -> float:
    """Return how often the held-out rows are evaluated in a training of this many steps."""
    if settings.eval_strategy == "no":
        return 0
    if settings.eval_strategy == "epoch":
        return settings.num_train_epochs
    every = settings.eval_steps or steps  # a share of the steps if it is below 1
    return min(steps, 1 / every if every < 1 else steps / every)


def evaluated_rows(settings: Settings, train: Sequence[int], held_out: Sequence[int]) -> tuple[int, int]:
    """Return how many held-out rows an evaluation in the training reads, and in how many evaluations one is done.

    `train` and `held_out` are tokens per row. Without eval_rows, all evaluations together take a tenth of the time of
    the training: each reads fewer rows, down to FEWEST_ROWS, then some are left out; one at the end is always done.
    """
    if settings.eval_rows:
        return min(settings.eval_rows, len(held_out)), 1
    steps, _ = settings.steps(len(train))
    trained = mean(train) * min(steps * settings.rows_a_step, len(train) * settings.num_train_epochs)
    times = max(passes(settings, steps), 1)
    affordable = EVALUATION_SHARE / (1 - EVALUATION_SHARE) * trained / EVALUATED / mean(held_out)  # rows, in all
    rows = min(len(held_out), max(FEWEST_ROWS, int(affordable / times)))
    # someone asked for each: early stopping counts them, and so does who sets a number of steps
    if settings.early_stopping_patience or settings.eval_strategy != "steps" or (settings.eval_steps or 1) >= 1:
        return rows, 1
    return rows, math.ceil(times / max(int(affordable / rows), 1))
