"""Evaluation on held-out rows: the loss on the expected answers, and the answers that the model generates."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planning.cost import ANSWERS
from preparing.formats import Message
from preparing.tokens import IGNORED, NO_THINKING, load_tokenizer, with_system
from settings.run_settings import Settings
from training import batches


@dataclass(frozen=True)
class Evaluation:
    """The metrics, and the questions and answers of the accuracy."""

    metrics: dict[str, float]  # eval_loss in nats per answer token, perplexity, accuracy from 0 to 1
    questions: list[list[Message]]
    answers: list[str]
    seconds: float


def evaluate(
    settings: Settings,
    folder: str,
    adapter: Path | None,
    rows: list[list[Message]],
    examples: list[batches.Row],
) -> Evaluation:
    """Evaluate the base model in `folder`, with the adapter when there is one, on held-out rows.

    `examples` are the rows' tokens and labels, as chat_tokens returns them.
    eval_loss is the mean over all answer tokens; accuracy is the share of the first ANSWERS rows whose last turn is
    generated exactly as in the row, by greedy decoding.
    """
    started = time.monotonic()
    model = load_model(folder, adapter, settings)
    tokenizer = load_tokenizer(folder)
    batch_size = settings.per_device_eval_batch_size
    rows = [with_system(row, settings.data["held_out"].tokens.system_prompt) for row in rows]
    loss = held_out_loss(model, tokenizer, examples, batch_size)
    asked = [row for row in rows if len(row) > 1 and row[-1]["role"] == "assistant"][:ANSWERS]
    answers = generate(model, tokenizer, asked, batch_size, end_of_turn(tokenizer, examples))
    right = sum(answer.strip() == row[-1]["content"].strip() for answer, row in zip(answers, asked, strict=True))
    metrics = {
        "eval_loss": round(loss, 4),
        "perplexity": round(math.exp(min(loss, 700)), 4),
        "accuracy": round(right / len(asked), 4) if asked else 0.0,
    }
    return Evaluation(metrics, asked, answers, round(time.monotonic() - started, 2))


def load_model(folder: str, adapter: Path | None, settings: Settings) -> Any:
    """Load the base model in the precision of the training, with the adapter if there is one."""
    from transformers import BitsAndBytesConfig

    quantization = None
    if settings.method == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=getattr(torch, str(settings.compute_dtype)),
            bnb_4bit_quant_type=settings.quant_type,
            bnb_4bit_use_double_quant=settings.double_quant,
        )
    model = load_base(folder, settings.torch_dtype, quantization)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return model


def load_base(folder: str, dtype: str, quantization: Any = None) -> Any:
    """Load a model from a folder onto the GPUs, or onto the CPU if there is none."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, dtype),
        # over all GPUs if there are several: the model may not fit on one
        device_map="auto" if torch.cuda.device_count() > 1 else "cuda" if torch.cuda.is_available() else "cpu",
        quantization_config=quantization,
        local_files_only=True,
        trust_remote_code=False,  # otherwise transformers asks in a terminal whether to run the model's code
    )
    if model.config.get_text_config().hidden_size < 256:
        torch.set_num_threads(1)  # for matrices as small as the demo's, more threads are slower
    return model.eval()


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, examples: list[batches.Row], batch_size: int) -> float:
    """Return the mean cross entropy in nats over all labels that are not IGNORED."""
    loss = labels = 0.0
    examples = sorted(examples, key=lambda row: len(row["input_ids"]))  # rows of similar length need little padding
    for start in range(0, len(examples), batch_size):
        batch = batches.pad(examples[start : start + batch_size], tokenizer.pad_token_id, model.device)
        loss += batches.answer_loss(model, batch).item()
        labels += (batch["labels"][:, 1:] != IGNORED).sum().item()
    return loss / labels


def generate(
    model: Any, tokenizer: Any, conversations: list[list[Message]], batch_size: int, stop: list[int]
) -> list[str]:
    """Answer the last turn of each conversation, greedily, in batches. Returns the texts without special tokens."""
    from transformers import GenerationConfig

    options = {"add_generation_prompt": True, "return_dict": False, **NO_THINKING}
    prompts = [tokenizer.apply_chat_template(row[:-1], **options) for row in conversations]
    expected = [tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"] for row in conversations]
    longest = max(map(len, expected), default=0)
    # not the model's own settings: they may sample, or penalise repetition
    settings = GenerationConfig(
        max_new_tokens=longest + 8,  # a longer answer is wrong anyway
        do_sample=False,
        eos_token_id=stop,
        pad_token_id=tokenizer.pad_token_id,
    )
    # PEFT passes it on to the base model for LoRA, but not for LoHa and LoKr
    for one in (model, getattr(model, "get_base_model", lambda: model)()):
        one.generation_config = settings
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = batches.stack(batch, tokenizer.pad_token_id, side="left").to(model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=batches.stack([[1] * len(prompt) for prompt in batch], 0, side="left").to(model.device),
            use_cache=True,
        )
        answers += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


def end_of_turn(tokenizer: Any, examples: list[dict[str, list[int]]]) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end of sequence and the chat template's end of turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    last_labels = {[label for label in example["labels"] if label != IGNORED][-1] for example in examples}
    return sorted({tokenizer.eos_token_id} | (last_labels & special))
