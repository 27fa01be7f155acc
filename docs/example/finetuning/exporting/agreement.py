"""Compare the answers of an int4 model with those of the merged model: the check that an export must pass."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from preparing.tokenised import tokenise_rows
from preparing.tokens import last_answer, load_tokenizer, tokenise
from settings.config_file import ConfigError

COMPARED_TOKENS = 64  # per answer; more takes longer and barely changes the figures
WAITING = {"session.intra_op.allow_spinning": "0"}  # waiting threads sleep: awake, they slow down a busy machine


def compare(merged: Path, folder: Path, rows: list[Any], dtype: str, thinking: bool) -> dict[str, Any]:
    """Generate answers to held-out rows greedily with the ONNX model, and check whether torch chooses the same tokens.

    Returns `rows`; `answers`, the share of answers (up to COMPARED_TOKENS) that torch gives token for token; `tokens`,
    the share of tokens that torch chooses after the same prefix; and `logits_max` and `logits_mean`, the absolute
    difference of the logits for the first token of an answer. `dtype` is torch's, as in models/run.json.
    """
    import numpy
    import torch

    from reporting.evaluate import load_base

    if not torch.cuda.is_available() and dtype == "float16":
        dtype = "float32"
    model = load_base(str(merged), dtype)
    onnx, tokenizer = load_onnx(folder), load_tokenizer(str(merged))
    context = json.loads((folder / "genai_config.json").read_text(encoding="utf-8"))["model"]["context_length"]
    alike: list[Any] = []
    differences = []
    for whole in prompts_of(tokenizer, rows, thinking):
        prompt = whole[-(context - COMPARED_TOKENS) :]
        tokens, logits = answer_greedily(onnx, prompt)
        with torch.inference_mode():
            ids = torch.tensor([prompt + tokens], device=model.device)
            expected = model(input_ids=ids, use_cache=False).logits[0, len(prompt) - 1 : -1].float().cpu().numpy()
        alike.append(expected.argmax(axis=-1) == numpy.array(tokens))
        differences.append(numpy.abs(expected[0] - logits))
    return {
        "rows": len(alike),
        "answers": round(sum(bool(row.all()) for row in alike) / len(alike), 4),
        "tokens": round(float(numpy.concatenate(alike).mean()), 4),
        "logits_max": round(float(numpy.max(differences)), 4),
        "logits_mean": round(float(numpy.mean(differences)), 4),
    }


def load_onnx(folder: Path) -> Any:
    """Load the ONNX model. Raises ConfigError if the libraries of its provider are missing."""
    import onnxruntime_genai

    try:
        config = onnxruntime_genai.Config(str(folder))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": WAITING}}}))
        return onnxruntime_genai.Model(config)
    except RuntimeError as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(
            f"ONNX Runtime GenAI cannot load the int4 model here ({reason}): --provider cpu makes one for the CPU."
        ) from error


def prompts_of(tokenizer: Any, rows: list[Any], thinking: bool) -> list[list[int]]:
    """Return the tokens before the last answer of each conversation; of plain text, its first half."""
    prompts = []
    for row in tokenise_rows(tokenizer, rows, max_bad_rows=1, thinking="on" if thinking else "off").rows:
        _, answer = last_answer(tokenizer, row, thinking)
        if answer:
            prompts.append(answer.ids[: answer.start])
        else:
            tokens = tokenise(tokenizer, row, "all")[0]["input_ids"]
            prompts.append(tokens[: (len(tokens) + 1) // 2])
    return prompts


def answer_greedily(model: Any, prompt: list[int]) -> tuple[list[int], Any]:
    """Return the ONNX model's answer tokens, with the end token, and the logits (vocabulary) of the first one."""
    import onnxruntime_genai

    settings = onnxruntime_genai.GeneratorParams(model)
    settings.set_search_options(do_sample=False, repetition_penalty=1.0, max_length=len(prompt) + COMPARED_TOKENS)
    generator = onnxruntime_genai.Generator(model, settings)
    generator.append_tokens(prompt)
    logits = generator.get_logits()[0, -1].copy()
    tokens = []
    while not generator.is_done():
        generator.generate_next_token()
        tokens.append(int(generator.get_next_tokens()[0]))
    return tokens, logits
