"""The Trainer with the loss of batches.py: each answer token counts the same in every batch."""

from __future__ import annotations

import math
from typing import Any

import torch
import transformers

from preparing.tokens import IGNORED
from settings.config_file import ConfigError
from training import batches


class AnswerTrainer(transformers.Trainer):
    """Trains and evaluates with the loss of the answers. `piece` is how many tokens are computed at once."""

    control: Any

    def __init__(self, piece: float = math.inf, **options: Any) -> None:
        super().__init__(**options)
        self.piece = piece
        self.model_accepts_loss_kwargs = True  # count the labels of all batches of a step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this batch's part of the mean loss over the labels of a step, in nats."""
        # the gradients of several processes are averaged, but their sum is needed
        return batches.answer_loss(model, inputs) / num_items_in_batch * self.accelerator.num_processes

    def training_step(self, model: Any, inputs: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        """Train on a batch, a piece at a time. Raises ConfigError in all processes if a loss is not a number."""
        losses = [
            super(AnswerTrainer, self).training_step(model, piece, num_items_in_batch)
            for piece in batches.divide(inputs, self.piece)
        ]
        loss = torch.stack(losses).sum()
        self.check_finite(self.accelerator.reduce(loss, "sum").item(), self.state.global_step + 1)
        return loss

    def check_finite(self, loss: float, step: int) -> None:
        """Raise ConfigError if a loss is not a number: all that follows would be learned from nothing."""
        if math.isfinite(loss):
            return
        precision = ", or set torch_dtype to float32 or bfloat16," if self.args.fp16 else ""
        raise ConfigError(
            f"The loss is not a number at step {step}, so the training stopped and no earlier result has changed: "
            f"lower learning_rate{precision} in olive-config.yaml."
        )

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Log and return eval_loss, the mean over all labels of the held-out rows."""
        self.model_wrapped.eval()
        totals = torch.zeros(2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                for piece in batches.divide(self._prepare_inputs(batch), self.piece):
                    labels = (piece["labels"][:, 1:] != IGNORED).sum()
                    totals += torch.stack([batches.answer_loss(self.model_wrapped, piece), labels])
        loss, labels = self.accelerator.reduce(totals, "sum")
        metrics = {"eval_loss": (loss / labels).item()}
        self.check_finite(metrics["eval_loss"], self.state.global_step)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
