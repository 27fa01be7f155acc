"""How many steps of a run have a learning rate above 0: by transformers' own scheduler, step by step."""

from __future__ import annotations

import warnings

from settings.config_file import CONFIG, ConfigError, line_of
from settings.run_settings import Settings

BY_LOSS = ("reduce_lr_on_plateau", "greedy")  # they start with the rate of the settings, and follow the held-out loss


def learning_steps(settings: Settings, steps: int) -> int:
    """Return how many of the steps have a learning rate above 0. Raises ConfigError if there is no such scheduler.

    As in the Trainer, a step uses the rate that the scheduler has set before it. Imports torch and transformers.
    """
    import torch
    from transformers import get_scheduler

    from settings.combinations import training_arguments

    arguments = training_arguments(settings)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=arguments.learning_rate)
    try:
        scheduler = get_scheduler(
            arguments.lr_scheduler_type,
            optimizer,
            num_warmup_steps=arguments.get_warmup_steps(steps),
            num_training_steps=steps,
            scheduler_specific_kwargs=arguments.lr_scheduler_kwargs,
        )
        if arguments.lr_scheduler_type.value in BY_LOSS:
            return steps
        above = 0
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # constants of PyTorch's own
            for _ in range(steps):
                above += optimizer.param_groups[0]["lr"] > 0
                optimizer.step()
                scheduler.step()
    except (ValueError, TypeError, ArithmeticError) as error:
        reason = " ".join(str(error).split()).rstrip(".")
        raise ConfigError(
            f"{CONFIG.name}, line {line_of(CONFIG, 'lr_scheduler_type')}: lr_scheduler_type "
            f"{arguments.lr_scheduler_type.value} does not take these settings ({reason}): correct lr_scheduler_kwargs."
        ) from error
    return above
