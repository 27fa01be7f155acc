"""The first tutorial, command by command, in one shell: the commands show what the page promises."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
TUTORIAL = (REPOSITORY / "docs" / "tutorial" / "first-fine-tuning.md").read_text(encoding="utf-8")
PUBLISHED = "PATH-OR-URL-OF-THIS-REPOSITORY"
BETWEEN = "=== the next block ==="
# Instead of the hook, which would install the packages a second time: they are in the environment of these tests.
HOOK = f"import pathlib\npathlib.Path('.venv').symlink_to({sys.prefix!r})\n"


def blocks(language: str) -> list[str]:
    """Return the tutorial's fenced blocks in this language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TUTORIAL, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Follow the tutorial in an empty folder; return what each of its blocks printed."""
    if not (Path(sys.prefix) / "bin" / "activate").is_file():
        pytest.skip("these tests do not run in a venv, which the tutorial activates")
    folder = tmp_path_factory.mktemp("tutorial")
    template = folder / "template"
    template.mkdir()
    for part in ("catalog", "hooks", "template"):
        shutil.copytree(REPOSITORY / part, template / part, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(REPOSITORY / "copier.yml", template)
    (template / "hooks" / "create_env.py").write_text(HOOK, encoding="utf-8")
    commands = f"echo '{BETWEEN}'\n".join(blocks("bash"))
    assert commands.count(PUBLISHED) == 1
    environment = {name: value for name, value in os.environ.items() if name != "COLUMNS"}
    environment["PATH"] = os.pathsep.join([str(REPOSITORY / ".venv" / "bin"), environment["PATH"]])
    (folder / "here").mkdir()
    done = subprocess.run(
        ["bash", "-e", "-c", commands.replace(PUBLISHED, str(template))],
        cwd=folder / "here",
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        encoding="utf-8",
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout.split(f"{BETWEEN}\n")


def figures(output: str) -> list[str]:
    """Return the rows of the first table that a run ends with."""
    return re.findall(r"^│ (?:exact answers|eval loss|perplexity) .*│$", output, re.MULTILINE)


def accuracy(output: str) -> list[float]:
    """Return the shares of exact answers before and after, as the table shows them."""
    return [float(share) / 100 for share in re.findall(r"([\d.]+)%", figures(output)[0])]


def test_the_data_look_as_the_tutorial_shows_them(outputs: list[str]) -> None:
    (row,) = blocks("json")
    assert row in outputs[1]
    assert "finetuning" in outputs[1].split()


def test_the_check_ends_with_the_command_of_the_next_section(outputs: list[str]) -> None:
    assert outputs[2].rstrip().endswith(blocks("bash")[3].strip())


def test_chance_becomes_nearly_always_right_on_the_numbers_of_rows_that_are_named(outputs: list[str]) -> None:
    held_out, trained_on = re.search(r"answered (\d+) \*held-out\*", TUTORIAL), re.search(r"on (\d+) other", TUTORIAL)
    assert held_out
    assert trained_on
    assert f"{trained_on[1]} rows to train on, {held_out[1]} held out\n" in outputs[3]
    before, after = accuracy(outputs[3])
    assert 0.2 <= before <= 0.35  # "one answer in four"
    assert after >= 0.95


def test_the_named_files_exist_and_have_the_metrics(outputs: list[str]) -> None:
    listing, _, run_json = outputs[4].partition("{")
    assert {"adapter_model.safetensors", "tokenizer.json", "index.html"} <= set(listing.split())
    run = json.loads("{" + run_json)
    assert [run["metrics"][moment]["accuracy"] for moment in ("before", "after")] == pytest.approx(
        accuracy(outputs[3]), abs=1e-4
    )
    assert len(run["examples"]) == 10  # "ten answers before and after"


def test_the_two_answers_differ_and_the_second_is_the_one_promised(outputs: list[str]) -> None:
    promised = re.search(r"second one should say `(\w+)`", TUTORIAL)
    assert promised
    base, tuned = outputs[5].split()
    assert base != tuned == promised[1]


def test_one_epoch_is_hardly_better_than_chance_and_the_restored_setting_gives_the_same_metrics(
    outputs: list[str],
) -> None:
    assert accuracy(outputs[6])[1] < 0.4
    assert len(figures(outputs[3])) == 3
    assert figures(outputs[7]) == figures(outputs[3])
