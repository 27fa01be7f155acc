"""Which model answers: the tuned one of models/run.json or the base model of olive-config.yaml, with torch or ONNX."""

from __future__ import annotations

import contextlib
import hashlib
import json
import tomllib
from datetime import date
from pathlib import Path
from typing import Any

from engine import ChatError, Source

TUNE = "run `python finetuning/invoke_olive.py`"
BASE = "or chat with the base model: --baseonly."
OWN_CODE = "runs only with code of its own, which is never run"


def tuned_source(root: Path) -> Source:
    """Read models/run.json of the last finished run. Raises ChatError."""
    try:
        run = json.loads((root / "models" / "run.json").read_text(encoding="utf-8"))
        return Source(
            base=run["base_model"],
            revision=run["revision"],
            adapter=run["adapter"],
            method=run["method"],
            dtype=run["dtype"],
            system_prompt=run["system_prompt"],
            # runs of older releases do not say what follows
            thinking=run.get("thinking", False),
            stops=tuple(run.get("stops") or ()),
            date=date.fromisoformat(run["date"]) if run.get("date") else None,
            quantization=run.get("quantization") or quantization_of(run.get("config", {}).get("adapter", {})),
            run=run,
        )
    except FileNotFoundError:
        raise ChatError(f"No tuned model yet (models/run.json is missing): {TUNE}, {BASE}") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"it has no {error}" if isinstance(error, KeyError) else error
        raise ChatError(f"models/run.json is damaged or incomplete ({reason}): {TUNE} again, {BASE}") from error


def base_source(root: Path) -> Source:
    """Read the base model from finetuning/olive-config.yaml, with the precision of the training. Raises ChatError."""
    config = read_yaml(root, "finetuning/olive-config.yaml")
    try:
        (chosen,) = config["passes"].values()
        data = [data.get("pre_process_data_config") or {} for data in config.get("data_configs") or []]
        return Source(
            base=config["input_model"]["model_path"],
            revision=(config["input_model"].get("load_kwargs") or {}).get("revision"),
            adapter=None,
            method=chosen["type"].lower(),
            dtype=chosen["torch_dtype"],
            system_prompt=next(filter(None, (settings.get("system_prompt") for settings in data)), of_the_rows(root)),
            quantization=quantization_of(chosen),
            # auto depends on the rows, which are not read here
            thinking=any(settings.get("thinking") in ("on", True) for settings in data),  # YAML 1.1 reads on as true
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise ChatError(
            "finetuning/olive-config.yaml does not name the model as it should: restore it with git or "
            "`copier recopy --trust --vcs-ref :current:`."
        ) from error


def of_the_rows(root: Path) -> str:
    """Return the system prompt with which the last run trained: that of the settings, or the one of all rows."""
    with contextlib.suppress(ChatError):
        return tuned_source(root).system_prompt
    return ""


def needs_code(error: Exception) -> bool:
    """Return whether transformers refuses files because they work only with code that comes with them."""
    return "custom code" in str(error)


def quantization_of(settings: dict[str, Any]) -> dict[str, Any]:
    """Return how QLoRA quantises the base model, from the settings of Olive's pass."""
    return {name: settings[name] for name in ("quant_type", "double_quant", "compute_dtype") if name in settings}


def read_yaml(root: Path, file: str) -> dict[str, Any]:
    """Read a YAML file of the workspace. Raises ChatError."""
    import yaml

    try:
        return dict(yaml.safe_load((root / file).read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise ChatError(
            f"{file} cannot be read ({reason}): restore it with git or `copier recopy --trust --vcs-ref :current:`."
        ) from error


def check_adapter(source: Source, root: Path) -> None:
    """Raise ChatError unless the adapter is complete and was trained on the base model of models/run.json."""
    from safetensors import SafetensorError, safe_open

    folder = root / str(source.adapter)
    try:
        trained_on = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        with safe_open(folder / "adapter_model.safetensors", framework="numpy") as weights:
            weights.keys()  # opening detects a damaged file
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise ChatError(
            f"The adapter in {source.adapter} is missing or damaged ({error}): {TUNE} again, {BASE}"
        ) from error
    # The workspace may have moved, and a downloaded model is in the hub's cache: compare the ends of the paths.
    path = f"/{trained_on or source.base}".replace("\\", "/")
    if (
        not path.endswith("/" + published(source.base).lstrip("./"))
        and "/models--" + source.base.replace("/", "--") not in path
    ):
        raise ChatError(
            f"The adapter in {source.adapter} was trained on {trained_on}, but models/run.json names {source.base}: "
            f"{TUNE} again, {BASE}"
        )


def published(path: str) -> str:
    """Return a model's name as finetuning/ writes it into what may be published: of an absolute path the last part."""
    return Path(path).name if Path(path).is_absolute() else path


def choose(engine: str, source: Source, root: Path) -> tuple[Path | None, list[str]]:
    """Return the folder of the ONNX model to use, None for torch, and notices about the choice. Raises ChatError."""
    folder = root / "models" / ("onnx" if source.adapter else "onnx-base")
    if engine == "torch" or (engine == "auto" and not (source.adapter and folder.exists())):
        return None, []
    problem = problem_of_export(folder, source, root)
    if engine == "onnx":
        if problem:
            raise ChatError(f"{problem}, or use --engine torch.")
        return folder, []
    if problem:
        return None, [f"torch answers. {problem}."]
    with contextlib.suppress(OSError, ValueError):
        settings = tomllib.loads((root / "setup" / "environment.toml").read_text(encoding="utf-8"))
        mark = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        if settings.get("device") == "gpu" and mark.get("provider", "cpu") == "cpu":
            return None, ["torch answers: this workspace is for a GPU, and models/onnx for a CPU (--engine onnx)."]
    says = f"The {precision_of(folder)} model in models/onnx answers"
    return folder, [f"{says}; --engine torch takes the adapter itself, and is slower."]


def precision_of(folder: Path) -> str:
    """Return the precision of most weights of an ONNX model, as the export chose it; ready-made models have int4."""
    try:
        return str(json.loads((folder / "export.json").read_text(encoding="utf-8")).get("precision", "int4"))
    except (OSError, ValueError, AttributeError):
        return "int4"


def problem_of_export(folder: Path, source: Source, root: Path) -> str:
    """Return why an ONNX folder is not the requested model, and what to do; "" if it is."""
    name = f"models/{folder.name}"
    make = "run `python finetuning/export.py`" if source.adapter else "run `python setup/get_model.py --onnx`"
    if not folder.exists():
        return f"There is no ONNX model in {name} yet: {make}"
    try:
        mark = json.loads((folder / "export.json").read_text(encoding="utf-8"))
        for file, size in mark["files"].items():
            if (folder / file).stat().st_size != size:
                return f"The ONNX model in {name} is damaged ({file}): {make} again"
        if mark["base_model"] not in (source.base, published(source.base)):
            return f"The ONNX model in {name} was made from {mark['base_model']}, not from {source.base}: {make} again"
        if source.adapter and mark["adapter_sha256"] != sha256_of_adapter(root / source.adapter):
            return f"The ONNX model in {name} was made from another adapter than {source.adapter}: {make} again"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"The ONNX model in {name} is damaged ({error}): {make} again"
    return ""


def sha256_of_adapter(folder: Path) -> str:
    """Return the hash of weights and settings, as finetuning/export.py records it."""
    with (folder / "adapter_model.safetensors").open("rb") as file:
        digest = hashlib.file_digest(file, "sha256")
    digest.update((folder / "adapter_config.json").read_bytes())
    return digest.hexdigest()
