"""Whether transformers can load a model to generate text, and which exports know it: from config.json alone.

python -m planning.text_model NAME, in finetuning/, reads a config.json from stdin and prints why the model cannot be
used: setup/get_model.py asks it before a download.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import preparing.workspace  # noqa: F401 - turns telemetry off, before transformers is imported

Config = Mapping[str, Any]  # a config.json
GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")  # endings of classes that generate text


def refused(name: str, config: Config) -> str | None:
    """Return why the model cannot be fine-tuned here and what to do, in one sentence; None if it can."""
    kind, made_for = config.get("model_type"), (config.get("architectures") or [""])[0]
    choose = "choose a text model, or the text-only version of this one"
    if not kind:
        return None  # nothing to go by: loading it will tell
    quantised = (config.get("quantization_config") or {}).get("quant_method")
    if quantised and (quantised != "bitsandbytes" or importlib.util.find_spec("bitsandbytes") is None):
        return (
            f"{name} is quantised already ({quantised}) and cannot be trained here: set model_path to the model that "
            "it was made from; QLoRA quantises that one when it loads it."
        )
    found = config_of(config)
    if found is None:
        why = "runs only with code of its own, which is never run" if config.get("auto_map") else "is of a newer kind"
        return f"{name} {why}: transformers {version('transformers')} does not know {kind}; choose another model."
    if found.is_encoder_decoder:
        return f"{name} ({kind}) is an encoder with a decoder, which is trained on pairs of texts: {choose}."
    if made_for and not made_for.endswith(GENERATES):
        return f"{name} is a {made_for}, which does not generate text: {choose}."
    if class_name(config) is None:
        inside = (config.get("text_config") or {}).get("model_type")
        wrapped = f" around {inside}" if inside else ""
        return f"{name} is a {made_for or kind}{wrapped}, which transformers does not load as a text model: {choose}."
    return None


def config_of(config: Config) -> Any:
    """Return transformers' configuration object; None for a kind of model that it does not know."""
    from transformers import AutoConfig
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if config.get("model_type") not in CONFIG_MAPPING:
        return None
    return AutoConfig.for_model(**config)


def class_name(config: Config) -> str | None:
    """Return the class that AutoModelForCausalLM makes of a config.json; None if it refuses the model."""
    from transformers import AutoModelForCausalLM

    mapping = AutoModelForCausalLM._model_mapping
    found = config_of(config)
    return str(mapping[type(found)].__name__) if found is not None and type(found) in mapping else None


def count_weights(config: Config) -> int:
    """Count the weights of the model that transformers makes of a config.json, without memory for them.

    0 if it makes none: it does not know the model, or fails on its numbers.
    """
    import torch
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config_of(config))
        return sum(weight.numel() for weight in model.parameters())
    except Exception:  # a model's code fails in ways of its own
        return 0


def no_int4(config: Config) -> str | None:
    """Return why export.py can make no ONNX model of it; None if the builder knows it, or cannot be asked.

    The builder's source is read, not imported: it needs torch and seconds. For a model with images, the builder makes
    a part that takes no text.
    """
    name, package = class_name(config), importlib.util.find_spec("onnxruntime_genai")
    if name is None or package is None or not package.origin:
        return None
    known: set[str] = set()
    with contextlib.suppress(OSError):
        source = Path(package.origin).with_name("models") / "builder.py"
        known = set(re.findall(r'architectures\[0\] == "(\w+)"', source.read_text(encoding="utf-8")))
    if not known or (name in known and name.endswith("ForCausalLM")):
        return None
    return f"no ONNX model: the builder does not know {name}; export.py --format merged works"


def main() -> int:
    """Read a config.json from stdin, and print why the model cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="the model's id or folder, for the sentence")
    arguments = parser.parse_args()
    print(refused(arguments.name, json.load(sys.stdin)) or "", end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
