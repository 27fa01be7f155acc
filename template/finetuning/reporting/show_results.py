"""The results of a run on the console: the metrics before and after, some answers, and the next command."""

from __future__ import annotations

from pathlib import Path

from preparing.dataset import spread
from reporting.run_record import RunRecord, interval_in_words


def show(run_json: RunRecord, report: Path) -> None:
    """Print the metrics, some answers, and the next command."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console()
    before, after = run_json["metrics"]["before"], run_json["metrics"]["after"]
    table = Table("held-out rows", "before", "after")
    table.add_row("exact answers", f"{before['accuracy']:.2%}", f"{after['accuracy']:.2%}")
    table.add_row("  95 % sure", interval_in_words(before), interval_in_words(after))
    for name in ("eval_loss", "perplexity"):
        table.add_row(name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}")
    console.print(table)
    answers = Table("question", "expected", "before", "after")
    for example in spread(run_json["examples"], 5):
        answers.add_row(*(escape(example[key][:300]) for key in ("question", "expected", "before", "after")))
    console.print(answers)
    console.print(f"Done in {run_json['seconds']:.0f} s.")
    for what, where in (
        ("adapter", run_json["adapter"]),
        ("figures", report.parents[1] / "run.json"),
        ("report", report),
    ):
        console.print(f"  {what:8} {Path(where).as_posix()}", highlight=False)
    smoke = "smoke" in report.parts
    console.print(f"Next: python {'finetuning/invoke_olive.py' if smoke else 'inference/console_chat.py'}")
