"""Which settings olive-config.yaml allows, and why it refuses others: validation.py compares the user's file with it.

Settings that Olive or transformers accept, but that this run would ignore or override or that would break it, are
refused. All other arguments of transformers.TrainingArguments reach the Trainer.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

Reasons = dict[str, tuple[str, ...]]  # why → the settings

TRAINING_ARGS: Reasons = {
    "use warmup_steps, which takes a share below 1 too": ("warmup_ratio",),
    "set the environment variable TENSORBOARD_LOGGING_DIR": ("logging_dir",),
    "write its keys among the training_args": ("extra_args",),
    "the run keeps complete checkpoints in models/checkpoints and resumes from them": (
        *("output_dir", "overwrite_output_dir", "resume_from_checkpoint", "restore_callback_states_from_checkpoint"),
        *("save_only_model", "enable_jit_checkpoint", "ignore_data_skip"),
    ),
    "torch_dtype decides the precision": ("fp16", "bf16", "fp16_full_eval", "bf16_full_eval"),
    "set allow_tf32 next to torch_dtype": ("tf32",),
    "device under systems selects the device": ("use_cpu",),
    "accelerate launch and torchrun set it": ("local_rank",),
    "an adapter has no unused weights": ("ddp_find_unused_parameters",),
    "use gradient_checkpointing": ("activation_checkpointing",),
    "use gradient_checkpointing_kwargs": ("activation_checkpointing_kwargs",),
    "with a cache, packed rows would attend to each other": ("use_cache",),
    "the loss counts every answer token of a step the same": (
        *("label_smoothing_factor", "average_tokens_across_devices", "label_names"),
    ),
    "every row is trained on": ("dataloader_drop_last",),
    "the rows have no columns but tokens and labels": ("remove_unused_columns", "length_column_name"),
    "an out-of-memory error says which size fits": ("auto_find_batch_size",),
    "only the held-out loss is measured during the training": (
        *("metric_for_best_model", "greater_is_better", "prediction_loss_only", "include_for_metrics"),
        *("batch_eval_metrics", "eval_do_concat_batches", "eval_use_gather_object", "eval_accumulation_steps"),
    ),
    "eval_strategy says when the held-out loss is measured": ("do_train", "do_eval", "do_predict"),
    "the run counts tokens and shows its own progress": ("include_num_input_tokens_seen", "disable_tqdm"),
    "memory is pinned if there is a GPU": ("dataloader_pin_memory",),
    "the run uploads nothing; `hf upload` takes the folder models/adapter": (
        *("push_to_hub", "hub_token", "hub_private_repo", "hub_model_id", "hub_strategy", "hub_always_push"),
        "hub_revision",
    ),
}
ANY_METHOD: Reasons = {
    "write its keys next to type": ("config",),
    "only the adapter is trained": ("modules_to_save",),
    "the model is put on the GPUs that PyTorch sees: CUDA_VISIBLE_DEVICES chooses them": ("device_map",),
    "the weights that it would move are on the GPU": ("ephemeral_gpu_offload",),
    "only `olive run` reads it, at the top level of the file": ("host", "evaluator"),
}
# what Olive's pass of a method accepts but does not use
METHOD: dict[str, Reasons] = {
    "lora": {},
    "qlora": {
        "QLoRA puts an adapter on every 4-bit layer": ("target_modules",),
        "the run keeps the adapter alone, which also fits the base model in full precision": ("save_quant_config",),
    },
    "dora": {},
    "loha": {
        "use rank_dropout": ("lora_dropout",),
        "language models have no such layers": ("use_effective_conv2d",),
    },
}
METHOD["lokr"] = METHOD["loha"]
USER_SCRIPT = {"user_script": "finetuning/preparing/dataset.py", "script_dir": "finetuning"}
LOAD_KWARGS: Reasons = {"code that comes with a model is never run": ("trust_remote_code",)}


def reasons(method: str) -> dict[str, dict[str, str]]:
    """Return, for each section of olive-config.yaml, the refused settings and why; `method` is in lower case."""
    sections = {
        "training_args": TRAINING_ARGS,
        "passes.*": ANY_METHOD | METHOD[method],
        "load_kwargs": LOAD_KWARGS,
    }
    return {
        section: {key: reason for reason, keys in table.items() for key in keys} for section, table in sections.items()
    }


def fixed_values(config: Mapping[str, Any]) -> list[tuple[str, Mapping[str, Any], dict[str, Any]]]:
    """Return (section, its settings, the values it must have): what Olive needs and no user can choose."""
    model = config["input_model"]
    (olive_pass,) = config["passes"].values()
    sections = [
        ("input_model", model, {"type": "HfModel"}),
        ("passes.*", olive_pass, {"train_data_config": "train", "eval_data_config": "held_out"}),
        ("local_system", config["systems"].get("local_system") or {}, {"type": "LocalSystem"}),
    ]
    for data_config in config["data_configs"]:
        rows = {"type": "chat_rows", "part": data_config.get("name")}
        tokens = {
            "type": "chat_tokens",
            "model_path": model["model_path"],
            "revision": model["load_kwargs"].get("revision"),
        }
        sections += [
            ("data_configs", data_config, USER_SCRIPT),
            ("load_dataset_config", data_config.get("load_dataset_config") or {}, rows),
            ("pre_process_data_config", data_config.get("pre_process_data_config") or {}, tokens),
        ]
    return sections
