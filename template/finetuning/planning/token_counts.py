"""How many tokens the rows have, and how many are labels: counted, or estimated if no tokenizer is available."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import yaml

from planning.model_facts import Model
from planning.row_lengths import Lengths
from preparing.dataset import chat_rows
from preparing.tokens import IGNORED, load_tokenizer, tokenise, with_system
from preparing.workspace import MODEL_FACTS, SAMPLE
from settings.run_settings import TokenSettings
from training.tiny_model import build_tokenizer

SAMPLED = 2000  # rows that the check tokenises: more would take longer and add little
CHARACTERS = 4  # per token, without a tokenizer: English text in the vocabularies of the catalogue
MARKS = 6  # tokens that a chat template adds to a turn


@dataclass(frozen=True)
class Tokens:
    """Tokens and labels of rows before max_seq_len cuts them."""

    rows: int
    tokens: list[int]  # of at most SAMPLED rows
    labels: list[int]
    estimated: bool  # from the number of characters

    def cut(self, longest: int) -> Lengths:
        """Return the lengths that the training sees: a row that lost its answer is left out."""
        cut = Lengths(self.tokens, self.labels).cut(longest)
        kept = [pair for pair in zip(cut.tokens, cut.labels, strict=True) if pair[1]]
        copies = max(1, round(self.rows / max(len(self.tokens), 1)))
        return Lengths([tokens for tokens, _ in kept] * copies, [labels for _, labels in kept] * copies)


def count(settings: TokenSettings, rows: list[Any], model: Model) -> Tokens:
    """Count the tokens and labels of the rows; if there are many, of an evenly spaced sample."""
    chosen = [with_system(row, settings.system_prompt) for row in rows[:: -(-len(rows) // SAMPLED) or 1]]
    if model.folder:
        tokenizer = load_tokenizer(model.folder)
    elif model.is_demo:
        tokenizer = demo_tokenizer()
    else:
        guessed = [guess(row, settings.train_on) for row in chosen]
        return Tokens(len(rows), [tokens for tokens, _ in guessed], [labels for _, labels in guessed], estimated=True)
    examples = [tokenise(tokenizer, row, settings.train_on)["labels"] for row in chosen]
    labels = [sum(label != IGNORED for label in example) for example in examples]
    return Tokens(len(rows), [len(example) for example in examples], labels, estimated=False)


def demo_tokenizer() -> Any:
    """Build the tokenizer of the demo model; building the model would take longer."""
    facts = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))
    return build_tokenizer(facts, chat_rows("train", train_file=str(SAMPLE), held_out_file=str(SAMPLE)))


def guess(row: list[dict[str, str]], train_on: str) -> tuple[int, int]:
    """Estimate a row's tokens and labels from its length in characters (UTF-8 bytes)."""
    turns = [(turn["role"], len(turn["content"].encode()) / CHARACTERS) for turn in row]
    tokens = int(sum(length + MARKS for _, length in turns)) + 1
    answers = int(sum(length + 1 for role, length in turns if role == "assistant"))
    return tokens, tokens if train_on == "all" else answers


def lengths_of(rows: list[dict[str, list[int]]]) -> Lengths:
    """Return the lengths of rows that are already tokenised and cut."""
    labels = [sum(label != IGNORED for label in row["labels"]) for row in rows]
    return Lengths([len(row["input_ids"]) for row in rows], labels)
