"""One run in several processes, as accelerate launch and torchrun start them: here two on the CPU, with gloo."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RENDERED, REPOSITORY

SHORT = {
    "num_train_epochs": 2,
    "max_rows": 240,
    "eval_split": 37,
    "eval_rows": 1000,
    "eval_steps": 0.1,
    "save_steps": 0.1,
}
TWO = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes") / "workspace"
    shutil.copytree(RENDERED, folder, ignore=shutil.ignore_patterns(".venv", "models", ".git"))
    return folder


def change(folder: Path, settings: dict[str, Any]) -> None:
    config = folder / "finetuning" / "olive-config.yaml"
    text = (RENDERED / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8")
    text = text.replace('"dataset/sample-heldout.jsonl"', "null")
    for key, value in settings.items():
        text, found = re.subn(rf"(?m)^(\s*{key}:) \S+", rf"\1 {value}", text)
        assert found, key
    config.write_text(text, encoding="utf-8")


def command(launcher: list[str], folder: Path) -> list[str]:
    return [*launcher, str(folder / "finetuning" / "invoke_olive.py")]


def run(launcher: list[str], folder: Path) -> tuple[dict[str, Any], str]:
    """Run to the end; return run.json and what was printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command(launcher, folder), capture_output=True, text=True, env=environment, cwd="/")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Traceback" not in done.stderr
    return json.loads((folder / "models" / "run.json").read_text(encoding="utf-8")), done.stdout


def test_two_processes_get_the_loss_of_one_with_twice_the_accumulation(folder: Path) -> None:
    change(folder, SHORT | {"gradient_accumulation_steps": 2})
    one, said_by_one = run([sys.executable], folder)
    change(folder, SHORT)
    two, said = run(TWO, folder)
    steps = re.findall(r"step (\d+/\d+)  loss (\S+)  eval loss (\S+)", said)
    assert [step for step, _, _ in steps] == re.findall(r"step (\d+/\d+)", said_by_one)
    assert said.count("Evaluating models/demo") == 1, "the first process alone speaks"
    assert f"length   {steps[-1][0].split('/')[1]} steps of 32 rows" in said
    assert "16 rows are trained on twice in each epoch: the 2 processes take equally many batches." in said
    assert (one["data"]["repeated_rows"], two["data"]["repeated_rows"]) == (0, 16)
    used = [run["config"]["training"] for run in (one, two)]
    assert [(run["processes"], run["rows_a_step"]) for run in used] == [(1, 32), (2, 32)]
    for moment in ("before", "after"):
        assert two["metrics"][moment]["eval_loss"] == pytest.approx(one["metrics"][moment]["eval_loss"], rel=0.01)
    assert two["config_sha256"] != one["config_sha256"]
    # no row is counted twice although the last batches are not full
    losses = [float(loss) for _, _, loss in re.findall(r"step (\d+/\d+)  loss (\S+)  eval loss (\S+)", said_by_one)]
    assert [float(loss) for _, _, loss in steps] == pytest.approx(losses, abs=1e-3)


def test_a_signal_stops_both_after_the_same_step_and_the_run_resumes_later(folder: Path) -> None:
    change(folder, SHORT | {"num_train_epochs": 10})
    shutil.rmtree(folder / "models" / "checkpoints", ignore_errors=True)
    process = subprocess.Popen(
        command(TWO, folder), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    deadline = time.monotonic() + 120
    while not list((folder / "models" / "checkpoints").glob("*/checkpoints/checkpoint-*/sizes.json")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    said, errors = process.communicate(timeout=60)
    assert errors.count("Stopped. The same command resumes from the newest checkpoint.") == 1, errors[-2000:]
    assert "Evaluating the tuned model" not in said
    _, said = run(TWO, folder)
    assert "Resuming from checkpoint-" in said


@pytest.mark.parametrize("option", ["--check", "--smoke"])
def test_check_and_smoke_are_refused_in_several_processes(folder: Path, option: str) -> None:
    done = subprocess.run([*command(TWO, folder), option], capture_output=True, text=True, timeout=120)
    assert done.returncode != 0
    assert "are for one process: python finetuning/invoke_olive.py --check" in done.stderr


def test_an_error_is_printed_once(folder: Path) -> None:
    change(folder, {"max_rows": 240, "train_file": '"dataset/absent.jsonl"'})
    done = subprocess.run(command(TWO, folder), capture_output=True, text=True)
    assert done.returncode != 0
    assert done.stderr.count("error: The dataset dataset/absent.jsonl is not there") == 1


def test_accelerate_accepts_the_documented_commands() -> None:
    from accelerate.commands.launch import launch_command_parser

    page = (REPOSITORY / "docs" / "how-to" / "several-gpus.md").read_text(encoding="utf-8")
    commands = re.findall(r"^accelerate launch (.*)$", page, re.MULTILINE)
    assert len(commands) == 2
    for words in commands:
        parsed = launch_command_parser().parse_args(words.split())
        assert (parsed.training_script, parsed.num_processes) == ("finetuning/invoke_olive.py", 2)
        assert not parsed.training_script_args


def test_accelerate_reads_the_fsdp_configuration(folder: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.utils import FullyShardedDataParallelPlugin

    path = folder / "finetuning" / "fsdp.yaml"
    assert load_config_from_file(str(path)).distributed_type == "FSDP"
    settings = yaml.safe_load(path.read_text(encoding="utf-8"))["fsdp_config"]
    known = set(FullyShardedDataParallelPlugin.__dataclass_fields__)
    renamed = {"offload_params": "cpu_offload"}
    names = {key.removeprefix("fsdp_") for key in settings}
    assert {renamed.get(name, name) for name in names} <= known | {"version"}
