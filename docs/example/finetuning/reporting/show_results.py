"""The results of a run on the console: the metrics before and after, some answers, and the next command."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from preparing.dataset import spread
from preparing.problems import one_line
from reporting.run_record import RunRecord, interval_in_words

if TYPE_CHECKING:
    from rich.text import Text

ROWS = 5  # examples shown
LINES = 4  # of a cell


def show_figures(run_json: RunRecord) -> None:
    """Print the metrics, and some answers."""
    from rich.console import Console
    from rich.table import Table

    console = Console()
    before, after = run_json["metrics"]["before"], run_json["metrics"]["after"]
    table = Table("held-out rows", "before", "after")
    table.add_row("exact answers", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}")
    table.add_row("95 % interval", interval_in_words(before), interval_in_words(after))
    for name in ("eval_loss", "perplexity"):
        table.add_row(name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}")
    console.print(table)
    answers = Table()
    for title in ("question", "expected", "before", "after"):
        answers.add_column(title, overflow="fold")  # Chinese and Japanese have no spaces to break a line at
    room = max(console.width // 4 - 3, 8) * LINES
    for example in spread(run_json["examples"], ROWS):
        texts = (example[key] for key in ("expected", "before", "after"))
        answers.add_row(fitting(example["question"], room, both_ends=True), *(fitting(text, room) for text in texts))
    console.print(answers)


def fitting(text: str, room: int, both_ends: bool = False) -> Text:
    """Return a text on one line, cut to `room` columns of a terminal: at its end, or in the middle."""
    from rich.cells import cell_len
    from rich.text import Text

    text = one_line(text)
    if cell_len(text) <= room:
        return Text(text)
    start, end = Text(text), ""
    if both_ends:  # the last turn of a conversation stands at the end
        while cell_len(end) < room // 2:
            end = text[len(text) - len(end) - 1 :]
    start.truncate(room - cell_len(end), overflow="ellipsis")
    return start + end


def show(run_json: RunRecord, report: Path) -> None:
    """Print where the results are, and the next command."""
    from rich.console import Console

    console = Console()
    sessions = run_json["sessions"]
    console.print(f"Done in {run_json['seconds']:.0f} s{f', over {sessions} sessions' if sessions > 1 else ''}.")
    for what, where in (
        ("adapter", run_json["adapter"]),
        ("figures", report.parents[1] / "run.json"),
        ("report", report),
    ):
        console.print(f"  {what:8} {Path(where).as_posix()}", highlight=False)
    smoke = "smoke" in report.parts
    console.print(f"Next: python {'finetuning/invoke_olive.py' if smoke else 'inference/console_chat.py'}")
