"""What a copy costs: `copier copy` of this template beside a bare copy of as many plain files, in the same run."""

from __future__ import annotations

import shutil
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[1]
ROUNDS = 7


def main() -> None:
    """Copy in turns, and print the least and the median seconds of each, and their ratio."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ours, bare = folder / "ours", folder / "bare"
        ours.mkdir()
        for part in ("copier.yml", "catalog", "hooks", "template"):
            copy = shutil.copytree if (REPOSITORY / part).is_dir() else shutil.copy
            copy(REPOSITORY / part, (ours / part) if copy is shutil.copytree else ours)
        seconds(ours, bare / "template")
        (bare / "template" / ".copier-answers.yml").unlink()
        (bare / "copier.yml").write_text("_subdirectory: template\n")
        files = sum(path.is_file() for path in (bare / "template").rglob("*"))

        times: dict[str, list[float]] = {"this template": [], f"{files} plain files": []}
        for turn in range(ROUNDS):
            for (_, taken), source in zip(times.items(), (ours, bare), strict=True):
                taken.append(seconds(source, folder / f"copy-{source.name}-{turn}"))
        for title, taken in times.items():
            print(f"{title:18} least {min(taken):.2f} s, median {statistics.median(taken):.2f} s")
        one, other = times.values()
        print(f"ratio              least {min(one) / min(other):.2f}, ", end="")
        print(f"median {statistics.median(one) / statistics.median(other):.2f} (to reach: 1.10)")


def seconds(source: Path, target: Path) -> float:
    """Run copier as a user does, and return the wall seconds."""
    started = time.perf_counter()
    command = ["copier", "copy", "--quiet", "--defaults", "--skip-tasks", str(source), str(target)]
    subprocess.run(command, check=True)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
