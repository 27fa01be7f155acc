"""For any edits, git settings and location of the workspace: an update loses nothing.

Each draw creates a workspace, changes it as a user, updates it, and checks every file by rules that share no code with
the update itself: it succeeded and kept everything, or it did not begin, or undo_update.py restores everything.

UPDATE_DRAWS=2000     how many draws (24)
UPDATE_SEED=123       that draw alone, as a failure names it
UPDATE_REPORT=file    add the figures of each share to a file
"""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from copier._main import Worker
from copier._settings import SettingsModel

from . import conftest, oracle
from .conftest import BEFORE, NEXT, NOW, known, release
from .draws import PLACES, SETTINGS, Place, Tree, git, tree, write_settings
from .faults import FAULTS, LARGEST, Outcome, run, variables
from .user import User

Copy = Callable[..., Path]
SHARES = 8
DRAWS = int(os.environ.get("UPDATE_DRAWS", "24"))
SEED = os.environ.get("UPDATE_SEED")
FIRST = {"project_name": "tone", "platform": "linux", "environment": "venv", "device": "cpu", "target": "local"}
STARTS: list[dict[str, Any]] = [
    {},
    {"model": "phi-3-mini-4k-instruct", "device": "gpu", "target": "azure"},
    {"dataset_source": "huggingface", "dataset_name": "owner/rows"},
]
CHANGES: list[dict[str, Any]] = [
    {"device": "gpu"},
    {"model": "phi-3-mini-4k-instruct", "device": "gpu", "target": "azure"},
    {"model": "demo", "target": "local", "device": "cpu"},
    {"dataset_source": "sample"},
    {"dataset_source": "file", "dataset_path": "dataset/mine.jsonl"},
]
# What two more releases rename; the second renames one again.
RENAMES = (
    {
        "finetuning/training/smoke.py": "finetuning/training/rehearse.py",
        "finetuning/reporting/report.html": "pages/report.html",
        "setup/install.py": "setup/packages.py",
        "dataset/README.md": "dataset/ABOUT.md",
    },
    {"finetuning/training/rehearse.py": "finetuning/training/trial.py", ".vscode/tasks.json": ".vscode/jobs.json"},
)
KNOWN = runpy.run_path(str(conftest.ROOT / "hooks/renames.py"))
RENAMING = tuple(f"{NEXT[-1].rpartition('.')[0].rpartition('.')[0]}.{number}.0" for number in (8, 9))


@pytest.fixture(scope="session")
def source(releases: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone of the template's repository with two more releases, which rename; the others' tests do not see them."""
    clone = tmp_path_factory.mktemp("renaming") / "clone"
    conftest.git(releases, "clone", "--quiet", ".", str(clone))
    for number, (tag, names) in enumerate(zip(RENAMING, RENAMES, strict=True), start=8):
        conftest.changed(clone, number)
        for old, new in names.items():
            for source in (clone / "template").glob(f"{old}*"):
                target = clone / "template" / f"{new}{source.name.removeprefix(Path(old).name)}"
                target.parent.mkdir(exist_ok=True)
                source.rename(target)
        with (clone / "hooks/renames.py").open("a", encoding="utf-8") as hook:
            hook.write(f"RENAMED_FILES |= {names}\n")
        release(clone, tag)
    return clone


@pytest.fixture(scope="session")
def tags(source: Path) -> list[str]:
    """All releases, oldest first."""
    return [*(known(source, tag) for tag in BEFORE[:1]), NOW, *NEXT, *RENAMING]


@pytest.fixture(scope="session")
def rendered(
    worker: type[Worker], source: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str, str], Path]:
    """The workspace that a release renders with some answers, made once."""
    folder = tmp_path_factory.mktemp("rendered")

    @cache
    def render(tag: str, answers: str) -> Path:
        target = Path(tempfile.mkdtemp(dir=folder)) / "tone"
        options: dict[str, Any] = {**conftest.OPTIONS, "settings": SettingsModel()}
        worker(src_path=str(source), dst_path=target, data=json.loads(answers), vcs_ref=tag, **options).run_copy()
        return target

    return render


@dataclass
class Draw:
    """What one seed means."""

    seed: int
    rng: random.Random = field(init=False)
    did: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.rng = random.Random(self.seed)

    def __str__(self) -> str:
        return f"UPDATE_SEED={self.seed}: " + "\n    ".join(self.did)


COUNTS: Counter[str] = Counter()


@pytest.mark.parametrize("share", range(SHARES))
def test_nothing_that_a_user_did_is_lost(
    share: int,
    update: Copy,
    tags: list[str],
    rendered: Callable[[str, str], Path],
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:
    # the same draws in every `make test`, so that a change fails by its own fault; others each time in `make test-all`
    seeds = [
        number if "UPDATE_DRAWS" not in os.environ else random.SystemRandom().randrange(2**40)
        for number in shared(share)
    ]
    seeds = [int(SEED)] * (share == 0) if SEED else seeds
    failures, started, counts = [], time.monotonic(), Counter[str]()
    for seed in seeds:
        draw, base = Draw(seed), tmp_path / f"draw {seed}"
        base.mkdir()
        counts["draws"] += 1
        try:
            found = one(draw, base, tags, rendered, update, capfd, counts)
        except Exception as error:
            found = [f"{type(error).__name__}: {error}"]
            if SEED:
                raise
        if found:
            counts["losses"] += 1
            failures.append(f"{draw}\n  " + "\n  ".join(found))
        if not SEED:
            shutil.rmtree(base, ignore_errors=True)
    counts["seconds"] = round(time.monotonic() - started)
    COUNTS.update(counts)
    line = f"share {share}: {dict(counts)}; all of this process: {dict(COUNTS)}"
    if report := os.environ.get("UPDATE_REPORT"):
        with Path(report).open("a", encoding="utf-8") as file:
            file.write("\n\n".join([line, *failures]) + "\n")
    with capfd.disabled():
        print(f"\n{line}")
    assert not failures, f"{len(failures)} of {len(seeds)} draws:\n\n" + "\n\n".join(failures)


def shared(share: int) -> range:
    """Return the numbers of the draws that are a share's."""
    return range(share, DRAWS, SHARES)


def one(
    draw: Draw,
    base: Path,
    tags: list[str],
    rendered: Callable[[str, str], Path],
    update: Copy,
    capfd: pytest.CaptureFixture[str],
    counts: Counter[str],
) -> list[str]:
    """Play one draw; return what is wrong afterwards."""
    rng = draw.rng
    first = FIRST | rng.choice(STARTS)
    changes = rng.choice(CHANGES) if rng.random() < 0.35 else {}
    if changes.get("device") == "cpu" and first.get("model"):
        changes = changes | {"model": "demo"}
    start, end = sorted(rng.choices(range(len(tags)), k=2))
    end = max(end, 1)  # the oldest is no release to go to
    if start == end and not changes and rng.random() < 0.8:
        end = min(end + 1, len(tags) - 1)
        start = min(start, end - 1)
    settings = rng.sample(SETTINGS, rng.choice([0, 1, 2, 4]))
    fault = rng.choices(list(FAULTS), list(FAULTS.values()))[0]
    place_of = rng.choices(list(PLACES), list(PLACES.values()))[0]
    draw.did += [f"{tags[start]} {first}", f"to {tags[end]} {changes}", place_of.__name__, *settings, f"«{fault}»"]
    source = rendered(tags[start], json.dumps(first))
    old = tree(source)
    new = tree(rendered(tags[end], json.dumps(first | changes)))
    renames = renamed_between(old, new)
    config = base / "config/gitconfig"
    config.parent.mkdir()
    write_settings(config, settings, conftest.GIT_CONFIG)
    with variables(GIT_CONFIG_GLOBAL=str(config)):
        (base / "all").mkdir()
        place = place_of(base / "all", lambda folder: shutil.copytree(source, folder, dirs_exist_ok=True) and None)
        place.commit()
        user = User(rng, place.workspace, old, new, renames)
        user.did = draw.did
        for _ in range(rng.randint(1, 6)):
            user.act()
        for name in ("models/base/mine.bin", ".env", "dataset/x.rejected.jsonl", "__pycache__/x.pyc"):
            if rng.random() < 0.3 and not (place.workspace / name.partition("/")[0]).is_symlink():
                user.add(name)
        if fault == "no room for a copy":
            user.grow(LARGEST)
        if rng.random() < 0.97:
            place.commit()
        else:
            draw.did.append("not committed")
        if place.outside:
            (place.outside / "changed.txt").write_text("not committed\n")
            (place.outside / "gone.txt").unlink()
            (place.outside / "of it/gone too.txt").unlink()
            (place.outside / "not added.txt").write_text("not added\n")
        before = State.of(base / "all", place)
        outcome = run(rng, place.workspace, update, tags[end], changes, fault, capfd)
        after = State.of(base / "all", place)

        def again() -> list[str]:
            """Update once more after it was taken back."""
            said = run(rng, place.workspace, update, tags[end], changes, "", capfd).said
            now = State.of(base / "all", place)
            return [f"again: {said}", *different(after.workspace, now.workspace, "again: ")] * (now != after)

        counts["updates"] += 1
        draw.did.append(f"status {outcome.status}: {outcome.said.strip()[-600:]}")
        return judged(draw, place, user, outcome, fault, (old, new, renames), before, after, again, counts)


@dataclass
class State:
    """All that an update could change."""

    workspace: Tree
    outside: Tree
    index: list[str]
    others: list[str]

    @staticmethod
    def of(base: Path, place: Place) -> State:
        index = git(place.workspace, "ls-files", "--stage", "-z").split("\0")
        others = [
            f"{repository.name} {line}"
            for repository in place.repositories
            for line in git(repository, "ls-files", "--stage", "-z").split("\0")
            if not within(place.workspace, repository, line)
        ]
        return State(tree(place.workspace), tree(base, place.workspace), index, others)


def within(workspace: Path, repository: Path, line: str) -> bool:
    return workspace in [repository / line.partition("\t")[2], *(repository / line.partition("\t")[2]).parents]


def judged(
    draw: Draw,
    place: Place,
    user: User,
    outcome: Outcome,
    fault: str,
    renders: tuple[Tree, Tree, dict[str, str]],
    before: State,
    after: State,
    again: Callable[[], list[str]],
    counts: Counter[str],
) -> list[str]:
    """Return what breaks the promise."""
    if outcome.killed:
        counts["kills"] += 1
    if outcome.status == 0:
        unmerged = {line.partition("\t")[2] for line in after.index if line.partition("\t")[0][-1:] in "123" and line}
        found = oracle.losses(user.edits, *renders, before.workspace, after.workspace, unmerged, KNOWN["SPLIT_FILES"])
        counts["conflicts"] += len(unmerged)
        found += different(before.outside, after.outside, "outside: ")
        found += [f"index of others: {line!r}" for line in set(before.others) ^ set(after.others)]
        changed = {line for line in set(before.index) ^ set(after.index) if line.partition("\t")[2] not in unmerged}
        found += [f"index: {line!r}" for line in sorted(changed)]
        if place.refused:
            found.append("it was not refused, though git does not track the workspace")
        if found or draw.rng.random() < 0.7:
            return found
        counts["taken back"] += 1
        return taken_back(place, before) or again()
    if before == after:
        counts["refusals"] += not outcome.killed
        checked = fault in ("", "locked")
        unsaid = checked and len(outcome.said.strip().splitlines()) != 1
        return [f"refused with other than one sentence: {outcome.said!r}"] if unsaid else []
    if not fault:
        return ["it stopped half-way", *different(before.workspace, after.workspace, "half-way: ")[:5]]
    counts["taken back"] += 1
    unsaid = fault == "stopped at the end" and "undo_update.py" not in outcome.said
    return [f"does not say how to undo it: {outcome.said!r}"] * unsaid + taken_back(place, before)


def taken_back(place: Place, before: State) -> list[str]:
    """Run undo_update.py as a user does who reads what it says; return what is not as before."""
    folder = place.workspace / git(place.workspace, "rev-parse", "--git-dir").strip()
    script = sorted(folder.glob("copier-finetune/*/*/undo_update.py"))[-1]
    for _ in range(2):
        command = [sys.executable, str(script), "--workspace", str(place.workspace)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode == 0:
            break
        (folder / "index.lock").unlink(missing_ok=True)  # which the sentence on stderr names
    base = place.workspace
    while base.name != "all" or base.parent.name[:5] != "draw ":
        base = base.parent
    now = State.of(base, place)
    found = [f"undo: {done.returncode} {done.stderr}"] if done.returncode else []
    found += different(before.workspace, now.workspace, "after undo: ")
    found += different(before.outside, now.outside, "after undo, outside: ")
    return found + [f"after undo, index: {line!r}" for line in set(before.index) ^ set(now.index)]


def different(before: Tree, after: Tree, where: str) -> list[str]:
    names = sorted(name for name in {*before, *after} if before.get(name) != after.get(name))
    return [f"{where}{name}: {short(before.get(name))} → {short(after.get(name))}" for name in names]


def short(entry: Any) -> str:
    return f"{str(entry)[:80]}… {str(entry)[-60:]}" if len(str(entry)) > 150 else str(entry)


def renamed_between(old: Tree, new: Tree) -> dict[str, str]:
    """Return the files that are renamed between two renders, over both releases."""
    found = {}
    for name in old:
        target = name
        for names in (KNOWN["RENAMED_FILES"], *RENAMES):
            target = names.get(target, target) if target not in new else target
        if target != name and target in new:
            found[name] = target
    return found
