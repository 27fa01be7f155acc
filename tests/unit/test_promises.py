"""Each promise in promises.yml stands on its page, and the tests that hold it exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
PROMISES: list[dict[str, Any]] = yaml.safe_load((ROOT / "tests" / "promises.yml").read_text(encoding="utf-8"))


def plain(text: str) -> str:
    """Return a page's text without line breaks, emphasis and the addresses of links."""
    return " ".join(re.sub(r"\]\([^)]*\)|[*\[\]`|]|^[-#>] ", "", text, flags=re.MULTILINE).split())


@pytest.mark.parametrize("promise", PROMISES, ids=lambda promise: promise["says"][:60])
def test_a_promise_stands_on_its_page_and_a_test_holds_it(promise: dict[str, Any]) -> None:
    page = (ROOT / promise["page"]).read_text(encoding="utf-8")
    assert plain(promise["says"]) in plain(page), f"{promise['page']} does not say this any more"
    assert promise["tests"]
    for test in promise["tests"]:
        file, _, name = test.partition("::")
        tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
        names = {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)}
        assert name in names, f"there is no test {test}"
