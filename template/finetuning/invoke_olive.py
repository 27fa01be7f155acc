"""Fine-tune the model through Microsoft Olive: check → evaluate → train → evaluate → report.

python finetuning/invoke_olive.py            the run that finetuning/olive-config.yaml describes
python finetuning/invoke_olive.py --check    only say whether it can work
python finetuning/invoke_olive.py --smoke    the same run on a tiny replica of the model, offline, in seconds
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.metadata
import json
import logging
import os
import shutil
import sys
import time
import warnings
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
MODELS = ROOT / "models"
PACKAGES = ("olive-ai", "torch", "transformers", "peft", "datasets", "accelerate")


def main() -> int:
    """Run the steps, and turn a user's mistake into one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="check settings, data and machine; train nothing")
    parser.add_argument("--smoke", action="store_true", help="run on a tiny replica of the model, offline")
    parser.add_argument("--fresh", action="store_true", help="start over instead of resuming")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    arguments = parser.parse_args()
    os.chdir(ROOT)  # the paths in olive-config.yaml are relative to the workspace
    quiet()
    from check import ConfigError
    from dataset import DataError

    try:
        return run(arguments)
    except (ConfigError, DataError) as error:
        if arguments.debug:
            raise
        print(f"error: {error}", file=sys.stderr)
    except OSError as error:
        if arguments.debug:
            raise
        print(f"error: {error}. Nothing that was there is lost; run the same command again.", file=sys.stderr)
    except ModuleNotFoundError as error:
        if arguments.debug:
            raise
        print(f"error: {error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`.", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nStopped. The same command goes on from the newest checkpoint.", file=sys.stderr)
        return 130
    return 1


def quiet() -> None:
    """Keep every library from calling home and from talking over the run. Olive sends nothing where CI is set."""
    os.environ.update(OLIVE_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1", ORT_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1")
    for name, value in (("CI", "1"), ("TOKENIZERS_PARALLELISM", "false"), ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
                        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.getLogger("olive").setLevel(logging.ERROR)


def run(arguments: argparse.Namespace) -> int:
    """Check, evaluate, train, evaluate, report."""
    import check

    started = time.monotonic()
    config = check.read_config()
    check.validate(config)
    check.check_machine(config)
    settings = check.pass_settings(config)
    results = MODELS
    if arguments.smoke:
        from smoke import shrink

        results = MODELS / "smoke"
        shrink(config, results)
    from dataset import chat_rows

    rows = {part: chat_rows(**check.data_settings(config, part, "load_dataset_config")) for part in ("train", "held_out")}
    print(f"{len(rows['train'])} rows to train on, {len(rows['held_out'])} held out")
    if arguments.check:
        print("The settings, the data and this machine fit. Next: python finetuning/invoke_olive.py")
        return 0

    base_model, revision = config["input_model"]["model_path"], config["input_model"]["load_kwargs"].get("revision")
    folder = check.base_model_folder(config)
    run_json: dict[str, Any] = {
        "base_model": base_model,
        "revision": revision or commit_of(folder),
        "method": settings["type"].lower(),
        "adapter": (results / "adapter").relative_to(ROOT).as_posix(),
        "system_prompt": check.data_settings(config, "train", "pre_process_data_config")["system_prompt"] or "",
        "dtype": settings["torch_dtype"],
        "dataset_sha256": sha256(rows),
        "config_sha256": sha256(config),
        "packages": {name: importlib.metadata.version(name) for name in PACKAGES},
    }
    use_folder(config, folder)
    tokens = check.data_settings(config, "held_out", "pre_process_data_config")
    batch_size = settings["training_args"]["per_device_eval_batch_size"]

    from dataset import load_tokenizer
    from evaluate import evaluate, load_model

    tokenizer = load_tokenizer(folder)
    lap = time.monotonic()
    print(f"Evaluating {base_model} on the held-out rows")
    before, answers_before = evaluate(load_model(folder, None, settings), tokenizer, rows["held_out"], tokens, batch_size)
    timings = {"before": time.monotonic() - lap}

    from train import train

    run_folder = results / "checkpoints" / sha256([run_json["config_sha256"], run_json["dataset_sha256"]])[:12]
    if arguments.fresh or (run_folder / "finished").exists():
        shutil.rmtree(run_folder, ignore_errors=True)  # its result stands in models/adapter
    print(f"Training with {settings['type']}")
    adapter, training_timings = train(config, run_folder)
    name_base_model(adapter, base_model, run_json["revision"])
    tokenizer.save_pretrained(adapter)

    lap = time.monotonic()
    model = load_model(folder, adapter, settings)
    after, answers_after = evaluate(model, tokenizer, rows["held_out"], tokens, batch_size)
    timings |= {**training_timings, "after": time.monotonic() - lap}

    answered = [row for row in rows["held_out"] if row[-1]["role"] == "assistant"]
    run_json |= {
        "metrics": {"before": before, "after": after},
        "examples": [
            {"question": row[-2]["content"], "expected": row[-1]["content"], "before": one, "after": other}
            for row, one, other in list(zip(answered, answers_before, answers_after, strict=False))[:10]
            if len(row) > 1
        ],
        "seconds": round(time.monotonic() - started, 2),
        "timings": {name: round(seconds, 2) for name, seconds in timings.items()},
        "finished": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    replace_folder(adapter, results / "adapter")
    write_json(results / "run.json", run_json)
    (run_folder / "finished").touch()
    show(run_json, results)
    return 0


def use_folder(config: dict[str, Any], folder: str) -> None:
    """Point the model and the tokenizer at the folder that holds them, since Olive asks the hub for the newest ones."""
    config["input_model"]["model_path"] = folder
    config["input_model"]["load_kwargs"]["revision"] = None
    for data_config in config["data_configs"]:
        data_config["pre_process_data_config"] |= {"model_path": folder, "revision": None}


def commit_of(folder: str) -> str | None:
    """Return the commit of a downloaded model: its folder in the cache is named by it; None for other folders."""
    return Path(folder).name if Path(folder).parent.name == "snapshots" else None


def name_base_model(adapter: Path, base_model: str, revision: str | None) -> None:
    """Write the base model's own name into the adapter, in place of the folder it was loaded from."""
    path = adapter / "adapter_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, config | {"base_model_name_or_path": base_model, "revision": revision})


def sha256(value: Any) -> str:
    """Hash a value by its canonical JSON."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write a file that is never seen half written."""
    unfinished = path.with_name(f".{path.name}.new")
    unfinished.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    unfinished.replace(path)


def replace_folder(new: Path, folder: Path) -> None:
    """Put a complete folder in the place of the old one; the old one goes when the new one is there."""
    old = folder.with_name(f".{folder.name}.old")
    copy = folder.with_name(f".{folder.name}.new")
    for leftover in (old, copy):
        shutil.rmtree(leftover, ignore_errors=True)
    shutil.copytree(new, copy)
    if folder.exists():
        folder.rename(old)
    copy.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def show(run_json: dict[str, Any], results: Path) -> None:
    """Print the metrics, some answers, and the next command."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    before, after = run_json["metrics"]["before"], run_json["metrics"]["after"]
    table = Table("held-out rows", "before", "after", title="Result")
    table.add_row("accuracy (exact answers)", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}")
    for name in ("eval_loss", "perplexity"):
        table.add_row(name, f"{before[name]:.4f}", f"{after[name]:.4f}")
    console.print(table)
    answers = Table("question", "expected", "before", "after", title="The same questions, before and after")
    for example in run_json["examples"][:5]:
        answers.add_row(*(example[key] for key in ("question", "expected", "before", "after")))
    console.print(answers)
    console.print(f"{run_json['seconds']:.0f} s. Adapter: {run_json['adapter']}, figures: {results.name}/run.json")
    console.print("Next: python inference/console_chat.py")


if __name__ == "__main__":
    sys.exit(main())
