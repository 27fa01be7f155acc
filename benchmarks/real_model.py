"""Training a real model, SmolLM2-135M-Instruct, beside TRL's three ways to fill a batch, and the limit.

real_model.py [--workspace FOLDER] [--rounds N] [--only WAY ...]. 64 rows of prose, the paragraphs of this repository's
documentation, as long as rows of instruction data are (median 150 tokens, 95th percentile 500); LoRA with rank 16 on
all linear layers, batches of 8 rows, one epoch, 32-bit floats, no gradient checkpointing. TRL packs the rows into
sequences as long as 8 of ours, one a step, so that the steps are as many and as large.

Each way runs in a fresh process. Time: from the beginning of the training to its end, imports not counted. Memory: the
peak of the process. Loss and accuracy: the finished adapter on 16 held-out rows, per answer token, by the same code
for all. `limit` is the matrix products of the training alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import re
import statistics
import sys
import time
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[1]
ROWS, HELD_OUT, BATCH = 64, 16, 8
MEDIAN, SPREAD = 150, 0.73  # tokens a row, log-normal: the 95th percentile is 3.3 times the median
LONGEST = 1024
RANK, ALPHA, DROPOUT, RATE = 16, 32, 0.05, 2e-4
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
OURS = {
    "ours": "ours",
    "ours-padded": "packing: false",
    "ours-all-logits": "logits of every token",
    "ours-whole-attention": "one masked attention for the whole batch",
    "ours-whole-batches": "whole batches, not in pieces",
    "ours-peft-layers": "LoRA's layers as PEFT computes them",
    "ours-bfloat16": "torch_dtype: bfloat16",
}
TRL = {"trl-padded": {}, "trl-packed": {"packing": True}, "trl-padding-free": {"padding_free": True}}
WAYS = (*OURS, *TRL, "limit")


def main() -> None:
    """Prepare the rows, run every way in turns, print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=REPOSITORY / ".cache" / "workspace")
    parser.add_argument("--model", type=Path, default=REPOSITORY / ".cache" / "smollm2")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=WAYS, default=WAYS, help="(default: all)")
    parser.add_argument(
        "--step", choices=["prepare", "measure", *WAYS], help=argparse.SUPPRESS
    )  # in a process of its own
    options = parser.parse_args()
    options.workspace, options.model = options.workspace.resolve(), options.model.resolve()
    if options.step:
        steps: dict[str, Any] = {"prepare": prepare, "measure": measure, "limit": limit}
        step = steps.get(options.step, ours if options.step in OURS else trl)
        print(json.dumps(step(options)))
        return
    from demo_run import run, trl_environment

    python, peer = options.workspace / ".venv" / "bin" / "python", trl_environment()
    arguments = ["--workspace", options.workspace, "--model", options.model]
    facts = last_line(run([python, __file__, *arguments, "--step", "prepare"])[2])
    found: dict[str, list[dict[str, float]]] = {way: [] for way in options.only}
    for number in range(options.rounds):
        for way in options.only[:: -1 if number % 2 else 1]:
            try:
                _, peak, out = run([peer if way in TRL else python, __file__, *arguments, "--step", way])
            except SystemExit as error:  # TRL pads to more than 23 GiB; the others have their figures all the same
                print(f"round {number + 1}: {way}: not measured: {error}", file=sys.stderr, flush=True)
                continue
            done = last_line(out) | {"peak": peak}
            if way != "limit":
                done |= last_line(run([python, __file__, *arguments, "--step", "measure"])[2])
            found[way].append(done)
            print(f"round {number + 1}: {way}: {done}", file=sys.stderr, flush=True)
    show(found, facts, options.rounds)


def show(found: dict[str, list[dict[str, float]]], facts: dict[str, Any], rounds: int) -> None:
    """Print the rows' lengths, and the medians of each way with their ratios to TRL packed, as a table in Markdown."""
    print(f"{facts['rows']} rows, {facts['tokens']} tokens, {facts['answers']} of them answers; {facts['lengths']}")
    print(f"medians of {rounds} rounds; load {os.getloadavg()[0]:.1f} at the end\n")
    names = ("seconds", "peak", "loss", "accuracy")
    medians = {
        way: {name: statistics.median(one[name] for one in runs) for name in names if name in runs[0]}
        for way, runs in found.items()
        if runs
    }
    peer = medians.get("trl-packed")
    print(
        "| | seconds | of TRL packed | answer tokens/s | peak, GiB | of TRL packed | held-out loss | token accuracy |"
    )
    print("|---|---|---|---|---|---|---|---|")
    for way, one in medians.items():
        time_ratio = f"{one['seconds'] / peer['seconds']:.3f}" if peer else ""
        cells = [OURS.get(way, way), f"{one['seconds']:.1f}", time_ratio]
        cells += [f"{facts['answers'] / one['seconds']:.1f}"]
        if way != "limit":
            memory_ratio = f"{one['peak'] / peer['peak']:.3f}" if peer else ""
            cells += [f"{one['peak']:.2f}", memory_ratio, f"{one['loss']:.4f}", f"{one['accuracy']:.1%}"]
        else:
            cells += [""] * 4
        print(f"| {' | '.join(cells)} |")


def last_line(out: str) -> dict[str, Any]:
    """Return the figures that a process prints as its last line."""
    figures: dict[str, Any] = json.loads(out.splitlines()[-1])
    return figures


def folder(options: argparse.Namespace) -> Path:
    """Return the folder of the rows and the adapters."""
    return Path(options.workspace) / "models" / "real-model"


def paragraphs() -> list[tuple[str, list[str]]]:
    """Return the documentation's sections, heading and sentences, without code, tables and lists."""
    sections = []
    for file in [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*/*.md"))]:
        text = re.sub(r"```.*?```", "", file.read_text(encoding="utf-8"), flags=re.DOTALL)
        for section in re.split(r"^#+ ", text, flags=re.MULTILINE)[1:]:
            heading, _, body = section.partition("\n")
            prose = [one for one in re.split(r"\n\s*\n", body) if one and not re.match(r"\s*([|<!\-*+>]|\d+\.)", one)]
            sentences = re.split(r"(?<=[.:]) (?=[A-Z`])", " ".join(" ".join(prose).split()))
            if heading and len(" ".join(sentences)) > 200:
                sections.append((heading.strip(), sentences))
    return sections


def prepare(options: argparse.Namespace) -> dict[str, Any]:
    """Write the rows, training and held-out. Returns how many tokens they have."""
    sys.path.insert(0, str(options.workspace / "finetuning"))
    from transformers import AutoTokenizer

    from preparing.tokens import IGNORED, tokenise

    tokenizer = AutoTokenizer.from_pretrained(options.model)
    draw = random.Random(1)
    sections = paragraphs()
    draw.shuffle(sections)
    quantiles = [
        statistics.NormalDist(0, SPREAD).inv_cdf((i + 0.5) / (ROWS + HELD_OUT)) for i in range(ROWS + HELD_OUT)
    ]
    lengths = [round(MEDIAN * math.exp(one)) for one in quantiles]
    draw.shuffle(lengths)
    rows, counted = [], []
    for number, length in enumerate(lengths):
        row = [{"role": "user", "content": ""}, {"role": "assistant", "content": ""}]
        for heading, sentences in sections[number % len(sections) :] + sections:
            row[0]["content"] = row[0]["content"] or f"What does the documentation say about «{heading}»?"
            for sentence in sentences:
                row[1]["content"] = f"{row[1]['content']} {sentence}".strip()
                (example,) = tokenise(tokenizer, row)
                if len(example["input_ids"]) >= length:
                    break
            if len(example["input_ids"]) >= length:
                break
        rows.append({"messages": row})
        counted.append(example)
    place = folder(options)
    place.mkdir(parents=True, exist_ok=True)
    for name, part in (("rows", rows[:ROWS]), ("held-out", rows[ROWS:])):
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
    sizes = sorted(len(example["input_ids"]) for example in counted[:ROWS])
    return {
        "rows": ROWS,
        "tokens": sum(sizes),
        "answers": sum(label != IGNORED for example in counted[:ROWS] for label in example["labels"]),
        "lengths": f"median {sizes[ROWS // 2]}, 95 % {sizes[ROWS * 95 // 100]}, longest {sizes[-1]}",
    }


def our_settings(options: argparse.Namespace) -> Any:
    """Return the workspace's settings for this model and these rows."""
    os.chdir(options.workspace)
    sys.path.insert(0, str(options.workspace / "finetuning"))
    from settings.startup import quiet

    quiet()
    from settings.config_file import read_file, the_pass
    from settings.run_settings import Settings

    config, place = read_file(), folder(options)
    config["input_model"]["model_path"] = str(options.model)
    config["input_model"]["load_kwargs"]["revision"] = None
    olive_pass = the_pass(config)
    olive_pass |= {"r": RANK, "alpha": ALPHA, "lora_dropout": DROPOUT, "target_modules": TARGETS}
    olive_pass["packing"] = options.step != "ours-padded"
    olive_pass["torch_dtype"] = "bfloat16" if options.step == "ours-bfloat16" else "float32"
    olive_pass["training_args"] |= {
        "num_train_epochs": 1,
        "learning_rate": RATE,
        "warmup_steps": 0,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "eval_strategy": "no",
        "load_best_model_at_end": False,
        "save_strategy": "no",
    }
    for data in config["data_configs"]:
        files = {"train_file": str(place / "rows.jsonl"), "held_out_file": str(place / "held-out.jsonl")}
        data["load_dataset_config"] |= files
        data["pre_process_data_config"] |= {"max_seq_len": LONGEST, "system_prompt": None}
    return Settings.of(config)


def ours(options: argparse.Namespace) -> dict[str, float]:
    """Train with the workspace's own finetuning/training/train.py, one of its causes switched off if asked."""
    import shutil

    settings = our_settings(options)
    from planning.plan import read_rows
    from preparing.dataset import chat_tokens
    from training import batches, train

    if options.step == "ours-all-logits":
        batches.takes_columns = lambda model: False
    if options.step == "ours-whole-attention":
        train.pack_attention = lambda model: None
    if options.step == "ours-whole-batches":
        train.piece_tokens = lambda settings: math.inf
    if options.step == "ours-peft-layers":
        train.fuse = lambda model: 0
    tokens = {
        part: chat_tokens(rows, settings.model_path, **vars(settings.data[part].tokens))
        for part, rows in read_rows(settings).items()
    }
    run_folder = folder(options) / "run"
    shutil.rmtree(run_folder, ignore_errors=True)
    noted: dict[str, float] = {}
    adapter, used, _ = train.train(settings, tokens, run_folder, lambda **timings: noted.update(timings))
    assert used["packing"] == (options.step != "ours-padded")
    shutil.rmtree(folder(options) / "adapter", ignore_errors=True)
    shutil.copytree(adapter, folder(options) / "adapter")
    return {"seconds": noted["training"]}


def trl(options: argparse.Namespace) -> dict[str, float]:
    """Train with TRL's SFTTrainer and PEFT, as their documentation shows it."""
    import shutil

    import torch
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    class Clock(TrainerCallback):
        began = ended = 0.0

        def on_train_begin(self, *arguments: Any, **more: Any) -> None:
            self.began = time.time()

        def on_train_end(self, *arguments: Any, **more: Any) -> None:
            self.ended = time.time()

    place, clock, tokenizer = folder(options), Clock(), AutoTokenizer.from_pretrained(options.model)
    data = load_dataset("json", data_files=str(place / "rows.jsonl"), split="train", cache_dir=str(place / "cache"))
    data = data.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
    sizes = [len(tokenizer.apply_chat_template(row, return_dict=True)["input_ids"]) for row in data["messages"]]
    packed = options.step == "trl-packed"
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32),
        processing_class=tokenizer,
        train_dataset=data.remove_columns("messages"),
        peft_config=LoraConfig(
            r=RANK, lora_alpha=ALPHA, lora_dropout=DROPOUT, target_modules=TARGETS, task_type="CAUSAL_LM"
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(place / "trl"),
            num_train_epochs=1,
            learning_rate=RATE,
            per_device_train_batch_size=1 if packed else BATCH,
            max_length={"trl-packed": sum(sizes) * BATCH // len(sizes), "trl-padded": LONGEST}.get(options.step),
            gradient_checkpointing=False,
            logging_steps=1,
            save_strategy="no",
            bf16=False,
            use_cpu=True,
            report_to="none",
            **TRL[options.step],
        ),
    )
    trainer.train()
    shutil.rmtree(place / "adapter", ignore_errors=True)
    trainer.save_model(str(place / "adapter"))
    return {"seconds": clock.ended - clock.began, "steps": trainer.state.global_step}


def measure(options: argparse.Namespace) -> dict[str, float]:
    """Return loss (nats) and accuracy per answer token of the newest adapter on the held-out rows."""
    sys.path.insert(0, str(options.workspace / "finetuning"))
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    from preparing.dataset import chat_rows, chat_tokens
    from preparing.tokens import IGNORED

    place = folder(options)
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    model = PeftModel.from_pretrained(model, str(place / "adapter")).eval()
    rows = chat_rows("train", train_file=str(place / "held-out.jsonl"), held_out_file="unused")
    loss = right = count = 0.0
    with torch.inference_mode():
        for example in chat_tokens(rows, str(options.model)):
            labels = torch.tensor(example["labels"][1:])
            logits = model(torch.tensor([example["input_ids"]])).logits[0, :-1][labels != IGNORED]
            labels = labels[labels != IGNORED]
            loss += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            right += (logits.argmax(-1) == labels).sum().item()
            count += len(labels)
    return {"loss": loss / count, "accuracy": right / count}


def limit(options: argparse.Namespace) -> dict[str, float]:
    """Return the seconds of the training's matrix products: those of the frozen weights, the adapter and attention.

    Per step and layer: the product forward, the one for the gradient of its input, and for the adapter also those for
    the gradients of its weights. The output layer computes the answers only, attention each row alone.
    """
    settings = our_settings(options)
    import torch
    from transformers import AutoConfig

    from planning.plan import read_rows
    from preparing.dataset import chat_tokens
    from preparing.tokens import IGNORED

    config = AutoConfig.from_pretrained(options.model)
    examples = chat_tokens(read_rows(settings)["train"], settings.model_path)
    hidden, inner, heads, width = (
        config.hidden_size,
        config.intermediate_size,
        config.num_attention_heads,
        config.head_dim,
    )
    kv = config.num_key_value_heads * width
    shapes = [(hidden, heads * width), (hidden, kv), (hidden, kv), (heads * width, hidden)]
    shapes += [(hidden, inner), (hidden, inner), (inner, hidden)]
    weights = [torch.randn(out, into) for into, out in shapes]
    adapters = [(torch.randn(RANK, into), torch.randn(out, RANK)) for into, out in shapes]
    embedding = torch.randn(config.vocab_size, hidden)
    began = time.perf_counter()
    with torch.no_grad():
        for start in range(0, len(examples), BATCH):
            rows = examples[start : start + BATCH]
            sizes = [len(row["input_ids"]) for row in rows]
            answers = torch.randn(sum(label != IGNORED for row in rows for label in row["labels"]), hidden)
            inputs = {into: torch.randn(sum(sizes), into) for into, _ in shapes}
            gradients = {out: torch.randn(sum(sizes), out) for _, out in shapes}
            for _ in range(config.num_hidden_layers):
                for (into, out), weight, (down, up) in zip(shapes, weights, adapters, strict=True):
                    one, gradient = inputs[into], gradients[out]
                    one @ weight.T, gradient @ weight
                    small, back = one @ down.T, gradient @ up
                    small @ up.T, back @ down, gradient.T @ small, back.T @ one
                for size in sizes:
                    several = torch.randn(heads, size, width)
                    scores = several @ several.mT  # twice forward, four times backward
                    scores @ several, several @ several.mT, scores.mT @ several, scores @ several, scores.mT @ several
            (answers @ embedding.T) @ embedding
    return {"seconds": time.perf_counter() - began}


if __name__ == "__main__":
    main()
