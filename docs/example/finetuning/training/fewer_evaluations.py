"""Leave out evaluations in a short training, in which they would take more time than the steps."""

from __future__ import annotations

from typing import Any

import transformers


class FewerEvaluations(transformers.TrainerCallback):
    """Does one in so many evaluations, and always the last one. The checkpoints between them are saved all the same."""

    def __init__(self, every: int) -> None:
        """Do one in `every` evaluations."""
        self.every = every

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Decide by the step, so that a resumed run evaluates where an uninterrupted one does."""
        left = (state.max_steps - state.global_step) // state.eval_steps if self.every > 1 else 0
        if left % self.every:
            control.should_evaluate = False
