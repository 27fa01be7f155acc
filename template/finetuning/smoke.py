"""The smoke run: the same configuration on a tiny replica of the model, offline, in seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from check import ROOT, data_settings, pass_settings
from dataset import chat_rows
from tiny_model import SAMPLE, build

ROWS = 64
STEPS = 10


def shrink(config: dict[str, Any], results: Path) -> None:
    """Build the replica in results/base and change the configuration to a short run on it, on the CPU's terms.

    The data is the configured file, or the sample where that would need a download.
    """
    facts = yaml.safe_load((ROOT / "setup" / "model.yaml").read_text(encoding="utf-8"))
    settings = pass_settings(config)
    for data_config in config["data_configs"]:
        rows = data_config["load_dataset_config"]
        rows["max_rows"] = ROWS
        # the replica's tokenizer spends more tokens on a row than the model's: what it cuts says nothing
        data_config["pre_process_data_config"]["max_bad_rows"] = 1
        if rows.get("dataset_name"):
            print("The smoke run takes the sample in place of the Hugging Face dataset: it needs no network.")
            rows |= {
                "dataset_name": None,
                "train_file": str(SAMPLE),
                "held_out_file": None,
                "dataset_format": "messages",
            }
    if settings["type"].lower() == "qlora":
        print("The smoke run trains with LoRA in place of QLoRA: four-bit weights need the GPU.")
        settings["type"] = "LoRA"
        for key in ("quant_type", "double_quant", "compute_dtype"):
            settings.pop(key, None)
    if settings["training_args"].get("report_to", "none") != "none":
        print("The smoke run reports to models/smoke/report alone: it needs no network.")
    config["systems"]["local_system"]["accelerators"] = [{"device": "cpu"}]
    settings["torch_dtype"] = "float32"
    settings["training_args"] |= {
        "max_steps": STEPS,
        "per_device_train_batch_size": 8,
        "gradient_accumulation_steps": 1,
        "optim": "adamw_torch",
        "eval_steps": STEPS // 2,
        "save_steps": STEPS // 2,
        "report_to": "none",
    }
    build(results / "base", facts, chat_rows(**data_settings(config, "train", "load_dataset_config")), steps=STEPS)
    config["input_model"]["model_path"] = (results / "base").relative_to(ROOT).as_posix()
    config["input_model"]["load_kwargs"]["revision"] = None
