"""`make site` stops at an error that would be on the site, and says where it is."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

sys.path.append(str(ROOT / "docs"))
from configurator import transpile

PYTHON = ROOT / ".cache" / "site" / "bin" / "python"


@pytest.fixture
def repository(tmp_path: Path) -> Path:
    """The sources of the site."""
    for name in ("docs", "catalog", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE", "copier.yml"):
        shutil.copy(ROOT / name, tmp_path)
    return tmp_path


def build(repository: Path) -> subprocess.CompletedProcess[str]:
    command = [str(PYTHON), str(repository / "docs/make_site.py")]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_a_broken_link_stops_the_build(repository: Path) -> None:
    with (repository / "docs/how-to/api.md").open("a", encoding="utf-8") as page:
        page.write("\n[nowhere](nowhere.md)\n")
    done = build(repository)
    assert done.returncode == 1
    assert "make_site: zensical refuses the pages:" in done.stderr and "docs/how-to/api.md" in done.stderr
    assert not (repository / "site").exists()


def test_an_expression_that_the_page_cannot_evaluate_stops_the_build(repository: Path) -> None:
    questions = (repository / "copier.yml").read_text(encoding="utf-8")
    (repository / "copier.yml").write_text(questions.replace("default: 16\n", 'default: "{{ [16] | shuffle }}"\n'))
    done = build(repository)
    assert (done.returncode, done.stdout) == (1, "")
    expected = "make_site: copier.yml, lora_r: Filter shuffle in line 1 of the template: "
    assert done.stderr == expected + "docs/configurator/transpile.py does not know it; teach it\n"


@pytest.mark.parametrize(
    "template",
    [
        *("{{ a | shuffle }}", "{{ a | default('', true) }}", "{{ a | map('upper') }}", "{{ a.upper() }}", "{{ a() }}"),
        *("{{ a is none }}", "{{ a.b is defined }}", "{{ a[1:] }}", "{{ a - b }}", "{{ a // b }}", "{{ -a }}"),
        *("{% for a, b in c %}{% endfor %}", "{% for a in b if a %}{% endfor %}", "{% macro a() %}{% endmacro %}"),
        *("{% include a %}", "{% set a, b = c %}", "{% filter lower %}{% endfilter %}", "{{ loop.index | abs }}"),
    ],
)
def test_a_construct_without_javascript_is_refused(template: str) -> None:
    with pytest.raises(transpile.UnknownError):
        transpile.function(template)
