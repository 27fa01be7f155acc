"""How many tokens the rows have, and how many are labels: counted, or estimated if no tokenizer is available."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import yaml

from planning.model_facts import Model
from planning.row_lengths import Lengths
from preparing.dataset import chat_rows
from preparing.tokenised import Tokenised, tokenise_rows
from preparing.tokens import IGNORED, Example, load_tokenizer, with_system
from preparing.turns import Message
from preparing.workspace import MODEL_FACTS, SAMPLE
from settings.run_settings import TokenSettings
from training.tiny_model import build_tokenizer

SAMPLED = 2000  # rows that the check tokenises: more would take longer and add little
CHARACTERS = 4  # per token, without a tokenizer: English text in the vocabularies of the catalogue
MARKS = 6  # tokens that a chat template adds to a turn


@dataclass(frozen=True)
class Tokens(Lengths):
    """The examples of a part before max_seq_len cuts them; a row can have several."""

    rows: int  # of the part, without those that the chat template refuses
    sampled: int  # of which this many were tokenised
    estimated: bool  # from the number of characters

    def examples(self, kept: int) -> int:
        """Return how many examples the whole part has if `kept` of these are trained on."""
        return round(kept * self.rows / max(self.sampled, 1))

    def trained_on(self, longest: int) -> Lengths:
        """Return the lengths that the training sees, as many as the whole part has."""
        return Lengths(self.cut(longest).masks * max(1, round(self.rows / max(self.sampled, 1))))


def count(settings: TokenSettings, rows: list[Any], model: Model) -> Tokens:
    """Count the tokens and labels of the rows; if there are many, of an evenly spaced sample. Raises DataError."""
    chosen = rows[:: -(-len(rows) // SAMPLED) or 1]
    if not model.folder and not model.is_demo:
        masks = [guess(with_system(row, settings.system_prompt), settings.train_on) for row in chosen]
        return Tokens(masks, len(rows), len(chosen), estimated=True)
    tokenizer = load_tokenizer(model.folder) if model.folder else demo_tokenizer()
    found = tokenise_rows(tokenizer, chosen, **vars(settings))
    return replace(tokens_of(found), rows=round(len(rows) * len(found.rows) / len(chosen)))


def tokens_of(found: Tokenised) -> Tokens:
    """Return the tokens of rows that are tokenised already."""
    masks = [mask_of(one) for row in found.whole for one in row]
    return Tokens(masks, len(found.rows), len(found.rows), estimated=False)


def mask_of(one: Example) -> bytes:
    """Return which tokens of an example are labels."""
    return bytes(label != IGNORED for label in one["labels"])


def demo_tokenizer() -> Any:
    """Build the tokenizer of the demo model; building the model would take longer."""
    facts = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))
    return build_tokenizer(facts, chat_rows("train", train_file=str(SAMPLE), held_out_file=str(SAMPLE)))


def guess(row: list[Message], train_on: str) -> bytes:
    """Estimate a row's tokens and labels from its length in characters (UTF-8 bytes)."""
    mask = b"\0"
    for turn in row:
        length = int(len((turn["content"] + turn.get("reasoning_content", "")).encode()) / CHARACTERS)
        learnt = train_on == "all" or (turn["role"] == "assistant" and turn.get("learn", True))
        mask += bytes(MARKS - 1) + bytes([learnt]) * (length + 1)
    return mask
