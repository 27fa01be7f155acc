"""What the demo run costs beside a plain TRL + PEFT script that does the same work, in turns, in the same run.

demo_run.py [--workspace FOLDER] [--rounds N]. TRL gets an environment of its own in .cache/trl: the workspace's lock
and trl, with compiled bytecode, as the workspace's environment has it.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
CACHE = REPOSITORY / ".cache"
TRL = "trl==1.16.0"


def main() -> None:
    """Run both in turns, print the figures and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workspace", type=Path, default=CACHE / "workspace")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    python = options.workspace / ".venv" / "bin" / "python"
    peer = trl_environment()
    figures: dict[str, list[dict[str, float]]] = {"ours": [], "TRL": []}
    subprocess.run([python, options.workspace / "setup" / "get_model.py"], check=True, stdout=subprocess.DEVNULL)
    for _ in range(options.rounds):
        wall, peak, _out = run([python, options.workspace / "finetuning" / "invoke_olive.py", "--fresh"])
        done = json.loads((options.workspace / "models" / "run.json").read_text())
        figures["ours"].append(
            {
                "wall": wall,
                "first_step": done["timings"]["start_to_first_step"],
                "training": done["timings"]["training"],
                "peak": peak,
                "before": done["metrics"]["before"]["accuracy"],
                "after": done["metrics"]["after"]["accuracy"],
            }
        )
        wall, peak, out = run([peer, REPOSITORY / "benchmarks" / "trl_run.py", options.workspace])
        figures["TRL"].append({"wall": wall, "peak": peak, **json.loads(out.splitlines()[-1])})
    print(f"medians of {options.rounds} rounds; load {os.getloadavg()[0]:.1f}")
    print(f"{'':24}{'ours':>8}{'TRL':>8}{'ratio':>8}")
    for key, title in (
        ("wall", "whole process, s"),
        ("first_step", "start to first step, s"),
        ("training", "training, s"),
        ("peak", "peak memory, GiB"),
        ("before", "exact answers before"),
        ("after", "exact answers after"),
    ):
        ours, trl = (statistics.median(run_[key] for run_ in figures[name]) for name in ("ours", "TRL"))
        print(f"{title:24}{ours:8.2f}{trl:8.2f}{ours / trl if trl else 0:8.2f}")


def trl_environment() -> Path:
    """Return the Python of an environment that has the workspace's lock and TRL."""
    folder = CACHE / "trl"
    python = folder / "bin" / "python"
    lock = REPOSITORY / "template" / "setup" / "requirements-cpu.txt"
    ready = folder / "ready"
    if not ready.exists() or ready.stat().st_mtime < lock.stat().st_mtime:
        links = [f"--find-links={place}" for place in re.split(r"\s+", os.environ.get("PIP_FIND_LINKS", "")) if place]
        install = ["uv", "pip", "install", "--quiet", "--python", python, "--compile-bytecode", *links]
        subprocess.run(["uv", "venv", "--quiet", "--clear", folder], check=True)
        subprocess.run([*install, "-r", lock, TRL], check=True)
        ready.touch()
    return python


def run(command: list[str | Path]) -> tuple[float, float, str]:
    """Run a command; return its wall seconds, its peak memory in GiB, and its output."""
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen([str(part) for part in command], stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        wall = time.perf_counter() - started
        out.seek(0)
        err.seek(0)
        if status:
            raise SystemExit(f"{command}: status {status}\n{err.read()[-3000:]}")
        return wall, usage.ru_maxrss / 2**20, out.read()


if __name__ == "__main__":
    main()
