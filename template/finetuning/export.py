"""Make one model of base and adapter: small for ONNX Runtime, or a Hugging Face folder at full precision.

python finetuning/export.py                    models/merged, then models/onnx: fast chat, mainly on a CPU
python finetuning/export.py --format merged    models/merged only: for transformers, vLLM and other tools

Each answers held-out rows before it is published, and must give the answers of base and adapter. For models/onnx, the
weights are stored in 4 bits if that keeps the answers, or else in more: what is tried, and in which order, is in
planning/quantizations.py. A complete export of the same adapter is reused. The figures are in models/run.json.
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

sys.path.insert(0, str(Path(__file__).resolve().parent))  # -P and PYTHONSAFEPATH leave it out
from planning.quantizations import QUANTIZATIONS, order, room
from preparing.workspace import MODELS, ROOT
from settings.startup import explain, quiet

if TYPE_CHECKING:
    from exporting.exported_folder import MadeFrom
    from reporting.run_record import RunRecord


def main() -> int:
    """Parse the command line, export, and report a user error in one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("onnx", "merged"), default="onnx", help="(default: onnx)")
    parser.add_argument(
        "--provider",
        choices=("cpu", "cuda", "dml"),
        help="where the ONNX model runs (default: what the installed onnxruntime-genai supports)",
    )
    parser.add_argument(
        "--quantization",
        choices=("auto", *QUANTIZATIONS),
        default="auto",
        help="try only this one for the ONNX model (default: auto, the smallest that keeps the answers)",
    )
    parser.add_argument(
        "--agreement",
        type=share,
        default=0.99,
        metavar="SHARE",
        help="the least share of whole answers that must be those of base and adapter, 0 to 1 (default: 0.99)",
    )
    parser.add_argument("--debug", action="store_true", help="show library output and the traceback of an error")
    options = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a pipe on Windows has another encoding
    os.chdir(ROOT)  # paths of data files are relative to the workspace
    quiet()
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    try:
        export(options.format, options.provider, options.agreement, options.debug, options.quantization)
    except KeyboardInterrupt:
        print("\nStopped. The same command reuses what is complete.", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def export(kind: str, provider: str | None, agreement: float, debug: bool, quantization: str = "auto") -> None:
    """Merge; for `onnx`, also build, compare and publish the ONNX model. Raises ConfigError and DataError."""
    from filelock import FileLock

    from exporting.agreement import agrees, ask_base_and_adapter
    from exporting.exported_folder import MERGED, ONNX, check_disk, is_made_from, shown, weights_of
    from exporting.int4 import build_onnx, choose_provider
    from exporting.merged import merge
    from exporting.tuned_model import base_folder, check_adapter, family_of, read_run
    from reporting.run_record import published
    from settings.config_file import ConfigError

    run = read_run()
    provider = choose_provider(provider) if kind == "onnx" else ""
    if (quantization, provider) == ("float16", "cpu"):
        raise ConfigError("--quantization float16 is for a GPU: choose float32 on a CPU, or auto.")

    with FileLock(MODELS / ".lock", timeout=0):  # a run would change the adapter meanwhile
        made_from: MadeFrom = {
            "adapter_sha256": check_adapter(run),
            "base_model": published(run["base_model"]),
            "revision": run["revision"],
        }
        base = base_folder(run)
        weights = weights_of(base, run)
        names = (quantization,) if quantization != "auto" else order(family_of(base), weights, provider)
        check_disk(base, kind, made_from, room(names, weights, provider))
        made = run.setdefault("export", {})
        again = is_made_from(MERGED, made_from) and agrees(made.get("merged", {}), agreement)
        reference = None
        if again:
            print(f"Using {shown(MERGED)} again: it was made from this adapter.")
        else:
            print(f"Merging {run['adapter']} into {run['base_model']}", flush=True)
            started = time.monotonic()
            reference = ask_base_and_adapter(run, base)
            record(run, "merged", made_from, started, merge(run, base, made_from, reference, agreement))
        made_for: MadeFrom = {**made_from, "provider": provider}
        asked: MadeFrom = made_for if quantization == "auto" else {**made_for, "quantization": quantization}
        if kind == "onnx" and again and is_made_from(ONNX, asked) and agrees(made.get("onnx", {}), agreement):
            print(f"Using {shown(ONNX)} again: it was made from this adapter.")
        elif kind == "onnx":
            started = time.monotonic()
            reference = reference or ask_base_and_adapter(run, base)
            figures = build_onnx(reference, names, agreement, debug, made_for)
            record(run, "onnx", made_from, started, {"provider": provider} | figures)
    show(made, kind)


def record(run: RunRecord, kind: str, made_from: MadeFrom, started: float, figures: dict[str, Any]) -> None:
    """Record the exported models in models/run.json, under `export`."""
    from exporting.exported_folder import MERGED, ONNX, bytes_in, shown
    from training.whole_files import write_json

    folder = {"merged": MERGED, "onnx": ONNX}[kind]
    run["export"][kind] = {
        "folder": shown(folder),
        "adapter_sha256": made_from["adapter_sha256"],
        "bytes": bytes_in(folder),
        "seconds": round(time.monotonic() - started, 2),
        **figures,
    }
    write_json(MODELS / "run.json", run)


def show(made: dict[str, Any], kind: str) -> None:
    """Print what was made, and the next command."""
    from exporting.exported_folder import MERGED, shown

    for name in ("merged", "onnx") if kind == "onnx" else ("merged",):
        figures = made[name]
        close = f", {figures['close_calls']:.1%} after a close call differ" if figures["close_calls"] else ""
        # older releases made int4 alone
        stored = f"{figures.get('quantization', 'int4')}, " if name == "onnx" else ""
        print(
            f"  {name:6} {figures['folder']}, {stored}{figures['bytes'] / 2**20:,.1f} MiB: on {figures['rows']} "
            f"held-out rows {figures['answers']:.1%} of the answers are base and adapter's{close}"
        )
    if four_bit := made["merged"].get("four_bit"):
        print(f"On the 4-bit base of the training, {four_bit['answers']:.1%} of the answers are the same.")
    serve = f"transformers serve {shown(MERGED)} (after python -m pip install openai), or vllm serve {shown(MERGED)}"
    print(f"Next: {'python inference/console_chat.py' if kind == 'onnx' else serve}")


if __name__ == "__main__":
    sys.exit(main())
