"""The tuned model of the last run: models/run.json, the adapter that it names, and the base model."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from preparing.dataset import chat_rows, spread
from preparing.problems import DataError
from preparing.tokens import with_system
from preparing.workspace import MODELS, ROOT, find_model
from reporting.run_record import RunRecord, published
from settings.config_file import ConfigError

COMPARED_ROWS = 200  # of fewer, one wrong answer is more than the hundredth that may differ


def read_run() -> RunRecord:
    """Return models/run.json. Raises ConfigError."""
    again = "run `python finetuning/invoke_olive.py`"
    try:
        run: RunRecord = json.loads((MODELS / "run.json").read_text(encoding="utf-8"))
        missing = {"base_model", "revision", "method", "adapter", "dtype", "system_prompt", "config"} - set(run)
    except FileNotFoundError:
        raise ConfigError(f"There is no tuned model yet (models/run.json): {again} first.") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"models/run.json is damaged ({error}): {again} again.") from error
    if missing:
        raise ConfigError(f"models/run.json has no {sorted(missing)[0]}: {again} again.")
    return run


def check_adapter(run: RunRecord) -> str:
    """Return the hash of the adapter, settings and weights, as inference/sources.py does. Raises ConfigError."""
    from safetensors import SafetensorError, safe_open

    folder = ROOT / run["adapter"]
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        with safe_open(weights, framework="numpy"):  # opening detects a damaged file
            pass
        trained_on = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        for name in ("tokenizer_config.json", "tokenizer.json"):
            json.loads((folder / name).read_text(encoding="utf-8"))
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(settings.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        again = "run `python finetuning/invoke_olive.py` again"
        raise ConfigError(f"The adapter in {run['adapter']} is missing or damaged ({error}): {again}.") from error
    if trained_on not in (run["base_model"], published(run["base_model"])):  # older releases write the whole path
        raise ConfigError(
            f"The adapter in {run['adapter']} was trained on {trained_on}, but models/run.json names "
            f"{run['base_model']}: run `python finetuning/invoke_olive.py` again."
        )
    return digest.hexdigest()


def base_folder(run: RunRecord) -> Path:
    """Return the folder of the base model that the run used. Raises ModelError if it is missing or damaged."""
    return find_model(run["base_model"], run["revision"], ROOT).folder


def family_of(base: Path) -> str:
    """Return the family of a model: model_type in its config.json."""
    return str(json.loads((base / "config.json").read_text(encoding="utf-8"))["model_type"])


def with_adapter(model: Any, run: RunRecord) -> Any:
    """Return the base model with the run's adapter. Raises ConfigError if they do not fit."""
    from peft import PeftModel

    try:
        return PeftModel.from_pretrained(model, str(ROOT / run["adapter"])).eval()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise ConfigError(
            f"The adapter in {run['adapter']} is damaged, or does not fit {run['base_model']} ({reason}): run "
            "`python finetuning/invoke_olive.py --fresh`."
        ) from error


def compared_rows(run: RunRecord) -> list[Any]:
    """Return held-out rows of the run, spread over all of them, with its system prompt.

    If the data is not here, they are the examples in models/run.json. Raises DataError if there are none.
    """
    try:
        rows: list[Any] = spread(chat_rows("held_out", **run["config"]["rows"]), COMPARED_ROWS)
    except DataError as error:
        if not run.get("examples"):
            raise DataError(f"{error} The export needs held-out rows to compare the models on.") from error
        print(f"The data cannot be read, so the models are compared on the examples in models/run.json ({error})")
        names = (("user", "question"), ("assistant", "expected"))
        rows = [[{"role": role, "content": one[name]} for role, name in names] for one in run["examples"]]
    return [with_system(row, run["system_prompt"]) for row in rows]
