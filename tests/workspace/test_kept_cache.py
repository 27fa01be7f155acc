"""What is kept between the turns of a chat: the same answers as without it, and only new tokens are computed."""

from __future__ import annotations

import contextlib
import gc
import io
import random
import weakref
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import inference_of

VOCABULARY = 300
# «window» has layers that see only the last tokens; «long» and «phi» rotate all positions otherwise beyond 64 tokens
KINDS = ("llama", "window", "long", "phi")


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    with inference_of(workspace):
        yield


@pytest.fixture(scope="module")
def root(workspace: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with a tiny model of each kind, and an adapter for it; all weights are random."""
    import peft
    import torch
    import transformers

    from training.tiny_model import build_tokenizer

    folder = tmp_path_factory.mktemp("kept")
    facts = yaml.safe_load((workspace / "setup/model.yaml").read_text(encoding="utf-8"))
    tokenizer = build_tokenizer(facts, [[{"role": "user", "content": "some words"}]])
    size = {
        "vocab_size": VOCABULARY, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 16,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.3,
        "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2,
    }  # fmt: skip
    longrope = {
        "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 64,
        "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
    }  # fmt: skip
    configs = {
        "llama": transformers.LlamaConfig(**size),
        "window": transformers.Gemma3TextConfig(
            **size, sliding_window=24, layer_types=["sliding_attention", "full_attention"], query_pre_attn_scalar=16
        ),
        "long": transformers.LlamaConfig(**size, rope_parameters=longrope),
        "phi": transformers.Phi3Config(
            **{key: value for key, value in size.items() if key != "head_dim"},
            rope_parameters=longrope,
            original_max_position_embeddings=64,
        ),
    }
    for name, config in configs.items():
        torch.manual_seed(1)
        model = transformers.AutoModelForCausalLM.from_config(config)
        model.save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
        adapted = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM"))
        for weight in filter(lambda weight: weight.requires_grad, adapted.parameters()):
            torch.nn.init.normal_(weight, std=0.3)
        adapted.save_pretrained(folder / f"{name}-adapter")
        tokenizer.save_pretrained(folder / f"{name}-adapter")
    return folder


def torch_backend(root: Path, kind: str) -> Any:
    """Load a model with its adapter; only the token 1 ends an answer."""
    from engine import Source
    from torch_backend import TorchBackend

    source = Source(kind, None, f"{kind}-adapter", "lora", "float32", "", stops=(1,))
    backend = TorchBackend(source, root / kind, root)
    backend.pieces.size = backend.pieces.least = 16  # so that the prompts of the tests have several
    return backend


@pytest.fixture(scope="module")
def onnx_folder(root: Path) -> Path:
    """The first model, as the export builds it."""
    from exporting.int4 import build

    folder = root / "onnx"
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        build(root / "llama", folder, "cpu")
    return folder


def onnx_backend(folder: Path) -> Any:
    from engine import Source
    from onnx_backend import OnnxBackend

    return OnnxBackend(Source("llama", None, None, "lora", "float32", "", stops=(1,)), folder, folder.parent)


def tokens(generated: Any) -> list[int]:
    """Return an answer's tokens; None stands for each piece of the prompt but the last."""
    return [token for token in generated if token is not None]


def stop_before_a_layer(backend: Any, generated: Any, number: int) -> None:
    """Stop an answer before the given layer of all that it computes; none is computed after that."""
    computed: list[Any] = []

    def stop(layer: Any, _: Any) -> None:
        if len(computed) == number:
            backend.here.stopped.set()

    layers = backend.model.get_base_model().get_decoder().layers
    hooks = [layer.register_forward_pre_hook(stop, prepend=True) for layer in layers]
    hooks += [layer.register_forward_hook(lambda *_: computed.append(None)) for layer in layers]
    tokens(generated)
    for hook in hooks:
        hook.remove()
    assert len(computed) <= number


def talk(backend: Any, fresh: Any, seed: int, adapters: tuple[bool, ...], longest: int) -> None:
    """Ask as people do, and compare each answer with that of a backend that knows nothing of the ones before."""
    from engine import Generation

    draw = random.Random(seed)

    def words() -> list[int]:
        return [draw.randrange(10, VOCABULARY) for _ in range(draw.randint(1, 9))]

    system, turns, adapter = words(), [words()], True
    for _ in range(14):
        prompt = [token for turn in (system, *turns) for token in turn]
        if len(prompt) > longest:
            turns = [words()]
            continue
        how = Generation(draw.randint(1, 8), adapter=adapter)
        if draw.random() < 0.3:
            how = replace(how, repetition_penalty=1.3)
        if draw.random() < 0.2:
            how = replace(how, temperature=1.5, seed=draw.randrange(99), top_k=50)
        fresh.kept = None
        expected = tokens(fresh.generate(prompt, how))
        given = tokens(backend.generate(prompt, how))
        assert given == expected, (seed, prompt, how)
        what = draw.choice(["next", "next", "next", "again", "edit", "system", "adapter", "stop", "stop", "other"])
        if what == "next":
            turns += [given, words()]
        elif what == "edit":
            at = draw.randrange(0, len(turns), 2)
            turns = [*turns[:at], words()]
        elif what == "system":
            system = words()
        elif what == "adapter":
            adapter = draw.choice(adapters)
        elif what == "stop":
            stopped = backend.generate(prompt, replace(how, max_new_tokens=20))
            if hasattr(backend, "here") and draw.random() < 0.7:
                stop_before_a_layer(backend, stopped, draw.randint(0, 40))
            else:
                next(stopped, None)
                stopped.close()
        elif what == "other":
            turns = [words()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(12))
def test_pytorch_answers_as_it_would_without_what_it_kept(root: Path, kind: str, seed: int) -> None:
    talk(torch_backend(root, kind), torch_backend(root, kind), seed, (True, False), 120)


@pytest.mark.parametrize("seed", range(12))
def test_onnx_runtime_answers_as_it_would_without_what_it_kept(onnx_folder: Path, seed: int) -> None:
    talk(onnx_backend(onnx_folder), onnx_backend(onnx_folder), seed, (True,), 120)


@contextlib.contextmanager
def computed_tokens(backend: Any) -> Iterator[list[int]]:
    """Yield a list of how many tokens each forward pass of the model gets."""
    passes: list[int] = []
    model = backend.model.get_base_model()

    def count(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        passes.append(options["input_ids"].shape[1])

    hook = model.register_forward_pre_hook(count, with_kwargs=True)
    yield passes
    hook.remove()


@pytest.mark.parametrize("kind", ["llama", "window"])
def test_pytorch_computes_only_what_is_new_in_the_next_turn(root: Path, kind: str) -> None:
    from engine import Generation

    backend, prompt = torch_backend(root, kind), list(range(10, 90))
    answer = tokens(backend.generate(prompt, Generation(4)))
    with computed_tokens(backend) as passes:
        tokens(backend.generate([*prompt, *answer, 91, 92], Generation(4)))
    assert passes[0] == 3  # the answer's last token, and the two new ones


def test_onnx_runtime_computes_only_what_is_new_in_the_next_turn(
    onnx_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import onnxruntime_genai

    from engine import Generation

    read: list[int] = []

    class Watched(onnxruntime_genai.Generator):
        def append_tokens(self, tokens: Any) -> None:
            read.append(len(tokens))
            super().append_tokens(tokens)

    def read_now() -> int:
        """Return how many tokens were read since the last call."""
        number = sum(read)
        read.clear()
        return number

    monkeypatch.setattr(onnxruntime_genai, "Generator", Watched)
    backend, prompt = onnx_backend(onnx_folder), list(range(10, 90))
    answer = tokens(backend.generate(prompt, Generation(4)))
    assert read_now() == 80
    tokens(backend.generate([*prompt, *answer, 91, 92], Generation(4)))
    assert read_now() == len(answer) + 2  # the answer again, as a part of the prompt
    tokens(backend.generate([*prompt, *answer, 91, 93], replace(Generation(4), repetition_penalty=1.2)))
    assert read_now() == 80 + len(answer) + 2  # the options of a generator are fixed, so this is another one
    tokens(backend.generate(list(range(10, 290)), Generation(100)))
    assert read_now() == 280  # there is no room for so many


@pytest.mark.parametrize("new", [[], [91], [91, 92, 93]])
def test_onnx_runtime_computes_the_very_same_numbers_as_without_what_it_kept(onnx_folder: Path, new: list[int]) -> None:
    import numpy

    from engine import Generation

    backend, fresh, prompt = onnx_backend(onnx_folder), onnx_backend(onnx_folder), list(range(10, 90))
    answer = tokens(backend.generate(prompt, Generation(8)))
    prompt += [*answer, *new] if new else []  # nothing new: the same question again
    options = backend.kept.options
    logits = []
    for one in (backend, fresh):
        begun = one.begin(prompt, 4, options)
        begun.generator.append_tokens(prompt[len(begun.prompt) :])
        logits.append(numpy.array(begun.generator.get_logits())[0, -1])
    assert numpy.array_equal(*logits)


def test_onnx_runtime_draws_the_same_answer_again_with_the_same_seed(onnx_folder: Path) -> None:
    from engine import Generation

    backend, how = onnx_backend(onnx_folder), Generation(12, temperature=2.0, top_k=200, seed=3)
    assert len({tuple(backend.generate(list(range(10, 40)), how)) for _ in range(3)}) == 1


@pytest.mark.parametrize("kind", ["long", "phi"])
def test_a_model_that_rotates_positions_otherwise_from_some_length_on_computes_longer_prompts_anew(
    root: Path, kind: str
) -> None:
    from engine import Generation

    backend = torch_backend(root, kind)
    with computed_tokens(backend) as passes:
        for length, expected in ((50, 50), (60, 10), (80, 80), (90, 90), (60, 60)):
            passes.clear()
            tokens(backend.generate(list(range(10, 10 + length)), Generation(4)))
            assert sum(size for size in passes if size > 1) == expected, length  # of the prompt, in pieces


def test_an_answer_that_fails_leaves_nothing_that_is_half_computed(root: Path) -> None:
    from engine import Generation

    backend, fresh, prompt = torch_backend(root, "llama"), torch_backend(root, "llama"), list(range(10, 60))
    tokens(backend.generate(prompt, Generation(4)))
    last = backend.model.get_base_model().model.layers[-1]

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    hook = last.register_forward_pre_hook(fail)  # the first layer has added to its part of the cache
    with pytest.raises(RuntimeError, match="the device is gone"):
        tokens(backend.generate([*prompt, 70], Generation(4)))
    hook.remove()
    for new in (70, 71):
        fresh.kept = None
        assert tokens(backend.generate([*prompt, new], Generation(4))) == tokens(
            fresh.generate([*prompt, new], Generation(4))
        )


def test_after_a_lack_of_memory_nothing_of_the_failed_answer_stays_in_memory(root: Path) -> None:
    import torch

    from engine import ChatError, Engine, Generation, Source

    backend, held = torch_backend(root, "llama"), []
    engine = Engine(Source("llama", None, None, "lora", "float32", ""), backend)

    def lack(_: Any, arguments: Any, options: dict[str, Any]) -> None:
        large = torch.zeros(1000)  # as a layer's tensors, which the frames of the error hold
        held.extend([weakref.ref(large), weakref.ref(options["past_key_values"])])
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    hook = backend.model.get_base_model().model.register_forward_pre_hook(lack, with_kwargs=True)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(
            ChatError, match=r"^The memory is full: ask for a shorter answer, or clear the chat\.$"
        ) as caught:
            list(engine.stream([{"role": "user", "content": "some words"}], Generation(4), print))
        assert [one() for one in held] == [None, None]
        assert caught.value.__cause__
    finally:
        gc.enable()
        hook.remove()
    assert list(engine.stream([{"role": "user", "content": "some words"}], Generation(4), print))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_seeded_answer_leaves_what_is_drawn_afterwards_as_it_was(root: Path, temperature: float) -> None:
    import torch

    from engine import Generation

    backend = torch_backend(root, "llama")
    torch.manual_seed(5)
    before = torch.get_rng_state()
    seeded = [tokens(backend.generate([20, 30], Generation(8, temperature=temperature, seed=1))) for _ in range(2)]
    assert seeded[0] == seeded[1]
    assert torch.equal(torch.get_rng_state(), before)
    drawn = {tuple(backend.generate([20, 30], Generation(8, temperature=1.0))) for _ in range(4)}
    assert len(drawn) > 1
