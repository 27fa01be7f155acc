"""The keys of a turn in the formats of OpenAI, ShareGPT and LLaMA-Factory, and which of them are used."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "template" / "finetuning"))

from preparing.formats import to_messages, unused
from preparing.problems import DataError
from preparing.thoughts import divided

ASKED, ANSWERED = {"role": "user", "content": "How?"}, {"role": "assistant", "content": "So."}


@pytest.mark.parametrize("mark", ["weight", "loss", "train", "training", "loss_weight"])
@pytest.mark.parametrize(
    ("value", "learn"), [(0, False), (0.0, False), (False, False), ("false", False), (1, True), (None, True)]
)
def test_a_mark_on_an_answer_decides_whether_it_is_learned(mark: str, value: Any, learn: bool) -> None:
    row = to_messages({"messages": [ASKED, ANSWERED | {mark: value}, ASKED, ANSWERED]})
    assert [turn.get("learn", True) for turn in row] == [True, learn, True, True]
    assert [turn["content"] for turn in row] == ["How?", "So.", "How?", "So."]


@pytest.mark.parametrize(
    ("turn", "words"),
    [
        (ANSWERED | {"weight": 0.5}, r"turn 2 has weight: 0\.5: a turn is learnt \(1, true\) or not"),
        (ANSWERED | {"loss": "maybe"}, 'turn 2 has loss: "maybe"'),
        (ANSWERED | {"weight": 1, "train": False}, "turn 2 has marks that disagree: weight, train"),
        (ANSWERED | {"weight": 0}, "its marks leave no assistant turn to learn from"),
    ],
)
def test_an_unsupported_mark_rejects_the_row(turn: Any, words: str) -> None:
    with pytest.raises(DataError, match=words):
        to_messages({"messages": [ASKED, turn]})


def test_unused_keys_within_a_turn_are_named() -> None:
    question = ASKED | {"name": "Ann", "weight": 1, "train": False, "note": None}
    answer = ANSWERED | {"refusal": "no", "weight": 1, "tool_calls": None}
    assert unused([question, answer], "auto", None, None) == {
        "messages[].name",
        "messages[].weight",
        "messages[].refusal",
    }
    part = {"type": "text", "text": "How?", "cache": 1}
    row = {"messages": [{"role": "user", "content": [part]}, ANSWERED | {"value": "Other."}], "id": 3}
    assert unused(row, "auto", None, None) == {"id", "messages[].content[].cache", "messages[].value"}


def test_parts_in_the_format_of_llama_factory_are_read() -> None:
    rows = [
        {"role": "user", "content": [{"type": "text", "value": "How"}, {"type": "text", "value": "?"}]},
        {
            "role": "assistant",
            "content": [
                {"type": "reasoning", "value": "Let me think."},
                {"type": "text", "value": "So."},
                {"type": "tool_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            ],
            "loss_weight": 1.0,
        },
    ]
    question, answer = to_messages({"messages": rows})
    assert question["content"] == "How?"
    assert answer["content"] == 'So.\n{"name": "f", "arguments": {"a": 1}}'
    assert answer["reasoning_content"] == "Let me think."
    with pytest.raises(DataError, match="has a part that is not text"):
        to_messages({"messages": [{"role": "user", "content": [{"type": "image", "value": "x.png"}]}, ANSWERED]})


def test_nulls_that_arrow_fills_in_are_left_out_of_a_call() -> None:
    def row(arguments: Any) -> Any:
        call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
        return [ASKED, {"role": "assistant", "content": None, "tool_calls": [call]}]

    given = {"city": "Oslo", "at": {"hour": 3}, "tags": ["a", None, {"b": 0, "c": False}]}
    filled = {
        "city": "Oslo",
        "unit": None,
        "at": {"hour": 3, "zone": None},
        "tags": ["a", None, {"b": 0, "c": False, "d": None}],
    }
    assert to_messages(row(filled)) == to_messages(row(given))


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_separated_from_the_answer(key: str) -> None:
    *_, answer = to_messages([ASKED, ANSWERED | {key: "Hm."}])
    assert divided(answer) == ("Hm.", "So.")


@pytest.mark.parametrize(
    ("content", "thought", "answer"),
    [
        ("<think>\nHm.\n</think>\n\nSo.", "Hm.", "So."),
        ("  <think>Hm.</think>So.", "Hm.", "So."),
        ("Hm.\n</think>\nSo.", "Hm.", "So."),  # a server's answer to a prompt that ends with <think>
        ("<think>\n\n</think>\n\nSo.", "", "So."),
        ("Write <think> and </think>.", "", "Write <think> and </think>."),
        ("<think>never closed", "", "<think>never closed"),
        ("So.", "", "So."),
    ],
)
def test_a_thought_in_the_content_is_found_at_its_start(content: str, thought: str, answer: str) -> None:
    assert divided({"role": "assistant", "content": content}) == (thought, answer)
    assert divided({"role": "user", "content": content}) == ("", content)
