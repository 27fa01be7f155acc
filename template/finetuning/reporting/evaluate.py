"""Evaluation on held-out rows: the loss on the expected answers, and the answers that the model generates."""

from __future__ import annotations

import contextlib
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from planning.cost import ANSWERS
from preparing.chat_template import ends_of_answer
from preparing.conversations import print_once
from preparing.dataset import spread
from preparing.thoughts import END
from preparing.tokens import IGNORED, Answer, last_answer, with_system
from preparing.turns import Message
from settings.config_file import ConfigError
from settings.run_settings import Settings
from training import batches
from training.progress import shown


@dataclass(frozen=True)
class Evaluation:
    """The metrics, and the questions and answers of the accuracy."""

    # eval_loss in nats per answer token, perplexity, accuracy from 0 to 1, and its interval [low, high]
    metrics: dict[str, Any]
    questions: list[list[Message]]
    answers: list[str]
    seconds: float


def evaluate(
    settings: Settings,
    tokenizer: Any,
    folder: str,
    adapter: Path | None,
    rows: list[list[Message]],
    examples: list[batches.Row],
) -> Evaluation:
    """Evaluate the base model in `folder`, with the adapter when there is one, on held-out rows.

    `examples` are the rows' tokens and labels, as chat_tokens returns them.
    eval_loss is the mean over all answer tokens; accuracy is the share of rows whose last answer is generated exactly
    as in the row, apart from a thought before it, by greedy decoding. ANSWERS rows are asked, spread over all of them.
    Raises ConfigError if the loss is not a number.
    """
    started = time.monotonic()
    model = load_model(folder, adapter, settings)
    batch_size, options = settings.per_device_eval_batch_size, settings.data["held_out"].tokens
    with computing_in(settings.torch_dtype):
        loss = held_out_loss(model, tokenizer, examples, batch_size)
    if adapter and not math.isfinite(loss):
        raise ConfigError(
            "The tuned model's loss on the held-out rows is not a number, so no earlier result has changed: lower "
            "learning_rate in olive-config.yaml."
        )
    if not math.isfinite(loss):
        raise ConfigError(
            f"The base model's loss on the held-out rows is not a number in torch_dtype: {settings.torch_dtype}, so it "
            "cannot be trained: set torch_dtype: float32 in olive-config.yaml, or bfloat16 on a GPU that has it."
        )
    questions: list[list[Message]] = []
    expected: list[Answer] = []
    for row in spread([row for row in rows if any(turn["role"] != "assistant" for turn in row)], ANSWERS):
        messages, answer = last_answer(tokenizer, with_system(row, options.system_prompt), options.thinking == "on")
        if answer:
            questions.append(messages)
            expected.append(answer)
    with computing_in(settings.torch_dtype):
        answers = generate(model, tokenizer, expected, batch_size)
    wanted = [tokenizer.decode(one.ids[one.start : one.end], skip_special_tokens=True) for one in expected]
    right = sum(said(answer) == said(want) for answer, want in zip(answers, wanted, strict=True))
    metrics = {
        "eval_loss": round(loss, 4),
        "perplexity": round(math.exp(min(loss, 700)), 4),
        "accuracy": round(right / len(expected), 4) if expected else 0.0,
        "accuracy_interval": interval(right, len(expected)),
    }
    return Evaluation(metrics, questions, answers, round(time.monotonic() - started, 2))


def interval(right: int, asked: int) -> list[float]:
    """Return the 95 % confidence interval of a share, by Wilson's formula, which also holds near 0 and 1."""
    if not asked:
        return [0.0, 1.0]
    z, share = 1.96, right / asked
    centre = share + z * z / (2 * asked)
    width = z * math.sqrt(share * (1 - share) / asked + z * z / (4 * asked * asked))
    return [round((centre + side * width) / (1 + z * z / asked), 4) for side in (-1, 1)]


def load_model(folder: str, adapter: Path | None, settings: Settings) -> Any:
    """Load the base model in the precision of the training, with the adapter if there is one."""
    quantization = None
    if settings.method == "qlora":
        quantization = four_bits(str(settings.quant_type), settings.double_quant, str(settings.compute_dtype))
    model = load_base(folder, settings.torch_dtype, quantization)
    if adapter:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, str(adapter)).eval()
    return model


def four_bits(quant_type: str, double_quant: bool, compute_dtype: str) -> Any:
    """Return how QLoRA's base model is quantised; the arguments are the settings of these names."""
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_compute_dtype=getattr(torch, compute_dtype),
        bnb_4bit_quant_type=quant_type,
        bnb_4bit_use_double_quant=double_quant,
    )


def load_base(folder: str, dtype: str, quantization: Any = None) -> Any:
    """Load a model from a folder onto the GPUs, or onto the CPU if there is none; `dtype` is that of the training."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder,
        dtype=getattr(torch, weights_in(dtype)),
        # over all GPUs if there are several: the model may not fit on one
        device_map="auto" if torch.cuda.device_count() > 1 else "cuda" if torch.cuda.is_available() else "cpu",
        quantization_config=quantization,
        local_files_only=True,
        trust_remote_code=False,  # otherwise transformers asks in a terminal whether to run the model's code
    )
    if model.config.get_text_config().hidden_size < 256:
        torch.set_num_threads(1)  # for matrices as small as the demo's, more threads are slower
    return model.eval()


def weights_in(dtype: str) -> str:
    """Return the precision of the weights of a model that was trained in `dtype`, on this machine.

    Olive trains float16 with weights in float32. A CPU without instructions for it multiplies bfloat16 slower than
    float32: 3 times was measured with SmolLM2-135M and AVX2, and up to 499 times is reported (pytorch#146508).
    """
    cpu = not torch.cuda.is_available()
    slow = cpu and not (torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return "float32" if dtype == "float16" or (dtype == "bfloat16" and slow) else dtype


def computing_in(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context for a model's forward pass: in float16, the products alone, as the Trainer computes them."""
    if dtype == "float16" and torch.cuda.is_available():
        return torch.autocast("cuda", torch.float16)
    return contextlib.nullcontext()


@torch.inference_mode()
def held_out_loss(model: Any, tokenizer: Any, examples: list[batches.Row], batch_size: int) -> float:
    """Return the mean cross entropy in nats over all labels that are not IGNORED."""
    loss = labels = 0.0
    examples = sorted(examples, key=lambda row: len(row["input_ids"]))  # rows of similar length need little padding
    for start in shown(range(0, len(examples), batch_size), "loss"):
        batch = batches.pad(examples[start : start + batch_size], tokenizer.pad_token_id, model.device)
        loss += batches.answer_loss(model, batch).item()
        labels += (batch["labels"][:, 1:] != IGNORED).sum().item()
    return loss / labels


def generate(model: Any, tokenizer: Any, expected: list[Answer], batch_size: int) -> list[str]:
    """Answer the questions before these answers, greedily, in batches. Returns the texts without special tokens."""
    set_greedy(model, tokenizer)
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None) or math.inf
    answers = [""] * len(expected)
    cut = 0
    # a batch takes as many steps as its longest answer
    order = sorted(range(len(expected)), key=lambda i: (expected[i].end - expected[i].start, expected[i].start))
    for start in shown(range(0, len(order), batch_size), "answers"):
        chosen = order[start : start + batch_size]
        # a longer answer is wrong anyway
        limit = max(expected[i].end - expected[i].start for i in chosen) + 8
        room = int(min(max(context - limit, 1), 2**31))
        cut += sum(expected[i].start > room for i in chosen)
        prompts = [expected[i].ids[: expected[i].start][-room:] for i in chosen]
        for i, answer in zip(chosen, decode(model, tokenizer, prompts, limit), strict=True):
            answers[i] = tokenizer.decode(answer, skip_special_tokens=True)
    if cut:
        print_once(
            f"{cut} of {len(expected)} questions are longer than the {context} tokens that the model reads, and were "
            "cut at their start."
        )
    return answers


def set_greedy(model: Any, tokenizer: Any) -> None:
    """Make a model answer greedily up to its end of turn: its own settings may sample, or penalise repetition."""
    from transformers import GenerationConfig

    ends = {"eos_token_id": ends_of_answer(tokenizer), "pad_token_id": tokenizer.pad_token_id}
    # PEFT passes it on to the base model for LoRA, but not for LoHa and LoKr
    for one in (model, getattr(model, "get_base_model", lambda: model)()):
        one.generation_config = GenerationConfig(do_sample=False, **ends)


@torch.inference_mode()
def decode(model: Any, tokenizer: Any, prompts: list[list[int]], limit: int, **options: Any) -> list[list[int]]:
    """Answer one batch by the model's generation_config. Returns each answer's tokens, up to its end or the limit."""
    pad = tokenizer.pad_token_id
    ids = batches.stack(prompts, pad, side="left").to(model.device)
    mask = batches.stack([[1] * len(prompt) for prompt in prompts], 0, side="left").to(model.device)
    output = model.generate(input_ids=ids, attention_mask=mask, max_new_tokens=limit, use_cache=True, **options)
    stops = model.generation_config.eos_token_id
    stops = {*stops} if isinstance(stops, list) else {stops}
    answers = []
    for answer in output[:, ids.shape[1] :].tolist():
        end = next((place for place, token in enumerate(answer, 1) if token in stops), len(answer))
        answers.append(answer[:end])
    return answers


def said(answer: str) -> str:
    """Return an answer without its thought, and without spaces around it."""
    return answer.rpartition(END)[2].strip()
