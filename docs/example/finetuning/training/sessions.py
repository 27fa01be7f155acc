"""The sessions of a run, one more each time it is resumed: its date, and the time that all of them took.

They are kept in the run's folder while it is not finished, and written at each log of the training, so that a run that
is killed loses little of its time.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

from training.whole_files import write_json

SESSIONS = "sessions.json"
ADDED = ("before", "training", "after")  # timings that add up; start_to_first_step is the last session's


class Sessions:
    """The earlier sessions of a run, and this one, which began at `started` (by time.monotonic)."""

    def __init__(self, run_folder: Path, today: str, started: float, over: bool = False) -> None:
        """Read the earlier sessions, if the run does not start over."""
        self.path, self.started = run_folder / SESSIONS, started
        self.date = today  # of the first start: a resumed run with another date would train on other tokens from there
        self.earlier: list[dict[str, float]] = []
        try:
            if not over:
                kept = json.loads(self.path.read_text(encoding="utf-8"))
                self.date, self.earlier = str(kept["date"]), [dict(one) for one in kept["sessions"]]
        except (OSError, ValueError, KeyError, TypeError):
            self.date, self.earlier = today, []
        self.this: dict[str, float] = {}

    def note(self, **values: float) -> None:
        """Write what is known of this session: its timings in seconds, and the `tokens` of its training."""
        self.this |= values | {"seconds": time.monotonic() - self.started}
        write_json(self.path, {"date": self.date, "sessions": self.all})

    @property
    def all(self) -> list[dict[str, float]]:
        """The seconds and timings of each session."""
        return [*self.earlier, self.this]

    def total(self, name: str) -> float:
        """Return the sum of a value over all sessions."""
        return sum(one.get(name, 0.0) for one in self.all)

    @property
    def timings(self) -> dict[str, float]:
        """The timings of run.json."""
        return {
            "start_to_first_step": round(self.this["start_to_first_step"], 2),
            "tokens_per_second": round(self.total("tokens") / self.total("training"), 1),
            **{name: round(self.total(name), 2) for name in ADDED},
        }
