"""Each promise in promises.yml is on its page, and the tests that hold it exist."""

from __future__ import annotations

import ast
import re
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMISES: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "promises.yml").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    """Return a page's text without line breaks, emphasis and the addresses of links."""
    return " ".join(re.sub(r"\]\([^)]*\)|[*\[\]`|]|^[-#>] ", "", text, flags=re.MULTILINE).split())


@cache
def page(name: str) -> str:
    """Return the plain text of a page."""
    return plain((ROOT / name).read_text(encoding="utf-8"))


@cache
def functions(file: str) -> set[str]:
    """Return the names of a file's functions."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["says"][:60])
def test_a_promise_is_on_its_page_and_its_tests_exist(promise: dict[str, Any]) -> None:
    assert plain(promise["says"]) in page(promise["page"]), f"{promise['page']} does not say this any more"
    assert promise["tests"]
    for test in promise["tests"]:
        file, _, name = test.partition("::")
        assert name in functions(file), f"there is no test {test}"
