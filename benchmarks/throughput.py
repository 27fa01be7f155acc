"""Answer tokens trained per second beside TRL's SFTTrainer, on rows whose lengths differ as those of real data do.

throughput.py [--workspace FOLDER] [--rounds N] [--lengths log-uniform|uniform]. The same random-weight Llama of 48
million parameters, the same 96 rows of 30 to 600 tokens, the same adapter and batch size, two threads, 32-bit floats.
Each run is a fresh process; the time is that between the beginning and the end of the training, imports not counted.
TRL runs with its defaults (padded, gradient checkpointing), and once more without gradient checkpointing.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

ROWS, SHORTEST, LONGEST, BATCH = 96, 30, 600, 8
ADAPTER = {"r": 16, "alpha": 32, "dropout": 0.05}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
SETUPS = ("ours", "trl", "trl-no-checkpointing")


def main() -> None:
    """Prepare the data and the model, run everything in turns, print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--lengths", choices=["log-uniform", "uniform"], default="log-uniform")
    parser.add_argument("--step", choices=["prepare", *SETUPS], help=argparse.SUPPRESS)  # in a process of its own
    options = parser.parse_args()
    if options.step:
        steps = {"prepare": prepare, "ours": ours, "trl": trl, "trl-no-checkpointing": trl}
        print(json.dumps(steps[options.step](options)))
        return
    from demo_run import CACHE, run, trl_environment

    workspace = options.workspace or CACHE / "workspace"
    python, peer = workspace / ".venv" / "bin" / "python", trl_environment()
    arguments = ["--workspace", workspace, "--lengths", options.lengths]
    facts = json.loads(run([python, __file__, *arguments, "--step", "prepare"])[2].splitlines()[-1])
    speeds: dict[str, list[float]] = {setup: [] for setup in SETUPS}
    peaks: dict[str, list[float]] = {setup: [] for setup in SETUPS}
    for _ in range(options.rounds):
        for setup in SETUPS:
            _, peak, out = run([python if setup == "ours" else peer, __file__, *arguments, "--step", setup])
            done = json.loads(out.splitlines()[-1])
            speeds[setup].append(facts["answers"] / done["seconds"])
            peaks[setup].append(peak)
            if "worst" in done:
                print(f"the loss of each of {ROWS} packed rows against its loss alone: {done['worst']:.1e} at most")
    print(f"{ROWS} rows, {options.lengths}, {facts['tokens']} tokens, {facts['answers']} of them answers")
    print(f"medians of {options.rounds} rounds; load {os.getloadavg()[0]:.1f}")
    fastest = statistics.median(speeds["ours"])
    for setup in SETUPS:
        speed, peak = statistics.median(speeds[setup]), statistics.median(peaks[setup])
        print(f"{setup:22}{speed:8.1f} answer tokens/s{fastest / speed:8.2f} x{peak:8.2f} GiB")


def folder(options: argparse.Namespace) -> Path:
    """Return the folder of the model and the rows."""
    return Path(options.workspace) / "models" / "throughput"


def prepare(options: argparse.Namespace) -> dict[str, int]:
    """Make the rows, a tokenizer and the model. Returns how many tokens they have."""
    sys.path.insert(0, str(options.workspace / "finetuning"))
    import torch
    import transformers
    import yaml

    from preparing.tokens import IGNORED, tokenise
    from training.tiny_model import build_tokenizer

    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(600)]
    family = yaml.safe_load((Path(__file__).parents[1] / "catalog" / "chat_templates.yml").read_text())["families"]
    facts = family["chatml"] | {"chat_template": family["chatml"]["template"]}
    tokenizer = build_tokenizer(facts, [[{"role": "user", "content": " ".join(words)}]])
    place = folder(options)
    place.mkdir(parents=True, exist_ok=True)
    rows, tokens, answers = [], 0, 0
    for _ in range(ROWS):
        if options.lengths == "uniform":
            length = draw.randint(SHORTEST, LONGEST)
        else:
            length = round(SHORTEST * (LONGEST / SHORTEST) ** draw.random())
        share = draw.uniform(0.2, 0.8)
        row = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
        while True:  # until it has the length
            (example,) = tokenise(tokenizer, row)
            if len(example["input_ids"]) >= length:
                break
            learnt = sum(label != IGNORED for label in example["labels"])
            row[learnt < share * len(example["input_ids"])]["content"] += f" {draw.choice(words)}"
        rows.append(row)
        tokens += len(example["input_ids"])
        answers += sum(label != IGNORED for label in example["labels"])
    (place / "rows.jsonl").write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    (place / "held-out.jsonl").write_text(json.dumps({"messages": rows[0]}) + "\n")
    transformers.set_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=32000,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=10,
        num_attention_heads=8,
        num_key_value_heads=8,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(place / "model")
    tokenizer.save_pretrained(place / "model")
    return {"tokens": tokens, "answers": answers}


def ours(options: argparse.Namespace) -> dict[str, float]:
    """Train with the workspace's own finetuning/training/train.py, then compare the packed rows' losses."""
    os.chdir(options.workspace)
    sys.path.insert(0, str(options.workspace / "finetuning"))
    import shutil

    from settings.startup import quiet

    quiet()
    from planning.plan import read_rows
    from preparing.dataset import chat_tokens
    from settings.config_file import read_file, the_pass
    from settings.run_settings import Settings
    from training.train import train

    config, place = read_file(), folder(options)
    config["input_model"]["model_path"] = str(place / "model")
    config["input_model"]["load_kwargs"]["revision"] = None
    olive_pass = the_pass(config)
    olive_pass |= {"r": ADAPTER["r"], "alpha": ADAPTER["alpha"], "lora_dropout": ADAPTER["dropout"], "packing": True}
    olive_pass["target_modules"] = TARGETS
    olive_pass["training_args"] |= {
        "num_train_epochs": 1,
        "learning_rate": 2e-4,
        "per_device_train_batch_size": BATCH,
        "gradient_accumulation_steps": 1,
        "gradient_checkpointing": False,
        "eval_steps": 1000,
        "save_steps": 1000,
    }
    for data in config["data_configs"]:
        data["load_dataset_config"] |= {
            "train_file": str(place / "rows.jsonl"),
            "held_out_file": str(place / "held-out.jsonl"),
        }
        data["pre_process_data_config"] |= {"max_seq_len": 1024}
    settings = Settings.of(config)
    shutil.rmtree(place / "run", ignore_errors=True)
    tokens = {
        part: chat_tokens(rows, settings.model_path, **vars(settings.data[part].tokens))
        for part, rows in read_rows(settings).items()
    }
    _, timings, _ = train(settings, tokens, place / "run")
    return {"seconds": timings["training"], "worst": worst_difference(options)}


def worst_difference(options: argparse.Namespace) -> float:
    """Return how far a row's loss in a packed batch is from its loss alone, at most, in nats a token."""
    import torch
    from transformers import AutoModelForCausalLM

    from preparing.dataset import chat_rows, chat_tokens
    from preparing.tokens import IGNORED
    from training import batches
    from training.train import pack_attention

    place = str(folder(options) / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(place).eval()
    rows = chat_rows("train", train_file=str(folder(options) / "rows.jsonl"), held_out_file="unused")
    examples = chat_tokens(rows, place)
    worst = 0.0
    with torch.inference_mode():
        alone = [batches.answer_loss(model, batches.pad([example], 0)) for example in examples]
        pack_attention(model)
        for start in range(0, len(examples), BATCH):
            several = examples[start : start + BATCH]
            for i, example in enumerate(several):  # all rows are in the batch, one is counted
                others = [one | {"labels": [IGNORED] * len(one["labels"])} for one in several]
                batch = batches.pack([*others[:i], example, *others[i + 1 :]])
                labels = sum(label != IGNORED for label in example["labels"])
                difference = abs(batches.answer_loss(model, batch) - alone[start + i]).item() / labels
                worst = max(worst, difference)
    return worst


def trl(options: argparse.Namespace) -> dict[str, float]:
    """Train with TRL's SFTTrainer and PEFT, as their documentation shows it."""
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

    place, clock = folder(options), Clock()
    data = load_dataset("json", data_files=str(place / "rows.jsonl"), split="train", cache_dir=str(place / "cache"))
    data = data.map(lambda row: {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]})
    settings = {"gradient_checkpointing": False} if options.step == "trl-no-checkpointing" else {}
    trainer = SFTTrainer(
        model=AutoModelForCausalLM.from_pretrained(place / "model", dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(place / "model"),
        train_dataset=data.remove_columns("messages"),
        peft_config=LoraConfig(
            r=ADAPTER["r"],
            lora_alpha=ADAPTER["alpha"],
            lora_dropout=ADAPTER["dropout"],
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        ),
        callbacks=[clock],
        args=SFTConfig(
            output_dir=str(place / "trl"),
            num_train_epochs=1,
            per_device_train_batch_size=BATCH,
            bf16=False,  # this machine's processor computes slower in it
            use_cpu=True,
            report_to="none",
            **settings,
        ),
    )
    trainer.train()
    return {"seconds": clock.ended - clock.began}


if __name__ == "__main__":
    main()
