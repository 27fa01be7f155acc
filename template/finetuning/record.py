"""What a run leaves behind: the adapter in its place, and run.json, which inference reads."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import shutil
import statistics
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from check import ROOT, data_settings, pass_settings
from dataset import IGNORED, Message, load_tokenizer, tokenise, with_system

PACKAGES = ("olive-ai", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "bitsandbytes")


def describe(
    config: dict[str, Any], rows: dict[str, list[list[Message]]], commit: str | None, results: Path
) -> dict[str, Any]:
    """Return the part of run.json that is known before the run. `commit` is the base model's; None: a folder."""
    # a branch by its commit: checkpoints on one must not be resumed on the next
    config["input_model"]["load_kwargs"]["revision"] = commit
    settings = pass_settings(config)
    return {
        "base_model": config["input_model"]["model_path"],
        "revision": commit,
        "method": settings["type"].lower(),
        "adapter": (results / "adapter").relative_to(ROOT).as_posix(),
        "dtype": settings["torch_dtype"],
        "system_prompt": data_settings(config, "train", "pre_process_data_config")["system_prompt"] or "",
        "dataset_sha256": sha256(rows),
        "config_sha256": sha256(config),
        "config": settings_in_use(config),
        "packages": versions(),
        "machine": machine(),
    }


def settings_in_use(config: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Return the settings that decide the result, by what they concern: without Olive's places and switches."""
    settings = pass_settings(config)
    rows = data_settings(config, "train", "load_dataset_config")
    tokens = data_settings(config, "train", "pre_process_data_config")
    return {
        "model": {"model_path": config["input_model"]["model_path"]} | config["input_model"]["load_kwargs"],
        "rows": {key: value for key, value in rows.items() if key != "part"},
        "tokens": {key: tokens[key] for key in ("system_prompt", "max_seq_len", "train_on")},
        "adapter": {key: value for key, value in settings.items() if not isinstance(value, dict) and "data" not in key},
        "training": dict(settings["training_args"]),
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that decide the result; one that is not installed is left out."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, str | int | None]:
    """Return what the run is on: Python, system, and the GPUs that PyTorch sees."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "gpu": ", ".join(gpus) or None,
        "cuda": torch.version.cuda if gpus else None,
    }


def keep_logs(config: dict[str, Any], folder: Path) -> None:
    """Let what report_to names write into a folder of the workspace, unless the user's environment says where.

    Left alone, the packages write into the current and the home folder. wandb would also send what the run prints,
    questions and answers among it: it gets the figures and settings, as the others do.
    """
    if pass_settings(config)["training_args"].get("report_to", "none") in ("none", []):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for variable, value in {
        "TENSORBOARD_LOGGING_DIR": folder / "tensorboard" / f"{datetime.now():%Y-%m-%d-%H%M%S}",  # a curve for each run
        # relative to the workspace, where the run is: a path above it may hold what an address cannot
        "MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').relative_to(ROOT).as_posix()}",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "TRACKIO_DIR": folder / "trackio",
        "WANDB_DIR": folder,
        "WANDB_CACHE_DIR": folder / "wandb" / "cache",
        "WANDB_CONSOLE": "off",
        "WANDB_ERROR_REPORTING": "false",
    }.items():
        os.environ.setdefault(variable, str(value))


def data_facts(config: dict[str, Any], rows: dict[str, list[list[Message]]], folder: str) -> dict[str, Any]:
    """Count what went into the run, in rows and in tokens of the model's tokenizer in `folder`.

    The rows are tokenised once more, so that the training starts without waiting for this. tokens_per_row is before a
    row is cut at max_seq_len; answer_share is the share of `tokens`, those trained on, that the loss counts.
    """
    from evaluate import end_of_turn

    source = data_settings(config, "train", "load_dataset_config")
    settings = data_settings(config, "train", "pre_process_data_config")
    tokenizer, longest = load_tokenizer(folder), settings["max_seq_len"]
    examples = [
        tokenise(tokenizer, with_system(row, settings["system_prompt"]), settings["train_on"]) for row in rows["train"]
    ]
    lengths = sorted(len(example["input_ids"]) for example in examples)
    answers = [sum(label != IGNORED for label in example["labels"][:longest]) for example in examples]
    kept = [example for example, tokens in zip(examples, answers, strict=True) if tokens]
    trained_on = sum(min(len(example["input_ids"]), longest) for example in kept)
    train, held_out = ([json.dumps(row, sort_keys=True) for row in rows[part]] for part in ("train", "held_out"))
    train_source = source["dataset_name"] or source["train_file"]
    return {
        "source": train_source,
        "held_out_source": source["held_out_file"] or train_source,
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "tokens": trained_on,
        "answer_share": round(sum(answers) / trained_on, 4),
        "tokens_per_row": {
            "min": lengths[0],
            "median": statistics.median_low(lengths),
            "p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "max": lengths[-1],
        },
        "cut_rows": sum(length > longest for length in lengths),
        "left_out_rows": answers.count(0),
        "duplicate_rows": len(train) - len(set(train)),
        "held_out_rows_trained_on": len(set(held_out) & set(train)),
        "end_of_answer": tokenizer.convert_ids_to_tokens(end_of_turn(tokenizer, kept)),
    }


def use_folder(config: dict[str, Any], folder: str) -> None:
    """Point model and tokenizer at the folder that holds them: Olive would ask the hub for the newest tokenizer."""
    config["input_model"]["model_path"] = folder
    config["input_model"]["load_kwargs"]["revision"] = None
    for data_config in config["data_configs"]:
        data_config["pre_process_data_config"] |= {"model_path": folder, "revision": None}
        for key in ("user_script", "script_dir"):  # train.py registers its functions: Olive would import them again
            data_config.pop(key, None)


def publish(run_json: dict[str, Any], adapter: Path, folder: str, results: Path) -> None:
    """Put the adapter and run.json in their places. What was there before goes when the new ones are complete."""
    config_file = adapter / "adapter_config.json"
    adapter_config = json.loads(config_file.read_text(encoding="utf-8"))
    # the base model's own name in place of the folder it was loaded from; PEFT's card names that folder too
    adapter_config |= {"base_model_name_or_path": run_json["base_model"], "revision": run_json["revision"]}
    write_json(config_file, adapter_config)
    (adapter / "README.md").unlink(missing_ok=True)
    load_tokenizer(folder).save_pretrained(adapter)  # with the chat template of the training

    run_json["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    replace_folder(adapter, results / "adapter")
    write_json(results / "run.json", run_json)


def replace_folder(new: Path, folder: Path) -> None:
    """Copy a folder into the place of another; the other goes when the new one is there."""
    old, copy = folder.with_name(f".{folder.name}.old"), folder.with_name(f".{folder.name}.new")
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(new, copy)
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)  # an earlier run was killed between the two renames
        folder.rename(old)
    copy.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write a file that is never seen half written."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def sha256(value: Any) -> str:
    """Hash a value by its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
