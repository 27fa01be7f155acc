"""The estimate of `invoke_olive.py --check` beside the memory that the run really takes.

memory_estimate.py [--workspace FOLDER] [--only NAME…]. Random-weight models of real architectures with vocabularies of
real size, rows of 30 to 600 tokens; each run is a fresh process of the workspace's own invoke_olive.py, its peak the
most memory that it ever held (ru_maxrss). Then two real models with short, long and mixed rows, where the held-out rows
are as long as those trained on, so that the evaluations count. Exits 1 when an estimate is off by more than a fifth.
"""

from __future__ import annotations

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parent
ROWS, SHORTEST, LONGEST = 8, 30, 600
MIXED_ROWS = 32  # of rows so different, the largest of four batches would be a matter of chance
REAL = {"SmolLM2": ("smollm2", "chatml"), "Gemma 3": ("gemma3-270m", "gemma")}  # folders of .cache, and their template
LENGTHS = {"short": (20, 80), "long": (400, 900), "mixed": (30, 900)}  # of the real models' rows
MODELS: dict[str, dict[str, Any]] = {
    "50 M": {
        "model_type": "llama",
        "vocab_size": 32000,
        "hidden_size": 512,
        "intermediate_size": 1408,
        "num_hidden_layers": 10,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": True,
    },
    "150 M": {
        "model_type": "qwen3",
        "vocab_size": 100352,
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
        "head_dim": 64,
        "tie_word_embeddings": True,
    },
    "400 M": {
        "model_type": "qwen3",
        "vocab_size": 151936,
        "hidden_size": 1024,
        "intermediate_size": 3072,
        "num_hidden_layers": 16,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "tie_word_embeddings": True,
    },
}
SETTINGS: dict[str, Any] = {
    "packing": True,
    "num_train_epochs": 1,
    "per_device_train_batch_size": 4,
    "per_device_eval_batch_size": 2,
    "max_seq_len": 640,
    "lora_dropout": 0.05,
    "gradient_checkpointing": False,
    "eval_steps": 0.5,
    "save_steps": 0.5,
}
REAL_SETTINGS = {"max_seq_len": 1024, "per_device_train_batch_size": 2}
EVALUATION = REAL_SETTINGS | {"per_device_train_batch_size": 1, "per_device_eval_batch_size": 8}
EVALUATION |= {"gradient_checkpointing": True}  # so that the evaluations need the most
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "50 M": ("50 M", {}),
    "50 M, padded": ("50 M", {"packing": False}),
    "50 M, checkpointing": ("50 M", {"gradient_checkpointing": True}),
    "50 M, bfloat16": ("50 M", {"torch_dtype": "bfloat16"}),
    "150 M": ("150 M", {}),
    "400 M": ("400 M", {}),
    **{f"{model}, {rows}": (f"{model}, {rows}", REAL_SETTINGS) for model in REAL for rows in LENGTHS},
    "SmolLM2, checkpointing": ("SmolLM2, long", REAL_SETTINGS | {"gradient_checkpointing": True}),
    "SmolLM2, evaluation": ("SmolLM2, long", EVALUATION),
    "Gemma 3, evaluation": ("Gemma 3, long", EVALUATION),
}


def main() -> int:
    """Run the cases and print estimates, peaks and their ratios."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workspace", type=Path, default=BENCHMARKS.parent / ".cache" / "workspace")
    parser.add_argument("--python", type=Path, help="the workspace's Python, if it is not in its .venv")
    parser.add_argument("--only", nargs="*", choices=[*CASES], help="some of the cases")
    parser.add_argument("--build", help=argparse.SUPPRESS)  # in the workspace's Python
    options = parser.parse_args()
    if options.build:
        build(options.workspace, options.build)
        return 0
    from demo_run import run

    python = options.python or options.workspace / ".venv" / "bin" / "python"
    script = options.workspace / "finetuning" / "invoke_olive.py"
    config = options.workspace / "finetuning" / "olive-config.yaml"
    original, worst = config.read_text(encoding="utf-8"), 0.0
    print(f"{'':24}{'estimate':>10}{'peak':>10}{'ratio':>8}   GiB", flush=True)
    try:
        for case in options.only or CASES:
            name, changes = CASES[case]
            run([python, __file__, "--workspace", options.workspace, "--build", name])
            folder = f"models/memory/{folder_of(name)}"
            data = {"train_file": "models/memory/train.jsonl", "held_out_file": "models/memory/held-out.jsonl"}
            config.write_text(changed(original, SETTINGS | data | changes | {"model_path": folder}), encoding="utf-8")
            report = json.loads(run([python, script, "--check", "--json"])[2])
            _, peak, _ = run([python, script, "--fresh"])
            estimated = report["estimate"]["memory"]["total"] / 2**30
            worst = max(worst, abs(estimated / peak - 1))
            print(f"{case:24}{estimated:10.2f}{peak:10.2f}{estimated / peak:8.2f}", flush=True)
    finally:
        config.write_text(original, encoding="utf-8")
    print(f"off by {worst:.0%} at most")
    return int(worst > 0.2)


def changed(text: str, settings: dict[str, Any]) -> str:
    """Return the text of olive-config.yaml with other values."""
    for key, value in settings.items():
        line = rf"(?m)^(\s*)(?:# )?((?:- )?{key}:(?: &\w+)?) \S+"
        text, found = re.subn(line, lambda match, value=value: f"{match[1]}{match[2]} {json.dumps(value)}", text)
        assert found, key
    return re.sub(r"target_modules: .*", "target_modules: null", text)


def build(workspace: Path, name: str) -> None:
    """Make the rows, a tokenizer and the model."""
    sys.path.insert(0, str(workspace / "finetuning"))
    import torch
    import transformers
    import yaml

    from preparing.tokens import load_tokenizer, tokenise
    from training.tiny_model import build_tokenizer

    draw = random.Random(1)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(2, 9))) for _ in range(600)]
    families = yaml.safe_load((BENCHMARKS.parent / "catalog" / "chat_templates.yml").read_text())["families"]
    place, (model_name, _, kind) = workspace / "models" / "memory", name.partition(", ")
    place.mkdir(parents=True, exist_ok=True)
    folder = place / folder_of(name)
    if model_name in REAL:
        source, family = REAL[model_name]
        folder.mkdir(exist_ok=True)
        for file in (BENCHMARKS.parent / ".cache" / source).iterdir():
            (folder / file.name).unlink(missing_ok=True)
            (folder / file.name).symlink_to(file)
        if not (folder / "chat_template.jinja").exists():
            (folder / "chat_template.jinja").write_text(families[family]["template"], encoding="utf-8")
        tokenizer = load_tokenizer(str(folder))
    else:
        facts = families["chatml"] | {"chat_template": families["chatml"]["template"]}
        tokenizer = build_tokenizer(facts, [[{"role": "user", "content": " ".join(words)}]])
    shortest, longest = LENGTHS.get(kind, (SHORTEST, LONGEST))
    held_out = (8, longest, (0.02, 0.06)) if kind else (2, 60, (0.2, 0.6))  # answering takes long
    train = (MIXED_ROWS if kind == "mixed" else ROWS, longest, (0.2, 0.6))
    for file, (count, limit, shares) in {"train": train, "held-out": held_out}.items():
        lines = []
        for _ in range(count):
            row = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "a"}]
            length, share = draw.randint(shortest, limit), draw.uniform(*shares)
            while len(tokenise(tokenizer, row, "all")[0]["input_ids"]) < length:
                row[draw.random() < share]["content"] += f" {draw.choice(words)}"
            lines.append(json.dumps({"messages": row}) + "\n")
        (place / f"{file}.jsonl").write_text("".join(lines))
    if model_name not in REAL:
        ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
        shape = transformers.AutoConfig.for_model(**MODELS[name], max_position_embeddings=1024, **ends)
        model = transformers.AutoModelForCausalLM.from_config(shape, dtype=torch.float32)
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)


def folder_of(name: str) -> str:
    """Return the folder of a model in models/memory."""
    return name.partition(", ")[0].replace(" ", "")


if __name__ == "__main__":
    sys.exit(main())
