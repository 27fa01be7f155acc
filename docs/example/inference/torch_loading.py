"""Loading a model for torch_backend.py: its precision, quantisation, adapter, and what its configuration says."""

from __future__ import annotations

import contextlib
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import BitsAndBytesConfig
from transformers.cache_utils import DynamicCache, DynamicLayer, DynamicSlidingWindowLayer

from engine import ChatError, Source
from sources import OWN_CODE, needs_code


def end_of_turn(tokenizer: Any) -> int | None:
    """Return the token that the chat template writes after an answer, by the rule of the training.

    Added tokens of blank text are none: Gemma has some for line breaks, and Phi-2 for spaces.
    """
    turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "THE-ANSWER"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, enable_thinking=False).rpartition("THE-ANSWER")[2]
    added = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
    tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
    return next((token for token in tokens if token in added and tokenizer.decode(token).strip()), None)


def computable(dtype: str, device: str) -> str:
    """Return the precision to compute in: on a CPU that lacks the training's, float32 is up to 500 times faster."""
    if device == "cpu" and (dtype == "float16" or (dtype == "bfloat16" and not has_bfloat16())):
        return "float32"
    return dtype


def computing_in(dtype: str) -> contextlib.AbstractContextManager[Any]:
    """Return the context for a model's forward pass: in float16, the products alone, as the training computes them."""
    return torch.autocast("cuda", torch.float16) if dtype == "float16" else contextlib.nullcontext()


def has_bfloat16() -> bool:
    """Return whether PyTorch multiplies matrices in bfloat16 with instructions of this CPU, through oneDNN."""
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def same_rotation(config: Any) -> int:
    """Return up to how many tokens a model rotates positions the same: some (longrope) rotate all otherwise beyond."""
    rope = getattr(config, "rope_parameters", None) or {}
    kinds = [rope, *(one for one in rope.values() if isinstance(one, dict))]
    changing = [one for one in kinds if one.get("rope_type") in ("longrope", "dynamic")]
    own = getattr(config, "max_position_embeddings", sys.maxsize)
    return min((one.get("original_max_position_embeddings") or own for one in changing), default=sys.maxsize)


def damaged(source: Source, error: Exception) -> ChatError:
    """Return the error for base model files that cannot be read."""
    if needs_code(error):
        return ChatError(f"The base model {source.base} {OWN_CODE}: choose a model that transformers knows.")
    reason = str(error).strip().partition("\n")[0][:200].rstrip(".!:")
    return ChatError(
        f"The base model {source.base} cannot be loaded ({reason}): run `python setup/get_model.py`, or for a folder "
        "of yours copy the model there again."
    )


def with_adapter(model: Any, source: Source, root: Path) -> Any:
    """Load the adapter into the model. Raises ChatError unless every weight fits."""
    try:
        with warnings.catch_warnings():
            # peft only warns about missing weights, and those layers would act as in the base model
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(root / str(source.adapter)))
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:
        reason = str(error).splitlines()[0][:200]
        raise ChatError(
            f"The adapter in {source.adapter} does not fit the base model {source.base} ({reason}): run `python "
            "finetuning/invoke_olive.py --fresh`, or chat with the base model: --baseonly."
        ) from error


def quantization_of_training(source: Source, device: str) -> BitsAndBytesConfig:
    """Return the quantisation of the base model that QLoRA trained on."""
    chosen = source.quantization
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=chosen.get("quant_type") or "nf4",
        bnb_4bit_use_double_quant=chosen.get("double_quant") or False,
        bnb_4bit_compute_dtype=getattr(torch, computable(chosen.get("compute_dtype") or source.dtype, device)),
    )


def can_be_cut(cache: Any) -> bool:
    """Return whether a cache is of a kind to which prompts can be added in pieces, and that can be shortened."""
    kinds = (DynamicLayer, DynamicSlidingWindowLayer)
    return type(cache) is DynamicCache and all(type(one) in kinds for one in cache.layers)


def cut(cache: DynamicCache, tokens: int) -> bool:
    """Shorten a cache to so many tokens; return whether it can be: a full window lacks what came before it."""
    for layer in cache.layers:
        if (surplus := layer.get_seq_length() - tokens) > 0:
            if layer.is_sliding and layer.get_seq_length() >= layer.sliding_window:
                return False
            layer.crop(-surplus)
    return True


def bytes_per_token(config: Any, size: int) -> int:
    """Return what a cache of numbers of `size` bytes takes for each token; 0 for a model that does not say it.

    Layers without attention keep nothing for a token, nor do those that take keys and values of earlier ones (Gemma 4).
    """
    kinds = getattr(config, "layer_types", None) or ["full_attention"] * config.num_hidden_layers
    own = len(kinds) - (getattr(config, "num_kv_shared_layers", None) or 0)
    different = getattr(config, "is_heterogeneous", False)
    layers = [config.per_layer_config[i] if different else config for i in range(own)]
    attending = [layer for kind, layer in zip(kinds, layers, strict=False) if is_attention(kind)]
    return sum(map(keys_and_values, attending)) * size


def is_attention(kind: str) -> bool:
    """Return whether a layer keeps keys and values, by its name in `layer_types` of config.json."""
    return kind.endswith("attention") and kind != "linear_attention"


def keys_and_values(layer: Any) -> int:
    """Return how many numbers a layer keeps for each token, by its configuration."""
    heads = getattr(layer, "num_attention_heads", 0) or 0
    head = getattr(layer, "head_dim", None) or (layer.hidden_size // heads if heads else 0)
    return int((getattr(layer, "num_key_value_heads", None) or heads) * head * 2)
