"""Chat on a CPU through the whole stack: PyTorch in float32 with an adapter, and int4 ONNX as the export makes it.

chat_speed.py [--workspace FOLDER] [--python PYTHON] [--rounds N]. A Llama of 0.4 billion parameters with random weights
and a LoRA adapter, exported by finetuning/export.py. Tokens a second are counted behind the first token of an answer of
64, in the engine that console and page share; the start is that of `console_chat.py --prompt`, from nothing to the
first character on the screen. Each round is a fresh process for each engine, in turns. In the end both engines answer
through the API too, as a client in another process sees it, in turns with the bare engine of the same server.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOKENS = 64
QUESTION = "Why was Dad so mournful when the letter from the bank arrived, and what did the teacher read aloud?"
ENGINES = ("torch", "onnx")
ROUNDS_OF_API = 11
CLIENT = f"""
import json, sys, time, urllib.request
body = {{"model": "tuned", "messages": json.loads(sys.argv[2]), "max_tokens": {TOKENS}, "stream": True}}
request = urllib.request.Request(sys.argv[1], json.dumps(body).encode(), {{"Content-Type": "application/json"}})
for _ in sys.stdin:
    started = time.perf_counter()
    with urllib.request.urlopen(request) as answer:
        assert answer.read().count(b"data: ") >= {TOKENS}
    print(time.perf_counter() - started, flush=True)
"""


def main() -> None:
    """Build the models once, run both engines in turns, print medians and ratio."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=ROOT / ".cache" / "workspace")
    parser.add_argument("--python", type=Path, help="(default: the workspace's)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--step", help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.step == "prepare":
        return prepare(options.workspace)
    if options.step and options.step.startswith("api-"):
        return print(json.dumps(api(options.workspace, options.step.removeprefix("api-"))))
    if options.step:
        return print(json.dumps(answer(options.workspace, options.step)))

    python = options.python or options.workspace / ".venv" / "bin" / "python"
    copy = ROOT / ".cache" / "chat-speed"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(options.workspace, copy, ignore=shutil.ignore_patterns(".venv", "models", "__pycache__"))
    step = [python, __file__, "--workspace", copy, "--step"]
    subprocess.run([*step, "prepare"], check=True)
    speeds: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    starts: dict[str, list[float]] = {engine: [] for engine in ENGINES}
    for _ in range(options.rounds):
        for engine in ENGINES:
            done = subprocess.run([*step, engine], check=True, stdout=subprocess.PIPE, text=True)
            speeds[engine].append(json.loads(done.stdout.splitlines()[-1])["speed"])
            starts[engine].append(first_character(python, copy, engine))
    print(f"{options.rounds} rounds, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f} at the end")
    for name, figures, unit in (("answer", speeds, "tokens/s"), ("start to first token", starts, "s")):
        for engine in ENGINES:
            values = figures[engine]
            middle = statistics.median(values)
            print(f"{name:22}{engine:7}{middle:7.2f} {unit:9} ({min(values):.2f} to {max(values):.2f})")
    print(f"onnx / torch, of the medians: {statistics.median(speeds['onnx']) / statistics.median(speeds['torch']):.2f}")
    for engine in ENGINES:
        done = subprocess.run([*step, f"api-{engine}"], check=True, stdout=subprocess.PIPE, text=True)
        bare, asked = json.loads(done.stdout.splitlines()[-1])
        more = statistics.median(after / before for before, after in zip(bare, asked, strict=True)) - 1
        print(f"API over the bare {engine} engine: {more:+.1%} ({min(bare):.2f} s and {min(asked):.2f} s at least)")
    return None


def prepare(workspace: Path) -> None:
    """Make base, adapter and models/run.json, and let the export make the rest, but for the comparison of answers."""
    os.chdir(workspace)
    sys.path.insert(0, str(workspace / "finetuning"))
    from settings.startup import quiet

    quiet()
    import peft
    import torch
    import transformers
    import yaml

    import export
    from exporting import tuned_model
    from preparing.dataset import chat_rows
    from preparing.workspace import SAMPLE
    from reporting.run_record import describe, publish
    from settings.run_settings import read_settings
    from training import tiny_model

    folder = workspace / "models" / "demo"
    rows = chat_rows("train", train_file=str(SAMPLE), held_out_file="unused")
    tiny_model.VOCABULARY = 32000  # so that every token that is drawn can be read
    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(40000)]
    texts = [*rows, [{"role": "user", "content": " ".join(words)}]]
    tokenizer = tiny_model.build_tokenizer(yaml.safe_load((workspace / "setup/model.yaml").read_text()), texts)
    assert len(tokenizer) == 32000
    transformers.set_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=16,
        max_position_embeddings=2048,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        tie_word_embeddings=False,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    print(f"{model.num_parameters() / 1e9:.2f} billion parameters", flush=True)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    run_json = describe(read_settings(), {"train": rows, "held_out": rows[:1]}, None, workspace / "models")
    adapter = peft.LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    peft.get_peft_model(model, adapter).save_pretrained(workspace / "models" / "unpublished")
    publish(run_json, workspace / "models" / "unpublished", str(folder), workspace / "models")
    tuned_model.COMPARED_ROWS = 1  # random weights agree in nothing, and many answers take minutes
    export.export("onnx", None, 0, debug=False, quantization="int4")


def answer(workspace: Path, name: str) -> dict[str, float]:
    """Answer through the engine; return the tokens per second behind the first."""
    sys.path.insert(0, str(workspace / "inference"))
    from engine import Generation
    from load_engine import load

    engine = load(engine=name, root=workspace)
    times: list[float] = []
    generate = engine.backend.generate

    def watched(*arguments: object):
        for token in generate(*arguments):
            if token is not None:  # a piece of the prompt
                times.append(time.perf_counter())
            yield token

    engine.backend.generate = watched
    messages = [{"role": "user", "content": QUESTION}]
    for _ in range(2):  # the first one warms up
        times.clear()
        for _ in engine.stream(messages, Generation(TOKENS), lambda _: None):
            pass
    assert len(times) == TOKENS, f"the answer ended after {len(times)} tokens"
    return {"speed": (TOKENS - 1) / (times[-1] - times[0])}


def api(workspace: Path, name: str) -> tuple[list[float], list[float]]:
    """Serve page and API; return the seconds of the same answers from the engine itself and for a client."""
    sys.path[:0] = [str(workspace / "inference"), str(ROOT / "tests" / "workspace")]
    from served import served

    from engine import Generation
    from load_engine import load

    engine = load(engine=name, root=workspace)
    messages = [{"role": "user", "content": QUESTION}]
    bare, asked = [], []
    with served(lambda: engine) as (address, _):
        client = [sys.executable, "-c", CLIENT, f"{address}v1/chat/completions", json.dumps(messages)]
        with subprocess.Popen(client, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdin and process.stdout
            for _ in range(ROUNDS_OF_API):
                started = time.perf_counter()
                for _ in engine.stream(messages, Generation(TOKENS), lambda _: None):
                    pass
                bare.append(time.perf_counter() - started)
                print(file=process.stdin, flush=True)
                asked.append(float(process.stdout.readline()))
            process.stdin.close()
    return bare[1:], asked[1:]  # the first ones warm up


def first_character(python: Path, workspace: Path, engine: str) -> float:
    """Return the seconds from the start of the console to the first character of its answer."""
    command = [python, workspace / "inference/console_chat.py", "--engine", engine, "--prompt", QUESTION]
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as console:
        assert console.stdout and console.stdout.read(1)
        seconds = time.perf_counter() - started
        console.kill()
    return seconds


if __name__ == "__main__":
    main()
