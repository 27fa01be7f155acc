"""Training: Olive's pass for the chosen method, with three features that it lacks.

Olive's LoRA passes build the adapters and run the Trainer, but give no access to it. The subclass made here keeps
the rest of the pass and adds packing, early stopping and progress. This is the only file that depends on Olive's
internals, and its imports are heavy: invoke_olive.py imports it when training starts.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, TypedDict

import torch
import transformers
from olive.hardware.accelerator import DEFAULT_CPU_ACCELERATOR
from olive.passes.olive_pass import create_pass_from_dict
from olive.workflows.run.config import RunConfig

from preparing import dataset
from preparing.tokens import IGNORED
from settings.config_file import ConfigError
from settings.olive_pass import ExtraSettings, pass_class
from settings.run_settings import Settings, olive_config
from training import batches
from training.answer_trainer import AnswerTrainer
from training.checkpoints import Checkpoints, newest_checkpoint
from training.evaluations import evaluated_rows
from training.fewer_evaluations import FewerEvaluations
from training.free_memory import free_memory
from training.fused_lora import fuse
from training.gradients import check_gradients
from training.pieces import piece_tokens
from training.processes import share
from training.progress import Progress


class Used(TypedDict):
    """Settings as the training used them: those that it may change, and what follows from several."""

    packing: bool
    gradient_checkpointing: bool
    processes: int
    rows_a_step: int
    eval_rows: int
    eval_every: int


def train(
    settings: Settings,
    tokens: dict[str, list[batches.Row]],
    run_folder: Path,
    note: Callable[..., None] = lambda **timings: None,
) -> tuple[Path, Used, list[dict[str, float]]]:
    """Run the pass of olive-config.yaml and return the adapter's folder, the settings as used, and the losses.

    `tokens` are the rows of both parts, `train` and `held_out`, as chat_tokens returns them. Checkpoints go to
    run_folder/checkpoints, and training resumes from the newest one; the adapter goes to run_folder/output/adapter.
    `note` gets the timings, see Progress; the losses are the Trainer's log: a dict with `step` and `loss` or
    `eval_loss` per entry. Raises ConfigError if a loss is not a number, or nothing was learned.
    """
    free_memory()  # of the evaluation before
    dataset.register()
    config = olive_config(settings)
    if config["input_model"]["load_kwargs"].get("attn_implementation") == "sdpa":
        # transformers takes it anyway, and another for the parts that do not have it: Gemma 4's for sound
        del config["input_model"]["load_kwargs"]["attn_implementation"]
    for data_config in config["data_configs"]:
        for key in ("user_script", "script_dir"):  # its functions are registered already; Olive would import them again
            data_config.pop(key, None)
    run_config = RunConfig.model_validate(config)
    ((chosen,),) = run_config.passes.values()
    arguments = chosen.config["training_args"]
    steps, of_epochs = settings.steps(len(tokens["train"]))
    arguments |= {
        "max_steps": steps if steps < of_epochs else -1,  # it can end a run before its epochs, but never extend it
        "output_dir": str(run_folder / "checkpoints"),
        "overwrite_output_dir": True,  # the loop below looks for checkpoints, not Olive
        "metric_for_best_model": "eval_loss",
        "logging_nan_inf_filter": False,  # it logs the mean of the losses before instead of one that is not a number
        "ddp_find_unused_parameters": False,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": torch.cuda.is_available(),
        "restore_callback_states_from_checkpoint": True,  # early stopping continues counting where it stopped
        "include_num_input_tokens_seen": "non_padding",
    }
    if torch.distributed.is_initialized():  # each process has the model on its own GPU; with FSDP, a part of it
        spread = settings.sharded or not torch.cuda.is_available()
        chosen.config["device_map"] = None if spread else "current_device"
    transformers.set_seed(settings.seed)  # adapters are initialised before the Trainer sets the seed
    kind = pass_class(settings.method, Training)
    olive_pass = create_pass_from_dict(kind, chosen.config, True, DEFAULT_CPU_ACCELERATOR)
    olive_pass.tokens, olive_pass.smoke, olive_pass.note = tokens, settings.smoke, note
    olive_pass.piece = piece_tokens(settings)
    lengths = ([len(row["input_ids"]) for row in tokens[part]] for part in ("train", "held_out"))
    olive_pass.eval_rows, olive_pass.eval_every = evaluated_rows(settings, *lengths)
    output = olive_pass.run(run_config.input_model.create_model(), str(run_folder / "output"))
    result = Path(output.adapter_path), olive_pass.used, olive_pass.history
    del olive_pass, output
    free_memory()
    return result


class Training(ExtraSettings):
    """The part that the five methods share: the loop around transformers.Trainer."""

    @staticmethod
    def get_target_modules(model: Any) -> str:
        """Take every linear layer if target_modules is null: Olive's own choice covers only some architectures."""
        return "all-linear"

    def enable_lora(self, model: Any, config: Any, task: Any = None, use_dora: bool = False) -> Any:
        """Give the adapter's layers to the text model alone: those for images and sound would never get a gradient."""
        config.target_modules = in_text_model(model, config.target_modules)
        return super().enable_lora(model, config, task, use_dora)

    def train_and_save_new_model(
        self, model: Any, tokenizer: Any, config: Any, output_model: Any, output_model_path: str
    ) -> Any:
        """Train `model`, a PEFT model, and return `output_model`, Olive's handle, with the adapter's folder."""
        train_rows, held_out_rows = self.tokens["train"], dataset.spread(self.tokens["held_out"], self.eval_rows)
        if len(held_out_rows) < len(self.tokens["held_out"]):
            often = f", one in {self.eval_every} is done" if self.eval_every > 1 else ""
            read, all_rows = len(held_out_rows), len(self.tokens["held_out"])
            print(f"Evaluations in the training read {read} of {all_rows} held-out rows{often}: see eval_rows.")
        if config.torch_dtype == "float16":
            config.training_args.extra_args["fp16"] = True
        torch.backends.cuda.matmul.allow_tf32 = config.allow_tf32
        pack = config.packing and can_pack(model, train_rows)
        shown, checkpoints = Progress(self.note), Checkpoints()
        arguments = config.training_args.create_training_args()
        fill_up(held_out_rows, arguments.eval_batch_size * arguments.world_size)
        trainer = AnswerTrainer(
            piece=self.piece,
            model=model,
            args=arguments,
            train_dataset=train_rows,
            eval_dataset=held_out_rows,
            data_collator=batches.pack if pack else partial(batches.pad, filler=tokenizer.pad_token_id),
            callbacks=[shown, checkpoints, FewerEvaluations(self.eval_every)],
        )
        # the bar of transformers mixes with other output; ours shows the same on one line
        trainer.remove_callback(transformers.trainer_callback.ProgressCallback)
        trainer.remove_callback(transformers.trainer_callback.PrinterCallback)
        if config.early_stopping_patience:
            trainer.add_callback(transformers.EarlyStoppingCallback(config.early_stopping_patience))
        start = first_to_move(model)
        if config.torch_dtype != "float16":  # which the Trainer computes under autocast
            fuse(model)
        with checkpoints:
            trainer.train(resume_from_checkpoint=newest_checkpoint(Path(trainer.args.output_dir)))
        if checkpoints.stopped_by:
            raise KeyboardInterrupt(checkpoints.stopped_by)
        if self.smoke:
            batch = trainer._prepare_inputs(trainer.data_collator(train_rows[: arguments.train_batch_size]))
            batch = next(batches.divide(batch, trainer.piece))
            print(check_gradients(model, batch, config.torch_dtype, trainer.compute_loss_context_manager))
        self.used: Used = {
            "packing": pack,
            "gradient_checkpointing": trainer.args.gradient_checkpointing,
            "processes": trainer.args.world_size,
            "rows_a_step": trainer.args.train_batch_size
            * trainer.args.gradient_accumulation_steps
            * trainer.args.world_size,
            "eval_rows": self.eval_rows,
            "eval_every": self.eval_every,
        }
        self.history = trainer.state.log_history

        adapter = Path(output_model_path) / "adapter"
        weights = trainer.accelerator.get_state_dict(trainer.model_wrapped) if trainer.is_fsdp_enabled else None
        if trainer.is_world_process_zero():
            check_moved(start, weights or dict(model.named_parameters()), trainer.state)
            # the embeddings are the base model's: only what was trained is saved
            model.save_pretrained(adapter, state_dict=weights, save_embedding_layers=False)
        share()  # the adapter is on disk before any process continues
        output_model.set_resource("adapter_path", adapter)
        return output_model


def text_part(model: Any) -> Any:
    """Return the text model in a multimodal one, or the model itself."""
    return model if model.config.get_text_config() is model.config else model.get_decoder()


def in_text_model(model: Any, names: Any) -> Any:
    """Return the target modules of a multimodal model that are in its text model or its output layer, by whole names.

    `names` are ends of names, `all-linear` or a pattern; those of a model for text alone are returned as they are.
    """
    everything = names == "all-linear"
    decoder = text_part(model)
    if decoder is model or (isinstance(names, str) and not everything):
        return names
    prefix = next(name for name, module in model.named_modules() if module is decoder)
    inside = {f"{prefix}.{name}": module for name, module in decoder.named_modules() if name}
    if everything:
        return [name for name, module in inside.items() if isinstance(module, torch.nn.Linear)]
    return [name for name in [*inside, "lm_head"] if any(name == end or name.endswith(f".{end}") for end in names)]


def first_to_move(model: Any) -> dict[str, torch.Tensor]:
    """Return copies of the adapter's weights that are zero before the training, all of them if none is.

    An adapter starts as zero, so that it changes nothing: in every method, the weights that make it so are the only
    ones that receive the first gradient. The others also move by weight decay, which teaches nothing.
    """
    trained = {name: weight.detach().cpu().clone() for name, weight in model.named_parameters() if weight.requires_grad}
    return {name: weight for name, weight in trained.items() if not weight.any()} or trained


def check_moved(start: dict[str, torch.Tensor], weights: dict[str, torch.Tensor], state: Any) -> None:
    """Raise ConfigError if the adapter has none of the weights changed that `first_to_move` returned.

    `state` is the Trainer's: the weights are those of its best step if there is one, else of the last.
    """
    if not all(torch.equal(weight, weights[name].detach().cpu()) for name, weight in start.items()):
        return
    losses = {entry["eval_loss"] for entry in state.log_history if "eval_loss" in entry}
    if len(losses) > 1:  # a later step has changed something, to the worse
        raise ConfigError(
            f"The training made nothing better: the lowest held-out loss is that of step {state.best_global_step} of "
            f"{state.global_step}, at which no weight of the adapter had moved: lower learning_rate, train longer, or "
            "keep the last step with load_best_model_at_end: false. models/adapter stays as it was."
        )
    raise ConfigError(
        "The training changed no weight of the adapter: see learning_rate and warmup_steps in olive-config.yaml, "
        "and with torch_dtype: float16 take bfloat16 or float32. models/adapter stays as it was."
    )


def can_pack(model: Any, rows: list[batches.Row]) -> bool:
    """Prepare a PEFT model for packed batches; print a notice and return False if its layers would mix the rows."""
    text = text_part(model.get_base_model())
    attention = text.config._attn_implementation
    pack_attention(text)
    if batches.keeps_apart(model, rows):
        return True
    text.set_attn_implementation(attention)
    print("The layers of this model would mix packed rows: the batches are padded, as with packing: false.")
    return False


def pack_attention(model: Any) -> None:
    """Give PyTorch's attention the ends of the packed rows. Others (eager, flash) derive them from position_ids."""
    if model.config._attn_implementation == "sdpa" and model._supports_attention_backend:
        model.set_attn_implementation(batches.PACKED_SDPA)


def fill_up(rows: list[batches.Row], batch_size: int) -> None:
    """Add rows without labels until all batches are full: otherwise several processes would repeat rows."""
    blank = rows[0] | {"labels": [IGNORED] * len(rows[0]["labels"])}
    rows += [blank] * (-len(rows) % batch_size)
