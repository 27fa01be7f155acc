"""Which tokens of a conversation are learned in every template family; a chat is tokenised as in training."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

FAMILIES = yaml.safe_load((REPOSITORY / "catalog" / "chat_templates.yml").read_text(encoding="utf-8"))["families"]
SYSTEM = {"role": "system", "content": "Be kind."}
TURNS = [
    {"role": "user", "content": "Hello you"},
    {"role": "assistant", "content": "I am glad."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "joy\n\nmore  of it"},
]
TOOL = {"role": "tool", "content": "17 degrees"}


@pytest.fixture(scope="module")
def tokens(workspace: Path) -> Any:
    from preparing import tokens

    return tokens


@pytest.fixture(scope="module")
def tokenizers(workspace: Path) -> dict[str, Any]:
    """A tiny tokenizer of each family, with its special tokens and its template."""
    from preparing.dataset import chat_rows
    from training import tiny_model

    rows = chat_rows("train", str(workspace / "dataset" / "sample-heldout.jsonl"), "unused")
    return {
        name: tiny_model.build_tokenizer({**facts, "chat_template": facts["template"]}, rows)
        for name, facts in FAMILIES.items()
    }


@pytest.fixture(scope="module")
def serving(workspace: Path) -> Any:
    """Make what answers in a chat: the engine with the backend of torch, without a model's weights."""
    sys.path.insert(0, str(workspace / "inference"))
    try:
        import engine
        import torch_backend
        from chat_template import ChatTemplate
    finally:
        sys.path.pop(0)

    def make(tokenizer: Any, system_prompt: str, thinking: bool = False) -> Any:
        backend: Any = object.__new__(torch_backend.TorchBackend)
        backend.tokenizer, backend.context, backend.vocabulary = tokenizer, 4096, len(tokenizer)
        source = engine.Source("models/demo", None, None, "lora", "float32", system_prompt, thinking=thinking)
        backend.render = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, source).render
        return engine.Engine(source, backend)

    return make


def only(examples: list[dict[str, list[int]]]) -> dict[str, list[int]]:
    """The single example of a conversation whose turns the template writes the same everywhere."""
    (example,) = examples
    return example


def learnt(example: dict[str, list[int]], ignored: int) -> list[list[int]]:
    """Return each run of learned tokens."""
    runs: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        if label != ignored:
            runs[-1].append(token)
        elif runs[-1]:
            runs.append([])
    return [run for run in runs if run]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("system_prompt", ["", "Be kind."])
def test_a_chat_is_tokenised_as_the_same_turns_were_in_training(
    tokens: Any, tokenizers: dict[str, Any], serving: Any, family: str, system_prompt: str
) -> None:
    tokenizer = tokenizers[family]
    trained = only(tokens.tokenise(tokenizer, tokens.with_system(TURNS, system_prompt or None), "responses"))
    engine = serving(tokenizer, system_prompt)
    # the first question, and the second with the first answer before it
    for turns, answer in zip((TURNS[:1], TURNS[:3]), learnt(trained, tokens.IGNORED), strict=True):
        asked, _ = engine.fit(turns, 64, pytest.fail)
        assert trained["input_ids"][: len(asked)] == asked
        # what comes next is learnt: the model is never asked for a token that it has not been taught
        assert trained["labels"][len(asked)] == trained["input_ids"][len(asked)] == answer[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_stops_at_the_token_that_was_learned_as_the_end(
    tokens: Any, tokenizers: dict[str, Any], serving: Any, family: str
) -> None:
    tokenizer = tokenizers[family]
    trained = only(tokens.tokenise(tokenizer, TURNS, "responses"))
    stops = serving(tokenizer, "").backend.end_of_answer(tokenizer.eos_token_id)
    for answer in learnt(trained, tokens.IGNORED):
        assert answer[-1] in stops
        assert not set(answer[:-1]) & set(stops)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_system_text_is_read_and_never_learned(tokens: Any, tokenizers: dict[str, Any], family: str) -> None:
    tokenizer = tokenizers[family]
    without, with_it = (only(tokens.tokenise(tokenizer, turns, "responses")) for turns in (TURNS, [SYSTEM, *TURNS]))
    assert "Be kind." in tokenizer.decode(with_it["input_ids"])
    assert learnt(with_it, tokens.IGNORED) == learnt(without, tokens.IGNORED)


@pytest.mark.parametrize("family", FAMILIES)
def test_tool_results_are_never_learned(tokens: Any, tokenizers: dict[str, Any], family: str) -> None:
    tokenizer = tokenizers[family]
    turns = [*TURNS[:2], TOOL, TURNS[3]]
    example = only(tokens.tokenise(tokenizer, turns, "responses"))
    texts = [tokenizer.decode(run) for run in learnt(example, tokens.IGNORED)]
    assert "17 degrees" in tokenizer.decode(example["input_ids"])
    assert "17 degrees" not in "".join(texts)
    assert len(texts) == 2 and "I am glad." in texts[0] and "more  of it" in texts[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_with_train_on_all_every_token_is_learned_including_the_ends_of_turns(
    tokens: Any, tokenizers: dict[str, Any], family: str
) -> None:
    tokenizer = tokenizers[family]
    example = only(tokens.tokenise(tokenizer, [SYSTEM, *TURNS], "all"))
    assert example["labels"] == example["input_ids"]
    end = tokenizer.convert_tokens_to_ids(FAMILIES[family]["end_of_turn"])
    assert example["labels"].count(end) >= 2


@pytest.mark.parametrize("family", FAMILIES)
def test_with_train_on_all_an_answer_that_is_marked_as_not_to_be_learnt_is_read_only(
    tokens: Any, tokenizers: dict[str, Any], family: str
) -> None:
    tokenizer = tokenizers[family]
    marked: list[Any] = [TURNS[0], TURNS[1] | {"learn": False}, *TURNS[2:]]
    example = only(tokens.tokenise(tokenizer, marked, "all"))
    whole = only(tokens.tokenise(tokenizer, TURNS, "all"))
    assert example["input_ids"] == whole["input_ids"]
    pairs = zip(example["input_ids"], example["labels"], strict=True)
    left_out = [i for i, (token, label) in enumerate(pairs) if token != label]
    assert left_out == list(range(left_out[0], left_out[-1] + 1))
    said = tokenizer.decode([example["input_ids"][i] for i in left_out])
    assert said.replace(FAMILIES[family]["end_of_turn"], "").strip() == "I am glad."


def test_a_turn_that_a_template_refuses_is_one_sentence_in_training_and_in_a_chat(
    tokens: Any, tokenizers: dict[str, Any], serving: Any
) -> None:
    import copy

    import engine

    tokenizer = copy.copy(tokenizers["chatml"])
    # as the template that comes with Mistral 7B does it
    tokenizer.chat_template = (
        "{% for message in messages %}{% if message.role == 'system' %}{{ raise_exception('Only user and assistant') }}"
        "{% endif %}{{ message.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(tokens.DataError, match=r"does not take this row \(Only user and assistant\)"):
        tokens.tokenise(tokenizer, [SYSTEM, *TURNS], "responses")
    with pytest.raises(engine.ChatError, match="does not take this conversation: Only user and assistant"):
        serving(tokenizer, "Be kind.").fit(TURNS[:1], 64, pytest.fail)
    # and one that a template leaves out
    tokenizer.chat_template = (
        "{% for message in messages if message.role != 'system' %}{{ message.content }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(engine.ChatError, match="chat template leaves out the system prompt, so the model would not"):
        serving(tokenizer, "Be kind.").fit(TURNS[:1], 64, pytest.fail)
    assert serving(tokenizer, "").fit(TURNS, 64, pytest.fail)
