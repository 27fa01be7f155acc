"""Evaluation on held-out rows: the loss on the expected answers, and the answers that the model generates."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planning.cost import ANSWERS
from preparing.chat_template import ends_of_answer
from preparing.thoughts import END
from preparing.tokens import IGNORED, Answer, last_answer, load_tokenizer, with_system
from preparing.turns import Message
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
    eval_loss is the mean over all answer tokens; accuracy is the share of the first ANSWERS rows whose last answer is
    generated exactly as in the row, apart from a thought before it, by greedy decoding.
    """
    started = time.monotonic()
    model = load_model(folder, adapter, settings)
    tokenizer = load_tokenizer(folder)
    batch_size, options = settings.per_device_eval_batch_size, settings.data["held_out"].tokens
    loss = held_out_loss(model, tokenizer, examples, batch_size)
    asked: list[list[Message]] = []
    expected: list[Answer] = []
    for row in rows:
        messages, answer = last_answer(tokenizer, with_system(row, options.system_prompt), options.thinking == "on")
        if answer and len(asked) < ANSWERS:
            asked.append(messages)
            expected.append(answer)
    answers = generate(model, tokenizer, expected, batch_size)
    wanted = [tokenizer.decode(one.ids[one.start : one.end], skip_special_tokens=True) for one in expected]
    right = sum(said(answer) == said(want) for answer, want in zip(answers, wanted, strict=True))
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


def generate(model: Any, tokenizer: Any, expected: list[Answer], batch_size: int) -> list[str]:
    """Answer the questions before these answers, greedily, in batches. Returns the texts without special tokens."""
    from transformers import GenerationConfig

    prompts = [one.ids[: one.start] for one in expected]
    longest = max((one.end - one.start for one in expected), default=0)
    # not the model's own settings: they may sample, or penalise repetition
    settings = GenerationConfig(
        max_new_tokens=longest + 8,  # a longer answer is wrong anyway
        do_sample=False,
        eos_token_id=ends_of_answer(tokenizer),
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


def said(answer: str) -> str:
    """Return an answer without its thought, and without spaces around it."""
    return answer.rpartition(END)[2].strip()
