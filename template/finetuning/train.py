"""Training: Olive's pass for the chosen method, with the three things that it lacks.

Olive's LoRA family builds the adapters and runs the Trainer, but lets nobody reach it. The subclass made here keeps
everything else of the pass and adds packing, early stopping and progress. This is the only file that depends on
Olive's inside, and imports what is heavy: invoke_olive.py imports it when training starts.
"""

from __future__ import annotations

import math
import os
import time
from copy import deepcopy
from functools import partial
from pathlib import Path
from typing import Any

import dataset
import psutil
import torch
import transformers
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.passes.olive_pass import PassConfigParam, create_pass_from_dict
from olive.passes.pytorch import lora
from olive.workflows.run.config import RunConfig
from rich.console import Console

METHODS = {name.lower(): getattr(lora, name) for name in ("LoRA", "QLoRA", "DoRA", "LoHa", "LoKr")}
EXTRA_SETTINGS = {
    "packing": PassConfigParam(type_=bool, default_value=False, description="Lay rows end to end, without padding."),
    "early_stopping_patience": PassConfigParam(type_=int, default_value=0, description="0 never stops early."),
}


def train(config: dict[str, Any], run_folder: Path) -> tuple[Path, dict[str, float], list[dict[str, float]]]:
    """Run the pass of olive-config.yaml (as a dict) and return the adapter's folder, timings and the losses.

    Checkpoints go to run_folder/checkpoints, and the newest one there is gone on from; the adapter goes to
    run_folder/output/adapter. The timings, in seconds, are `start_to_first_step` (from the start of the process) and
    `training`; the losses are the Trainer's log: a dict with `step` and `loss` or `eval_loss` for each report.
    """
    dataset.register()
    run_config = RunConfig.model_validate(deepcopy(config))  # Olive changes the dict it is given
    ((chosen,),) = run_config.passes.values()
    arguments = chosen.config["training_args"]
    arguments |= {
        "output_dir": str(run_folder / "checkpoints"),
        "overwrite_output_dir": True,  # Olive must not look for checkpoints: the loop below does
        "dataloader_pin_memory": torch.cuda.is_available(),
    }
    transformers.set_seed(arguments["seed"])  # adapters are initialised before the Trainer sets its seed
    pass_class = type(chosen.type, (Training, METHODS[chosen.type.lower()]), {})
    olive_pass = create_pass_from_dict(pass_class, chosen.config, True, DEFAULT_CPU_ACCELERATOR)
    output = olive_pass.run(run_config.input_model.create_model(), str(run_folder / "output"))
    return Path(output.adapter_path), olive_pass.timings, olive_pass.history


class Training(lora.LoRA):
    """What the five methods share: the loop around transformers.Trainer."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {**super()._default_config(accelerator_spec), **EXTRA_SETTINGS}

    @staticmethod
    def get_target_modules(model: Any) -> str:
        """Take every linear layer where target_modules is null: Olive's own choice knows some architectures only."""
        return "all-linear"

    def train_and_save_new_model(
        self, model: Any, tokenizer: Any, config: Any, output_model: Any, output_model_path: str
    ) -> Any:
        """Train `model`, a PEFT model, and return `output_model`, Olive's handle of it, with the adapter's folder."""
        train_rows, held_out_rows = (tensors(part) for part in (config.train_data_config, config.eval_data_config))
        if config.torch_dtype == "float16":
            config.training_args.extra_args["fp16"] = True
        model.config.use_cache = False  # with a cache, packed rows would see each other
        collator = transformers.DataCollatorWithFlattening() if config.packing else None
        progress = Progress()
        trainer = transformers.Trainer(
            model=model,
            args=config.training_args.create_training_args(),
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=collator or partial(self.collate_batch, tokenizer=tokenizer),
            callbacks=[progress],
        )
        # the bar of transformers mixes with what is printed; ours shows the same on one line
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        if config.early_stopping_patience:
            trainer.add_callback(transformers.EarlyStoppingCallback(config.early_stopping_patience))
        batches = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
        if trainer.args.max_steps > batches * trainer.args.num_train_epochs:
            trainer.args.max_steps = -1  # it may end a run before its epochs, never lengthen it
        trainer.train(resume_from_checkpoint=newest_checkpoint(trainer.args.output_dir))
        self.timings = progress.timings()
        self.history = trainer.state.log_history

        adapter = Path(output_model_path) / "adapter"
        # the embeddings are the base model's: only what was trained is saved
        model.save_pretrained(adapter, save_embedding_layers=False)
        output_model.set_resource("adapter_path", adapter)
        return output_model


def tensors(data_config: Any) -> list[dict[str, torch.Tensor]]:
    """Return the tokens and labels of one of Olive's data configurations, without a detour through files."""
    container = data_config.to_data_container()
    rows = container.pre_process(container.load_dataset())
    return [{key: torch.tensor(ids) for key, ids in row.items()} for row in rows]


def newest_checkpoint(folder: str) -> str | None:
    """Return the newest checkpoint of an interrupted run, and say so."""
    checkpoint: str | None = transformers.trainer_utils.get_last_checkpoint(folder) if Path(folder).is_dir() else None
    if checkpoint:
        print(f"Going on from {Path(checkpoint).name} of an interrupted run (--fresh starts over)")
    return checkpoint


class Progress(transformers.TrainerCallback):
    """One line that moves in a terminal, a plain line at each report in a log."""

    def __init__(self) -> None:
        self.console = Console()
        self.started = time.time()
        self.first_step = 0.0
        self.values: dict[str, float] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Start the clock."""
        self.started = time.time()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note when the first step starts."""
        self.first_step = self.first_step or time.time()

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        """Show the newest losses."""
        new = {key: logs[key] for key in ("loss", "eval_loss") if key in (logs or {})}
        self.values |= new
        in_terminal = self.console.is_terminal
        if not new or not (in_terminal or "eval_loss" in new):
            return  # a log gets a line at each evaluation
        shown = "  ".join(f"{key.replace('_', ' ')} {float(value):.4f}" for key, value in self.values.items())
        left = (time.time() - self.started) / max(state.global_step, 1) * (state.max_steps - state.global_step)
        line = f"step {state.global_step}/{state.max_steps}  {shown}  {left:.0f} s left"
        self.console.print(line.ljust(70), end="\r" if in_terminal else "\n", highlight=False)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Leave the last line on the screen."""
        self.ended = time.time()
        if self.console.is_terminal:
            self.console.print()

    def timings(self) -> dict[str, float]:
        """Return the seconds from the process's start to the first step, and of the training."""
        process_start = psutil.Process(os.getpid()).create_time()
        return {
            "start_to_first_step": round(self.first_step - process_start, 2),
            "training": round(self.ended - self.started, 2),
        }
