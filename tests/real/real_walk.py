"""A workspace in which a real model is walked through its steps, each a process, as a user does."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import time
from pathlib import Path
from typing import Any


class Walk:
    """A workspace, its user's variables, and what was seen on the way."""

    def __init__(self, root: Path, environment: dict[str, str], figures: dict[str, str], name: str) -> None:
        self.estimate: dict[str, Any] = {}  # of the check
        self.root, self.environment, self.figures, self.name = root, environment, figures, name

    def start(self, *command: str, **more: str) -> subprocess.Popen[str]:
        """Start a script of the workspace from another folder."""
        script = [sys.executable, str(self.root / command[0]), *command[1:]]
        pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "encoding": "utf-8"}
        return subprocess.Popen(script, cwd="/", env=self.environment | more, **pipes)

    def step(self, *command: str, **more: str) -> str:
        """Run a script; return what it said. Its time is among the figures."""
        started = time.monotonic()
        running = self.start(*command, **more)
        out, err = running.communicate()
        assert running.returncode == 0, f"{command}: {out[-3000:]}{err[-3000:]}"
        self.figures[f"{self.name}, {' '.join(command)[:60]}"] = f"{time.monotonic() - started:.1f} s"
        return out

    @property
    def run(self) -> dict[str, Any]:
        """models/run.json."""
        read: dict[str, Any] = json.loads((self.root / "models" / "run.json").read_text(encoding="utf-8"))
        return read

    def rows(self, name: str) -> list[list[dict[str, str]]]:
        """Return the conversations of a file in dataset/."""
        lines = (self.root / "dataset" / name).read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["messages"] for line in lines]


def set_in(root: Path, **settings: object) -> None:
    """Change settings in olive-config.yaml; comments stay."""
    config = root / "finetuning" / "olive-config.yaml"
    text = config.read_text(encoding="utf-8")
    for key, value in settings.items():
        text, found = re.subn(rf"(?m)^(\s*{key}:(?: &\w+)?) \S+", rf"\1 {json.dumps(value)}", text)
        assert found, key
    config.write_text(text, encoding="utf-8")
