"""Every valid combination of answers renders files that are valid in their own language; every other one is refused."""

from __future__ import annotations

import ast
import itertools
import json
import os
import re
import tomllib
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
MODELS = [model["id"] for model in yaml.safe_load((ROOT / "catalog" / "models.yml").read_text())["models"]]
SOURCES = ("sample", "file", "huggingface")
# These get all data sources, as all models do with EVERY_ANSWER=1; for the others, a model changes nothing there.
WHOLE = ("demo", "custom")
METHODS = ("qlora", "lora", "dora", "loha", "lokr")
PLATFORMS = ("linux", "windows", "macos")
Loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times as fast, where PyYAML was built with it
# What the answer to another question makes necessary.
REQUIRED = {
    "file": {"dataset_path": "dataset/rows.jsonl"},
    "huggingface": {"dataset_name": "owner/rows"},
    "custom": {"custom_model_id": "owner/model"},
}


def data_sources(model: str) -> tuple[str, ...]:
    return SOURCES if model in WHOLE or os.environ.get("EVERY_ANSWER") == "1" else SOURCES[:1]


def combinations(model: str) -> Iterator[dict[str, Any]]:
    for device, platform, target, method, source in itertools.product(
        ("gpu", "cpu"), PLATFORMS, ("local", "azure"), METHODS, data_sources(model)
    ):
        yield {
            "model": model,
            "device": device,
            "platform": platform,
            "target": target,
            "method": method,
            "dataset_source": source,
            **REQUIRED.get(model, {}),
            **REQUIRED.get(source, {}),
        }


def refusal(model: str, device: str, platform: str, target: str, method: str, **_: Any) -> str:
    """Return why these answers do not go together, in the words of the refusal; "" when they do."""
    if device == "gpu" and platform == "macos" and target == "local":
        return "a Mac has no CUDA: choose cpu, or target azure"
    if device == "cpu" and target == "azure" and model != "demo":
        return "Azure jobs run on a GPU: choose gpu"
    if device == "cpu" and method == "qlora":
        return "needs an NVIDIA GPU: choose lora"
    return ""


def files(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@cache
def mistakes(name: str, content: bytes, plain: bool) -> list[str]:
    """Return what is wrong with a file of a workspace. Most are the same for most answers: each is read once."""
    text = content.decode()
    found = []
    if text and not text.endswith("\n"):
        found.append("no newline at its end")
    if re.search(r"[ \t\r]$", text, flags=re.MULTILINE) or text.endswith("\n\n"):
        found.append("trailing blanks or blank lines")
    kind = Path(name).suffix
    try:
        if kind == ".py":
            ast.parse(text)
        elif kind in {".yaml", ".yml"}:
            yaml.load(text, Loader)
        elif kind == ".toml":
            tomllib.loads(text)
        elif kind == ".jsonl":
            [json.loads(line) for line in text.splitlines()]
        elif kind == ".json":
            json.loads(re.sub(r"^\s*//.*$", "", text, flags=re.MULTILINE))  # VS Code's files hold comments
    except (SyntaxError, ValueError, yaml.YAMLError) as error:
        found.append(f"not valid: {error}")
    # Chat templates and GitHub's expressions are meant to hold braces.
    if not plain and not name.startswith(".github/workflows/"):
        rest = re.sub(r"^chat_template: .*\n(  .*\n|\n)+", "", text, flags=re.MULTILINE)
        if re.search(r"\{\{|\{%|\{#", rest):
            found.append("Jinja left over")
    return found


@pytest.mark.parametrize("model", MODELS)
def test_every_valid_combination_renders_right_and_every_other_is_refused(
    model: str,
    render: Callable[..., Path],
    answer: Callable[..., dict[str, Any]],
    template: Path,
    models: dict[str, dict[str, Any]],
    tmp_path: Path,
) -> None:
    sources = template / "template"
    plain = {name: content for name, content in files(sources).items() if not name.endswith(".jinja")}
    assert not [name for name in files(sources) if name.endswith(".py.jinja")]
    hub_id = "owner/model" if model == "custom" else models[model]["hub_id"]
    rendered = 0
    for answers in combinations(model):
        if reason := refusal(**answers):
            with pytest.raises(ValueError, match=reason):
                answer(**answers)
            continue
        made = files(render(tmp_path / "workspace", **answers))
        wrong = {name: found for name, content in made.items() if (found := mistakes(name, content, name in plain))}
        assert wrong == {}, answers
        same = {name: content for name, content in plain.items() if wanted(name, **answers)}
        assert {name: content for name, content in made.items() if name in plain} == same, answers
        settings = yaml.load(made["finetuning/olive-config.yaml"], Loader)
        assert settings["input_model"]["model_path"] == hub_id, answers
        assert settings["passes"]["finetune"]["type"].lower() == answers["method"], answers
        rendered += 1
        for name in made:  # the folders stay: to remove them takes longer than to render
            (tmp_path / "workspace" / name).unlink()
    places = 5 * len(METHODS) + (6 if model == "demo" else 3) * (len(METHODS) - 1)
    assert rendered == len(data_sources(model)) * places


def wanted(name: str, device: str, target: str, **_: Any) -> bool:
    """Whether a plain file of the template is for these answers: the lock of the device; Azure's files for Azure."""
    unused_lock = f"setup/requirements-{'cpu' if device == 'gpu' else 'gpu'}.txt"
    for_azure = name.startswith("infra/") or name == ".github/workflows/bicep.yml"
    return name != unused_lock and (target == "azure" or not for_azure)
