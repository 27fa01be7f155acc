"""Rows → messages → tokens and labels."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

FAMILIES = yaml.safe_load((REPOSITORY / "catalog" / "chat_templates.yml").read_text(encoding="utf-8"))["families"]
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello you"},
    {"role": "assistant", "content": "I am glad."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "joy\n\nmore  of it"},
]
TONE = [{"role": "user", "content": "Phrase: Hooray!"}, {"role": "assistant", "content": "joy"}]


@pytest.fixture(scope="module")
def dataset(workspace: Path) -> Any:
    import dataset

    return dataset


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TONE, "id": 7}, TONE),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Phrase: Hooray!"}]}, TONE[1]]}, TONE),
        ({"conversations": [{"from": "human", "value": "Phrase: Hooray!"}, {"from": "gpt", "value": "joy"}]}, TONE),
        ({"instruction": "Phrase: Hooray!", "input": "", "output": "joy"}, TONE),
        (
            {"instruction": "And now?", "output": "fear", "system": "Be kind.", "history": [["Hi", "Hello"]]},
            [
                {"role": "system", "content": "Be kind."},
                {"role": "user", "content": "Hi"},
                {"role": "assistant", "content": "Hello"},
                {"role": "user", "content": "And now?"},
                {"role": "assistant", "content": "fear"},
            ],
        ),
        ({"prompt": "Phrase: Hooray!", "completion": "joy"}, TONE),
        ({"text": "joy"}, [{"role": "assistant", "content": "joy"}]),
    ],
)
def test_the_format_of_a_row_is_found_from_its_columns(dataset: Any, row: dict[str, Any], expected: Any) -> None:
    assert dataset.to_messages(row, "auto", None, None) == expected


def test_columns_are_put_into_templates_and_other_braces_stay(dataset: Any) -> None:
    row = {"phrase": "Hooray!", "tone": "joy {sic}"}
    assert dataset.to_messages(row, "columns", "Phrase: {phrase}", "{tone}") == [
        TONE[0],
        {"role": "assistant", "content": "joy {sic}"},
    ]


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"a": "x", "b": "y"}, "columns a, b fit no known format"),
        ({"messages": [TONE[0]]}, "no assistant turn with text"),
        ({"prompt": "x", "completion": ""}, "column 'completion' is missing or empty"),
        ({"messages": [{"role": "user", "content": 7}, TONE[1]]}, "not text but int"),
    ],
)
def test_a_row_that_cannot_be_learnt_from_says_why(dataset: Any, row: dict[str, Any], words: str) -> None:
    with pytest.raises(dataset.DataError, match=words):
        dataset.to_messages(row, "auto", None, None)


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "jsonl.gz"])
def test_files_of_every_kind_give_the_same_rows(dataset: Any, tmp_path: Path, ending: str) -> None:
    rows = [{"prompt": f"Phrase: {i}", "completion": "joy"} for i in range(5)]
    text = {
        "jsonl": "\n".join(json.dumps(row) for row in rows),
        "json": json.dumps(rows),
        "csv": "prompt,completion\n" + "\n".join(f"Phrase: {i},joy" for i in range(5)),
    }[ending.removesuffix(".gz")]
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(text.encode()) if ending.endswith(".gz") else text.encode())
    read = dataset.chat_rows("train", train_file=str(path), held_out_file="unused")
    assert [row[0]["content"] for row in read] == [f"Phrase: {i}" for i in range(5)]


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", ["jsonl", "csv", "jsonl.gz", "txt"])
def test_a_file_may_have_the_mark_of_its_encoding(dataset: Any, tmp_path: Path, ending: str, encoding: str) -> None:
    text = {"csv": "prompt,completion\nPhrase: ü,jöy\n", "txt": "jöy\n"}.get(
        ending, json.dumps({"prompt": "Phrase: ü", "completion": "jöy"}, ensure_ascii=False) + "\n"
    )
    raw = text.encode(encoding) if encoding == "utf-8-sig" else ("\ufeff" + text).encode(encoding)
    path = tmp_path / f"rows.{ending}"
    path.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)
    (row,) = dataset.chat_rows("train", train_file=str(path), held_out_file="unused")
    assert row[-1] == {"role": "assistant", "content": "jöy"}


def test_rows_that_stand_twice_and_held_out_rows_that_are_trained_on_are_counted(dataset: Any) -> None:
    import check

    other = [TONE[0], {"role": "assistant", "content": "fear"}]
    assert check.repeated_rows({"train": [TONE], "held_out": [other]}) == []
    doubled, leaked = check.repeated_rows({"train": [TONE, TONE, other], "held_out": [other]})
    assert "1 of 3 rows to train on stand there more than once" in doubled
    assert "1 held-out rows are trained on too" in leaked


def test_a_file_that_is_missing_or_torn_is_named(dataset: Any, tmp_path: Path) -> None:
    with pytest.raises(dataset.DataError, match=r"absent\.jsonl is not there"):
        dataset.chat_rows("train", train_file="absent.jsonl")
    torn = tmp_path / "torn.jsonl"
    torn.write_text('{"messages": [{"role": "us')
    with pytest.raises(dataset.DataError, match=r"torn\.jsonl cannot be read as json"):
        dataset.chat_rows("train", train_file=str(torn))
    (tmp_path / "rows.docx").write_text("x")
    with pytest.raises(dataset.DataError, match="unknown ending"):
        dataset.chat_rows("train", train_file=str(tmp_path / "rows.docx"))


@pytest.mark.parametrize("eval_split", [0.2, 30])
def test_held_out_rows_are_a_part_of_the_whole_and_stay_when_rows_are_added(
    dataset: Any, tmp_path: Path, eval_split: float
) -> None:
    path = tmp_path / "rows.jsonl"

    def parts(count: int) -> tuple[set[str], set[str]]:
        path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(count)))
        read = [
            dataset.chat_rows(part, train_file=str(path), eval_split=eval_split, data_seed=1)
            for part in ("train", "held_out")
        ]
        return {row[0]["content"] for row in read[0]}, {row[0]["content"] for row in read[1]}

    train, held_out = parts(150)
    assert not train & held_out
    assert len(train | held_out) == 150
    assert 15 <= len(held_out) <= 45
    if eval_split < 1:
        assert held_out == {name for name in parts(300)[1] if int(name[1:]) < 150}
    assert dataset.held_out_positions([TONE], 0.5, 1) in (set(), {0})


@pytest.fixture(scope="module")
def sample(dataset: Any, workspace: Path) -> Any:
    return dataset.chat_rows("train", str(workspace / "dataset" / "sample-train.jsonl"), "unused")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_labels_are_the_answers_with_their_end_of_turn(dataset: Any, sample: Any, family: str) -> None:
    import tiny_model

    facts = FAMILIES[family]
    tokenizer = tiny_model.build_tokenizer({**facts, "chat_template": facts["template"]}, sample)
    example = dataset.tokenise(tokenizer, CONVERSATION, "responses")
    spans: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, dataset.IGNORED)
        if label == token:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    learnt = [tokenizer.decode(span) for span in spans if span]
    end = facts["end_of_turn"]
    assert [text.removesuffix(end).strip() for text in learnt] == ["I am glad.", "joy\n\nmore  of it"]
    assert all(text.endswith(end) for text in learnt)
    everything = dataset.tokenise(tokenizer, CONVERSATION, "all")
    assert everything["labels"] == everything["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_asked_later_is_tokenised_as_what_was_trained(dataset: Any, sample: Any, family: str) -> None:
    import tiny_model

    facts = FAMILIES[family]
    tokenizer = tiny_model.build_tokenizer({**facts, "chat_template": facts["template"]}, sample)
    asked = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True, return_dict=False)
    assert dataset.tokenise(tokenizer, CONVERSATION, "responses")["input_ids"][: len(asked)] == asked


def test_a_model_that_thinks_learns_the_answer_alone_in_every_turn(dataset: Any, sample: Any) -> None:
    import tiny_model

    # as Qwen3 does it: an empty thought before the last answer only, and in the prompt when thinking is off
    template = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
    facts = {**FAMILIES["chatml"], "chat_template": template}
    tokenizer = tiny_model.build_tokenizer(facts, sample)
    labels = dataset.tokenise(tokenizer, CONVERSATION, "responses")["labels"]
    learnt = tokenizer.decode([label for label in labels if label != dataset.IGNORED])
    assert learnt == "I am glad.<|im_end|>joy\n\nmore  of it<|im_end|>"


def test_rows_that_are_too_long_are_cut_and_counted(
    dataset: Any, workspace: Path, sample: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    import tiny_model

    if not tiny_model.DEMO.is_dir():
        tiny_model.build_demo()
    capsys.readouterr()
    whole = dataset.chat_tokens(sample, str(tiny_model.DEMO), max_seq_len=256)
    assert len(whole) == len(sample), "no row is dropped because the data is short"
    assert capsys.readouterr().out == ""
    dataset.chat_tokens(sample, str(tiny_model.DEMO), max_seq_len=20)
    assert "of 800 rows are longer than max_seq_len 20 and were cut" in capsys.readouterr().out
    with pytest.raises(dataset.DataError, match="max_seq_len 4 cuts off every answer"):
        dataset.chat_tokens(sample, str(tiny_model.DEMO), max_seq_len=4)
