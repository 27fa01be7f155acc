"""How many tokens the rows have, and how many are labels: counted, or estimated if no tokenizer is available."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import yaml

from planning.model_facts import Model
from planning.row_lengths import Lengths
from preparing.dataset import chat_rows
from preparing.tokenised import Tokenised, tokenise_rows
from preparing.tokens import IGNORED, load_tokenizer, with_system
from preparing.turns import Message
from preparing.workspace import MODEL_FACTS, SAMPLE
from settings.run_settings import TokenSettings
from training.tiny_model import build_tokenizer

SAMPLED = 2000  # rows that the check tokenises: more would take longer and add little
CHARACTERS = 4  # per token, without a tokenizer: English text in the vocabularies of the catalogue
MARKS = 6  # tokens that a chat template adds to a turn


@dataclass(frozen=True)
class Tokens:
    """The tokens of a part before max_seq_len cuts its rows, and which of them are labels."""

    rows: int  # of the part, without those that the chat template refuses
    sampled: int  # of which this many were tokenised
    masks: list[bytes]  # a byte for each token of an example, 1 for a label; a row can have several examples
    estimated: bool  # from the number of characters

    @property
    def tokens(self) -> list[int]:
        """The tokens of each example."""
        return [len(mask) for mask in self.masks]

    @property
    def labels(self) -> list[int]:
        """The labels of each example."""
        return [mask.count(1) for mask in self.masks]

    @property
    def first_labels(self) -> list[int]:
        """The tokens of each example up to its first label: a shorter max_seq_len leaves nothing to learn."""
        return [mask.find(1) + 1 for mask in self.masks]

    def examples(self, kept: int) -> int:
        """Return how many examples the whole part has if `kept` of these are trained on."""
        return round(kept * self.rows / max(self.sampled, 1))

    def cut(self, longest: int) -> Lengths:
        """Return the lengths that the training sees: an example that lost its labels is left out."""
        cut = [mask[:longest] for mask in self.masks if 1 in mask[:longest]]
        copies = max(1, round(self.rows / max(self.sampled, 1)))
        return Lengths([len(mask) for mask in cut] * copies, [mask.count(1) for mask in cut] * copies)


def count(settings: TokenSettings, rows: list[Any], model: Model) -> Tokens:
    """Count the tokens and labels of the rows; if there are many, of an evenly spaced sample. Raises DataError."""
    chosen = rows[:: -(-len(rows) // SAMPLED) or 1]
    if not model.folder and not model.is_demo:
        masks = [guess(with_system(row, settings.system_prompt), settings.train_on) for row in chosen]
        return Tokens(len(rows), len(chosen), masks, estimated=True)
    tokenizer = load_tokenizer(model.folder) if model.folder else demo_tokenizer()
    found = tokenise_rows(tokenizer, chosen, **vars(settings))
    return replace(tokens_of(found), rows=round(len(rows) * len(found.rows) / len(chosen)))


def tokens_of(found: Tokenised) -> Tokens:
    """Return the tokens of rows that are tokenised already."""
    masks = [bytes(label != IGNORED for label in one["labels"]) for row in found.whole for one in row]
    return Tokens(len(found.rows), len(found.rows), masks, estimated=False)


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
