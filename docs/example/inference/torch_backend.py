"""The backend that works everywhere: transformers, with the adapter on the base model.

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

warnings.filterwarnings("ignore", category=FutureWarning)  # deprecation warnings of the libraries
DAMAGED = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # what transformers raises for damaged files


class TorchBackend:
    """A transformers model, on the GPU if there is one."""

    def __init__(self, source: Source, base: Path, root: Path) -> None:
        """Load the model from the folder `base`, the adapter and the tokenizer. Raises ChatError."""
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
        # The adapter's folder has the tokenizer with the chat template of the training.
        tokenizer_folder = root / source.adapter if source.adapter else base
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
        except DAMAGED as error:
            raise damaged(source, error) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True)
        except DAMAGED as error:
            if not source.adapter:
                raise damaged(source, error) from error
            raise ChatError(f"The tokenizer in {source.adapter} is missing or damaged: {TUNE} again, {BASE}") from error
        if not tokenizer.chat_template:  # a base model's tokenizer
            tokenizer.chat_template = read_yaml(root, "setup/model.yaml")["chat_template"]
        self.tokenizer, self.thinking = tokenizer, source.thinking
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.stops = self.end_of_answer(model.generation_config.eos_token_id)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # A new one: the model's own may sample or penalise repetition, which the evaluation did not do.
        model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=pad)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        self.description = f"torch, {'4-bit weights, ' if quantization else ''}{dtype} on {device}"
        self.switchable = bool(source.adapter)
        self.model = (with_adapter(model, source, root) if source.adapter else model).eval()

    def end_of_answer(self, end_of_text: int | list[int] | None) -> list[int]:
        """Return the tokens that end an answer.

        The model's and the tokenizer's end of text, and the chat template's end of turn: the first special token after
        an answer. Often only the template has that one (Phi-3's <|end|>, ChatML's <|im_end|>). A tuned model generates
        it, as trained, and would continue with a made-up conversation if it did not stop there.
        """
        turns = [{"role": "user", "content": "question"}, {"role": "assistant", "content": "THE-ANSWER"}]
        after = self.tokenizer.apply_chat_template(turns, tokenize=False).rpartition("THE-ANSWER")[2]
        special = {*self.tokenizer.all_special_ids, *self.tokenizer.added_tokens_decoder}
        tokens = self.tokenizer(after, add_special_tokens=False)["input_ids"]
        end_of_turn = [token for token in tokens if token in special][:1]
        stops = [self.tokenizer.eos_token_id, *end_of_turn]
        stops += end_of_text if isinstance(end_of_text, list) else [end_of_text]
        return sorted({stop for stop in stops if stop is not None})

    def render(self, messages: list[Message]) -> str:
        """Render messages with the chat template, up to the start of the answer. Raises ChatError."""
        try:
            options = {"tokenize": False, "add_generation_prompt": True, "enable_thinking": self.thinking}
            return str(self.tokenizer.apply_chat_template(messages, **options))
        except TemplateError as error:
            raise ChatError(f"The model's chat template does not take this conversation: {error}.") from error

    def encode(self, text: str) -> list[int]:
        """Tokenise a rendered text, as the training did. Raises ChatError for a token that the model lacks."""
        ids = list(self.tokenizer(text, add_special_tokens=False)["input_ids"])
        if (token := max(ids, default=0)) >= self.vocabulary:
            raise ChatError(
                f"The tokenizer is larger than the model: {self.tokenizer.convert_ids_to_tokens(token)!r} has the id "
                f"{token}, for which the model has no embedding: leave this text out."
            )
        return ids

    def decode(self, tokens: list[int]) -> str:
        """Decode tokens to text, without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def generate(self, prompt: list[int], generation: Generation) -> Generator[int, None, None]:
        """Yield the answer's tokens from a thread; closing the generator stops it after at most one more token."""
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
    """Passes tokens from the generating thread to the waiting one; None is the end.

    Not transformers' TextIteratorStreamer: it decodes each line separately, so tokenizers that drop the space at the
    start of a text (Llama 2, Mistral, Phi-3) lose a space of each line's indentation. It cannot pass errors on either.
    """

    def __init__(self) -> None:
        """Expect the prompt first: transformers puts it before the answer."""
        self.made: queue.Queue[int | Exception | None] = queue.Queue()
        self.cancelled = threading.Event()
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receive one new token; called by transformers."""
        if self.prompt_seen:
            self.made.put(int(value.item()))
        self.prompt_seen = True

    def end(self) -> None:
        """Mark the end; called by transformers."""
        self.made.put(None)

    def is_cancelled(self, ids: torch.Tensor, _scores: Any, **_: Any) -> torch.Tensor:
        """Return whether transformers should stop; called after each token."""
        return torch.full((ids.shape[0],), self.cancelled.is_set(), device=ids.device)


def damaged(source: Source, error: Exception) -> ChatError:
    """Return the error for base model files that cannot be read."""
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


def quantization_of_training(source: Source, root: Path) -> BitsAndBytesConfig:
    """Return the quantisation of the base model for QLoRA from olive-config.yaml."""
    (chosen,) = read_yaml(root, "finetuning/olive-config.yaml")["passes"].values()
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=chosen.get("quant_type", "nf4"),
        bnb_4bit_use_double_quant=chosen.get("double_quant", False),
        bnb_4bit_compute_dtype=getattr(torch, chosen.get("compute_dtype") or source.dtype),
    )
