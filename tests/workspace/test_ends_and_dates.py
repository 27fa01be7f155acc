"""What a chat template decides besides the text: the token that ends an answer, and the date that it writes."""

from __future__ import annotations

import copy
import datetime
import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Run
from test_labels import FAMILIES

# Added tokens that are text, as in these models' tokenizer.json ("special": false)
TEXT = {
    "gemma": ["\n" * count for count in range(1, 32)] + ["\t", "\t\t", "▁▁", "<h1>", "</h1>", "<i>", "</i>"],
    "phi-2": [" " * count for count in range(2, 32)] + ["\t" * count for count in range(2, 10)],
}
PIECES = ("joy", "It rains.", "<h1>title</h1>", "def f():", "    return 1", "\tx")
ENDS = ("", "\n", "\n\n", "  ", "\t\t", " \n")


@pytest.fixture(scope="module")
def tokenizers(workspace: Path) -> dict[tuple[str, str], Any]:
    """A small tokenizer of each family, with the added tokens of each of the two models."""
    from tokenizers import AddedToken

    from preparing.dataset import chat_rows
    from training.tiny_model import build_tokenizer

    rows = chat_rows("train", str(workspace / "dataset" / "sample-heldout.jsonl"), "unused")
    made = {}
    for family, facts in FAMILIES.items():
        for kind, texts in TEXT.items():
            tokenizer = build_tokenizer({**facts, "chat_template": facts["template"]}, rows)
            tokenizer.add_tokens([AddedToken(text, special=False, normalized=False) for text in texts])
            made[family, kind] = tokenizer
    return made


@pytest.mark.parametrize("kind", TEXT)
@pytest.mark.parametrize("family", FAMILIES)
def test_added_tokens_that_are_text_end_nothing(tokenizers: dict[tuple[str, str], Any], family: str, kind: str) -> None:
    from preparing.chat_template import ends_of_answer
    from preparing.tokens import last_answer

    tokenizer, rng = tokenizers[family, kind], random.Random(f"{family} {kind}")
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family]["end_of_turn"])
    stops = ends_of_answer(tokenizer)
    assert end in stops and {*stops} <= {end, tokenizer.eos_token_id}
    for _ in range(20):
        said = rng.choice(["\n", "\n\n"]).join(rng.choices(PIECES, k=rng.randint(1, 3))) + rng.choice(ENDS)
        row: Any = [{"role": "user", "content": "Say it."}, {"role": "assistant", "content": said}]
        _, answer = last_answer(tokenizer, row, thinking=False)
        assert answer
        learnt = answer.ids[answer.start : answer.end]
        # a model that gives the whole answer, and stops at the first of its stops, stops at the end and not before
        assert [token in stops for token in learnt] == [False] * (len(learnt) - 1) + [True], said
        assert tokenizer.decode(learnt[:-1]).strip() == said.strip()


# ---- the date

DATED = "{{- 'Today: ' + strftime_now('%d %b %Y') + '\n' -}}"
CONVERSATION: Any = [{"role": "user", "content": "joy?"}, {"role": "assistant", "content": "joy"}]


def test_a_template_writes_the_date_of_the_run(tokenizers: dict[tuple[str, str], Any]) -> None:
    from preparing.tokens import tokenise

    tokenizer = copy.copy(tokenizers["chatml", "gemma"])
    tokenizer.chat_template = DATED + FAMILIES["chatml"]["template"]
    tokenizer.date = datetime.date(2024, 2, 29)
    (example,) = tokenise(tokenizer, CONVERSATION)
    assert tokenizer.decode(example["input_ids"]).startswith("Today: 29 Feb 2024\n")
    tokenizer.date = None
    (example,) = tokenise(tokenizer, CONVERSATION)
    assert "29 Feb 2024" not in tokenizer.decode(example["input_ids"])


@pytest.fixture
def dated(workspace: Path, invoke: Callable[..., Run]) -> Any:
    """A copy of the demo whose template writes the date, in models/dated; afterwards it is gone."""
    assert invoke("--check").status == 0  # builds the demo's tokenizer
    from planning.model_facts import base_model
    from settings.run_settings import read_settings

    base = base_model(read_settings()).folder
    folder = workspace / "models" / "dated"
    shutil.copytree(base, folder)
    template = folder / "chat_template.jinja"
    template.write_text(DATED + template.read_text(encoding="utf-8"), encoding="utf-8")
    yield "models/dated"
    shutil.rmtree(folder)
    shutil.rmtree(workspace / "models" / "checkpoints", ignore_errors=True)


def test_a_run_that_resumes_on_another_day_has_the_same_tokens(
    invoke: Callable[..., Run], dated: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from reporting import run_record
    from training import train

    settings = {"model_path": dated, "max_rows": 40, "max_steps": 4, "warmup_steps": 0}
    seen: list[Any] = []
    trained = train.train

    def killed(given: Any, tokens: Any, folder: Path, note: Any) -> Any:
        seen.append(tokens["train"])
        raise KeyboardInterrupt

    class Tomorrow(datetime.datetime):
        @classmethod
        def now(cls, zone: Any = None) -> Any:
            return datetime.datetime.now(zone) + datetime.timedelta(days=1)

    def goes_on(given: Any, tokens: Any, folder: Path, note: Any) -> Any:
        seen.append(tokens["train"])
        return trained(given, tokens, folder, note)

    today = datetime.datetime.now().date()
    monkeypatch.setattr(train, "train", killed)
    assert invoke("--fresh", settings=settings).status == 130
    monkeypatch.setattr(run_record, "datetime", Tomorrow)
    monkeypatch.setattr(train, "train", goes_on)
    run = invoke(settings=settings)
    assert run.status == 0, run.err
    assert seen[0] == seen[1]
    assert run.json["date"] == today.isoformat()
    # a run that starts over has its own date
    monkeypatch.setattr(train, "train", killed)
    invoke("--fresh", settings=settings)
    assert seen[2] != seen[0]
    assert json.loads(next((run_record.ROOT / "models/checkpoints").glob("*/sessions.json")).read_text())
