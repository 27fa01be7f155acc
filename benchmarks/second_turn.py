"""The second turn of a chat: the time to its first token, with what the engines keep of the first turn, and without.

second_turn.py MODEL [--onnx FOLDER] [--workspace FOLDER] [--tokens N] [--rounds N]. MODEL is a folder as from the hub;
FOLDER, its int4 ONNX model, is built if it is not there. Run it with the workspace's Python. A chat has a history of N
tokens (default: 2,000); its first answer has up to 16, and the second question 20. Both ways are measured in turns in
one process for each engine: `kept` goes on with what was computed for the first turn, `anew` is a backend that forgot
it, as it was until release 0.3. Both must give the same answer.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
ANSWER, QUESTION = 16, 20  # tokens


def main() -> None:
    """Measure each engine in a process of its own; print medians and the ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("--onnx", type=Path, help="(default: .cache/second-turn/MODEL)")
    parser.add_argument("--workspace", type=Path, default=ROOT / ".cache" / "workspace")
    parser.add_argument("--tokens", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--step", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    onnx = options.onnx or ROOT / ".cache" / "second-turn" / options.model.name
    os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
    if options.step == "build":
        return build(options.model, onnx, options.workspace)
    if options.step:
        return print(json.dumps(measure(options, onnx)))
    command = [sys.executable, __file__, str(options.model), "--onnx", str(onnx), "--workspace", str(options.workspace)]
    command += ["--tokens", str(options.tokens), "--rounds", str(options.rounds), "--step"]
    if not (onnx / "genai_config.json").is_file():
        subprocess.run([*command, "build"], check=True)
    print(f"{'engine':8}{'anew, s':>10}{'kept, s':>10}{'kept / anew':>13}")
    for engine in ("torch", "onnx"):
        done = subprocess.run([*command, engine], check=True, stdout=subprocess.PIPE, text=True)
        times = json.loads(done.stdout.splitlines()[-1])
        anew, kept = statistics.median(times["anew"]), statistics.median(times["kept"])
        print(f"{engine:8}{anew:10.2f}{kept:10.2f}{kept / anew:13.3f}", flush=True)
    return print(f"{options.tokens} tokens before, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")


def build(model: Path, folder: Path, workspace: Path) -> None:
    """Build the int4 model as the export does."""
    sys.path.insert(0, str(workspace / "finetuning"))
    from settings.startup import quiet

    quiet()
    from exporting.int4 import build

    folder.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build(model.resolve(), folder.resolve(), "cpu")


def measure(options: argparse.Namespace, onnx: Path) -> dict[str, list[float]]:
    """Return the seconds to the first token of the second turn, both ways."""
    sys.path.insert(0, str(options.workspace / "inference"))
    import load_engine  # noqa: F401 - it sets what the libraries read when they are imported
    from engine import Generation, Source

    source = Source(options.model.name, None, None, "lora", "float32", "")
    backend: Any
    if options.step == "torch":
        from torch_backend import TorchBackend

        backend = TorchBackend(source, options.model, options.workspace)
    else:
        from onnx_backend import OnnxBackend

        backend = OnnxBackend(source, onnx, onnx.parent)
    words = "the cat sat on a mat and then it went to town where people sang songs about rain and a long way home"
    draw = random.Random(1)
    times: dict[str, list[float]] = {"anew": [], "kept": []}
    for number in range(options.rounds):
        history = backend.encode(" ".join(draw.choices(words.split(), k=2 * options.tokens)))[: options.tokens]
        question = backend.encode(" ".join(draw.choices(words.split(), k=2 * QUESTION)))[:QUESTION]
        answers = {}
        for way in ("anew", "kept")[:: -1 if number % 2 else 1]:
            backend.kept = None
            prompt = [*history, *tokens_of(backend.generate(history, Generation(ANSWER))), *question]
            if way == "anew":
                backend.kept = None
            started = time.perf_counter()
            tokens = tokens_of(backend.generate(prompt, Generation(ANSWER)))
            answers[way] = [next(tokens, None)]
            times[way].append(time.perf_counter() - started)
            answers[way] += tokens
        assert answers["anew"] == answers["kept"], answers
    return times


def tokens_of(generated: Iterator[int | None]) -> Iterator[int]:
    """Yield an answer's tokens; None stands for a piece of the prompt."""
    return (token for token in generated if token is not None)


if __name__ == "__main__":
    main()
