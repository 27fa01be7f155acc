"""Small ONNX models that keep the answers: every quantisation of the export, tried on tuned real models.

int4.py [CASE …] [--folder FOLDER] [--models FOLDER] [--tune-only]

A case is a real model, tuned by a short run on rows of one kind, in a workspace of its own below FOLDER; one that is
tuned already is used as it is. Each is merged, and each quantisation is built and asked all of 200 held-out rows: the
table has the size, the share of answers that are those of base and adapter, and the seconds to build and to ask. What
is measured is kept in FOLDER/CASE.json, and not measured again. Run it with the workspace's Python; the models are
those of the tests (`make bench` makes them), and QLoRA needs the tests' bitsandbytes.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "real")]

import int4_rows  # noqa: E402
from real_walk import set_in  # noqa: E402
from walks import FOLDER, render  # noqa: E402

HELD_OUT, EVALUATED = 200, 16  # rows that are compared; of them, those on which the run itself is evaluated
SETTINGS = {
    "max_steps": 40,
    "learning_rate": 0.002,
    "lora_dropout": 0,
    "max_seq_len": 160,
    "train_batch_size": 8,
    "eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
}


@dataclass(frozen=True)
class Case:
    """A model, the rows that it is tuned on, and how."""

    model: str  # a folder in .cache
    rows: str  # sample, facts or prose
    method: str = "lora"


CASES = {
    "smollm2-sample": Case("smollm2", "sample"),
    "gemma-sample": Case("gemma3-270m", "sample"),
    "smollm2-prose": Case("smollm2", "prose"),
    "smollm2-facts": Case("smollm2", "facts"),
    "smollm2-facts-qlora": Case("smollm2", "facts", "qlora"),
    "smollm2-sample-qlora": Case("smollm2", "sample", "qlora"),
}


def main() -> None:
    """Tune what is not tuned yet, measure each case in a process of its own, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=f"(default: {' '.join(CASES)})")
    parser.add_argument("--folder", type=Path, default=ROOT / ".cache" / "int4")
    parser.add_argument("--models", type=Path, default=ROOT / ".cache", help="where the models are (default: .cache)")
    parser.add_argument("--tune-only", action="store_true")
    parser.add_argument("--measure", type=Path, help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if options.measure:
        return measure(options.measure)
    for name in options.cases or CASES:
        workspace = (options.folder / name).resolve()
        if not (workspace / "models" / "run.json").is_file():
            tune(CASES[name], workspace, options.models)
        if not options.tune_only:
            subprocess.run([sys.executable, __file__, "--measure", str(workspace)], check=True)
            show(name, read(workspace))
    return None


def show(name: str, measured: dict[str, Any]) -> None:
    """Print a case as rows of a Markdown table."""
    for quantization, one in measured.items():
        if "problem" in one:
            print(f"| {name} | {quantization} | {one['problem']} |")
            continue
        shares = f"{one['answers'] + one['close_calls']:.1%} ({one['close_calls']:.1%} after a close call)"
        print(
            f"| {name} | {quantization} | {one['bytes'] / 1e6:.0f} MB | {shares} | {one['build']} s | {one['ask']} s |"
        )


def read(workspace: Path) -> dict[str, Any]:
    """Return what was measured in a workspace: quantisation → figures."""
    file = workspace.with_suffix(".json")
    return dict(json.loads(file.read_text(encoding="utf-8"))) if file.is_file() else {}


def measure(workspace: Path) -> None:
    """Build each quantisation that was not measured yet, and ask it all rows. Each is written as it becomes known."""
    os.chdir(workspace)
    sys.path.insert(0, str(workspace / "finetuning"))
    from settings.startup import quiet

    quiet()
    from export import export
    from exporting.agreement import ask_base_and_adapter, compare
    from exporting.exported_folder import MERGED, bytes_in
    from exporting.int4 import ask_onnx, build
    from exporting.tuned_model import base_folder, read_run
    from planning.quantizations import QUANTIZATIONS

    measured = read(workspace)
    missing = [one for name, one in QUANTIZATIONS.items() if name != "float16" and name not in measured]
    if not missing:
        return
    export("merged", None, agreement=0, debug=False)
    reference = ask_base_and_adapter(read_run(), base_folder(read_run()))
    folder = workspace / "models" / "measured"
    for quantization in missing:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        started = time.monotonic()
        try:
            with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
                build(MERGED, folder, "cpu", quantization)
            built = time.monotonic()
            figures, _ = compare(reference, ask_onnx(reference, folder))
            seconds = {"build": round(built - started, 1), "ask": round(time.monotonic() - built, 1)}
            measured[quantization.name] = {"bytes": bytes_in(folder), **figures, **seconds}
        except Exception as error:
            measured[quantization.name] = {"problem": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
        workspace.with_suffix(".json").write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(folder)


def tune(case: Case, workspace: Path, models: Path) -> None:
    """Render a workspace, write the rows, and let invoke_olive.py tune the model."""
    shutil.rmtree(workspace, ignore_errors=True)
    workspace.parent.mkdir(parents=True, exist_ok=True)
    render(workspace, model="custom", custom_model_id=FOLDER, device="cpu", **SETTINGS)
    folder = workspace / FOLDER
    folder.parent.mkdir(exist_ok=True)
    folder.symlink_to((models / case.model).resolve())
    if case.model.startswith("gemma"):  # a base model: its tokenizer has no chat template
        families = yaml.safe_load((ROOT / "catalog" / "chat_templates.yml").read_text(encoding="utf-8"))["families"]
        facts = workspace / "setup" / "model.yaml"
        known = yaml.safe_load(facts.read_text(encoding="utf-8")) | {"chat_template": families["gemma"]["template"]}
        facts.write_text(yaml.safe_dump(known), encoding="utf-8")
    rows = rows_of(case.rows, workspace)
    write(rows[HELD_OUT:], workspace / "dataset" / "train.jsonl")
    held_out = workspace / "dataset" / "heldout.jsonl"
    write(rows[:EVALUATED], held_out)
    steps = SETTINGS["max_steps"]
    data = {"train_file": "dataset/train.jsonl", "held_out_file": "dataset/heldout.jsonl"}
    set_in(workspace, **data, eval_steps=steps, save_steps=steps)
    command = [str(workspace / "finetuning" / "invoke_olive.py")]
    if case.method == "qlora":
        in_four_bits(workspace / "finetuning" / "olive-config.yaml")
        command.insert(0, str(ROOT / "tests" / "four_bits.py"))
    subprocess.run([sys.executable, *command], check=True)
    write(rows[:HELD_OUT], held_out)


def rows_of(kind: str, workspace: Path) -> list[int4_rows.Row]:
    """Return the rows of a kind; those to hold out come first."""
    if kind != "sample":
        return {"facts": int4_rows.facts, "prose": int4_rows.prose}[kind]()
    names = ("sample-heldout.jsonl", "sample-train.jsonl")
    lines = [line for name in names for line in (workspace / "dataset" / name).read_text("utf-8").splitlines()]
    return [json.loads(line)["messages"] for line in lines]


def write(rows: list[int4_rows.Row], path: Path) -> None:
    """Write rows as JSON lines."""
    lines = (json.dumps({"messages": row}, ensure_ascii=False) + "\n" for row in rows)
    path.write_text("".join(lines), encoding="utf-8")


def in_four_bits(config: Path) -> None:
    """Set QLoRA on a CPU, which the questions offer for a GPU only."""
    text = config.read_text(encoding="utf-8")
    (line,) = (line for line in text.splitlines(keepends=True) if line.startswith("    type: LoRA "))
    qlora = "    type: QLoRA\n    quant_type: nf4\n    double_quant: true\n    compute_dtype: float32\n"
    kept = [one for one in text.replace(line, qlora).splitlines(keepends=True) if "    target_modules: " not in one]
    config.write_text("".join(kept), encoding="utf-8")


if __name__ == "__main__":
    main()
