"""VS Code's YAML extension finds the schema next to olive-config.yaml, which accepts the file of every answer."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
METHODS = ("lora", "qlora", "dora", "loha", "lokr")
SOURCES: dict[str, dict[str, Any]] = {
    "sample": {},
    "file": {"dataset_path": "dataset/rows.jsonl", "eval_split": 100, "dataset_format": "columns"},
    "huggingface": {"dataset_name": "owner/rows", "system_prompt": "Be brief.", "gradient_checkpointing": True},
}
MODELS = {"cpu": "demo", "gpu": "qwen3-0.6b"}


@pytest.fixture(scope="module")
def complaint() -> Callable[[Any], str | None]:
    """Return a function that says what the schema has against the content of a file."""
    sys.path.append(str(ROOT / ".cache" / "fastjsonschema"))
    import fastjsonschema

    schema = json.loads((ROOT / "template/finetuning/olive-config.schema.json").read_text(encoding="utf-8"))
    check = fastjsonschema.compile(schema, use_default=False)

    def say(content: Any) -> str | None:
        try:
            check(content)
        except fastjsonschema.JsonSchemaValueException as error:
            return str(error)
        return None

    return say


@pytest.mark.parametrize(
    ("method", "device", "source"),
    [case for case in product(METHODS, MODELS, SOURCES) if case[:2] != ("qlora", "cpu")],
)
def test_the_schema_accepts_the_file_of_every_answer(
    render: Callable[..., Path],
    complaint: Callable[[Any], str | None],
    tmp_path: Path,
    method: str,
    device: str,
    source: str,
) -> None:
    answers = {"method": method, "device": device, "dataset_source": source, "model": MODELS[device]}
    folder = render(tmp_path / "workspace", **answers, **SOURCES[source])
    text = (folder / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8")
    content = yaml.safe_load(text)
    assert complaint(content) is None
    content["passes"]["finetune"]["lora_r"] = 16
    assert complaint(content)


def test_the_file_names_the_schema_beside_it_and_the_extension_is_recommended(
    render: Callable[..., Path], tmp_path: Path
) -> None:
    folder = render(tmp_path / "workspace")
    first = (folder / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8").splitlines()[0]
    name = first.removeprefix("# yaml-language-server: $schema=")
    assert json.loads((folder / "finetuning" / name).read_text(encoding="utf-8"))["type"] == "object"
    assert "redhat.vscode-yaml" in (folder / ".vscode" / "extensions.json").read_text(encoding="utf-8")
