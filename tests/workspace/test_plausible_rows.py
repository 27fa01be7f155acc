"""Valid rows with unusual content, in every template family: the intended part is learned, or the row is rejected.

A conversation is drawn first: turns with their texts, and whether each is learned. Then it is written as a row in one
of the formats, with the marks, thoughts, parts, nulls and keys that other tools use. What must be learned follows from
the conversation and from a line for each family below, without any code of the workspace.

PLAUSIBLE_ROWS=5000   how many rows (150), drawn anew each time
PLAUSIBLE_SEED=7      that row alone, as a failure names it
"""

from __future__ import annotations

import json
import os
import random
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest
from conftest import inference_of
from test_labels import FAMILIES

ROWS = int(os.environ.get("PLAUSIBLE_ROWS", "150"))
SEED = os.environ.get("PLAUSIBLE_SEED")

# What a family writes around an answer, and what becomes of system texts: in a turn of its own, or before the next
# question, so that a second one takes its place and one without a question is lost.
AROUND = {
    "phi3": ("", "<|end|>"),
    "phi4": ("", "<|end|>"),
    "llama2": (" ", " </s>"),
    "llama3": ("", "<|eot_id|>"),
    "mistral": (" ", "</s>"),
    "mistral_v3": (" ", "</s>"),
    "zephyr": ("", "</s>"),
    "chatml": ("", "<|im_end|>"),
    "gemma": ("", "<end_of_turn>"),
    "gemma4": ("", "<turn|>"),
    "granite": ("", "<|end_of_text|>"),
    "plain": ("", "<|endoftext|>"),
}
BEFORE_THE_QUESTION = ("llama2", "mistral", "mistral_v3", "gemma")
# As Qwen3 writes thoughts: in the last turn always, even an empty one; in earlier turns never.
THINKS = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{% if message.role == 'assistant' -%}
{%- set thought = message.reasoning_content or '' -%}
{%- set content = message.content -%}
{%- if not thought and '</think>' in content -%}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip() -%}
{%- set content = content.split('</think>')[-1].lstrip() -%}
{%- endif -%}
{%- if loop.last -%}{{ '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif -%}
{{ content }}
{%- else -%}
{{ message.content }}
{%- endif -%}
<|im_end|>
{% endfor -%}
{%- if add_generation_prompt -%}
<|im_start|>assistant
{% if not enable_thinking -%}{{ '<think>\\n\\n</think>\\n\\n' }}{%- endif -%}
{%- endif -%}"""
# As 06-template-that-drops-roles of a public report: other roles than user and assistant are left out.
DROPS = """{%- for message in messages if message.role in ('user', 'assistant') -%}
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
{% endif -%}"""
# As DeepSeek-R1's distilled models: a chat is asked with the start of a thought, which no row has.
OPENS = """{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content.split('</think>')[-1] }}<|im_end|>
{% endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant
<think>
{% endif -%}"""
OWN = {"thinks": THINKS, "drops": DROPS, "opens": OPENS}

WORDS = (
    "joy",
    "Grüße aus Köln",
    "日本語の文",
    "a\nb",
    "  spaces  ",
    "{{ x }}",
    "user",
    "assistant",
    "🙂🙂",
    "<b>no</b>",
    "ا ب",
)
WORDS += (
    "It rains, and nobody in the town minds it.",
    "def f():\n\treturn 1\n",
    "1",
    "null",
    "<|im",
    "I think so",
    "é",
)


@dataclass
class Turn:
    """A turn as it is meant."""

    role: str
    says: str
    thought: str = ""
    learn: bool = True
    inline: bool = False  # the thought stands in the content
    call: dict[str, Any] | None = None

    @property
    def answer(self) -> str:
        """What is said after the thought."""
        if self.call is None:
            return self.says
        line = json.dumps(self.call, ensure_ascii=False)
        return f"{self.says}\n{line}" if self.says else line


def draw(rng: random.Random) -> list[Turn]:
    """Draw a conversation: mostly as usual, sometimes with odd roles, blank texts, or without an end."""
    roles = ["system"] * (rng.random() < 0.3)
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        roles += ["user"] * rng.choice([1, 1, 1, 1, 2])
        roles += rng.choice([["assistant"], ["assistant"], ["assistant"], ["assistant", "tool", "assistant"]])
    if rng.random() < 0.1:
        rng.shuffle(roles)
    if rng.random() < 0.05:
        roles.insert(rng.randrange(len(roles)), "system")
    if rng.random() < 0.05:
        roles.pop(0)
    turns = []
    for role in roles or ["assistant"]:
        says = rng.choice(["", " ", "\0", "\ud800"]) if rng.random() < 0.02 else said(rng)
        # an empty system text counts as none
        turn = Turn(role, says or " " if role == "system" else says)
        if role == "assistant":
            turn.learn = rng.random() > 0.2
            if rng.random() < 0.2:
                turn.thought, turn.inline = said(rng).strip(), rng.random() < 0.5
            elif rng.random() < 0.1:
                turn.says = rng.choice(["", turn.says])
                turn.call = {"name": "weather", "arguments": {"city": said(rng), "days": [1, {"a": 2}]}}
        turns.append(turn)
    return turns


def said(rng: random.Random) -> str:
    """Draw a text that is not blank."""
    if rng.random() < 0.01:
        return "long " * 3000
    return " ".join(rng.choice(WORDS) for _ in range(rng.choice([1, 1, 2, 5])))


def written(rng: random.Random, turns: list[Turn]) -> Any:
    """Write a conversation down as a row, in one of the formats that can say all of it."""
    style = rng.choice(["openai", "openai", "sharegpt", "parts"])
    with_nulls = rng.random() < 0.3
    mark = rng.choice(["weight", "loss", "train", "training", "loss_weight"])
    rows = []
    for turn in turns:
        content: Any = turn.says
        if turn.inline and turn.thought:
            content = f"<think>\n{turn.thought}\n</think>\n\n{content}"
        row: dict[str, Any] = {}
        if style == "sharegpt":
            row["from"] = {"user": "human", "assistant": "gpt", "tool": "observation"}.get(turn.role, turn.role)
            row["value"] = content
        else:
            row["role"] = rng.choice(["system", "developer"]) if turn.role == "system" else turn.role
            row["content"] = content
        if style == "parts":
            row["content"] = [{"type": "text", rng.choice(["text", "value"]): content}]
            if turn.thought and not turn.inline and rng.random() < 0.5:
                row["content"].insert(0, {"type": "reasoning", "value": turn.thought})
        if turn.thought and not turn.inline and not isinstance(row.get("content"), list):
            row[rng.choice(["reasoning_content", "reasoning", "thinking"])] = turn.thought
        elif turn.thought and not turn.inline and len(row["content"]) == 1:
            row["reasoning_content"] = turn.thought
        if turn.call is not None:
            given = turn.call["arguments"] | ({"unit": None} if with_nulls else {})
            arguments = json.dumps(given) if rng.random() < 0.5 else given
            row["tool_calls"] = [{"type": "function", "function": {"name": "weather", "arguments": arguments}}]
            if not turn.says and rng.random() < 0.7 and style == "openai":
                row["content"] = None
        if turn.role == "assistant" and (not turn.learn or rng.random() < 0.3):
            value = rng.choice([1, 1.0, True]) if turn.learn else rng.choice([0, 0.0, False])
            row[mark] = value
        if with_nulls:  # as Arrow fills in what other rows have
            for key in ("weight", "tool_calls", "name", "reasoning_content", "train"):
                row.setdefault(key, None)
        if rng.random() < 0.1:
            row["note"] = "not used"
        rows.append(row)
    if style == "sharegpt":
        return {"conversations": rows}
    return rng.choice([{"messages": rows}, {"messages": rows, "id": 7}, rows])


def unreadable(turns: list[Turn]) -> bool:
    """Say whether no template could help: the row is no conversation to learn from."""
    if turns[-1].role != "assistant":
        return True
    learnt = [turn for turn in turns if turn.role == "assistant" and turn.learn and turn.answer.strip()]
    blank = any(not turn.answer.strip() and turn.role != "tool" for turn in turns)  # a thought is no answer
    broken = any("\0" in turn.says or "\ud800" in turn.says for turn in turns)
    return not learnt or blank or broken


def lost(turns: list[Turn], family: str) -> bool:
    """Say whether the family's template leaves out a turn."""
    pending = False
    if family == "drops":
        return any(turn.role in ("system", "tool") and turn.says.strip() for turn in turns)
    if family in BEFORE_THE_QUESTION:
        for turn in turns:
            if turn.role == "system" and pending:
                return True
            pending = turn.role == "system" or (pending and turn.role == "assistant")
    return pending


def unlike(turns: list[Turn], family: str) -> bool:
    """Say whether the family's template may write an answer in another way than it asks for it."""
    twice = any(one.role == other.role == "assistant" for one, other in pairwise(turns))
    asked_or_thought = any(turn.role != "assistant" or turn.thought for turn in turns)
    return (family == "thinks" and twice) or (family == "opens" and asked_or_thought)


def expected(turn: Turn, family: str, thinking: bool, asked: bool) -> str:
    """Return what must be learned of a turn: what the family's template writes for it when it is the last.

    Of a turn that nobody asks for, at the start of a conversation, that is what the row has and not the template's own.
    """
    thought = f"<think>\n{turn.thought}\n</think>\n\n" if turn.thought and thinking else ""
    answer = turn.answer
    if turn.thought and not (thought and turn.inline and family != "thinks"):
        answer = answer.lstrip()
    before, after = AROUND.get(family, ("", "<|im_end|>"))
    if family == "thinks" and thinking and asked:
        thought = thought or "<think>\n\n</think>\n\n"
    elif family == "thinks" and thought:
        thought = thought.removeprefix("<think>\n")
    return f"{before if asked else ''}{thought}{answer}{after}"


@pytest.fixture(scope="module")
def tokenizers(workspace: Any) -> dict[str, Any]:
    """Return a tiny tokenizer for each family and for the templates above."""
    from preparing.dataset import chat_rows
    from training import tiny_model

    rows = chat_rows("train", str(workspace / "dataset" / "sample-heldout.jsonl"), "unused")
    found = {
        name: tiny_model.build_tokenizer({**facts, "chat_template": facts["template"]}, rows)
        for name, facts in FAMILIES.items()
    }
    for name, template in OWN.items():
        found[name] = tiny_model.build_tokenizer({**FAMILIES["chatml"], "chat_template": template}, rows)
    return found


@pytest.fixture(scope="module")
def chat(workspace: Any) -> Any:
    """Return what asks in a chat: the engine, with the backend of torch but no model."""
    with inference_of(workspace):
        import engine
        import torch_backend
        from chat_template import ChatTemplate

        def ask(tokenizer: Any, thinking: bool, messages: list[dict[str, str]]) -> list[int] | None:
            backend: Any = object.__new__(torch_backend.TorchBackend)
            backend.tokenizer, backend.context, backend.vocabulary = tokenizer, 10**6, len(tokenizer)
            source = engine.Source("models/demo", None, None, "lora", "float32", "", thinking=thinking)
            backend.render = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, source).render
            try:
                return engine.Engine(source, backend).fit(messages, 64, pytest.fail)[0]
            except engine.ChatError:
                return None

        yield ask


def judged(turns: list[Turn], row: Any, family: str, tokenizer: Any, ask: Callable[..., Any], thinking: bool) -> str:
    """Return what is wrong with the tokens of a row; else "learnt", or "rejected" if it had to be."""
    from preparing.conversations import Conversation
    from preparing.formats import to_messages
    from preparing.problems import DataError
    from preparing.tokens import IGNORED, tokenise

    try:
        messages = to_messages(row)
    except DataError as error:
        return "rejected" if unreadable(turns) else f"refused to read: {error}"
    if unreadable(turns):
        return "read, though it is no conversation"
    try:
        examples = tokenise(tokenizer, Conversation(messages, "rows.jsonl", 7), "responses", thinking)
    except DataError as error:
        named = str(error).startswith("rows.jsonl, line 7: ")
        return "rejected" if named and (lost(turns, family) or unlike(turns, family)) else f"rejected: {error}"
    if lost(turns, family):
        return "learnt, though a turn is lost"
    found = []
    for example in examples:
        pairs = [*zip(example["input_ids"], example["labels"], strict=True)]
        if any(label not in (token, IGNORED) for token, label in pairs):
            return "a label is not its token"
        start = 0
        for i in range(1, len(pairs) + 1):
            if i == len(pairs) or (pairs[i][1] == IGNORED) != (pairs[start][1] == IGNORED):
                if pairs[start][1] != IGNORED:
                    found.append((example["input_ids"][:start], [token for token, _ in pairs[start:i]]))
                start = i
    wanted = [(i, turn) for i, turn in enumerate(turns) if turn.role == "assistant" and turn.learn]
    runs = [expected(turn, family, thinking, any(one.role != "assistant" for one in turns[:i])) for i, turn in wanted]
    said = [tokenizer.decode(run) for _, run in found]
    if "".join(said) != "".join(runs):
        return f"learnt {said}, not {runs}"
    if said == runs:  # two answers in a row can be one run
        for (i, _), (prompt, _) in zip(wanted, found, strict=True):
            if any(turn.role in ("user", "tool") for turn in turns[:i]):
                history = [{"role": turn.role, "content": heard(turn, thinking)} for turn in turns[:i]]
                asked = ask(tokenizer, thinking, history)
                if asked != prompt and asked is not None:
                    return f"asked {tokenizer.decode(asked)!r}, trained {tokenizer.decode(prompt)!r}"
    return "learnt"


def heard(turn: Turn, thinking: bool) -> str:
    """Return what a turn is in a chat's history: what the model said, with the thought that it had."""
    thought = f"<think>\n{turn.thought}\n</think>\n\n" if turn.thought and thinking else ""
    answer = turn.answer if turn.inline and thinking else turn.answer.lstrip() if turn.thought else turn.answer
    return thought + answer


def test_the_intended_part_is_learned_or_the_row_is_rejected(
    tokenizers: dict[str, Any], chat: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    seeds = range(ROWS) if "PLAUSIBLE_ROWS" not in os.environ else random.SystemRandom().sample(range(2**40), ROWS)
    counts: dict[str, Counter[str]] = {family: Counter() for family in tokenizers}
    wrong = []
    for seed in [int(SEED)] if SEED else seeds:
        rng = random.Random(seed)
        turns = draw(rng)
        row = written(rng, turns)
        thinking = rng.random() < 0.5
        for family, tokenizer in tokenizers.items():
            outcome = judged(turns, row, family, tokenizer, chat, thinking)
            counts[family][outcome if outcome in ("learnt", "rejected") else "wrong"] += 1
            if outcome not in ("learnt", "rejected") and f"SEED={seed}," not in "".join(wrong):
                wrong.append(f"PLAUSIBLE_SEED={seed}, {family}, thinking {thinking}: {outcome}\n  {turns}")
    with capsys.disabled():
        print("\n" + "\n".join(f"{family}: {dict(count)}" for family, count in counts.items()))
    assert not wrong, f"{len(wrong)} wrong:\n" + "\n".join(wrong[:5])
