"""What waiting threads cost beside another busy process: training, chat with PyTorch, and chat with ONNX Runtime.

busy_machine.py [--workspace FOLDER] [--python PYTHON] [--rounds N] [--busy N] [--quick]. Three ways to wait: `ours`
(threads sleep: OMP_WAIT_POLICY=PASSIVE, and no spinning in ONNX Runtime), `former` (the libraries' defaults: awake),
and `short` (awake for a moment: GOMP_SPINCOUNT=10000; PyTorch only). Each is measured quiet and beside busy processes,
which loop and do nothing else. Each measurement is a fresh process; in every second round the order is reversed. The
model is a Llama with random weights; a step is a packed batch of 8 rows of 49 tokens, LoRA with rank 16; an answer has
48 tokens. --quick takes a tiny model and one round, to see that everything works: its figures mean nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from itertools import product
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
WAYS = {
    "ours": {"OMP_WAIT_POLICY": "PASSIVE"},
    "former": {},
    "short": {"GOMP_SPINCOUNT": "10000"},
}
WORK = ("training", "torch chat", "onnx chat")
ROWS, ROW, RANK, TOKENS = 8, 49, 16, 48


def main() -> None:
    """Build the model once, measure in turns, print medians and ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=ROOT / ".cache" / "workspace")
    parser.add_argument("--python", type=Path, help="(default: the workspace's)")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--busy", type=int, default=1, help="busy processes beside it (default: 1)")
    parser.add_argument("--quick", action="store_true", help="a tiny model, one round")
    parser.add_argument("--step", nargs=2, help=argparse.SUPPRESS)  # in a process of its own: the work, the model
    options = parser.parse_args()
    if options.step:
        sys.path.insert(0, str(options.workspace / "finetuning"))
        work, folder = options.step
        if work == "prepare":
            return prepare(Path(folder), options.quick)
        measure = {"training": step_time, "torch chat": torch_time, "onnx chat": onnx_time}[work]
        return print(json.dumps(measure(Path(folder))))

    python = options.python or options.workspace / ".venv" / "bin" / "python"
    times: dict[tuple[str, str, str], list[float]] = {}
    with tempfile.TemporaryDirectory() as folder:
        command = [str(python), __file__, "--workspace", str(options.workspace), *["--quick"] * options.quick, "--step"]
        subprocess.run([*command, "prepare", folder], check=True)
        measurements = [one for one in product(WORK, WAYS, ("quiet", "busy")) if one[:2] != ("onnx chat", "short")]
        for number in range(1 if options.quick else options.rounds):
            for work, way, beside in measurements[:: -1 if number % 2 else 1]:
                with busy(options.busy if beside == "busy" else 0):
                    seconds = run([*command, work, folder], WAYS[way])
                times.setdefault((work, way, beside), []).append(seconds)
                print(f"  round {number + 1}: {work}, {way}, {beside}: {seconds * 1000:.1f} ms", flush=True)
    show({one: statistics.median(values) for one, values in times.items()})
    print(f"{options.busy} busy, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    return None


def run(command: list[str], variables: dict[str, str]) -> float:
    """Return the seconds that a fresh process measures."""
    left_out = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "OMP_NUM_THREADS")
    environment = {name: value for name, value in os.environ.items() if name not in left_out} | variables
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    return float(json.loads(done.stdout.splitlines()[-1]))


@contextlib.contextmanager
def busy(processes: int) -> Iterator[None]:
    """Keep so many processes busy meanwhile."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for one in running:
            one.kill()
            one.wait()


def show(medians: dict[tuple[str, str, str], float]) -> None:
    """Print the medians in milliseconds a step or token, and what the goals are about: ratios."""
    print(f"\n{'median ms':12}{'way':8}{'quiet':>10}{'busy':>10}{'busy / quiet':>14}{'quiet / former':>16}")
    for work, way in {one[:2]: None for one in medians}:
        quiet, beside = medians[work, way, "quiet"], medians[work, way, "busy"]
        cost = quiet / medians[work, "former", "quiet"]
        print(f"{work:12}{way:8}{quiet * 1000:10.1f}{beside * 1000:10.1f}{beside / quiet:14.2f}{cost:16.3f}")


def prepare(folder: Path, quick: bool) -> None:
    """Save a Llama with random weights and the demo's tokenizer, and its int4 ONNX model as the export builds it."""
    import transformers
    import yaml

    from settings.startup import quiet

    quiet()
    from exporting.int4 import build
    from preparing.dataset import chat_rows
    from preparing.workspace import MODEL_FACTS, SAMPLE
    from training.tiny_model import build_tokenizer

    rows = chat_rows("train", train_file=str(SAMPLE), held_out_file="unused")
    tokenizer = build_tokenizer(yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8")), rows)
    transformers.set_seed(1)
    size = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 2048}
    if not quick:
        size = {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "vocab_size": 49152}
    ids = {name: getattr(tokenizer, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    heads = {"num_attention_heads": size["hidden_size"] // 64, "num_key_value_heads": size["hidden_size"] // 64}
    config = transformers.LlamaConfig(**size, **heads, **ids, max_position_embeddings=2048)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    with contextlib.redirect_stdout(sys.stderr):
        build(folder / "model", folder / "onnx", "cpu")


def load(folder: Path) -> Any:
    """Load the model in float32."""
    import torch
    from transformers import AutoModelForCausalLM
    from transformers.utils import logging

    logging.disable_progress_bar()
    return AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)


def step_time(folder: Path) -> float:
    """Train for some steps; return the median seconds of one."""
    import peft
    import torch

    from training import batches, train

    torch.manual_seed(1)
    lora = peft.LoraConfig(r=RANK, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    model = peft.get_peft_model(load(folder), lora)
    optimizer = torch.optim.AdamW([weight for weight in model.parameters() if weight.requires_grad], lr=1e-4)
    drawn = torch.randint(3, 2000, (ROWS, ROW)).tolist()
    rows = [{"input_ids": row, "labels": [-100] * (ROW // 2) + row[ROW // 2 :]} for row in drawn]
    assert train.can_pack(model, rows)
    model.train()
    times = []
    for _ in range(5):
        started = time.perf_counter()
        (batches.answer_loss(model, batches.pack(rows)) / ROWS).backward()
        optimizer.step()
        optimizer.zero_grad()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def torch_time(folder: Path) -> float:
    """Answer with PyTorch; return the median seconds of a token."""
    import torch

    model, times = load(folder).eval(), []
    with torch.inference_mode():
        ids, cache = torch.arange(5, 5 + ROW)[None], None
        for _ in range(TOKENS):
            started = time.perf_counter()
            output = model(input_ids=ids, past_key_values=cache, use_cache=True)
            ids, cache = output.logits[:, -1:].argmax(-1), output.past_key_values
            times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


def onnx_time(folder: Path) -> float:
    """Answer with ONNX Runtime GenAI; return the median seconds of a token. It spins unless the policy is passive."""
    import onnxruntime_genai

    config = onnxruntime_genai.Config(str(folder / "onnx"))
    spins = "0" if os.environ.get("OMP_WAIT_POLICY") == "PASSIVE" else "1"
    options = {"session_options": {"session.intra_op.allow_spinning": spins}}
    config.overlay(json.dumps({"model": {"decoder": options}}))
    model = onnxruntime_genai.Model(config)
    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, max_length=ROW + TOKENS, min_length=ROW + TOKENS)
    generator, times = onnxruntime_genai.Generator(model, settings), []
    generator.append_tokens(list(range(5, 5 + ROW)))
    for _ in range(TOKENS):
        started = time.perf_counter()
        generator.generate_next_token()
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
