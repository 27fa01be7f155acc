"""The output of a run: the adapter, and run.json, which inference reads."""

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
from collections.abc import Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypedDict

from preparing.chat_template import ends_of_answer
from preparing.conversations import Conversation
from preparing.rejected import count_rejected
from preparing.tokenised import Tokenised
from preparing.tokens import IGNORED, load_tokenizer
from preparing.turns import Message
from preparing.workspace import ROOT
from settings.config_file import ConfigError, the_pass
from settings.run_settings import Settings, olive_config
from training.whole_files import new_folder, replace_folder, write_json

if TYPE_CHECKING:
    from training.train import Used


class RunRecord(TypedDict, total=False):
    """models/run.json: the inputs and the results of a run."""

    base_model: str  # a hub id, or a folder relative to the workspace
    revision: str | None  # the commit of the model's repository
    method: str
    adapter: str  # a folder relative to the workspace
    dtype: str  # of the training
    quantization: dict[str, Any] | None  # with QLoRA, of the base model: quant_type, double_quant, compute_dtype
    stops: list[int]  # the tokens that end an answer
    date: str  # YYYY-MM-DD, of the first start: what the chat template writes as today's
    system_prompt: str
    thinking: bool  # whether it is asked with thoughts
    dataset_sha256: str
    config_sha256: str
    config: dict[str, dict[str, Any]]  # the settings that affect the result, by group
    packages: dict[str, str]
    machine: dict[str, str | int | None]
    data: dict[str, Any]
    metrics: dict[str, dict[str, Any]]  # before and after, as in reporting/evaluate.py
    examples: list[dict[str, str]]  # question (all turns before the answer), expected, before, after
    timings: dict[str, float]  # see training/sessions.py
    seconds: float  # of all sessions
    sessions: int  # above 1 if the run was interrupted and resumed
    finished: str
    export: dict[str, dict[str, Any]]  # merged and onnx


WORSE = 1.05  # a smaller rise of the loss is no damage: a trial of a few steps ends a little higher or lower
PACKAGES = ("olive-ai", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "bitsandbytes")


def describe(settings: Settings, rows: dict[str, list[list[Message]]], commit: str | None, results: Path) -> RunRecord:
    """Return the part of run.json that is known before the run. `commit` is the base model's; None for a folder."""
    # the commit, not the branch: checkpoints of one commit must not be resumed with another
    config = olive_config(replace(settings, revision=commit))
    return {
        "base_model": settings.model_path,
        "revision": commit,
        "method": settings.method,
        "adapter": (results / "adapter").relative_to(ROOT).as_posix(),
        "dtype": settings.torch_dtype,
        "quantization": {name: getattr(settings, name) for name in ("quant_type", "double_quant", "compute_dtype")}
        if settings.method == "qlora"
        else None,
        "date": datetime.now().date().isoformat(),
        "system_prompt": settings.data["train"].tokens.system_prompt or "",
        "thinking": settings.data["train"].tokens.thinking == "on",
        "dataset_sha256": sha256(rows),
        "config_sha256": sha256(config),
        "packages": versions(),
        "machine": machine(),
    }


def settings_as_used(settings: Settings, run_json: RunRecord, used: Used) -> dict[str, dict[str, Any]]:
    """Return the settings that affect the result, by group: without Olive's paths and switches.

    `used` are those that the training has decided, as train() returns them.
    """
    # with the base model's name, not the folder it was loaded from
    config = olive_config(replace(settings, model_path=run_json["base_model"], revision=run_json["revision"]))
    olive_pass, tokens = the_pass(config), settings.data["train"].tokens
    adapter = {name: value for name, value in olive_pass.items() if not isinstance(value, dict) and "data" not in name}
    return {
        "model": {"model_path": run_json["base_model"]} | config["input_model"]["load_kwargs"],
        "rows": vars(settings.data["train"].rows),
        "tokens": {name: getattr(tokens, name) for name in ("system_prompt", "max_seq_len", "train_on", "thinking")},
        "adapter": adapter | {"packing": used["packing"]},
        "training": olive_pass["training_args"] | {name: value for name, value in used.items() if name != "packing"},
    }


def versions() -> dict[str, str]:
    """Return the versions of the packages that affect the result; those that are not installed are left out."""
    found = {}
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def machine() -> dict[str, str | int | None]:
    """Return Python, operating system, and the GPUs that PyTorch sees."""
    import torch

    gpus = [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()}, {platform.machine()}",
        "cpu_cores": os.cpu_count(),
        "gpu": ", ".join(gpus) or None,
        "cuda": torch.version.cuda if gpus else None,
    }


def keep_logs(settings: Settings, folder: Path) -> None:
    """Make the report_to integrations write to a folder of the workspace, unless environment variables say where.

    By default they write to the current and the home folder. wandb would also upload the console output, which contains
    questions and answers: here it gets figures and settings only, like the others.
    """
    if settings.report_to in ("none", ()):
        return
    folder.mkdir(parents=True, exist_ok=True)
    for variable, value in {
        "TENSORBOARD_LOGGING_DIR": folder / "tensorboard" / f"{datetime.now():%Y-%m-%d-%H%M%S}",  # one curve per run
        # relative to the workspace: an absolute path may contain characters that a URL cannot
        "MLFLOW_TRACKING_URI": f"sqlite:///{(folder / 'mlflow.db').relative_to(ROOT).as_posix()}",
        "TRACKIO_DIR": folder / "trackio",
        "WANDB_DIR": folder,
        "WANDB_CACHE_DIR": folder / "wandb" / "cache",
        "WANDB_CONSOLE": "off",
    }.items():
        os.environ.setdefault(variable, str(value))


def data_facts(
    settings: Settings, rows: dict[str, list[list[Message]]], found: Tokenised, tokenizer: Any
) -> dict[str, Any]:
    """Count the data of the run, in rows and in tokens. `found` are the rows to train on, `rows` those of both parts.

    tokens_per_row is before the cut at max_seq_len; answer_share is the share of `tokens` (those trained on) that count
    for the loss.
    """
    source = settings.data["train"].rows
    lengths = sorted(len(one["input_ids"]) for row in found.whole for one in row)
    trained_on = sum(len(one["input_ids"]) for one in found.examples)
    answers = sum(label != IGNORED for one in found.examples for label in one["labels"])
    train, held_out = ([json.dumps(row, sort_keys=True) for row in rows[part]] for part in ("train", "held_out"))
    train_source = source.dataset_name or source.train_file
    return {
        "source": train_source,
        "held_out_source": source.held_out_file or train_source,
        "train_rows": len(train),
        "held_out_rows": len(held_out),
        "tokens": trained_on,
        "answer_share": round(answers / trained_on, 4),
        "tokens_per_row": {
            "min": lengths[0],
            "median": statistics.median_low(lengths),
            "p95": lengths[math.ceil(0.95 * len(lengths)) - 1],
            "max": lengths[-1],
        },
        "cut_rows": found.longer,
        "left_out_rows": len(found.lost),
        "set_aside_rows": count_rejected(
            {row.source: row.is_from_hub for part in rows.values() for row in part if isinstance(row, Conversation)}
        ),
        "repeated_rows": settings.repeated_rows(len(found.examples)),
        "duplicate_rows": len(train) - len(set(train)),
        "held_out_rows_trained_on": len(set(held_out) & set(train)),
        "end_of_answer": tokenizer.convert_ids_to_tokens(ends_of_answer(tokenizer)),
    }


def interval_in_words(metrics: Mapping[str, Sequence[float]]) -> str:
    """Return the confidence interval of the exact answers in readable form; runs before release 0.4.0 have none."""
    low, high = metrics.get("accuracy_interval", (0, 1))
    return f"{low:.1%} to {high:.1%}"


def asked(row: list[Message]) -> str:
    """Return the turns before the answer of a row as text: one turn alone, several each after its role."""
    turns = [turn for turn in row[:-1] if turn["role"] != "system"]
    if len(turns) < 2:
        return "".join(turn["content"] for turn in turns)
    return "\n".join(f"{turn['role']}: {turn['content']}" for turn in turns)


def refuse_worse(run_json: RunRecord, adapter: Path, results: Path) -> None:
    """Raise ConfigError if the held-out loss is clearly higher than before the training; say it if it is a little."""
    before, after = (run_json["metrics"][moment]["eval_loss"] for moment in ("before", "after"))
    if after <= before * WORSE:
        if after >= before:
            print(f"Nothing was gained: the held-out loss went from {before:.4f} to {after:.4f}. More steps may help.")
        return
    kept = (
        "The adapter of an earlier run stays as it is"
        if (results / "run.json").is_file()
        else "No adapter is published"
    )
    raise ConfigError(
        f"The run made the model worse: its loss on the held-out rows went from {before:.4f} to {after:.4f}. {kept}, "
        f"and this one lies in {adapter.relative_to(ROOT).as_posix()}: lower learning_rate, or take more steps if "
        "these were few, in olive-config.yaml, or publish it with --keep-worse."
    )


def published(path: str) -> str:
    """Return only the last part of an absolute path, which names folders of this machine; other values unchanged."""
    return Path(path).name if Path(path).is_absolute() else path


def publish(run_json: RunRecord, adapter: Path, folder: str, results: Path) -> None:
    """Publish the adapter and run.json. The previous ones are removed when the new ones are complete."""
    config_file = adapter / "adapter_config.json"
    adapter_config = json.loads(config_file.read_text(encoding="utf-8"))
    # the base model's name instead of the folder it was loaded from; PEFT's card also names that folder
    adapter_config |= {
        "base_model_name_or_path": published(run_json["base_model"]),
        "revision": run_json["revision"],
    }
    write_json(config_file, adapter_config)
    (adapter / "README.md").unlink(missing_ok=True)
    tokenizer = load_tokenizer(folder)
    tokenizer.save_pretrained(adapter)  # with the chat template of the training
    run_json["stops"] = ends_of_answer(tokenizer)
    run_json["finished"] = datetime.now(UTC).isoformat(timespec="seconds")
    new = new_folder(results / "adapter")
    shutil.copytree(adapter, new, dirs_exist_ok=True)
    replace_folder(new, results / "adapter")
    write_json(results / "run.json", run_json)


def sha256(value: Any) -> str:
    """Return the hash of a value's canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
