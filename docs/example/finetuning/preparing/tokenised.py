"""All rows of a part → tokens: which rows the chat template refuses, and what max_seq_len cuts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from preparing.chat_template import refuse_system_prompt
from preparing.conversations import print_once
from preparing.problems import DataError
from preparing.rejected import Rejected, add_rejected
from preparing.thoughts import has_thought
from preparing.tokens import IGNORED, Example, place, tokenise, with_system
from preparing.turns import Message


@dataclass(frozen=True)
class Tokenised:
    """The rows of a part as tokens."""

    rows: list[list[Message]]  # those that the chat template takes
    whole: list[list[Example]]  # the examples of each row, uncut: one, or several (see tokenise)
    max_seq_len: int
    refused: list[Rejected] = field(default_factory=list)

    @property
    def examples(self) -> list[Example]:
        """The examples to train on: cut at max_seq_len, without those that lose all their labels."""
        cut = [{key: ids[: self.max_seq_len] for key, ids in one.items()} for row in self.whole for one in row]
        return [one for one in cut if any(label != IGNORED for label in one["labels"])]

    @property
    def longer(self) -> int:
        """How many rows are cut."""
        return sum(any(len(one["labels"]) > self.max_seq_len for one in row) for row in self.whole)

    @property
    def lost(self) -> list[list[Message]]:
        """The rows whose whole answer is cut off."""
        last = self.max_seq_len
        return [
            row
            for row, examples in zip(self.rows, self.whole, strict=True)
            if all(label == IGNORED for one in examples for label in one["labels"][:last])
        ]

    def cut_in_words(self) -> str:
        """Return how many rows max_seq_len cuts; "" if none."""
        if not self.longer:
            return ""
        first = f" (the first: {place(self.lost[0])})" if self.lost else ""
        return (
            f"{self.longer} of {len(self.rows)} rows are longer than max_seq_len {self.max_seq_len} and were cut; "
            f"{len(self.lost)} of them lost their whole answer and were left out{first}."
        )


def tokenise_rows(
    tokenizer: Any,
    rows: Sequence[list[Message]],
    system_prompt: str | None = None,
    max_seq_len: int = 1024,
    train_on: str = "responses",
    max_bad_rows: float = 0.05,
    thinking: str | bool = "auto",
) -> Tokenised:
    """Tokenise conversations; see tokenise for the labels. `thinking` is auto (as the rows are), on or off.

    Rows that the chat template refuses, or of which it drops a part, are left out and counted. Raises DataError if they
    are more than the share `max_bad_rows`, or all rows, or if the template does not take the system prompt.
    """
    # YAML 1.1 reads on as true
    thinks = thinking in ("on", True) or (thinking == "auto" and any(map(has_thought, rows)))
    if system_prompt and any(with_system(row, system_prompt) is not row for row in rows):
        refuse_system_prompt(tokenizer, system_prompt, thinks)
    found = Tokenised([], [], max_seq_len)
    for row in rows:
        try:
            examples = tokenise(tokenizer, with_system(row, system_prompt), train_on, thinks)
        except DataError as error:
            where = {"file": getattr(row, "source", ""), "line": getattr(row, "number", 0)}
            found.refused.append({**where, "reason": str(error), "row": {"messages": row}})  # type: ignore[typeddict-item]
        else:
            found.rows.append(row)
            found.whole.append(examples)
    count = f"{len(found.refused)} of {len(rows)} rows"
    if found.refused and (len(found.refused) > max_bad_rows * len(rows) or not found.rows):
        raise DataError(
            f"{found.refused[0]['reason']} In all, {count} cannot be used (max_bad_rows allows a share of "
            f"{max_bad_rows:g})."
        )
    if found.refused:
        print_once(f"{count} were rejected by the model's chat template, the first: {found.refused[0]['reason']}")
    if not thinks and (left_out := sum(map(has_thought, found.rows))):
        print_once(f"{left_out} of {len(rows)} rows have thoughts, which are left out (thinking: off).")
    return found


def list_refused(refused: list[Rejected], rows: Sequence[list[Message]]) -> None:
    """Add rows that the chat template refuses to the lists of rejected rows next to the data."""
    hubs = {getattr(row, "source", ""): getattr(row, "is_from_hub", False) for row in rows}
    for source in dict.fromkeys(row["file"] for row in refused if row["file"]):
        add_rejected(source, [row for row in refused if row["file"] == source], hubs[source])
