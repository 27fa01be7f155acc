"""Change the code in small ways, one at a time, and count the changes that no test notices.

`make mutants` does it for GROUPS below: MUTANTS changes of each, drawn at random with a fixed seed. The changes are
those of cosmic-ray. What survives is printed as a difference: a test is missing, or the change makes none.

The tests of a group run in a process that has loaded the heavy libraries already, forked for each change.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import importlib
import json
import os
import random
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
# files, the tests that should notice a change of them, and whether these run in the workspace's environment
GROUPS: dict[str, tuple[str, str, bool]] = {
    "rows": (
        "template/finetuning/preparing/{rows,data_files,turns,formats,rejected}.py",
        "tests/unit/test_row_files.py tests/unit/test_rows.py tests/unit/test_turns.py",
        False,
    ),
    "preparing": (
        "template/finetuning/preparing/{chat_template,conversations,dataset,thoughts,tokenised,tokens}.py",
        "tests/workspace/test_data.py tests/workspace/test_right_or_rejected.py tests/workspace/test_labels.py "
        "tests/workspace/test_ends_and_dates.py tests/workspace/test_plausible_rows.py",
        True,
    ),
    "training": (
        "template/finetuning/training/{answer_trainer,batches,checkpoints,evaluations,fused_lora,gradients,pieces,"
        "processes,sessions,train}.py",
        "tests/workspace/test_packing.py tests/workspace/test_fused_lora.py tests/workspace/test_run_end.py "
        "tests/workspace/test_finetuning.py",
        True,
    ),
    "planning": (
        "template/finetuning/planning/*.py",
        "tests/workspace/test_needs.py tests/workspace/test_check.py tests/workspace/test_plan.py",
        True,
    ),
    "serving": (
        "template/inference/{engine,request_queue,model_process,prompt_cost}.py",
        "tests/workspace/test_as_trained.py tests/workspace/test_request_cost.py tests/workspace/test_kept_cache.py "
        "tests/workspace/test_model_process.py tests/workspace/test_inference.py",
        True,
    ),
    "migrate": (
        "hooks/{migrate,rendering}.py",
        "tests/unit/test_merging.py tests/update/test_migrations.py tests/update/test_edits.py",
        False,
    ),
    "sync": ("template/infra/{sync,share}.py", "tests/azure/test_share.py tests/azure/test_sync.py", True),
    "release": ("tools/release.py", "tests/unit/test_release.py", False),
}
HEAVY = ("torch", "transformers", "peft", "datasets", "olive", "gradio", "fastapi", "onnxruntime_genai", "openai")

Change = dict[str, Any]


def expand(pattern: str) -> list[Path]:
    """Return the files of a pattern with one list in braces."""
    before, _, rest = pattern.partition("{")
    names, _, after = rest.partition("}")
    return [file for name in names.split(",") for file in sorted(ROOT.glob(before + name + after))]


def meaning(code: str) -> str | None:
    """Return what a module does, without annotations and texts of documentation; None if it is no Python."""
    with contextlib.suppress(SyntaxError):
        tree = ast.parse(code)
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                node.returns = None
            if isinstance(node, ast.arg):
                node.annotation = None
            if isinstance(node, ast.AnnAssign):
                node.annotation = ast.Constant(None)
        return ast.dump(tree)
    return None


def possible(file: Path) -> Iterator[Change]:
    """Yield every change of a file that cosmic-ray knows, without its code."""
    from cosmic_ray.ast import ast_nodes, get_ast  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-not-found]

    nodes = list(ast_nodes(get_ast(file.read_text(encoding="utf-8"))))
    for name in operator_names():
        if name.startswith("core/Variable"):
            continue  # other names put anywhere: nearly all of them fail at once
        positions = (start for node in nodes for start, _ in get_operator(name)().mutation_positions(node))
        for occurrence, (line, _) in enumerate(positions):
            yield {"file": file.relative_to(ROOT).as_posix(), "line": line, "operator": name, "occurrence": occurrence}


def draw(folder: Path, count: int) -> None:
    """Write changes of each group, one of a line: another says little more than the first."""
    from cosmic_ray.mutating import mutate_code  # type: ignore[import-not-found]
    from cosmic_ray.plugins import get_operator

    folder.mkdir(parents=True, exist_ok=True)
    for group, (pattern, _, _) in GROUPS.items():
        changes = [change for file in expand(pattern) for change in possible(file)]
        random.Random(group).shuffle(changes)
        chosen: dict[tuple[str, int], Change] = {}
        for change in changes:
            place = change["file"], change["line"]
            code = (ROOT / change["file"]).read_text(encoding="utf-8")
            if place in chosen or len(chosen) == count:
                continue
            changed = mutate_code(code, get_operator(change["operator"])(), change["occurrence"])
            if changed and meaning(changed) not in (None, meaning(code)):
                chosen[place] = {**change, "code": changed}
        (folder / f"{group}.json").write_text(json.dumps(list(chosen.values())), encoding="utf-8")
        print(f"{group}: {len(chosen)} of {len(changes)} changes")


def difference(change: Change) -> list[str]:
    """Return a change as the lines of a difference."""
    old = (ROOT / change["file"]).read_text(encoding="utf-8").splitlines()
    return list(difflib.unified_diff(old, change["code"].splitlines(), change["file"], change["file"], "", "", 1, ""))


def survives(tests: str, limit: float) -> bool:
    """Run tests in a fork; return whether they pass. Tests that hang are failed."""
    child = os.fork()
    if not child:
        os.setsid()
        with Path(os.devnull).open("w") as nowhere:
            os.dup2(nowhere.fileno(), 1)
            os.dup2(nowhere.fileno(), 2)
        import pytest

        status = 3
        with contextlib.suppress(BaseException):
            status = int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", "-p", "no:randomly", *tests.split()]))
        os._exit(status)
    end = time.monotonic() + limit
    while time.monotonic() < end:
        if (done := os.waitpid(child, os.WNOHANG))[0]:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
            return done[1] == 0
        time.sleep(0.05)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


def run(changes: list[Change], group: str, tests: str) -> list[Change]:
    """Try changes on this clone and its workspace. Return those that survive."""
    os.environ.update(
        HF_HUB_OFFLINE="1", HF_HUB_DISABLE_TELEMETRY="1", OMP_NUM_THREADS="1", TOKENIZERS_PARALLELISM="false"
    )
    sys.dont_write_bytecode = True
    os.environ["PYTHONDONTWRITEBYTECODE"] = "1"
    # as startup.py of the workspace sets them, before anything is imported
    os.environ.update(
        HF_HUB_DISABLE_PROGRESS_BARS="1", HF_DATASETS_DISABLE_PROGRESS_BARS="1", TRANSFORMERS_VERBOSITY="error"
    )
    for name in HEAVY if GROUPS[group][2] else ():
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    begin = time.monotonic()
    if not survives(tests, 1200):
        raise SystemExit(f"{group}: the tests fail without a change")
    limit = 20 + 3 * (time.monotonic() - begin)
    print(f"{group}: {len(changes)} changes, the tests take {time.monotonic() - begin:.0f} s", flush=True)
    survivors = []
    for number, change in enumerate(changes, 1):
        file = Path(change["file"])
        places = [ROOT / file, ROOT / ".cache/workspace" / file.relative_to(file.parts[0])]
        places = [place for place in places if place.is_file()]
        kept = {place: place.read_bytes() for place in places}
        try:
            for place in places:
                place.write_text(change["code"], encoding="utf-8")
                shutil.rmtree(place.parent / "__pycache__", ignore_errors=True)
            lives = survives(tests, limit)
        finally:
            for place, content in kept.items():
                place.write_bytes(content)
        if lives:
            survivors.append(change)
            print("\n".join(["", change["operator"], *difference(change)[2:]]), flush=True)
        print(f"{group}: {len(survivors)} of {number} survive", file=sys.stderr, flush=True)
    print(f"\n{group}: {len(survivors)} of {len(changes)} survive")
    return survivors


def main() -> None:
    """Draw the changes, or try those of a group."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["draw", *GROUPS])
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache/mutants")
    parser.add_argument("--count", type=int, default=40)
    parser.add_argument("--changes", help="the file with the changes, instead of that of the group")
    parser.add_argument("--tests", help="files of tests, instead of those of the group")
    arguments = parser.parse_args()
    if arguments.what == "draw":
        draw(arguments.folder, arguments.count)
        return
    name = arguments.changes or f"{arguments.what}.json"
    changes = json.loads((arguments.folder / name).read_text(encoding="utf-8"))
    survivors = run(changes, arguments.what, arguments.tests or GROUPS[arguments.what][1])
    (arguments.folder / f"{arguments.what}-survivors.json").write_text(json.dumps(survivors), encoding="utf-8")


if __name__ == "__main__":
    main()
