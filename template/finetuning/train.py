"""Training: Olive's pass for the chosen method, with the three things that it lacks.

Olive's LoRA family builds the adapters and runs the Trainer, but lets nobody reach it. The subclass made here keeps
everything else of the pass and adds packing, early stopping and progress. This is the only file that depends on
Olive's inside, and imports what is heavy: invoke_olive.py imports it when training starts.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
from copy import deepcopy
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import batches
import dataset
import torch
import transformers
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.passes.olive_pass import PassConfigParam, create_pass_from_dict
from olive.passes.pytorch import lora
from olive.workflows.run.config import RunConfig
from progress import Progress

METHODS = {name.lower(): getattr(lora, name) for name in ("LoRA", "QLoRA", "DoRA", "LoHa", "LoKr")}
SIZES = "sizes.json"  # in a checkpoint that is complete: its files and their sizes in bytes
EXTRA_SETTINGS = {
    "packing": PassConfigParam(type_=bool, default_value=False, description="Lay rows end to end, without padding."),
    "early_stopping_patience": PassConfigParam(type_=int, default_value=0, description="0 never stops early."),
}


def train(
    config: dict[str, Any], tokens: dict[str, list[batches.Row]], run_folder: Path
) -> tuple[Path, dict[str, float], list[dict[str, float]]]:
    """Run the pass of olive-config.yaml (as a dict) and return the adapter's folder, timings and the losses.

    `tokens` are the rows of both parts, `train` and `held_out`, as chat_tokens returns them. Checkpoints go to
    run_folder/checkpoints, and the newest one there is gone on from; the adapter goes to run_folder/output/adapter. The
    timings are `start_to_first_step` (seconds from the start of the process), `training` (seconds) and
    `tokens_per_second`; the losses are the Trainer's log: a dict with `step` and `loss` or `eval_loss` for each report.
    """
    dataset.register()
    run_config = RunConfig.model_validate(deepcopy(config))  # Olive changes the dict it is given
    ((chosen,),) = run_config.passes.values()
    arguments = chosen.config["training_args"]
    arguments |= {
        "output_dir": str(run_folder / "checkpoints"),
        "overwrite_output_dir": True,  # Olive must not look for checkpoints: the loop below does
        "metric_for_best_model": "eval_loss",
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "restore_callback_states_from_checkpoint": True,  # early stopping goes on counting where it was
        "include_num_input_tokens_seen": "non_padding",
    }
    if torch.distributed.is_initialized():  # each process has the model on its own GPU; with FSDP, a part of it
        sharded = os.environ.get("ACCELERATE_USE_FSDP") == "true"
        chosen.config["device_map"] = "current_device" if torch.cuda.is_available() and not sharded else None
    transformers.set_seed(arguments["seed"])  # adapters are initialised before the Trainer sets its seed
    pass_class = type(chosen.type, (Training, METHODS[chosen.type.lower()]), {})
    olive_pass = create_pass_from_dict(pass_class, chosen.config, True, DEFAULT_CPU_ACCELERATOR)
    olive_pass.tokens = tokens
    output = olive_pass.run(run_config.input_model.create_model(), str(run_folder / "output"))
    return Path(output.adapter_path), olive_pass.timings, olive_pass.history


def share(value: Any = None) -> Any:
    """Return what the first of several processes gives, to all of them, once each has come here."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:  # no accelerate launch, no torchrun
        return value
    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        # the others wait while the first process evaluates, which may take hours
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


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
        train_rows, held_out_rows = self.tokens["train"], [*self.tokens["held_out"]]
        if config.torch_dtype == "float16":
            config.training_args.extra_args["fp16"] = True
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        pack = config.packing and can_pack(model, train_rows)
        shown, checkpoints = Progress(), Checkpoints()
        arguments = config.training_args.create_training_args()
        fill_up(held_out_rows, arguments.eval_batch_size * arguments.world_size)
        trainer = AnswerTrainer(
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=batches.pack if pack else partial(batches.pad, filler=tokenizer.pad_token_id),
            callbacks=[shown, checkpoints],
        )
        # the bar of transformers mixes with what is printed; ours shows the same on one line
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        if config.early_stopping_patience:
            trainer.add_callback(transformers.EarlyStoppingCallback(config.early_stopping_patience))
        steps_an_epoch = math.ceil(len(trainer.get_train_dataloader()) / trainer.args.gradient_accumulation_steps)
        if trainer.args.max_steps > steps_an_epoch * trainer.args.num_train_epochs:
            trainer.args.max_steps = -1  # it may end a run before its epochs, never lengthen it
        with checkpoints:
            trainer.train(resume_from_checkpoint=newest_checkpoint(Path(trainer.args.output_dir)))
        if checkpoints.stopped_by:
            raise KeyboardInterrupt(checkpoints.stopped_by)
        self.timings = shown.timings()
        self.history = trainer.state.log_history

        adapter = Path(output_model_path) / "adapter"
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
        if trainer.is_world_process_zero():
            # the embeddings are the base model's: only what was trained is saved
            model.save_pretrained(adapter, state_dict=weights, save_embedding_layers=False)
        share()  # it is there for all
        output_model.set_resource("adapter_path", adapter)
        return output_model


class AnswerTrainer(transformers.Trainer):
    """The Trainer with the loss of batches.py: each answer token counts the same, in whichever batch it is."""

    control: Any

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        self.model_accepts_loss_kwargs = True  # count the labels of all batches of a step

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> torch.Tensor:
        """Return this batch's part of the mean loss over the labels of a step, in nats."""
        # the gradients of several processes are averaged, and what is wanted is their sum
        return batches.answer_loss(model, inputs) / num_items_in_batch * self.accelerator.num_processes

    def evaluate(self, *arguments: Any, **options: Any) -> dict[str, float]:
        """Log eval_loss, the mean over all labels of the held-out rows, and return it."""
        self.model_wrapped.eval()
        totals = torch.zeros(2, device=self.args.device)
        with torch.no_grad(), self.compute_loss_context_manager():
            for batch in self.get_eval_dataloader():
                inputs = self._prepare_inputs(batch)
                labels = (inputs["labels"][:, 1:] != dataset.IGNORED).sum()
                totals += torch.stack([batches.answer_loss(self.model_wrapped, inputs), labels])
        loss, labels = self.accelerator.reduce(totals, "sum")
        metrics = {"eval_loss": (loss / labels).item()}
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


def can_pack(model: Any, rows: list[batches.Row]) -> bool:
    """Prepare a PEFT model for packed batches; return False, and say so, where its layers would mix the rows."""
    base_model = model.get_base_model()
    attention = base_model.config._attn_implementation
    pack_attention(base_model)
    if batches.keeps_apart(model, rows):
        return True
    base_model.set_attn_implementation(attention)
    print("The layers of this model would mix packed rows: the batches are padded, as with packing: false.")
    return False


def pack_attention(model: Any) -> None:
    """Let PyTorch's attention see where the packed rows end. Others (eager, flash) find that in position_ids."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(batches.PACKED_SDPA)


def fill_up(rows: list[batches.Row], batch_size: int) -> None:
    """Add rows without labels until all batches are full: several processes would see some rows twice to fill them."""
    blank = rows[0] | {"labels": [dataset.IGNORED] * len(rows[0]["labels"])}
    rows += [blank] * (-len(rows) % batch_size)


def newest_checkpoint(folder: Path) -> str | None:
    """Return the newest checkpoint that is whole, and say so. The others, cut off while they were written, go."""
    newest = None
    for checkpoint in sorted(folder.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]), reverse=True):
        if newest is None and is_whole(checkpoint):
            newest = checkpoint
        elif not is_whole(checkpoint) and int(os.environ.get("RANK", "0")) == 0:
            shutil.rmtree(checkpoint)
    if newest:
        print(f"Going on from {newest.name} of an interrupted run (--fresh starts over)")
    return str(newest) if newest else None


def is_whole(checkpoint: Path) -> bool:
    """Tell whether every file has the size that was noted when the checkpoint was complete."""
    try:
        sizes = json.loads((checkpoint / SIZES).read_text(encoding="utf-8"))
        return all((checkpoint / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


class Checkpoints(transformers.TrainerCallback):
    """Checkpoints that can be gone on from: marked when they are complete, and one more when the run is stopped.

    Entered as a context, it lets the first Ctrl-C or SIGTERM save and stop after the step; a second stops at once.
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
        """Save and stop when a signal came, to any of the processes."""
        if args.world_size > 1:  # a signal reaches them at different moments, and all must stop after the same step
            signals = torch.tensor(self.stopped_by, device=args.device)
            torch.distributed.all_reduce(signals, torch.distributed.ReduceOp.MAX)
            self.stopped_by = int(signals)
        if self.stopped_by:
            control.should_save = control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Note the sizes of a checkpoint's files, now that all are written.

        The last checkpoint gets no note: gone on from, it would be trained for one step too many.
        """
        share()  # each process writes its own random state
        if not state.is_world_process_zero:
            return
        if state.global_step >= state.max_steps or (control.should_training_stop and not self.stopped_by):
            return
        checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir() if path.is_file()}
        unfinished = checkpoint / f".{SIZES}.new"
        unfinished.write_text(json.dumps(sizes), encoding="utf-8")
        unfinished.replace(checkpoint / SIZES)
