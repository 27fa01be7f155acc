"""Compare an exported model's answers with those of base model and adapter: the check that every export must pass."""

from __future__ import annotations

import gc
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from transformers import LogitsProcessor, LogitsProcessorList

from exporting.tuned_model import compared_rows, with_adapter
from preparing.chat_template import ends_of_answer
from preparing.problems import short
from preparing.tokenised import tokenise_rows
from preparing.tokens import last_answer, load_tokenizer, tokenise
from preparing.workspace import ROOT
from reporting.evaluate import computing_in, decode, four_bits, load_base, set_greedy
from reporting.run_record import RunRecord
from settings.config_file import ConfigError

LONGEST = 256  # tokens of an answer that are compared
TEXT = 64  # the same, for plain text, which goes on from its first half
BATCH = 16
CLOSE = 0.5  # a token is a close call if the model finds it at least half as likely as the likeliest


@dataclass
class Answers:
    """The greedy answers of a model."""

    tokens: list[list[int]] = field(default_factory=list)  # of each answer, with its end
    first: list[Any] = field(default_factory=list)  # the probabilities (vocabulary) of each answer's first token
    close: list[list[set[int]]] = field(default_factory=list)  # for each token, those that were close calls


@dataclass(frozen=True)
class Reference:
    """The questions, and what base model and adapter answer."""

    tokenizer: Any
    prompts: list[list[int]]
    limit: int  # tokens of an answer
    answers: Answers


def ask_base_and_adapter(run: RunRecord, base: Path) -> Reference:
    """Let base model and adapter answer held-out rows, with unquantised weights. Raises ConfigError and DataError."""
    tokenizer = load_tokenizer(str(ROOT / run["adapter"]), run.get("date"))
    prompts, limit = questions(tokenizer, mixed(compared_rows(run)), run.get("thinking", False))
    model = with_adapter(load_base(str(base), run["dtype"]), run)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    prompts = [prompt[-max(context - limit, 1) :] for prompt in prompts] if context else prompts
    set_greedy(model, tokenizer)
    return Reference(tokenizer, prompts, limit, answer(model, tokenizer, prompts, limit, run["dtype"]))


def mixed(rows: list[Any]) -> list[Any]:
    """Return the rows in an order in which the first of them are spread over all: a bad model is known by those."""
    return [row for start in range(BATCH) for row in rows[start::BATCH]]


def questions(tokenizer: Any, rows: list[Any], thinking: bool) -> tuple[list[list[int]], int]:
    """Return the tokens before the last answer of each row, and how long an answer may be.

    Of plain text, the prompt is the first half.
    """
    prompts, longest = [], 0
    for row in tokenise_rows(tokenizer, rows, max_bad_rows=1, thinking="on" if thinking else "off").rows:
        _, expected = last_answer(tokenizer, row, thinking)
        if expected:
            prompts.append(expected.ids[: expected.start])
            longest = max(longest, expected.end - expected.start + 8)  # as in the evaluation
        else:
            tokens = tokenise(tokenizer, row, "all")[0]["input_ids"]
            prompts.append(tokens[: (len(tokens) + 1) // 2])
            longest = max(longest, TEXT)
    return prompts, min(longest, LONGEST)


def answer(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int, dtype: str) -> Answers:
    """Answer by the model's own generation_config. `dtype` is the precision of the training."""
    answers = Answers()
    for start in range(0, len(prompts), BATCH):
        seen = Watch()
        with computing_in(dtype):
            batch = decode(
                model,
                tokenizer,
                prompts[start : start + BATCH],
                limit,
                logits_processor=LogitsProcessorList([seen]),
            )
        answers.tokens += batch
        answers.first += seen.first
        answers.close += [[step[i] for step in seen.close] for i in range(len(batch))]
    return answers


class Watch(LogitsProcessor):
    """Keeps the probabilities of the first tokens of a batch, and which tokens were close calls."""

    def __init__(self) -> None:
        self.first: list[Any] = []
        self.close: list[list[set[int]]] = []

    def __call__(self, input_ids: Any, scores: Any) -> Any:
        """Look at the logits (answers, vocabulary) of the next token; change nothing."""
        logits = scores.float()
        if not self.first:
            self.first = [*logits.softmax(-1).cpu().numpy()]
        values, tokens = logits.topk(min(8, logits.shape[-1]))
        near = (values >= values[:, :1] + math.log(CLOSE)).tolist()
        self.close.append(
            [
                {token for token, is_near in zip(*row, strict=True) if is_near}
                for row in zip(tokens.tolist(), near, strict=True)
            ]
        )
        return scores


def compare(reference: Reference, answers: Answers) -> tuple[dict[str, Any], str]:
    """Return how well a model's answers agree with the reference, and the first that does not, in words.

    The figures: `rows`, how many answers there are, of the first questions; `answers`, the share of whole answers that
    are the same, with their end; `close_calls`, the share of those that first differ at a close call, not in their
    first token, and end if the reference does; `tokens`, the share up to the first difference; `first_tokens`; and
    `difference`, the probability of an answer's first token that moved to other tokens, on average.
    """
    rows = len(answers.tokens)
    wanted, found = reference.answers.tokens[:rows], answers.tokens
    alike = [agreeing(one, other) for one, other in zip(wanted, found, strict=True)]
    same = [one == other for one, other in zip(wanted, found, strict=True)]
    close = [not same[i] and is_close(reference, i, found[i]) for i in range(rows)]
    probabilities = zip(reference.answers.first[:rows], answers.first, strict=True)
    moved = [abs(one - other).sum() / 2 for one, other in probabilities]
    figures = {
        "rows": rows,
        "answers": round(sum(same) / rows, 4),
        "close_calls": round(sum(close) / rows, 4),
        "tokens": round(sum(alike) / sum(map(len, wanted)), 4),
        "first_tokens": round(sum(place > 0 for place in alike) / rows, 4),
        "difference": round(float(sum(moved)) / rows, 4),
    }
    wrong = next((i for i in range(rows) if not same[i] and not close[i]), None)
    if wrong is None:
        return figures, ""
    text, other = (short(reference.tokenizer.decode(one[wrong]), 40) for one in (found, wanted))
    return figures, f"for example {text!r} for {other!r}"


def agreeing(one: list[int], other: list[int]) -> int:
    """Return how many tokens two answers begin with alike."""
    return len(os.path.commonprefix([one, other]))  # noqa: RUF071 (of two lists)


def is_close(reference: Reference, row: int, found: list[int]) -> bool:
    """Return whether an answer that differs from the reference first does so at a close call, and ends if that does."""
    wanted, stops = reference.answers.tokens[row], ends_of_answer(reference.tokenizer)
    place = agreeing(wanted, found)
    return (
        0 < place < min(len(wanted), len(found))
        and found[place] in reference.answers.close[row][place]
        and (found[-1] in stops or wanted[-1] not in stops)
    )


def agrees_at(reference: Reference, row: int, found: list[int]) -> bool:
    """Return whether the answer to a question counts as that of the reference."""
    return found == reference.answers.tokens[row] or is_close(reference, row, found)


def can_agree(wrong: int, rows: int, share: float) -> bool:
    """Return whether enough of so many answers agree if no more of them are wrong."""
    return agrees({"answers": 1 - wrong / rows, "close_calls": 0}, share)


def agrees(figures: Mapping[str, float], share: float) -> bool:
    """Return whether enough whole answers agree."""
    return share_of(figures) >= share - 1e-4  # the two shares are rounded


def share_of(figures: Mapping[str, float]) -> float:
    """Return the share of answers that agree; below 0 for releases before 0.4.0, which did not count them like this."""
    return figures.get("answers", -1) + figures.get("close_calls", -1)


def refusal(
    model: str, figures: Mapping[str, float], example: str, share: float, instead: str, options: str = ""
) -> ConfigError:
    """Return the error for a model that does not keep the answers; `options` are those that make it again."""
    reached = share_of(figures)
    return ConfigError(
        f"The {model} gives {reached:.1%} of {figures['rows']} answers as base and adapter do ({example}), less than "
        f"the {100 * share:g}% that are wanted, and is not published: {instead}, or if that is good enough, allow it "
        f"with {options}--agreement {math.floor(100 * reached + 1e-4) / 100:g}."
    )


def ask_folder(reference: Reference, folder: Path, dtype: str) -> Answers:
    """Let a Hugging Face folder answer the questions, by its own generation_config.json."""
    gc.collect()  # the reference's model
    model = load_base(str(folder), dtype)
    return answer(model, reference.tokenizer, reference.prompts, reference.limit, dtype)


def four_bit_agreement(reference: Reference, run: RunRecord, base: Path) -> dict[str, Any] | None:
    """Return how the answers on QLoRA's 4-bit base, as trained, agree with the reference; None without bitsandbytes."""
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        return None
    quantization = run.get("quantization") or {
        name: run["config"]["adapter"][name] for name in ("quant_type", "double_quant", "compute_dtype")
    }
    model = with_adapter(load_base(str(base), run["dtype"], four_bits(**quantization)), run)
    set_greedy(model, reference.tokenizer)
    asked = (reference.tokenizer, reference.prompts, reference.limit, run["dtype"])
    return compare(reference, answer(model, *asked))[0]
