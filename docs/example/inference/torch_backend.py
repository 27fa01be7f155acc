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
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, GenerationConfig
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.utils import logging

from chat_template import ChatTemplate
from engine import ChatError, Generation, Source
from prompt_cost import Pieces, free_memory, refuse_too_large, same_start
from sources import BASE, OWN_CODE, TUNE, needs_code, read_yaml
from torch_loading import (
    bytes_per_token,
    can_be_cut,
    computable,
    computing_in,
    cut,
    damaged,
    end_of_turn,
    quantization_of_training,
    same_rotation,
    with_adapter,
)

warnings.filterwarnings("ignore", category=FutureWarning)  # deprecation warnings of the libraries
DAMAGED = (OSError, ValueError, KeyError, RuntimeError, SafetensorError)  # what transformers raises for damaged files


END = object()  # of an answer


class StoppedError(Exception):
    """The answer is not wanted any more."""


class Kept(NamedTuple):
    """What was computed for the last conversation."""

    adapter: bool  # whether it was on
    tokens: list[int]  # of the cache
    cache: DynamicCache


class TorchBackend:
    """A transformers model, on the GPU if there is one."""

    def __init__(self, source: Source, base: Path, root: Path) -> None:
        """Load the model from the folder `base`, the adapter and the tokenizer. Raises ChatError."""
        logging.disable_progress_bar()
        device = "cuda" if torch.cuda.is_available() else "cpu"
        dtype = computable(source.dtype, device)
        # as in the training; keys and values are in it too
        weights = getattr(torch, "float32" if dtype == "float16" else dtype)
        self.notices: list[str] = []
        quantization = None
        if source.method == "qlora" and importlib.util.find_spec("bitsandbytes"):
            quantization = quantization_of_training(source, device)
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
                dtype=weights,
                # as in the evaluation: over all GPUs if there are several, as the model may not fit on one
                device_map="auto" if torch.cuda.device_count() > 1 else device,
                quantization_config=quantization,
                local_files_only=True,
                trust_remote_code=False,  # otherwise transformers asks in a terminal whether to run the model's code
            )
        except torch.OutOfMemoryError as error:
            raise ChatError(f"The GPU's memory is too small for {source.base}: close what else uses it.") from error
        except DAMAGED as error:
            raise damaged(source, error) from error
        try:
            tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, local_files_only=True, trust_remote_code=False)
        except DAMAGED as error:
            if not source.adapter:
                raise damaged(source, error) from error
            if needs_code(error):
                raise ChatError(f"The tokenizer in {source.adapter} {OWN_CODE}: {TUNE} again, {BASE}") from error
            raise ChatError(f"The tokenizer in {source.adapter} is missing or damaged: {TUNE} again, {BASE}") from error
        if not tokenizer.chat_template:  # a base model's tokenizer
            tokenizer.chat_template = read_yaml(root, "setup/model.yaml")["chat_template"]
        self.tokenizer = tokenizer
        self.render = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, source).render
        self.vocabulary = model.get_input_embeddings().num_embeddings
        self.stops = list(source.stops) or self.end_of_answer(model.generation_config.eos_token_id)
        pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        # A new one: the model's own may sample or penalise repetition, which the evaluation did not do.
        model.generation_config = GenerationConfig(eos_token_id=self.stops, pad_token_id=pad)
        self.context = getattr(model.config.get_text_config(), "max_position_embeddings", tokenizer.model_max_length)
        self.description = f"torch, {'4-bit weights, ' if quantization else ''}{dtype} on {device}"
        if dtype != source.dtype:
            self.description = f"torch, {dtype} instead of {source.dtype} on {device}"
            self.notices.append(
                f"This processor is slow in {source.dtype}: the model computes in {dtype}, and answers may differ a "
                "little from those of the run."
            )
        self.kept: Kept | None = None
        self.pieces = Pieces(least=384)  # on a CPU, 128 take 14 % longer in all
        self.same_rotation = same_rotation(model.config.get_text_config())
        self.dtype = dtype
        self.token_bytes = bytes_per_token(model.config.get_text_config(), weights.itemsize)
        self.switchable = bool(source.adapter)
        self.model = (with_adapter(model, source, root) if source.adapter else model).eval()
        self.here = threading.local()  # `stopped`: whether the answer that this thread computes is not wanted any more
        for module in self.model.modules():  # a piece of a prompt, or a token, can take seconds; a layer of it does not
            if isinstance(module, GradientCheckpointingLayer | torch.nn.Embedding):
                module.register_forward_pre_hook(self.end_if_stopped)

    def end_if_stopped(self, *_: Any) -> None:
        """Raise StoppedError if the answer is not wanted any more; called before each layer."""
        if (stopped := getattr(self.here, "stopped", None)) and stopped.is_set():
            raise StoppedError

    def end_of_answer(self, end_of_text: int | list[int] | None) -> list[int]:
        """Return the tokens that end an answer.

        These are for the base model alone and for runs of old releases; models/run.json has those of a tuned model.
        The model's and the tokenizer's end of text, and the chat template's end of turn. Often only the template has
        that one (Phi-3's <|end|>, ChatML's <|im_end|>). A tuned model generates it, as trained, and would continue with
        a made-up conversation if it did not stop there.
        """
        stops = [self.tokenizer.eos_token_id, end_of_turn(self.tokenizer)]
        stops += end_of_text if isinstance(end_of_text, list) else [end_of_text]
        return sorted({stop for stop in stops if stop is not None})

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

    def generate(self, prompt: list[int], generation: Generation) -> Generator[int | None, None, None]:
        """Yield the answer's tokens from a thread; closing the generator stops it after one more layer."""
        streamer = TokenStreamer()
        stopped = threading.Event()
        ids = torch.tensor([prompt], device=self.model.device)
        settings: dict[str, Any] = {
            "max_new_tokens": generation.max_new_tokens,
            "repetition_penalty": generation.repetition_penalty,
        }
        if generation.temperature > 0:
            settings |= {"do_sample": True, "temperature": generation.temperature}
            settings |= {"top_p": generation.top_p, "top_k": generation.top_k}

        without = self.switchable and not generation.adapter
        cache = self.kept_cache(prompt, generation.adapter)
        known = cache.get_seq_length() if cache else 0
        refuse_too_large(len(prompt) - known + generation.max_new_tokens, self.token_bytes, self.free_memory())

        def compute() -> None:
            nonlocal cache
            self.here.stopped = stopped
            try:
                with contextlib.ExitStack() as stack:
                    stack.enter_context(computing_in(self.dtype))
                    if without:
                        stack.enter_context(self.model.disable_adapter())
                    if generation.seed is not None:  # what is drawn for other answers stays as it would be without this
                        stack.enter_context(torch.random.fork_rng(range(torch.cuda.device_count())))
                        torch.manual_seed(generation.seed)
                    cache = self.prepared(prompt, cache)
                    self.read(prompt, cache, streamer)
                    made = self.model.generate(
                        input_ids=ids,
                        attention_mask=torch.ones_like(ids),
                        past_key_values=cache,
                        use_cache=True,
                        return_dict_in_generate=True,
                        streamer=streamer,
                        **settings,
                    )
                self.keep(generation.adapter, made.sequences[0].tolist(), made.past_key_values)
            except StoppedError:
                self.keep(generation.adapter, prompt + streamer.tokens, cache)
                streamer.end()
            except Exception as error:
                cache = None
                streamer.made.put(error)

        thread = threading.Thread(target=compute, daemon=True)
        thread.start()
        try:
            while (made := streamer.made.get()) is not END:
                if isinstance(made, Exception):
                    raise made
                if made not in self.stops:
                    yield made
        finally:
            stopped.set()
            thread.join()

    def prepared(self, prompt: list[int], cache: DynamicCache | None) -> DynamicCache | None:
        """Return the cache to read a prompt into, or None if it has to be read in one piece."""
        made = cache or DynamicCache(config=self.model.config.get_text_config(decoder=True))
        # some models would rotate the positions of the first pieces otherwise than those of the whole prompt
        return made if len(prompt) <= self.same_rotation and can_be_cut(made) else cache

    def read(self, prompt: list[int], cache: DynamicCache | None, streamer: TokenStreamer) -> None:
        """Read the prompt in pieces, but the last one, after which the answer begins."""
        if cache is None:
            return
        known = cache.get_seq_length()
        only_last = {"logits_to_keep": 1} if self.model._supports_logits_to_keep() else {}
        for piece in self.pieces.of(prompt[known:]):
            if known + len(piece) == len(prompt):
                break
            ids = torch.tensor([piece], device=self.model.device)
            mask = torch.ones((1, known + len(piece)), dtype=ids.dtype, device=ids.device)
            with torch.no_grad():
                self.model(input_ids=ids, attention_mask=mask, past_key_values=cache, use_cache=True, **only_last)
            known += len(piece)
            streamer.made.put(None)

    def free_memory(self) -> int:
        """Return the bytes that a cache can take: of the GPUs, also those that PyTorch holds for later, or here."""
        if self.model.device.type != "cuda":
            return free_memory()
        gpus = range(torch.cuda.device_count())
        held = sum(torch.cuda.memory_reserved(gpu) - torch.cuda.memory_allocated(gpu) for gpu in gpus)
        return held + sum(torch.cuda.mem_get_info(gpu)[0] for gpu in gpus)

    def kept_cache(self, prompt: list[int], adapter: bool) -> DynamicCache | None:
        """Return the last conversation's cache, cut to the tokens that this prompt begins with too, or None."""
        kept, self.kept = self.kept, None  # an answer that fails leaves none behind
        if not kept or kept.adapter != adapter or len(prompt) > self.same_rotation:
            return None
        same = min(same_start(kept.tokens, prompt), len(prompt) - 1)  # the last token's output is needed
        return kept.cache if same and cut(kept.cache, same) else None

    def keep(self, adapter: bool, tokens: list[int], cache: Any) -> None:
        """Keep a conversation's cache for its next turn, if it is of a kind that can be continued and cut.

        Where the answer was stopped within a piece, the first layers have read more than the last.
        """
        if can_be_cut(cache) and all(one.is_initialized for one in cache.layers):
            length = min(one.get_seq_length() for one in cache.layers)
            if length <= self.same_rotation and cut(cache, length):
                self.kept = Kept(adapter, tokens[:length], cache)


class TokenStreamer:
    """Passes tokens from the generating thread to the waiting one, None after each piece of the prompt, and END.

    Not transformers' TextIteratorStreamer: it decodes each line separately, so tokenizers that drop the space at the
    start of a text (Llama 2, Mistral, Phi-3) lose a space of each line's indentation. It cannot pass errors on either.
    """

    def __init__(self) -> None:
        """Expect the prompt first: transformers puts it before the answer."""
        self.made: queue.Queue[Any] = queue.Queue()
        self.tokens: list[int] = []
        self.prompt_seen = False

    def put(self, value: torch.Tensor) -> None:
        """Receive one new token; called by transformers."""
        if self.prompt_seen:
            self.tokens.append(int(value.item()))
            self.made.put(self.tokens[-1])
        self.prompt_seen = True

    def end(self) -> None:
        """Mark the end; called by transformers."""
        self.made.put(END)
