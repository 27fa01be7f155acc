"""The data of a run: training and held-out conversations → tokens and labels.

Olive imports this file as a user script (see `user_script` in olive-config.yaml) and uses two functions: `chat_rows`
reads the rows, `chat_tokens` converts them to tokens and labels. The evaluation uses the same functions, so its rows
are tokenised exactly like those of the training.
"""

from __future__ import annotations

import hashlib
import json
import random
import sys
from collections.abc import Sequence
from typing import TypeVar

from preparing.conversations import read
from preparing.problems import DataError
from preparing.tokenised import tokenise_rows
from preparing.tokens import Example, load_tokenizer, place
from preparing.turns import Message
from preparing.workspace import ROOT, find_model

ALWAYS = 8  # a run needs as many rows (LEAST_ROWS in planning/fit.py)

Item = TypeVar("Item")


def chat_rows(
    part: str,
    train_file: str | list[str] | None = None,
    held_out_file: str | list[str] | None = None,
    dataset_name: str | None = None,
    dataset_split: str = "train",
    dataset_format: str = "auto",
    prompt_template: str | None = None,
    completion_template: str | None = None,
    eval_split: float = 0.1,
    data_seed: int = 42,
    max_rows: int | None = None,
    max_bad_rows: float = 0.05,
    encoding: str | None = None,
) -> list[list[Message]]:
    """Read one part (`train` or `held_out`) of the data as conversations: lists of {role, content} with a `place`.

    A file can also be a folder, a pattern or a list of them. Without a `held_out_file`, the held-out rows are taken
    from the training rows: a share (`eval_split` below 1, at least one row) or a number of rows. The choice depends on
    `data_seed` and the rows' content. With a share, rows that are appended do not change it; a number is chosen anew,
    as no choice of exactly so many can be right for every length of a file. Unusable rows are rejected, up to the share
    `max_bad_rows`. Raises DataError.
    """
    file, name = train_file, dataset_name
    if held_out_file and part == "held_out":
        file, name = held_out_file, None
    read_as = (dataset_format, prompt_template, completion_template, max_bad_rows, encoding)
    conversations: list[list[Message]] = [*read(file, name, dataset_split, *read_as)]
    if not held_out_file:
        held_out = held_out_positions(conversations, eval_split, data_seed)
        conversations = [row for i, row in enumerate(conversations) if (i in held_out) == (part == "held_out")]
    if not conversations:
        raise DataError(
            f"{name or file} leaves no rows for {part}: add rows or change eval_split in olive-config.yaml."
        )
    return conversations[:max_rows]


def held_out_positions(conversations: Sequence[list[Message]], eval_split: float, data_seed: int) -> set[int]:
    """Choose the held-out rows by a hash of seed and content: a share if below 1, otherwise a number of rows.

    Of the first ALWAYS rows, the one with the lowest hash is always held out: a short file has one too, and it stays
    when rows are appended.
    """
    digests = [
        hashlib.sha256(f"{data_seed}:{json.dumps(row, sort_keys=True)}".encode()).hexdigest() for row in conversations
    ]
    if eval_split >= 1:
        by_digest = sorted(range(len(digests)), key=digests.__getitem__)
        return set(by_digest[: int(eval_split)])
    if not eval_split or not digests:
        return set()
    lowest = min(digests[:ALWAYS])
    return {i for i, digest in enumerate(digests) if digest == lowest or int(digest[:8], 16) < eval_split * 2**32}


def spread(items: Sequence[Item], count: int) -> list[Item]:
    """Choose `count` items, in their order: one at random, always the same, from each of as many equal parts.

    The first rows of a sorted file have one label; at even distances, so may those of a file with a pattern.
    """
    chance, total = random.Random(0), len(items)
    if total <= count:
        return [*items]
    return [items[chance.randrange(i * total // count, (i + 1) * total // count)] for i in range(count)]


def chat_tokens(
    rows: list[list[Message]],
    model_path: str,
    revision: str | None = None,
    system_prompt: str | None = None,
    max_seq_len: int = 1024,
    train_on: str = "responses",
    max_bad_rows: float = 0.05,
    thinking: str | bool = "auto",
) -> list[Example]:
    """Tokenise conversations into {input_ids, attention_mask, labels}, each of the same length up to max_seq_len.

    Labels are the tokens of the assistant's turns including the end of turn, and IGNORED elsewhere; with
    `train_on: all`, every token is a label. The number of rows cut at max_seq_len is printed; a row that loses all its
    answers is left out, as it has no labels. Raises DataError if these are more than the share `max_bad_rows`, or all
    rows, and in the cases of tokenise_rows.
    """
    tokenizer = load_tokenizer(str(find_model(model_path, revision, ROOT).folder))
    found = tokenise_rows(tokenizer, rows, system_prompt, max_seq_len, train_on, max_bad_rows, thinking)
    if (lost := found.lost) and (len(lost) > max_bad_rows * len(rows) or len(lost) == len(found.rows)):
        raise DataError(
            f"{place(lost[0])}: max_seq_len {max_seq_len} cuts off the whole answer, as in {len(lost)} of {len(rows)} "
            f"rows (max_bad_rows allows a share of {max_bad_rows:g}): raise max_seq_len in olive-config.yaml."
        )
    if line := found.cut_in_words():
        print(line)
    return found.examples


def register() -> None:
    """Register the two functions with Olive."""
    from olive.data.registry import Registry

    Registry.register_dataset()(chat_rows)
    Registry.register_pre_process()(chat_tokens)


if "olive" in sys.modules:  # `olive run` imports this file as its user script
    register()
