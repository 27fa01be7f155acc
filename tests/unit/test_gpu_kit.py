"""benchmarks/gpu.py: its wheels, its environment, and that a measurement which fails is a line and ends nothing."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import shlex
import subprocess
import sys
import time
import venv
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
KIT = REPOSITORY / "benchmarks" / "gpu.py"
sys.path.append(str(KIT.parent))
import gpu_plan  # noqa: E402

spec = importlib.util.spec_from_file_location("gpu_kit", KIT)  # a workspace's setup/ has another gpu.py
assert spec and spec.loader
kit = importlib.util.module_from_spec(spec)
spec.loader.exec_module(kit)

TITLE = "ours: QLoRA"
FIGURES = {"speed": 8123.4, "estimated_speed": 9000, "allocated": 5.5, "reserved": 6.25, "used": 7, "estimated": 7.1}
FAILED = f"""print('{gpu_plan.FIGURES}{{"failed": "trl is not installed"}}')"""


def result(step: str, status: str, **more: Any) -> dict[str, Any]:
    return {"step": step, "status": status, "title": TITLE, "unproven": "speed", "seconds": 3.0, **more}


def report(*results: dict[str, Any], dry: bool = False) -> dict[str, Any]:
    versions = {"torch": "2.11.0", "trl": None}
    return {"date": "2026-11-30", "dry": dry, "machine": {"machine": "a GPU", "versions": versions}, "results": results}


def cells(text: str, start: str) -> list[str]:
    """Return the cells of the row that starts so."""
    (row,) = [line for line in text.splitlines() if line.startswith(f"| {start}")]
    return [cell.strip() for cell in row.strip("|").split("|")]


# ---- wheels


def test_every_wheel_has_the_version_of_the_lock_or_one_of_its_own_if_the_lock_lacks_it() -> None:
    lock = (REPOSITORY / "template" / "setup" / "requirements-gpu.txt").read_text()
    own = set()
    for name, pin in gpu_plan.pins().items():
        locked, version = gpu_plan.SAME_VERSION.get(name, name), pin.partition("==")[2]
        if not re.search(rf"^{locked}=={re.escape(version)} ", lock, re.MULTILINE):
            own.add(name)
            assert f"\n{locked}==" not in lock, pin
    assert own == {"trl", "onnxruntime-gpu"}


def test_the_kit_never_fetches_torch_or_what_comes_with_it() -> None:
    assert not [name for name in gpu_plan.pins() if kit.NEVER.match(f"{name.replace('-', '_')}-1.0")]
    assert kit.NEVER.match("torch-2.11.0-cp312.whl") and kit.NEVER.match("nvidia_cublas-13.1-py3.whl")
    assert not kit.NEVER.match("torchmetrics-1.9.0-py3.whl")


def test_the_command_that_fetches_wheels_leaves_out_what_the_machine_has(tmp_path: Path) -> None:
    (tmp_path / "have.txt").write_text("Package    Version\n---------- -------\npandas     3.1.1\npydantic_core 2.1\n")
    options = ["--download", "wheels", "--python", "3.13", "--have", str(tmp_path / "have.txt")]
    done = subprocess.run([sys.executable, str(KIT), *options], capture_output=True, text=True, check=True)
    command = shlex.split(done.stdout)
    assert command[:4] == ["python3", "-m", "pip", "download"]
    assert command[command.index("--python-version") + 1] == "3.13"
    names = {word.partition("==")[0] for word in command if "==" in word}
    assert names == set(gpu_plan.pins()) - {"pandas", "pydantic-core"}


def test_the_environment_has_the_wheels_and_what_this_python_sees_but_no_other_torch(
    tmp_path: Path, small_workspace: Any
) -> None:
    for name, version in (("small", "1.0"), ("torch", "9.9")):
        small_workspace.make_wheel(tmp_path / "wheels", name, version)
    python = kit.environment(tmp_path / "wheels", tmp_path / "environment", tmp_path / "log")
    code = "import importlib.util as u, small, pytest; print(small.__version__, pytest.__file__, u.find_spec('torch'))"
    done = subprocess.run([python, "-c", code], capture_output=True, text=True, check=True)
    found = importlib.util.find_spec("torch")
    assert done.stdout.strip() == f"1.0 {pytest.__file__} {found}"


def test_a_folder_without_wheels_is_said_and_the_machine_s_python_measures(tmp_path: Path) -> None:
    options = argparse.Namespace(wheels=tmp_path, minutes=0.0, dry=True)
    made = kit.measure(options, [], tmp_path / "work", tmp_path / "out")
    assert made["wheels"] == f"the wheels are not installed ({tmp_path} has no wheels)"


# ---- measurements


def outcome(tmp_path: Path, code: str, seconds: float = 30) -> dict[str, Any]:
    done: dict[str, Any] = kit.outcome([sys.executable, "-c", code], seconds, tmp_path / "log")
    return done


def test_the_figures_of_a_measurement_are_its_last_line_of_that_kind(tmp_path: Path) -> None:
    code = f"print('{gpu_plan.FIGURES}' + '{{\"speed\": 5}}'); print('a library says goodbye')"
    done = outcome(tmp_path, code)
    assert done["status"] == "measured" and done["figures"] == {"speed": 5}
    assert "a library says goodbye" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        (FAILED, "trl is not installed"),
        ("raise SystemExit('no such thing')", "ended with status 1: no such thing"),
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "ended with status -9: it said nothing"),
    ],
)
def test_a_measurement_that_fails_has_its_reason_in_a_sentence(tmp_path: Path, code: str, reason: str) -> None:
    done = outcome(tmp_path, code)
    assert done["status"] == "failed" and done["reason"] == f"failed: {reason}"


def test_a_measurement_that_takes_too_long_ends_with_all_that_it_started(tmp_path: Path) -> None:
    started = "subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])"
    code = f"import subprocess, sys, time; print({started}.pid, flush=True); time.sleep(600)"
    done = outcome(tmp_path, code, seconds=3)
    assert done["reason"].startswith("failed: took longer than 3 s: ")
    state = Path("/proc") / done["reason"].rpartition(" ")[2] / "stat"
    until = time.monotonic() + 10
    while state.exists() and state.read_text().rpartition(") ")[2][0] != "Z":
        assert time.monotonic() < until, "the process that it started still runs"


def test_what_finds_no_time_is_listed_as_not_measured(tmp_path: Path) -> None:
    options = argparse.Namespace(wheels=None, minutes=0.0, dry=False)
    made = kit.measure(options, list(gpu_plan.PLAN), tmp_path / "work", tmp_path / "out")
    assert {one["reason"] for one in made["results"]} == {"not measured: time"}
    text = (tmp_path / "out" / "gpu.md").read_text()
    assert text.count("not measured: time") == len(gpu_plan.PLAN) - 1  # all but the machine, which is no row
    assert json.loads((tmp_path / "out" / "gpu.json").read_text()) == made


def test_a_measurement_that_cannot_even_start_is_a_line(tmp_path: Path) -> None:
    (tmp_path / "work").mkdir()
    (tmp_path / "work" / "machine").write_text("a file where its workspace should be")
    options = argparse.Namespace(wheels=None, minutes=9.0, dry=False)
    first, second = kit.measure(options, kit.chosen(["full"])[:2], tmp_path / "work", tmp_path / "out")["results"]
    assert first["status"] == "failed" and "File exists" in first["reason"]
    assert second["name"] == "make-qwen3" and second["status"] == "failed" and "torch" in second["reason"]


def test_a_machine_without_the_packages_gets_a_line_for_each_measurement(tmp_path: Path) -> None:
    venv.create(tmp_path / "bare", symlinks=True)
    command = [tmp_path / "bare" / "bin" / "python", KIT, "--dry", "--only", "ours-qwen3-lora,chat"]
    env = {"PATH": os.environ["PATH"]}
    done = subprocess.run([*command, "--out", tmp_path / "out"], env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and not done.stderr
    results = json.loads((tmp_path / "out" / "gpu.json").read_text())["results"]
    assert [one["status"] for one in results] == ["failed"] * 4
    assert all(re.fullmatch(r"failed: [\w-]+ is not installed: .+", one["reason"]) for one in results)
    assert "failed: olive-ai is not installed: put the wheel of olive-ai==" in (tmp_path / "out" / "gpu.md").read_text()


def test_an_unknown_name_is_an_error_before_anything_is_measured(tmp_path: Path) -> None:
    command = [sys.executable, str(KIT), "--only", "machine,nothing", "--out", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "--only has no nothing" in done.stderr
    assert not (tmp_path / "out").exists()


def test_names_are_unique_and_a_model_is_made_before_it_is_measured() -> None:
    names = [one.name for one in gpu_plan.PLAN]
    assert len(set(names)) == len(names)
    made = {None}
    for one in gpu_plan.PLAN:
        made |= {one.model} if one.step == "prepare" else set()
        assert one.model in made, one.name


def test_a_choice_comes_with_the_models_that_it_needs_and_in_the_order_of_the_plan() -> None:
    names = [one.name for one in gpu_plan.chosen(["chat", "attention", "ours-phi-lora"])]
    assert names == ["machine", "attention", "make-qwen3", "chat", "make-phi", "ours-phi-lora"]


# ---- tables


def test_a_training_is_a_row_with_speed_and_memory_beside_their_estimates() -> None:
    text = kit.as_markdown(report(result("ours", "measured", figures=FIGURES)))
    assert cells(text, TITLE)[1:] == ["8,123", "9,000", "5.50", "6.25", "7.00", "7.10"]
    assert text.startswith("a GPU; torch 2.11.0; 2026-11-30.\n")
    assert "not proven" not in text


def test_a_peer_has_no_estimates_and_says_what_it_does() -> None:
    figures = {"speed": 7000.0, "allocated": 6.0, "reserved": 7.5, "used": 8.0, "note": "packing, sdpa"}
    text = kit.as_markdown(report(result("trl", "measured", figures=figures)))
    assert cells(text, TITLE) == [f"{TITLE} (packing, sdpa)", "7,000", "", "6.00", "7.50", "8.00", ""]


@pytest.mark.parametrize("step", ["ours", "attention", "resume"])
def test_a_failed_measurement_is_a_row_as_wide_as_the_others(step: str) -> None:
    text = kit.as_markdown(report(result(step, "failed", reason="failed: out of | memory")))
    (row,) = [line for line in text.splitlines() if TITLE in line]
    head = text.splitlines()[text.splitlines().index(row) - 2]
    assert "| failed: out of / memory |" in row
    assert row.count("|") == head.count("|")


def test_a_dry_run_says_in_each_row_what_it_does_not_prove() -> None:
    rows = [{"what": "heads", "loop_ms": 1.0, "varlen_ms": 0.5, "loop_error": 0.001, "varlen_error": 0.002}]
    made = report(
        result("ours", "measured", figures=FIGURES),
        result("attention", "measured", figures={"rows": rows}),
        result("full", "measured", figures={"text": "error: the memory is full"}),
        dry=True,
    )
    text = kit.as_markdown(made)
    assert text.startswith("Tiny models on a CPU (--dry): no figure says anything about a GPU.")
    assert cells(text, "heads")[1:] == ["1.000", "0.500", "1.0e-03", "2.0e-03", "speed"]
    measured = [line for line in text.splitlines() if TITLE in line or line.startswith("| heads")]
    assert len(measured) == 3 and all(line.endswith("| speed |") for line in measured)
