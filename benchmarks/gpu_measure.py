"""One measurement of gpu.py in a process of its own: gpu_measure.py STEP --workspace FOLDER …

The last line that it prints has its figures as JSON, or under `failed` in one sentence why there are none. Sizes are
GiB, speeds tokens a second: all tokens, questions and answers.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.util
import json
import os
import re
import sys
import traceback
from pathlib import Path

from gpu_models import MeasureError, folder
from gpu_plan import FIGURES, NAMES, pins

# The steps, by the file with a function of that name; `script` is a run of invoke_olive.py, for two of the others.
STEPS = {
    "machine": "gpu_models",
    "prepare": "gpu_models",
    "attention": "gpu_attention",
    "ours": "gpu_training",
    "bare": "gpu_training",
    "trl": "gpu_training",
    "resume": "gpu_runs",
    "full": "gpu_runs",
    "chat": "gpu_runs",
    "script": "gpu_runs",
}
NEEDS = {"ours": "olive-ai", "trl": "trl", "resume": "olive-ai", "full": "olive-ai", "chat": "onnxruntime-genai-cuda"}
MODULES = {"olive-ai": "olive", "onnxruntime-genai-cuda": "onnxruntime_genai"}  # unless named as their package


def main() -> None:
    """Run one step, and print its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=list(STEPS))
    parser.add_argument("--workspace", type=Path, required=True)
    parser.add_argument("--models", type=Path, metavar="FOLDER", help="with the models that were made")
    parser.add_argument("--model", choices=list(NAMES))
    parser.add_argument("--method", choices=["lora", "qlora"], default="lora")
    parser.add_argument("--dtype", choices=["bfloat16", "float16"], default="bfloat16")
    parser.add_argument("--attention", choices=["by-row", "varlen"], default="by-row")
    parser.add_argument("--dry", action="store_true", help="on the CPU, a tiny model of the same architecture")
    parser.add_argument("--limit", type=float, help="of a script: GiB of the GPU that it may take")
    parser.add_argument("--script", nargs=argparse.REMAINDER, help="of the workspace, with its options")
    options = parser.parse_args()
    os.chdir(options.workspace)
    sys.path.insert(0, str(options.workspace / "finetuning"))
    try:
        refuse_missing(options)
        figures = getattr(importlib.import_module(STEPS[options.step]), options.step)(options)
    except Exception as error:
        traceback.print_exc()
        figures = {"failed": sentence(error)}
    print(f"\n{FIGURES}{json.dumps(figures)}", flush=True)


def refuse_missing(options: argparse.Namespace) -> None:
    """Raise MeasureError if a package of the step is missing here, or the model."""
    needed = [NEEDS.get(options.step), "bitsandbytes" if options.method == "qlora" else None]
    for name in filter(None, needed):
        if importlib.util.find_spec(MODULES.get(name, name)) is None:
            raise MeasureError(f"{name} is not installed: put the wheel of {pins()[name]} into the folder of --wheels")
    if options.model and options.step != "prepare" and not (folder(options) / "config.json").is_file():
        raise MeasureError(f"{NAMES[options.model]} was not made before")


def sentence(error: Exception) -> str:
    """Return an error in one sentence."""
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed: --download of gpu.py prints the command that fetches its wheel"
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "no reason given")
    said = re.split(r"(?<=\.) (?=[A-Z])", said)[0].rstrip(".")[:240]
    return said if type(error).__name__ in ("MeasureError", "ConfigError") else f"{type(error).__name__}: {said}"


if __name__ == "__main__":
    main()
