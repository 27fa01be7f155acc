"""After an update, an unedited workspace equals a fresh one, for any answers.

`make test` uses sets of answers that cover every pair of values, with a model of each kind, and each other model once;
`make test-all` (EVERY_ANSWER=1) every valid combination of those that the files depend on most.
"""

from __future__ import annotations

import itertools
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from .conftest import BEFORE, NEXT, NOW, ROOT, commit, contents, git, known

MODELS = [model["id"] for model in yaml.safe_load((ROOT / "catalog/models.yml").read_text("utf-8"))["models"]]
# one of each chat template and licence; the models differ in the same few facts
KINDS = ("demo", "phi-3-mini-4k-instruct", "llama-2-7b", "mistral-7b-v0.1", "qwen3-0.6b", "gemma-3-1b-it", "custom")
GPUS = yaml.safe_load((ROOT / "catalog/azure_gpus.yml").read_text("utf-8"))["gpus"]
MORE = {
    ("model", "custom"): {"custom_model_id": "owner/model"},
    ("dataset_source", "file"): {"dataset_path": "dataset/rows.jsonl"},
    ("dataset_source", "huggingface"): {"dataset_name": "owner/rows"},
    ("dataset_format", "columns"): {"prompt_template": "Say it’s {a}", "completion_template": '"{b}"'},
}
# None: not given, so that the default decides, then and after the update.
VALUES: dict[str, list[Any]] = {
    "model": MODELS if os.environ.get("EVERY_ANSWER") == "1" else [*KINDS],
    "dataset_format": [None, "messages", "sharegpt", "alpaca", "prompt-completion", "columns", "text"],
    "method": [None, "qlora", "lora", "dora", "loha", "lokr"],
    "platform": ["linux", "windows", "macos"],
    "device": ["gpu", "cpu"],
    "target": ["local", "azure"],
    "azure_gpu": [None, *(gpu["id"] for gpu in GPUS)],
    "dataset_source": ["sample", "file", "huggingface"],
    "environment": ["auto", "conda", "venv", "none"],
    "download_model": [None, True],
    "advanced": [False, True],
    "packing": [None, True, False],
    "gradient_checkpointing": [None, True, False],
    "compute_dtype": [None, "bfloat16", "float16", "float32"],
    "quant_type": [None, "fp4"],
    "double_quant": [None, False],
    "train_on": ["responses", "all"],
    "system_prompt": [None, "It’s a \"test\": {{ no }} # 'one'"],
    "max_seq_len": [None, 128],
    "epochs": [None, 2],
    "max_steps": [None, 20],
    "learning_rate": [None, 0.00001],
    "lora_r": [None, 64],
    "lora_alpha": [None, 8],
    "lora_dropout": [None, 0.123],
    "train_batch_size": [None, 3],
    "eval_batch_size": [None, 3],
    "gradient_accumulation_steps": [None, 3],
    "eval_split": [None, 100],
    "early_stopping_patience": [None, 3],
    "seed": [None, 1],
    "data_seed": [None, 1],
}
EVERY = ("model", "device", "platform", "target", "method", "dataset_source")


def valid(row: dict[str, Any]) -> bool:
    """Whether these answers go together, as far as they are given; one that would not be asked is not valid either."""

    def differ(name: str, *values: Any) -> bool:
        return name in row and row[name] not in values

    given = {name for name, value in row.items() if value is not None}
    return not (
        (row.get("device"), row.get("platform"), row.get("target")) == ("gpu", "macos", "local")
        or ((row.get("device"), row.get("target")) == ("cpu", "azure") and differ("model", "demo"))
        or (row.get("device"), row.get("method")) == ("cpu", "qlora")
        or ("azure_gpu" in given and differ("target", "azure"))
        or (row.get("dataset_source") == "sample" and given & {"dataset_format", "eval_split"})
        or (given & {"quant_type", "double_quant"} and differ("method", "qlora"))
        or ("download_model" in given and (row.get("model") == "demo" or row.get("environment") == "none"))
    )


def pairs(row: dict[str, Any]) -> set[tuple[tuple[str, Any], ...]]:
    return set(itertools.combinations([(name, row[name]) for name in VALUES if name in row], 2))


def pairwise() -> list[dict[str, Any]]:
    """Return rows in which every two values meet that go together: each row takes, value by value, what is new most."""
    every = itertools.combinations(VALUES, 2)
    left = {
        ((one, first), (other, second))
        for one, other in every
        for first, second in itertools.product(VALUES[one], VALUES[other])
        if valid({one: first, other: second})
    }
    rows = []
    while left:
        row = dict(min(left, key=repr))
        left.discard(tuple(row.items()))
        for name in [name for name in VALUES if name not in row]:
            fits = [value for value in VALUES[name] if completes(row | {name: value})]
            if not fits:
                break
            row[name] = max(fits, key=lambda value: sum(pair in left for pair in new_pairs(row, name, value)))
        else:
            rows.append({name: row[name] for name in VALUES})
            left -= pairs(row)
    return rows


def new_pairs(row: dict[str, Any], name: str, value: Any) -> Iterator[tuple[tuple[str, Any], ...]]:
    order = list(VALUES)
    for other, chosen in row.items():
        pair = ((other, chosen), (name, value))
        yield pair if order.index(other) < order.index(name) else pair[::-1]


# What decides whether the others can be answered; a row is of use only while these can still be completed.
DECIDING = ("model", "device", "platform", "target", "method", "dataset_source", "environment")


def completes(row: dict[str, Any]) -> bool:
    """Whether a row is valid and can still be filled."""
    if not valid(row):
        return False
    name = next((name for name in DECIDING if name not in row), None)
    return name is None or any(completes(row | {name: value}) for value in VALUES[name])


def answers_of(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row as answers: what is not given left out, what a value makes necessary added."""
    answers = {name: value for name, value in row.items() if value is not None}
    for name, value in row.items():
        answers |= MORE.get((name, value), {})
    return answers


def combinations() -> list[dict[str, Any]]:
    if os.environ.get("EVERY_ANSWER") != "1":
        return [*pairwise(), *({"model": model} for model in MODELS if model not in KINDS)]
    rows = (dict(zip(EVERY, values, strict=True)) for values in itertools.product(*(VALUES[name] for name in EVERY)))
    return [row for row in rows if valid(row)]


SETS = combinations()
SHARES = 8  # a test each: enough for two processes to share them evenly


def test_every_valid_pair_of_values_is_covered() -> None:
    met = set[Any]().union(*map(pairs, pairwise()))
    for one, other in itertools.combinations(VALUES, 2):
        for first, second in itertools.product(VALUES[one], VALUES[other]):
            if completes({one: first, other: second}):
                assert ((one, first), (other, second)) in met


@pytest.mark.parametrize("before", BEFORE)
@pytest.mark.parametrize("share", range(SHARES))
def test_an_update_equals_a_fresh_render(
    before: str, share: int, releases: Path, copy: Callable[..., Path], update: Callable[..., Path], tmp_path: Path
) -> None:
    catalogue = yaml.safe_load(git(releases, "show", f"{known(releases, before)}:catalog/models.yml"))["models"]
    had = {model["id"] for model in catalogue}
    # each set from one of the releases; from all of them in `make test-all`
    first, step = (0, 1) if os.environ.get("EVERY_ANSWER") == "1" else (BEFORE.index(before), len(BEFORE))
    for number, row in enumerate(SETS[share::SHARES][first::step]):
        answers = answers_of(row)
        # Every eighth goes on to the release after this one. A model that came later starts with this one.
        tags = [before, NOW, NEXT[0]] if number % 8 == 0 else [before, NOW]
        if answers["model"] not in had:
            tags = [NOW, NEXT[0]]
        workspace = copy(tmp_path / "old" / "tone", tags[0], **answers)
        commit(workspace, "As copied")
        for tag in tags[1:]:
            update(workspace, tag)
            fresh = copy(tmp_path / "fresh" / "tone", tag, **answers)
            assert contents(workspace) == contents(fresh), answers
            commit(workspace, tag)
            shutil.rmtree(fresh)
        shutil.rmtree(workspace)
