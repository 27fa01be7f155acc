"""What an update costs: copy, update, fresh render and comparison in this process, nothing of Copier's work kept."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

from copier import run_copy, run_update

REPOSITORY = Path(__file__).resolve().parents[1]
ROUNDS = 5
OPTIONS = {"defaults": True, "overwrite": True, "quiet": True, "unsafe": True, "skip_tasks": True}


def main() -> None:
    """Go through all four in turn, and print the least seconds of each and of a round."""
    os.environ |= {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    with tempfile.TemporaryDirectory() as name:
        template = Path(name) / "template"
        for part in ("catalog", "hooks", "template"):
            shutil.copytree(REPOSITORY / part, template / part)
        shutil.copy(REPOSITORY / "copier.yml", template)
        commit(template, "v1.0.0")
        with (template / "template/inference/api.py").open("a") as file:
            file.write("# new\n")
        commit(template, "v2.0.0")
        rounds = [round_of(template, Path(name) / str(turn)) for turn in range(ROUNDS)]
        for step in rounds[0]:
            print(f"{step:12} least {min(taken[step] for taken in rounds):.2f} s")
        print(f"{'together':12} least {min(map(together, rounds)):.2f} s (to reach: 2.50)")


def together(taken: dict[str, float]) -> float:
    """Return the wall seconds of a round, without those of the processor."""
    return sum(seconds for step, seconds in taken.items() if step != "processor")


def round_of(template: Path, folder: Path) -> dict[str, float]:
    """Return the wall seconds of each step, and the processor's of all."""
    taken, cpu, started = {}, processor(), time.perf_counter()

    def done(step: str) -> None:
        nonlocal started
        taken[step] = time.perf_counter() - started
        started = time.perf_counter()

    workspace, fresh = folder / "old/tone", folder / "fresh/tone"
    run_copy(str(template), workspace, vcs_ref="v1.0.0", **OPTIONS)
    done("copy")
    commit(workspace, "copied")
    started = time.perf_counter()
    run_update(workspace, vcs_ref="v2.0.0", **OPTIONS)
    done("update")
    run_copy(str(template), fresh, vcs_ref="v2.0.0", **OPTIONS)
    done("fresh render")
    files = [path.relative_to(fresh) for path in fresh.rglob("*") if path.is_file()]
    assert all((workspace / path).read_bytes() == (fresh / path).read_bytes() for path in files)
    done("comparison")
    return taken | {"processor": processor() - cpu}


def processor() -> float:
    """Return the seconds that this process and its children have computed."""
    usages = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def commit(folder: Path, tag: str) -> None:
    """Commit all of a folder, and tag it."""
    for command in (["init", "--quiet"], ["add", "--all"], ["commit", "--quiet", "--message", tag], ["tag", tag]):
        subprocess.run(["git", *command], cwd=folder, check=True)


if __name__ == "__main__":
    main()
