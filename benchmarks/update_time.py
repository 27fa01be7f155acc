"""What an update costs: copy, update, fresh render and comparison, as users have it and as the tests do it.

Users' Copier keeps nothing of its work; the tests do hundreds of updates in one process, and keep clones and compiled
templates. Beside the first stands Copier's own share: as many files, without a question and with nothing to render.
"""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from copier import run_copy, run_update

REPOSITORY = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(REPOSITORY))

from tests.update.test_every_answer import pairwise  # noqa: E402

ROUNDS = 5
OPTIONS = {"defaults": True, "overwrite": True, "quiet": True, "unsafe": True, "skip_tasks": True}


def main() -> None:
    """Print the least seconds of each step and of a round, Copier's own share, and what a set of the tests takes."""
    os.environ |= {f"GIT_{who}_{what}": "a@b" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    with tempfile.TemporaryDirectory() as name:
        template = Path(name) / "template"
        for part in ("catalog", "hooks", "template"):
            shutil.copytree(REPOSITORY / part, template / part)
        shutil.copy(REPOSITORY / "copier.yml", template)
        rounds = measured(template)
        for step in rounds[0]:
            print(f"{step:12} least {min(taken[step] for taken in rounds):.2f} s")
        print(f"{'together':12} least {min(map(together, rounds)):.2f} s")
        plain = Path(name) / "plain"
        shutil.copytree(Path(name) / "template 0/fresh/tone", plain / "template")
        (plain / "template/.copier-answers.yml").unlink()
        shutil.copy(next((template / "template").glob("{{*")), plain / "template")
        (plain / "copier.yml").write_text("_subdirectory: template\n")
        print(f"{'Copier alone':12} least {min(map(together, measured(plain))):.2f} s")
    started = time.perf_counter()
    tests = [sys.executable, "-m", "pytest", "-q", "-p", "no:xdist", "tests/update/test_every_answer.py"]
    subprocess.run(tests, cwd=REPOSITORY, check=True, stdout=subprocess.DEVNULL)
    each = (time.perf_counter() - started) / len(pairwise())
    print(f"{'in the tests':12} mean  {each:.2f} s for each of {len(pairwise())} sets of answers (to reach: 2.50)")


def measured(template: Path) -> list[dict[str, float]]:
    """Make two releases of a template, and return the rounds from the one to the other."""
    commit(template, "v1.0.0")
    with next(template.rglob("api.py")).open("a") as file:
        file.write("# new\n")
    commit(template, "v2.0.0")
    return [round_of(template, template.with_name(f"{template.name} {turn}")) for turn in range(ROUNDS)]


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
