"""What a GPU needs for the training of a workspace, beside its estimates and its peers, in one call of nine minutes.

On the machine with the GPU, which needs Python with torch, transformers, peft, accelerate, and no network:
    python benchmarks/gpu.py --wheels wheels --out results
Before, on a machine with network and pip, for the Python of the other:
    sh -c "$(python benchmarks/gpu.py --download wheels --python 3.12)"
On any machine, to try all of it on the CPU with tiny models:
    python benchmarks/gpu.py --dry

The measurements come in the order of their importance, each in a process of its own; one that fails or finds no time is
a line with its reason, and the others go on. The results are written after each: gpu.md (a table for README.md),
gpu.json, and gpu.log with all that the processes said. The models have the shapes of the catalogue and random weights;
the workspace is docs/example. Wheels go into an environment that also sees what the machine has; torch stays as it is.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import site
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from gpu_plan import FIGURES, PLAN, REPOSITORY, Measurement, chosen, download

NEVER = re.compile(r"(torch|triton|(nvidia|cuda)_\w+)-")  # how wheels begin that are not installed
# Not measured here; the settings differ from ours (adapter, batch, rows).
PUBLISHED = (
    ("torchtune README: LoRA, Llama-3.2-3B, packed 4,096, A100", 8210, 8.5),
    ("torchtune README: QLoRA, Llama-3.2-3B, packed 4,096, A100", 8035, 4.6),
    ("NeMo AutoModel: LoRA in bfloat16, Llama-3-8B, 4,096, H100", 12473, None),
)


def main() -> int:
    """Print the command that fetches the wheels, or measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--wheels", type=Path, metavar="FOLDER", help="install these, beside what the machine has")
    parser.add_argument("--out", type=Path, metavar="FOLDER", help="(default: .cache/gpu)")
    parser.add_argument("--work", type=Path, metavar="FOLDER", help="for models, 16 GiB (default: a temporary one)")
    parser.add_argument("--minutes", type=float, default=9.0, help="for all of it (default: 9)")
    parser.add_argument("--only", metavar="NAMES", help=f"some of: {','.join(one.name for one in PLAN)}")
    parser.add_argument("--dry", action="store_true", help="tiny models on the CPU: does all of it run?")
    parser.add_argument("--download", metavar="FOLDER", help="print the command that fills a folder with wheels")
    parser.add_argument("--python", default="3.12", help="with --download: the version on the machine with the GPU")
    parser.add_argument("--have", type=Path, metavar="FILE", help="with --download: its `pip list`, to leave these out")
    options = parser.parse_args()
    if options.download:
        print(download(options.download, options.python, options.have.read_text() if options.have else ""))
        return 0
    names = options.only.split(",") if options.only else [one.name for one in PLAN]
    if unknown := set(names) - {one.name for one in PLAN}:
        parser.error(f"--only has no {', '.join(sorted(unknown))}")
    out = options.out or REPOSITORY / ".cache" / "gpu"
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=options.work) as work:
        report = measure(options, chosen(names), Path(work).resolve(), out)
    print(f"\n{as_markdown(report)}\nWritten: {out / 'gpu.md'}, gpu.json and gpu.log")
    return 0 if any(result["status"] == "measured" for result in report["results"]) else 1


def measure(options: argparse.Namespace, plan: list[Measurement], work: Path, out: Path) -> dict[str, Any]:
    """Run the measurements one after the other, writing the results after each; return the report.

    In a dry run, where no time is measured, each processor has one; the models are made before.
    """
    ends = time.monotonic() + 60 * options.minutes
    out.mkdir(parents=True, exist_ok=True)
    log = out / "gpu.log"
    log.write_text("")
    date = time.strftime("%Y-%m-%d", time.gmtime())
    report: dict[str, Any] = {"date": date, "dry": options.dry, "machine": {}, "results": []}
    python = sys.executable
    try:
        python = str(environment(options.wheels, work / "environment", log)) if options.wheels else python
    except (OSError, subprocess.CalledProcessError) as error:
        report["wheels"] = f"the wheels are not installed ({last_line(getattr(error, 'stdout', '') or str(error))})"
        print(report["wheels"], flush=True)

    def run(one: Measurement) -> dict[str, Any]:
        left = ends - time.monotonic()
        if left < one.seconds / 2:
            return {"status": "not measured", "reason": "not measured: time"}
        try:
            return started(one, left)
        except (OSError, ValueError) as error:  # the disk is full, or its figures are no JSON
            return {"status": "failed", "reason": f"failed: {error}", "seconds": 0.0}

    def started(one: Measurement, left: float) -> dict[str, Any]:
        workspace = work / one.name
        left_out = shutil.ignore_patterns(".venv*", "models", "__pycache__")
        shutil.copytree(REPOSITORY / "docs" / "example", workspace, ignore=left_out)
        command = [python, str(Path(__file__).with_name("gpu_measure.py")), one.step, "--workspace", str(workspace)]
        command += ["--models", str(work / "models"), *one.options, *(["--dry"] if options.dry else [])]
        allowed = one.seconds * (4 if options.dry else 1)  # a busy machine proves as much
        return outcome(command, min(allowed, left), log, options.dry)

    def note(one: Measurement, result: dict[str, Any]) -> None:
        result |= {"name": one.name, "step": one.step, "title": one.title, "unproven": one.unproven}
        if one.step == "machine":
            report["machine"] = result.get("figures", {})
        report["results"].append(result)
        print(f"{one.title}: {short(result)}", flush=True)
        (out / "gpu.json").write_text(json.dumps(report, indent=1) + "\n")
        (out / "gpu.md").write_text(as_markdown(report))

    if not options.dry:
        for one in plan:
            note(one, run(one))
        return report
    first = [one for one in plan if one.step in ("machine", "prepare")]
    with ThreadPoolExecutor(os.cpu_count() or 1) as pool:
        for part in (first, [one for one in plan if one not in first]):
            for one, result in zip(part, pool.map(run, part), strict=True):
                note(one, result)
    return report


def outcome(command: list[str], seconds: float, log: Path, dry: bool = False) -> dict[str, Any]:
    """Run a measurement; return its figures, or in one sentence why it has none. Ends it, and all that it started."""
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    env |= {"CUDA_VISIBLE_DEVICES": ""} if dry else {}
    started = time.monotonic()
    with tempfile.TemporaryFile("w+", errors="replace") as said, log.open("a", encoding="utf-8") as kept:
        process = subprocess.Popen(command, stdout=said, stderr=subprocess.STDOUT, env=env, process_group=0)
        try:
            process.wait(seconds)
            reason = f"ended with status {process.returncode}"
        except subprocess.TimeoutExpired:
            reason = f"took longer than {seconds:.0f} s"
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # what it started may still hold the GPU's memory
            process.wait()
        said.seek(0)
        text = said.read()
        kept.write(f"\n==== {shlex.join(command[2:])}\n{text}")
    took = {"seconds": round(time.monotonic() - started, 1)}
    lines = [line.removeprefix(FIGURES) for line in text.splitlines() if line.startswith(FIGURES)]
    figures = json.loads(lines[-1]) if lines else {"failed": f"{reason}: {last_line(text)}"}
    if failed := figures.get("failed"):
        return took | {"status": "failed", "reason": f"failed: {failed}"}
    return took | {"status": "measured", "figures": figures}


def last_line(text: str) -> str:
    """Return the last line of a text, cut to a sentence's length."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:200] if lines else "it said nothing"


def short(result: dict[str, Any]) -> str:
    """Return a result in a few words, for the terminal."""
    return str(result.get("reason") or f"{result['status']} in {result['seconds']:.0f} s")


def environment(wheels: Path, folder: Path, log: Path) -> Path:
    """Make an environment with the wheels that also sees what this Python sees; return its Python.

    A virtual environment sees only the packages of the Python that it was made from, also if that Python is itself in
    a virtual environment: a .pth file names all folders.
    """
    found = sorted(wheels.glob("*.whl"))
    if not found:
        raise FileNotFoundError(f"{wheels} has no wheels")
    venv.create(folder, symlinks=True)
    python = folder / "bin" / "python"
    (own,) = folder.glob("lib/python*/site-packages")
    seen = [*site.getsitepackages(), *([site.getusersitepackages()] if site.ENABLE_USER_SITE else [])]
    (own / "machine.pth").write_text("".join(f"import site; site.addsitedir({path!r})\n" for path in seen))
    chosen = [str(wheel) for wheel in found if not NEVER.match(wheel.name)]
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-index", "--no-deps", *chosen]
    with log.open("a", encoding="utf-8") as kept:
        done = subprocess.run(install, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False)
        kept.write(done.stdout)
    done.check_returncode()
    return python


# ---- tables


def as_markdown(report: dict[str, Any]) -> str:
    """Return all results as tables for README.md."""
    results = [result for result in report["results"] if result["step"] != "machine"]
    training = [result for result in results if result["step"] in ("ours", "bare", "trl")]
    others = [result for result in results if result["step"] not in ("ours", "bare", "trl", "attention")]
    attention = [result for result in results if result["step"] == "attention"]
    lines = [head(report), ""]
    titles = ["", "tokens/s", "estimated", "GiB allocated", "reserved", "with CUDA's own", "estimated"]
    lines += [*table(titles, (training_row(one) for one in training), report["dry"]), ""] if training else []
    titles = ["attention, forward and backward", "by row, ms", "varlen, ms", "error by row", "error of varlen"]
    rows = (row for one in attention for row in attention_rows(one))
    lines += [*table(titles, rows, report["dry"]), ""] if attention else []
    lines += [*table(["", "result"], (text_row(one) for one in others), report["dry"]), ""] if others else []
    rows = ([title, f"{speed:,}", f"{size}" if size else "", ""] for title, speed, size in PUBLISHED)
    lines += [*table(["published, not measured here", "tokens/s", "GiB"], rows, dry=False), ""]
    return "\n".join(lines)


def head(report: dict[str, Any]) -> str:
    """Return machine, versions and date."""
    facts = report["machine"]
    versions = ", ".join(f"{name} {version}" for name, version in facts.get("versions", {}).items() if version)
    said = [facts.get("machine", "machine not known"), versions, report["date"], report.get("wheels", "")]
    dry = "Tiny models on a CPU (--dry): no figure says anything about a GPU. " if report["dry"] else ""
    return dry + "; ".join(part for part in said if part) + "."


def table(titles: list[str], rows: Iterator[list[str]], dry: bool) -> list[str]:
    """Return the lines of a table; the last cell of each row, what it does not prove, only shows in a dry run."""
    titles = [*titles, "not proven"] if dry else titles
    lines = [titles, ["---"] * len(titles)]
    for *cells, unproven in rows:
        blanks = [""] * (len(titles) - dry - len(cells))
        lines.append([*cells, *blanks, *([unproven] if dry else [])])
    return [f"| {' | '.join(cell.replace('|', '/') for cell in line)} |" for line in lines]


def training_row(result: dict[str, Any]) -> list[str]:
    """Return the cells of a training; a failed one has its reason instead."""
    if result["status"] != "measured":
        return [result["title"], result["reason"], result["unproven"]]
    figures = result["figures"]
    note = f" ({figures['note']})" if figures.get("note") else ""
    cells = [f"{figures[key]:,.0f}" if figures.get(key) else "" for key in ("speed", "estimated_speed")]
    sizes = [figures.get(key) for key in ("allocated", "reserved", "used", "estimated")]
    return [result["title"] + note, *cells, *(f"{size:.2f}" if size else "" for size in sizes), result["unproven"]]


def attention_rows(result: dict[str, Any]) -> Iterator[list[str]]:
    """Yield the cells of each shape and precision."""
    if result["status"] != "measured":
        yield [result["title"], result["reason"], result["unproven"]]
        return
    for row in result["figures"]["rows"]:
        times = [f"{row[key]:.3f}" for key in ("loop_ms", "varlen_ms")]
        yield [row["what"], *times, *(f"{row[key]:.1e}" for key in ("loop_error", "varlen_error")), result["unproven"]]


def text_row(result: dict[str, Any]) -> list[str]:
    """Return the cells of a measurement whose result is a sentence."""
    said = result["figures"]["text"] if result["status"] == "measured" else result["reason"]
    return [result["title"], said, result["unproven"]]


if __name__ == "__main__":
    sys.exit(main())
