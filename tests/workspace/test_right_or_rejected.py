"""Rows that a chat template refuses, thoughts, and rows of Arrow: learned correctly, or rejected with the reason."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from test_labels import FAMILIES, SYSTEM
from test_plausible_rows import DROPS, THINKS

ASKED, ANSWERED = {"role": "user", "content": "How is the weather?"}, {"role": "assistant", "content": "It rains."}
ROW = [ASKED, ANSWERED]
STRICT = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate user/assistant') }}{% endif %}<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""


@pytest.fixture(scope="module")
def tokenizer(workspace: Path) -> Callable[[str], Any]:
    """Return what makes a tiny ChatML tokenizer with a chat template."""
    from preparing.dataset import chat_rows
    from training import tiny_model

    rows = chat_rows("train", str(workspace / "dataset" / "sample-heldout.jsonl"), "unused")
    return lambda template: tiny_model.build_tokenizer({**FAMILIES["chatml"], "chat_template": template}, rows)


def rows_of(path: Path, count: int, odd: list[Any]) -> Any:
    """Write a file of usual rows with some odd ones at its end, and read it."""
    from preparing.dataset import chat_rows

    rows = [[{"role": "user", "content": f"Question {i}"}, ANSWERED] for i in range(count)]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in [*rows, *odd]), encoding="utf-8")
    return chat_rows("train", train_file=str(path), held_out_file="unused", max_bad_rows=1)


def test_rows_that_the_chat_template_refuses_are_rejected_up_to_the_share(
    tokenizer: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from preparing.problems import DataError
    from preparing.tokenised import list_refused, tokenise_rows

    path = tmp_path / "rows.jsonl"
    rows = rows_of(path, 78, [[ASKED, *ROW], [SYSTEM, *ROW]])
    found = tokenise_rows(tokenizer(STRICT), rows, max_bad_rows=0.05)
    assert (len(found.rows), len(found.examples)) == (78, 78)
    said = f"2 of 80 rows were rejected by the model's chat template, the first: {path}, line 79: the model's chat "
    said += "template does not take this row (Conversation roles must alternate user/assistant)"
    assert said in capsys.readouterr().out
    list_refused(found.refused, rows)
    listed = [json.loads(line) for line in (tmp_path / "rows.rejected.jsonl").read_text().splitlines()]
    assert [row["line"] for row in listed] == [79, 80]
    with pytest.raises(DataError, match=r"line 79: .* In all, 2 of 80 rows cannot be used \(max_bad_rows"):
        tokenise_rows(tokenizer(STRICT), rows, max_bad_rows=0.02)


def test_a_system_prompt_that_the_template_refuses_or_drops_is_named_as_the_setting(
    tokenizer: Any, tmp_path: Path
) -> None:
    from preparing.problems import DataError
    from preparing.tokenised import tokenise_rows

    rows = rows_of(tmp_path / "rows.jsonl", 10, [])
    for template, words in ((STRICT, "does not take it (Conversation roles must"), (DROPS, "leaves it out")):
        with pytest.raises(DataError) as raised:
            tokenise_rows(tokenizer(template), rows, system_prompt="Be kind.")
        assert str(raised.value).startswith(f"system_prompt: the model's chat template {words}")
        assert "set system_prompt: null in olive-config.yaml" in str(raised.value)
        assert len(tokenise_rows(tokenizer(template), rows).rows) == 10


@pytest.mark.parametrize("role", ["system", "tool"])
@pytest.mark.parametrize("content", ["It rains.", "user", "The weather station says that it is 17 degrees in Oslo."])
def test_a_turn_that_the_template_leaves_out_rejects_the_row(tokenizer: Any, role: str, content: str) -> None:
    from preparing.problems import DataError
    from preparing.tokens import tokenise

    turns = [*ROW, {"role": role, "content": content}, ASKED, ANSWERED]
    with pytest.raises(DataError, match=rf"the model's chat template leaves out turn 3 \({role}\)"):
        tokenise(tokenizer(DROPS), turns)


def test_a_part_of_a_turn_that_the_template_leaves_out_rejects_the_row(tokenizer: Any) -> None:
    from preparing.problems import DataError
    from preparing.tokens import tokenise

    first_line = DROPS.replace("{{ message.content }}", "{{ message.content.splitlines()[0] }}")
    assert tokenise(tokenizer(first_line), ROW)
    with pytest.raises(DataError, match=r"leaves out turn 1 \(user\), or a part of it"):
        tokenise(tokenizer(first_line), [ASKED | {"content": "How is the weather?\nIn Oslo, I mean."}, ANSWERED])


# ---- thoughts


@pytest.mark.parametrize("form", ["content", "key"])
@pytest.mark.parametrize("template", ["thinks", "chatml"])
@pytest.mark.parametrize("thinking", ["auto", "on", "off"])
def test_thoughts_are_learned_as_the_template_writes_them_or_left_out_with_a_note(
    tokenizer: Any, form: str, template: str, thinking: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from preparing import conversations
    from preparing.tokenised import tokenise_rows
    from preparing.tokens import IGNORED

    conversations.print_once.cache_clear()
    model = tokenizer(THINKS if template == "thinks" else FAMILIES["chatml"]["template"])
    written = "<think>\nClouds.\n</think>\n\nIt rains."
    answer = ANSWERED | ({"content": written} if form == "content" else {"reasoning_content": "Clouds."})
    found = tokenise_rows(model, [[ASKED, answer], ROW], thinking=thinking)
    learnt = [model.decode([label for label in one["labels"] if label != IGNORED]) for one in found.examples]
    if thinking == "off":
        assert learnt == ["It rains.<|im_end|>"] * 2
        assert "1 of 2 rows have thoughts, which are left out (thinking: off)." in capsys.readouterr().out
    else:
        empty = "<think>\n\n</think>\n\n" if template == "thinks" else ""
        assert learnt == [f"{written}<|im_end|>", f"{empty}It rains.<|im_end|>"]


def test_the_thoughts_of_the_training_rows_decide_for_both_parts_and_for_the_chat(invoke: Any, workspace: Path) -> None:
    from planning.plan import as_the_rows_are
    from settings.run_settings import read_settings

    settings = read_settings()
    thoughtful = [ASKED, ANSWERED | {"reasoning_content": "Clouds."}]
    unlearnt = [ASKED, thoughtful[1] | {"learn": False}, *ROW]
    for rows, expected in (([ROW], "off"), ([ROW, thoughtful], "on"), ([unlearnt], "off")):
        decided = as_the_rows_are(settings, rows)  # type: ignore[arg-type]
        assert {part.tokens.thinking for part in decided.data.values()} == {expected}
    file = workspace / "finetuning" / "olive-config.yaml"
    text = file.read_text(encoding="utf-8")
    try:
        for written, expected in (("on", "on"), ("off", "off"), ('"on"', "on"), ("auto", "auto")):
            file.write_text(text.replace("thinking: auto", f"thinking: {written}"), encoding="utf-8")
            assert {part.tokens.thinking for part in read_settings().data.values()} == {expected}
    finally:
        file.write_text(text, encoding="utf-8")
    # YAML 1.1 reads on as true
    run = invoke("--check", "--json", edit=lambda text: text.replace("thinking: auto", "thinking: on"))
    assert run.status == 0, run.err
    run = invoke("--check", edit=lambda text: text.replace("thinking: auto", "thinking: yes please"))
    assert "thinking is 'yes please': choose one of auto, " in run.err


# ---- Arrow


def test_rows_of_parquet_a_saved_dataset_and_json_lines_give_the_same_messages(workspace: Path, tmp_path: Path) -> None:
    import datasets

    from preparing.dataset import chat_rows

    def row(**arguments: Any) -> Any:
        call = {"type": "function", "function": {"name": "weather", "arguments": arguments}}
        return [
            ASKED,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": "3"},
            ANSWERED,
        ]

    values = [
        {"messages": one} for one in (ROW, row(city="Oslo"), row(unit="C", at={"hour": 3}), row(at={"zone": "Z"}))
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, values)))
    saved = datasets.Dataset.from_list(values)
    (tmp_path / "odd [1]*").mkdir()
    saved.to_parquet(str(tmp_path / "odd [1]*" / "rows.parquet"))
    saved.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(str(tmp_path / "parts"))
    assert saved[1]["messages"][1]["tool_calls"][0]["function"]["arguments"]["unit"] is None, "Arrow fills nothing in"

    def read(name: str, **options: Any) -> Any:
        return [list(one) for one in chat_rows("train", str(tmp_path / name), "unused", **options)]

    expected = read("rows.jsonl")
    assert '"arguments": {"city": "Oslo"}' in expected[1][1]["content"]
    assert read("odd [1]*/rows.parquet") == read("odd [1]*") == read("saved") == read("parts") == expected
    assert read("parts", dataset_split="test") == expected[:1]
    with pytest.raises(sys.modules["preparing.problems"].DataError, match=r"has no split dev: .* one of train, test"):
        read("parts", dataset_split="dev")


# ---- lengths


def tokens_of_lengths(*rows: tuple[int, int]) -> Any:
    """Return tokens of rows with these lengths, each with one label at a place."""
    from planning.token_counts import Tokens

    masks = [bytes(first - 1) + b"\1" + bytes(length - first) for length, first in rows]
    return Tokens(masks, len(rows), len(rows), estimated=False)


def test_the_advised_length_is_enough_for_both_parts_and_within_the_models_context(workspace: Path) -> None:
    from planning.fit import cut_answers
    from settings.run_settings import read_settings

    settings = read_settings()
    parts = settings.data
    counted = {
        "train": tokens_of_lengths(*[(600, 517)] * 10),
        "held_out": tokens_of_lengths(*[(700, 605)] * 10),
    }

    def said(longest: int, context: int | None) -> str | None:
        cut = {name: replace(part, tokens=replace(part.tokens, max_seq_len=longest)) for name, part in parts.items()}
        return cut_answers(counted, replace(settings, data=cut), context)

    cut = "max_seq_len 256 cuts off every answer of 10 in 10 rows, and max_bad_rows allows 0: "
    assert said(256, 4096) == f"{cut}set max_seq_len: 605 or more in olive-config.yaml."
    assert said(605, 4096) is None
    assert said(604, None) is not None
    assert said(256, 512) == (
        f"{cut}the model reads 512 tokens, and 20 rows have no answer before that: shorten or drop these rows, or "
        "raise max_bad_rows in olive-config.yaml."
    )
    assert said(517, 512) == (
        "max_seq_len 517 is more than the 512 tokens that the model reads: set max_seq_len: 512 in olive-config.yaml."
    )


def test_an_answer_in_the_middle_of_a_long_row_is_not_counted_as_lost(workspace: Path) -> None:
    from planning.fit import cut_answers
    from settings.run_settings import read_settings

    settings = read_settings()  # with max_seq_len 256
    rows = tokens_of_lengths(*[(1000, 100)] * 10)
    assert cut_answers({"train": rows, "held_out": rows}, settings, None) is None
    assert rows.cut(256).labels == [1] * 10
