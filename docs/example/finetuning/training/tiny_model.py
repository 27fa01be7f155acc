"""Tiny models, built locally without a download: the demo model, and the replica of `--smoke`.

python -m training.tiny_model, in finetuning/, builds the demo model in models/demo, unless it is there.

Both have the architecture, the chat template and the layer names of the model in setup/model.yaml, two layers and a
vocabulary of about a thousand tokens. The base is trained on shuffled answers, so it knows their *form* and answers
with the right words at random: this makes the effect of fine-tuning visible.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import yaml

from preparing.dataset import chat_rows
from preparing.problems import DataError
from preparing.tokens import tokenise
from preparing.turns import Message
from preparing.workspace import DEMO, MODEL_FACTS, ROOT, SAMPLE, ModelMissingError, find_model
from training.whole_files import replace_folder

VOCABULARY = 1024
# What a small model of some architectures needs, by the names in config.json: a layer of each kind.
LAYER_KINDS: dict[str, dict[str, Any]] = {
    "gemma4": {
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
        "num_hidden_layers": 4,
        "num_kv_shared_layers": 2,
        "use_double_wide_mlp": True,
        "global_head_dim": 32,
        "hidden_size_per_layer_input": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "tie_word_embeddings": True,
    },
    "granite": {"attention_multiplier": 0.25, "residual_multiplier": 0.5, "logits_scaling": 2.0},
    "lfm2": {"layer_types": ["conv", "full_attention"], "block_auto_adjust_ff_dim": False},
    "qwen3_5": {
        "layer_types": ["linear_attention", "full_attention"],
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
    },
}
# The parts of a multimodal model for images and sound.
TOWER: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
TOWER |= {"num_key_value_heads": 2, "head_dim": 16, "output_proj_dims": 64, "subsampling_conv_channels": [8, 4]}
STEPS = 150
BATCH_SIZE = 16
LEARNING_RATE = 3e-3


def build(folder: Path, facts: dict[str, Any], rows: list[list[Message]], steps: int = STEPS, seed: int = 42) -> None:
    """Build a tiny model of the architecture in `facts` (setup/model.yaml) from conversations, and save it to `folder`.

    The folder appears only when complete. Raises ValueError for an architecture that transformers does not know.
    """
    import torch
    import transformers

    torch.set_num_threads(1)  # for matrices this small, more threads are slower
    transformers.set_seed(seed)
    tokenizer = build_tokenizer(facts, rows)
    config = tiny_config(facts, tokenizer)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    # rare words must be distinguishable from the start: fine-tuning does not change the embeddings
    torch.nn.init.normal_(model.get_input_embeddings().weight, std=0.2)
    teach_form(model, tokenizer, rows, steps, seed)

    folder.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    unfinished.chmod(0o755)
    replace_folder(unfinished, folder)


def build_tokenizer(facts: dict[str, Any], rows: list[list[Message]]) -> Any:
    """Train a byte-level BPE tokenizer on the rows, with the special tokens and chat template of the model's family."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = facts["special_tokens"]
    named = {key: marks[key] for key in ("bos_token", "eos_token", "pad_token") if marks[key]}
    special = list(dict.fromkeys([*named.values(), *marks["additional"]]))
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        (turn["content"] for row in rows for turn in row),
        trainers.BpeTrainer(
            vocab_size=VOCABULARY,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        **named,
        additional_special_tokens=marks["additional"],
        chat_template=facts["chat_template"],
        clean_up_tokenization_spaces=False,
    )


def tiny_config(facts: dict[str, Any], tokenizer: Any) -> Any:
    """Return the architecture's configuration with few layers of width 64, and the tokenizer's token ids."""
    from transformers import AutoConfig

    sizes: dict[str, Any] = {
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 16,
        "initializer_range": 0.05,  # the usual 0.02 is for widths of a thousand and more
        "max_position_embeddings": 512,
        "original_max_position_embeddings": 512,  # a number other than the one above means LongRoPE to Phi-3's tools
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": False,
    }
    kind = facts["architecture"]
    sizes |= LAYER_KINDS.get(kind, {})
    parts = AutoConfig.for_model(kind).sub_configs
    if "text_config" not in parts:
        return AutoConfig.for_model(kind, **sizes)
    towers = {name: TOWER for name in parts if name != "text_config"}
    return AutoConfig.for_model(kind, text_config=sizes, tie_word_embeddings=sizes["tie_word_embeddings"], **towers)


def teach_form(model: Any, tokenizer: Any, rows: list[list[Message]], steps: int, seed: int) -> None:
    """Train all weights on conversations with shuffled answers: this teaches the form, not the task.

    The loss covers every token: a base model knows its language, and its embeddings are trained.
    """
    import random

    import torch
    from transformers import get_scheduler

    shuffle = random.Random(seed)
    answers = [row[-1] for row in rows]
    shuffle.shuffle(answers)
    examples = []
    for row, answer in zip(rows, answers, strict=True):
        with contextlib.suppress(DataError):  # the run itself rejects what the chat template does not take
            examples += tokenise(tokenizer, [*row[:-1], answer], "all")[:1]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = get_scheduler("linear", optimizer, num_warmup_steps=steps // 10, num_training_steps=steps)
    model.train()
    for _ in range(steps):
        batch = shuffle.sample(examples, min(BATCH_SIZE, len(examples)))
        width = max(len(example["input_ids"]) for example in batch)
        columns = {
            key: torch.tensor([example[key] + [filler] * (width - len(example[key])) for example in batch])
            for key, filler in (("input_ids", 0), ("attention_mask", 0), ("labels", -100))
        }
        model(**columns).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    model.eval()


def build_demo() -> None:
    """Build the demo model from the sample data."""
    facts = yaml.safe_load(MODEL_FACTS.read_text(encoding="utf-8"))
    build(ROOT / DEMO, facts, chat_rows("train", train_file=str(SAMPLE), held_out_file=str(SAMPLE)))


def main() -> int:
    """Build models/demo unless it exists, in a separate process, for setup/get_model.py."""
    argparse.ArgumentParser(description="Build the demo model in models/demo, without any download.").parse_args()
    with contextlib.suppress(ModelMissingError):
        print(f"The demo model is there: {find_model(DEMO, None, ROOT).folder}")
        return 0
    started = time.monotonic()
    build_demo()
    print(f"Built the demo model in {time.monotonic() - started:.0f} s: {ROOT / DEMO}")
    return 0


if __name__ == "__main__":
    os.environ.update(
        HF_DATASETS_DISABLE_PROGRESS_BARS="1",
        HF_HUB_DISABLE_PROGRESS_BARS="1",
    )
    sys.exit(main())
