"""What is known about the base model before it is loaded: from its folder, from the hub, or from setup/model.yaml."""

from __future__ import annotations

import contextlib
import json
import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import yaml

from planning.architecture import OVERFLOW_IN_FLOAT16, Shape
from planning.text_model import count_weights, no_int4, refused
from preparing.workspace import (
    DEMO,
    MODEL_FACTS,
    ROOT,
    Found,
    ModelError,
    ModelMissingError,
    find_model,
    needed,
    weights_header,
)
from settings.run_settings import Settings
from training.tiny_model import build_demo

WAIT = 5  # seconds for the hub; the check must not be slow without a network


@dataclass(frozen=True)
class Model:
    """The base model, wherever it is."""

    name: str
    revision: str | None  # as in the settings
    folder: str | None  # None: not on this machine
    shape: Shape | None  # as its config.json says; None: not known without network
    parameters: int | None  # counted in the weights, or from the catalogue; None: not known
    download: int  # bytes missing here; also 0 if not known
    commit: str | None = None  # of the hub's repository; None: a folder, or not on this machine
    problem: str | None = None  # why it cannot be downloaded, and what to do
    own_template: bool = True  # whether its tokenizer has a chat template, as far as known
    no_int4: str | None = None  # why export.py can make no ONNX model of it, as far as known
    float16: bool = True  # whether float16 holds its numbers, as far as known
    replaced_by: str | None = None  # the catalogue's better model, if this one is deprecated

    @property
    def context(self) -> int | None:
        """How many tokens it reads, as far as known."""
        return self.shape.context if self.shape else None

    @property
    def dense(self) -> Shape | None:
        """Its shape if that is the whole model, of layers of a known kind, so that its needs can be estimated."""
        return self.counted if self.counted and self.counted.is_uniform else None

    @property
    def counted(self) -> Shape | None:
        """Its shape if that has the weights that transformers makes of its text model, so that they can be counted."""
        return self.shape if self.shape and self.shape.is_right else None

    @property
    def is_demo(self) -> bool:
        """Whether the run builds it."""
        return self.name == DEMO


def base_model(settings: Settings) -> Found:
    """Return where the base model is; builds the demo model if it is missing. Raises ModelError."""
    if settings.model_path == DEMO and not (ROOT / DEMO).exists():
        build_demo()
    return find_model(settings.model_path, settings.revision, ROOT)


def find(settings: Settings) -> Model:
    """Look for the model on this machine, then ask the hub. Raises ModelError if it cannot be used at all."""
    name, revision = settings.model_path, settings.revision
    facts = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))
    try:
        found = find_model(name, revision, ROOT)
    except ModelMissingError:
        if name == DEMO:
            demo = Shape.of(facts)
            return Model(name, None, None, demo, facts["parameters"], 0, float16=holds(name, demo, facts))
        return elsewhere(name, revision, facts)
    config = json.loads((found.folder / "config.json").read_text(encoding="utf-8"))
    counted = count_parameters(found.folder, bool((config.get("text_config") or config).get("tie_word_embeddings")))
    own_template = has_template(found.folder)
    problem, shape = refused(name, config), shape_in(config)
    return Model(
        name,
        revision,
        str(found.folder),
        shape,
        counted,
        0,
        found.commit,
        problem,
        own_template,
        None if problem else no_int4(config),
        holds(name, shape, facts),
        better(name, facts),
    )


def is_described(name: str, facts: Mapping[str, Any]) -> bool:
    """Return whether setup/model.yaml is about this model of the hub."""
    return f"/{name}/" in str(facts.get("source"))


def better(name: str, facts: Mapping[str, Any]) -> str | None:
    """Return the id of the model that the catalogue recommends instead of this deprecated one."""
    return facts.get("replaced_by") if is_described(name, facts) else None


def holds(name: str, shape: Shape | None, facts: Mapping[str, Any]) -> bool:
    """Return whether float16 holds a model's numbers: as the catalogue says, or by its architecture."""
    if is_described(name, facts) and facts.get("float16") is not None:
        return bool(facts["float16"])
    return shape is None or shape.architecture not in OVERFLOW_IN_FLOAT16


def has_template(folder: Path) -> bool:
    """Return whether a tokenizer has a chat template, in a separate file or in its settings."""
    settings = folder / "tokenizer_config.json"
    if (folder / "chat_template.jinja").is_file() or (folder / "chat_template.json").is_file():
        return True
    return settings.is_file() and bool(json.loads(settings.read_text(encoding="utf-8")).get("chat_template"))


def count_parameters(folder: Path, tied: bool) -> int:
    """Count a model's weights from the headers of its files, each once: a tied output layer is the embedding."""
    shapes = {
        name: tensor["shape"]
        for file in folder.glob("model*.safetensors")
        for name, tensor in weights_header(file).items()
        if not (tied and name == "lm_head.weight")
    }
    return sum(math.prod(shape) for shape in shapes.values())


def elsewhere(name: str, revision: str | None, facts: Mapping[str, Any]) -> Model:
    """Return what the hub says about a model that is not here, or else setup/model.yaml if it describes this model."""
    from huggingface_hub import constants, get_token

    known: dict[str, Any] = {}
    if not constants.HF_HUB_OFFLINE:
        asking = threading.Thread(target=ask_hub, args=(name, revision, known), daemon=True)
        asking.start()
        asking.join(WAIT)  # a DNS lookup has no timeout of its own
        known = dict(known)
    if is_described(name, facts):
        known = {"shape": Shape.of(facts), "bytes": 2 * facts["parameters"], "gated": facts["gated"]} | known
        known["parameters"] = facts["parameters"]
    problem = known.get("problem")
    if known.get("gated") and not get_token():
        page = f"{constants.ENDPOINT}/{name}"
        problem = f"{name} is gated: accept its licence on {page}, then `hf auth login`, or set HF_TOKEN."
    return Model(
        name,
        revision,
        None,
        known.get("shape"),
        known.get("parameters"),
        known.get("bytes", 0),
        problem=problem,
        no_int4=known.get("no_int4"),
        float16=holds(name, known.get("shape"), facts),
        replaced_by=better(name, facts),
    )


def ask_hub(name: str, revision: str | None, known: dict[str, Any]) -> None:
    """Ask the hub for a model's files, gate and config.json (a few KB) and store the answers in `known`."""
    from huggingface_hub import HfApi, errors, get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    try:
        answer = HfApi().model_info(name, revision=revision, files_metadata=True, timeout=WAIT)
        sizes = {file.rfilename: file.size or 0 for file in answer.siblings or []}
        known["gated"] = bool(answer.gated)
        known["bytes"] = sum(sizes[file] for file in needed(sizes, name))
        if answer.safetensors:
            known["parameters"] = answer.safetensors.total
        url = hf_hub_url(name, "config.json", revision=answer.sha)
        config = get_session().get(url, headers=build_hf_headers(), timeout=WAIT)
        if config.status_code in (401, 403):
            known["problem"] = f"This token has no access to {name}: accept its licence on the model's page."
        elif config.status_code == 200:
            if shape := shape_in(config.json()):
                known["shape"] = shape
            if problem := refused(name, config.json()):
                known["problem"] = problem
            else:
                known["no_int4"] = no_int4(config.json())
    except ModelError as error:
        known["problem"] = str(error)
    except errors.RepositoryNotFoundError:
        known["problem"] = f"{name} does not exist on the hub or is private: correct model_path, or set HF_TOKEN."
    except errors.RevisionNotFoundError:
        known["problem"] = f"{name} has no revision {revision}: correct revision in olive-config.yaml."
    except Exception as error:  # no network, or the hub is down: the check continues without it
        known["silent"] = str(error)


def shape_in(config: Mapping[str, Any]) -> Shape | None:
    """Read a config.json, completed with transformers' defaults; None if its dimensions have other names."""
    from transformers import AutoConfig

    text = config.get("text_config") or config  # of a multimodal model
    completed = dict(text)
    with contextlib.suppress(ValueError, TypeError, KeyError):  # an architecture that transformers does not know
        given = {key: value for key, value in text.items() if value is not None}
        completed = AutoConfig.for_model(**text).to_dict() | given
    try:
        shape, weights = Shape.of(completed), count_weights(text)
    except (KeyError, TypeError, AttributeError):
        return None
    beside = count_weights(config) - weights if text is not config else 0
    return replace(shape, weights=weights, beside=max(beside, 0))
