"""What a run leaves behind: the adapter in its place, and run.json, which inference reads."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shutil
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from check import ROOT, data_settings, pass_settings
from dataset import Message, load_tokenizer

PACKAGES = ("olive-ai", "torch", "transformers", "peft", "datasets", "accelerate")


def describe(
    config: dict[str, Any], rows: dict[str, list[list[Message]]], folder: str, results: Path
) -> dict[str, Any]:
    """Return the part of run.json that is known before the run. `folder` is where the base model lies."""
    # a model from the hub lies in a folder of the cache that is named by its commit
    commit = Path(folder).name if Path(folder).parent.name == "snapshots" else None
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
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
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
