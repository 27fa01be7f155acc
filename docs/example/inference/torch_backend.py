"""The backend that works everywhere: transformers, with the adapter on top of the base model as it was trained.

load_engine.py imports this file when it loads a model; it is the only one here that imports torch.
"""

from __future__ import annotations

import contextlib
import importlib.util
import queue
import threading
import warnings
from collections.abc import Generator
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from peft import PeftModel
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, GenerationConfig
from transformers.utils import logging

from engine import ChatError, Generation, Message, Source
from sources import BASE, TUNE, read_yaml

warnings.filterwarnings(
    "ignore", category=FutureWarning
)  # what the libraries tell each other about their next versions
TORN = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # what transformers raises of files not whole


class TorchBackend:
    """A transformers model, on the GPU when there is one."""

    def __init__(self, source: Source, base: Path, root: Path) -> None:
        """Load the model in the folder `base`, adapter and tokenizer from the disk. Raises ChatError."""
        logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = "float32" if (device, source.dtype) == ("cpu", "float16") else source.dtype
        self.notices: list[str] = []
        quantization = None
        if source.method == "qlora" and importlib.util.find_spec("bitsandbytes"):
            quantization = quantization_of_training(source, root)
        elif source.method == "qlora":
            self.notices.append(
                f"QLoRA trains on 4-bit weights, but bitsandbytes is not here: the base model is loaded in {dtype}, "
                "and answers may differ a little."
            )
        # The adapter's folder holds the tokenizer with the chat template that the training used.
        words = root / source.adapter if source.adapter else base
        try:
            model = AutoModelForCausalLM.from_pretrained(
                base,
                dtype=getattr(torch, dtype),
                device_map=device,
                quantization_config=quantization,
                local_files_only=True,
            )
        except torch.OutOfMemoryError as error:
            raise ChatError(f"The GPU's memory is too small for {source.base}: close what else uses it.") from error
        except TORN as error:
            raise torn(source, error) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(words, local_files_only=True)
        except TORN as error:
            if not source.adapter:
                raise torn(source, error) from error
            raise ChatError(f"The tokenizer in {source.adapter} is missing or torn: {TUNE} again, {BASE}") from error
        if not tokenizer.chat_template:  # a base model's tokenizer
            tokenizer.chat_template = read_yaml(root, "setup/model.yaml")["chat_template"]
        self.tokenizer = tokenizer
        self.stops = self.end_of_answer(model.generation_config.eos_token_id)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # A new one: the model's own may draw at random or punish repetition, which the evaluation did not do.
        model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=pad)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        self.description = f"torch, {'4-bit weights, ' if quantization else ''}{dtype} on {device}"
        self.switchable = bool(source.adapter)
        self.model = (with_adapter(model, source, root) if source.adapter else model).eval()

    def end_of_answer(self, end_of_text: int | list[int] | None) -> list[int]:
        """Return the tokens at which an answer ends.

        The model's and the tokenizer's end of text, and the chat template's end of turn: the first special token
        behind an answer. Often only the template knows that one (Phi-3's <|end|>, ChatML's <|im_end|>). A tuned model
        says it, as it was taught to, and would go on with a conversation of its own if nobody stopped there.
        """
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "THE-ANSWER"}]
        behind = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("THE-ANSWER")[2]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        tokens = self.tokenizer(behind, add_special_tokens=False)["input_ids"]
        end_of_turn = [token for token in tokens if token in special][:1]
        stops = [self.tokenizer.eos_token_id, *end_of_turn]
        stops += end_of_text if isinstance(end_of_text, list) else [end_of_text]
        return sorted({stop for stop in stops if stop is not None})

    def encode(self, messages: list[Message]) -> list[int]:
        """Render messages with the chat template and tokenise them, as the training did. Raises ChatError."""
        try:
            options = {"add_generation_prompt": True, "return_dict": False, "enable_thinking": False}
            return list(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise ChatError(f"The model's chat template does not take this conversation: {error}.") from error

    def decode(self, tokens: list[int]) -> str:
        """Turn tokens into text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generate(self, prompt: list[int], generation: Generation) -> Generator[int, None, None]:
        """Yield the answer's tokens while a thread makes them; it stops after at most one more when this is closed."""
        streamer = TokenStreamer()
        ids = torch.tensor([prompt], device=self.model.device)
        settings: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "repetition_penalty": generation.repetition_penalty,
        }
        if generation.temperature > 0:
            settings |= {"do_sample": True, "temperature": generation.temperature}
            settings |= {"top_p": generation.top_p, "top_k": generation.top_k}

        without = self.switchable and not generation.adapter

        def compute() -> None:
            try:
                if generation.seed is not None:
                    torch.manual_seed(generation.seed)
                with self.model.disable_adapter() if without else contextlib.nullcontext():
                    self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        use_cache=True,
                        streamer=streamer,
                        stopping_criteria=[streamer.is_cancelled],
                        **settings,
                    )
            except Exception as error:
                streamer.made.put(error)

        thread = threading.Thread(target=compute, daemon=True)
        thread.start()
        try:
            while (made := streamer.made.get()) is not None:
                if isinstance(made, torch.OutOfMemoryError):
                    raise ChatError("The GPU's memory is full: ask for a shorter answer, or clear the chat.") from made
                if isinstance(made, Exception):
                    raise made
                if made not in self.stops:
                    yield made
        finally:
            streamer.cancelled.set()
            thread.join()


class TokenStreamer:
    """Hands tokens from the thread that makes them to the one that waits for them; None is the end.

    Not transformers' TextIteratorStreamer: that one decodes each line alone, so that tokenizers which drop the space
    at the start of a text (Llama 2, Mistral, Phi-3) lose one of each line's indentation. Nor can it pass an error on.
    """

    def __init__(self) -> None:
        """Start with the prompt, which transformers puts first."""
        self.made: queue.Queue[int | Exception | None] = queue.Queue()
        self.cancelled = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Take one new token; called by transformers."""
        if self.prompt_seen:
            self.made.put(int(value.item()))
        self.prompt_seen = True

    def end(self) -> None:
        """Mark the end; called by transformers."""
        self.made.put(None)

    def is_cancelled(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Tell transformers, after each token, whether to stop."""
        return torch.full((ids.shape[0],), self.cancelled.is_set(), device=ids.device)


def torn(source: Source, error: Exception) -> ChatError:
    """Say that the base model's files cannot be read, and what to do."""
    reason = str(error).strip().partition("\n")[0][:200].rstrip(".!:")
    return ChatError(
        f"The base model {source.base} cannot be loaded ({reason}): run `python setup/get_model.py`, or for a folder "
        "of yours copy the model there again."
    )


def with_adapter(model: Any, source: Source, root: Path) -> Any:
    """Put the adapter on the model. Raises ChatError when it does not fit in every weight."""
    try:
        with warnings.catch_warnings():
            # peft only warns when weights are missing, and the layers concerned would answer as the base model does
            warnings.filterwarnings("error", message="Found missing adapter keys")
            return PeftModel.from_pretrained(model, str(root / str(source.adapter)))
    except (RuntimeError, ValueError, KeyError, UserWarning) as error:
        reason = str(error).splitlines()[0][:200]
        raise ChatError(
            f"The adapter in {source.adapter} does not fit the base model {source.base} ({reason}): run `python "
            "finetuning/invoke_olive.py --fresh`, or chat with the base model: --baseonly."
        ) from error


def quantization_of_training(source: Source, root: Path) -> BitsAndBytesConfig:
    """Return how QLoRA quantises the base model, as olive-config.yaml says."""
    (chosen,) = read_yaml(root, "finetuning/olive-config.yaml")["passes"].values()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=chosen.get("quant_type", "nf4"),
        bnb_4bit_use_double_quant=chosen.get("double_quant", False),
        bnb_4bit_compute_dtype=getattr(torch, chosen.get("compute_dtype") or source.dtype),
    )
