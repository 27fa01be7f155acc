"""The import graph of a workspace: imports go down a list of folders (rooms), and never in a cycle."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

TEMPLATE = Path(__file__).resolve().parents[2] / "template"
# From the top floor down, as the workspace's README lists them: a room imports only rooms below it.
ROOMS = ("exporting", "reporting", "planning", "training", "settings", "preparing")
FLOORS = {room: len(ROOMS) - number for number, room in enumerate(ROOMS)}
# The door of a file, or a library's shape that is passed on: a user's row, the file of settings, a model's config.json,
# the facts of setup/model.yaml. Everything else has types.
UNTYPED = {
    "exporting": 0,
    "planning": 9,
    "preparing": 8,
    "reporting": 1,
    "settings": 13,
    "training": 3,
    ".": 2,
}


def imports(file: Path, folder: Path) -> Iterator[str]:
    """Yield the files of `folder` that a file imports, anywhere in it but for types alone."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    for_types = {
        inner
        for node in ast.walk(tree)
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if node in for_types:
            continue
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            path = folder / f"{name.replace('.', '/')}.py"
            if path.is_file():
                yield path.relative_to(folder).as_posix()


@cache
def graph(folder: str) -> dict[str, frozenset[str]]:
    """Return what each Python file of a top folder imports of the same folder."""
    root = TEMPLATE / folder
    return {
        path.relative_to(root).as_posix(): frozenset(imports(path, root))
        for path in sorted(root.rglob("*.py"))
        if path.name != "__init__.py"
    }


def longest_path(files: dict[str, frozenset[str]], file: str, above: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Return the longest chain of imports that starts at a file. Fails where it comes back to where it was."""
    assert file not in above, f"a circle: {' → '.join([*above, file])}"
    chains = [longest_path(files, other, (*above, file)) for other in files[file]]
    return max(chains, key=len, default=(*above, file))


@pytest.mark.parametrize("folder", ["finetuning", "inference", "infra", "setup"])
def test_no_import_comes_back_to_where_it_started(folder: str) -> None:
    files = graph(folder)
    assert sum(map(len, files.values())) >= 2, "no imports were found: this test would see nothing"
    for file in files:
        longest_path(files, file)


def test_imports_go_down_the_rooms() -> None:
    up = {
        f"{file} → {other}"
        for file, others in graph("finetuning").items()
        for other in others
        if FLOORS.get(file.partition("/")[0], 9) < FLOORS.get(other.partition("/")[0], 9)
    }
    assert up == set()
    stories = [file for file in graph("finetuning") if "/" not in file]
    assert sorted(stories) == ["export.py", "invoke_olive.py"]
    assert {file.partition("/")[0] for file in graph("finetuning") if "/" in file} == set(ROOMS)


def test_every_room_says_in_three_lines_what_it_is_for() -> None:
    for room in ROOMS:
        text = (TEMPLATE / "finetuning" / room / "__init__.py").read_text(encoding="utf-8")
        lines = (ast.get_docstring(ast.parse(text)) or "").splitlines()
        assert len([line for line in lines if line]) in (2, 3) and "Belongs here" in text, room


@pytest.mark.parametrize("folder", ["finetuning", "inference"])
def test_no_file_has_more_than_300_lines(folder: str) -> None:
    sizes = {
        path.name: len(path.read_text(encoding="utf-8").splitlines()) for path in (TEMPLATE / folder).rglob("*.py")
    }
    assert {name: size for name, size in sizes.items() if size > 300} == {}


def test_the_engine_knows_no_backend_and_no_source() -> None:
    assert graph("inference")["engine.py"] == frozenset()
    assert {"torch_backend.py", "onnx_backend.py", "sources.py"} <= graph("inference")["load_engine.py"]


def test_no_settings_walk_through_the_house_as_a_dict() -> None:
    found: dict[str, list[str]] = {room: [] for room in UNTYPED}
    root = TEMPLATE / "finetuning"
    for path in sorted(root.rglob("*.py")):
        for function in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(function, ast.FunctionDef) or function.name.startswith("_"):
                continue
            for argument in [*function.args.args, *function.args.kwonlyargs]:
                if argument.annotation and ast.unparse(argument.annotation) in ("dict[str, Any]", "Mapping[str, Any]"):
                    found[str(path.parent.relative_to(root))].append(f"{path.name}: {function.name}({argument.arg})")
    assert {room: len(names) for room, names in found.items()} == UNTYPED, found
