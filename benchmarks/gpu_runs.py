"""The measurements of gpu.py that are whole runs of the workspace's programs: killed, out of memory, and a chat."""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import runpy
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from gpu_models import GIB, MeasureError, configured, device, facts_of, folder
from gpu_plan import NAMES, pins

RUN_STEPS, PROMPT = 20, 64  # of a run that is killed; tokens


def resume(options: argparse.Namespace) -> dict[str, Any]:
    """Kill a run of invoke_olive.py at its first checkpoint, and let it go on to its end."""
    write_config(options, configured(options, max_steps=RUN_STEPS, per_device_train_batch_size=4))
    command = script_command(options, "--keep-worse")
    checkpoints = options.workspace / "models" / "checkpoints"
    run = subprocess.Popen([*command, "--fresh"])
    while not list(checkpoints.glob("*/checkpoints/checkpoint-*/sizes.json")):
        if run.poll() is not None:
            raise MeasureError(f"the run ended with status {run.returncode} before its first checkpoint, see gpu.log")
        time.sleep(0.005)
    run.send_signal(signal.SIGKILL)
    run.wait()
    started = time.monotonic()
    status, said = finished(command)
    came = re.search(r"Resuming from checkpoint-(\d+)", said)
    if status or not came:
        raise MeasureError(f"the killed run did not go on (status {status}), see gpu.log")
    run_json = json.loads((options.workspace / "models" / "run.json").read_text(encoding="utf-8"))
    before, after = (run_json["metrics"][when]["eval_loss"] for when in ("before", "after"))
    return {
        "text": f"{run_json['method']}, {NAMES[options.model]}: killed, resumed from step {came[1]} of {RUN_STEPS} in "
        f"{time.monotonic() - started:.0f} s; held-out loss {before:.3f} before, {after:.3f} after"
    }


def full(options: argparse.Namespace) -> dict[str, Any]:
    """Let a run of invoke_olive.py meet the end of the GPU's memory in its training; return its last sentence."""
    write_config(options, configured(options, max_steps=4, per_device_eval_batch_size=1))
    limit = 2 * facts_of(options)["parameters"] / GIB + 1.0  # enough for the model, and for an evaluation
    status, said = finished(script_command(options, "--fresh", "--keep-worse", limit=limit))
    errors = [line for line in said.splitlines() if line.startswith("error: ")]
    if options.dry and status == 0:
        return {"text": "a CPU has no such limit: the run ended well"}
    if status != 1 or not errors or "memory is full" not in errors[-1]:
        raise MeasureError(f"the run ended with status {status} and {errors[-1] if errors else 'no sentence'}")
    return {"text": f"{limit:.1f} GiB allowed: «{errors[-1]}»"}


def chat(options: argparse.Namespace) -> dict[str, Any]:
    """Make the int4 model with the workspace's export, and let it answer, greedily."""
    from settings.startup import leave_out, quiet

    quiet()
    leave_out("torchmetrics")
    import onnxruntime_genai

    from exporting import int4

    device(options)
    provider = int4.choose_provider(None)
    if provider != "cuda" and not options.dry:
        raise MeasureError(f"put the wheel of {pins()['onnxruntime-genai-cuda']} into the folder of --wheels")
    place, started = options.workspace / "models" / "onnx", time.monotonic()
    with contextlib.redirect_stdout(sys.stderr):
        int4.build(folder(options), place, provider)
    built = time.monotonic() - started
    model, tokens, speeds = int4.load_onnx(place), 16 if options.dry else 256, []
    settings = onnxruntime_genai.GeneratorParams(model)
    # random weights may end an answer at any token
    settings.set_search_options(do_sample=False, min_length=PROMPT + tokens, max_length=PROMPT + tokens)
    for _ in range(3):
        generator = onnxruntime_genai.Generator(model, settings)
        generator.append_tokens(list(range(300, 300 + PROMPT)))
        generator.generate_next_token()
        started = time.perf_counter()
        for _ in range(tokens - 1):
            generator.generate_next_token()
        speeds.append((tokens - 1) / (time.perf_counter() - started))
    speed = statistics.median(speeds)
    said = f"{NAMES[options.model]} on {provider}: {speed:.0f} tokens/s; built in {built:.0f} s"
    return {"text": said, "speed": speed}


def write_config(options: argparse.Namespace, config: dict[str, Any]) -> None:
    """Write olive-config.yaml of the workspace, for a run on the rows of text."""
    import yaml

    for data in config["data_configs"]:
        files = {"train_file": "rows", "held_out_file": "held-out"}
        data["load_dataset_config"] |= {key: str(folder(options) / f"{name}.jsonl") for key, name in files.items()}
        data["pre_process_data_config"] |= {"model_path": config["input_model"]["model_path"], "revision": None}
        data["pre_process_data_config"] |= {"max_seq_len": 512 if options.dry else 1024}
    file = options.workspace / "finetuning" / "olive-config.yaml"
    file.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")


def script_command(options: argparse.Namespace, *more: str, limit: float | None = None) -> list[str]:
    """Return the command that runs invoke_olive.py in a process of its own."""
    measure = Path(__file__).with_name("gpu_measure.py")
    command = [sys.executable, str(measure), "script", "--workspace", str(options.workspace)]
    command += [*(["--dry"] if options.dry else []), *(["--limit", str(limit)] if limit else [])]
    return [*command, "--script", "finetuning/invoke_olive.py", *more]


def finished(command: list[str]) -> tuple[int, str]:
    """Run a command; return its exit status and what it said, which goes to the log too."""
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
    print(done.stdout)
    return done.returncode, done.stdout


def script(options: argparse.Namespace) -> None:
    """Run a script of the workspace as if it had been called, with a part of the GPU's memory."""
    import torch

    on = device(options)
    if options.limit and on == "cuda":
        torch.cuda.set_per_process_memory_fraction(options.limit * GIB / torch.cuda.mem_get_info()[1])
    sys.argv = options.script
    sys.path[0] = str(Path(options.script[0]).resolve().parent)
    runpy.run_path(options.script[0], run_name="__main__")
