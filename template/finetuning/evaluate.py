"""Evaluation on held-out rows: the loss of the expected answers, and the answers that the model really gives."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from dataset import IGNORED, Message, tokenise, with_system
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence

MAX_ANSWERS = 200  # generating is slow: more rows than this would change the accuracy by little


def load_model(model_folder: str, adapter: Path | None, olive_pass: dict[str, Any]) -> Any:
    """Load the base model in the precision of the training, with the adapter on top when there is one."""
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    dtype = getattr(torch, olive_pass["torch_dtype"])
    quantization = None
    if olive_pass["type"].lower() == "qlora":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_compute_dtype=getattr(torch, olive_pass["compute_dtype"]),
            bnb_4bit_quant_type=olive_pass["quant_type"],
            bnb_4bit_use_double_quant=olive_pass["double_quant"],
        )
    model = AutoModelForCausalLM.from_pretrained(
        model_folder,
        dtype=dtype,
        device_map="cuda" if torch.cuda.is_available() else "cpu",
        quantization_config=quantization,
        local_files_only=True,
    )
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter))
    return model.eval()


@torch.inference_mode()
def evaluate(
    model: Any, tokenizer: Any, rows: list[list[Message]], settings: dict[str, Any], batch_size: int
) -> tuple[dict[str, float], list[str]]:
    """Return {eval_loss, perplexity, accuracy} over held-out rows, and the answers behind the accuracy.

    eval_loss is the mean over all answer tokens in nats, perplexity its exponential, accuracy the share of the first
    MAX_ANSWERS rows whose last turn is answered exactly as expected. `settings` are those of chat_tokens.
    """
    rows = [with_system(row, settings["system_prompt"]) for row in rows]
    examples = [tokenise(tokenizer, row, settings["train_on"]) for row in rows]
    length = settings["max_seq_len"]
    loss = tokens = 0.0
    for start in range(0, len(examples), batch_size):
        batch = examples[start : start + batch_size]
        ids = pad([example["input_ids"][:length] for example in batch], tokenizer.pad_token_id).to(model.device)
        mask = pad([example["attention_mask"][:length] for example in batch], 0).to(model.device)
        labels = pad([example["labels"][:length] for example in batch], IGNORED).to(model.device)
        logits = model(input_ids=ids, attention_mask=mask).logits
        loss += cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum").item()
        tokens += (labels[:, 1:] != IGNORED).sum().item()
    answered = [row for row in rows if row[-1]["role"] == "assistant"][:MAX_ANSWERS]
    answers = generate(model, tokenizer, answered, batch_size, end_of_turn(tokenizer, examples))
    right = sum(answer.strip() == row[-1]["content"].strip() for answer, row in zip(answers, answered, strict=True))
    eval_loss = loss / tokens
    return {
        "eval_loss": round(eval_loss, 4),
        "perplexity": round(math.exp(min(eval_loss, 700)), 4),
        "accuracy": round(right / len(answered), 4) if answered else 0.0,
    }, answers


def generate(
    model: Any, tokenizer: Any, conversations: list[list[Message]], batch_size: int, stop: list[int]
) -> list[str]:
    """Answer the last turn of each conversation, greedily, in batches. Returns the texts without special tokens."""
    prompts = [
        tokenizer.apply_chat_template(row[:-1], add_generation_prompt=True, return_dict=False) for row in conversations
    ]
    expected = [tokenizer(row[-1]["content"], add_special_tokens=False)["input_ids"] for row in conversations]
    longest = max(map(len, expected), default=0)
    answers: list[str] = []
    for start in range(0, len(prompts), batch_size):
        batch = prompts[start : start + batch_size]
        ids = pad(batch, tokenizer.pad_token_id, side="left").to(model.device)
        output = model.generate(
            input_ids=ids,
            attention_mask=pad([[1] * len(prompt) for prompt in batch], 0, side="left").to(model.device),
            max_new_tokens=longest + 8,  # an answer that runs on is wrong, however long it gets
            do_sample=False,
            use_cache=True,
            eos_token_id=stop,
            pad_token_id=tokenizer.pad_token_id,
        )
        answers += tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
    return answers


def end_of_turn(tokenizer: Any, examples: list[dict[str, list[int]]]) -> list[int]:
    """Return the tokens that end an answer: the tokenizer's end of sequence and the chat template's end of turn."""
    special = set(tokenizer.all_special_ids) | set(tokenizer.added_tokens_decoder)
    last_labels = {[label for label in example["labels"] if label != IGNORED][-1] for example in examples}
    return sorted({tokenizer.eos_token_id} | (last_labels & special))


def pad(rows: list[list[int]], value: int, side: str = "right") -> torch.Tensor:
    """Stack rows of token ids to one tensor (rows, longest row)."""
    return pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=value, padding_side=side)
