"""What answers does as what trained: where an answer ends, which date, which precision, which limits."""

from __future__ import annotations

import datetime
import itertools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import inference_of


@pytest.fixture(scope="module", autouse=True)
def modules(workspace: Path) -> Iterator[None]:
    with inference_of(workspace):
        yield


# ---- where an answer ends

FORMS = {  # the text around an answer, and what ends it
    "ChatML": ("<|im_start|>{role}\n{content}<|im_end|>\n", "<|im_end|>"),
    "Llama 3": ("<|start_header_id|>{role}<|end_header_id|>\n\n{content}<|eot_id|>", "<|eot_id|>"),
    "Phi-3": ("<|{role}|>\n{content}<|end|>\n", "<|end|>"),
    "Gemma": ("<start_of_turn>{role}\n{content}<end_of_turn>\n", "<end_of_turn>"),
    "two ends": ("[{role}]{content}<|end|><|eot_id|>\n", "<|end|>"),
    "line breaks, then the end": ("{role}: {content}\n\n<|end|>\n", "<|end|>"),
    "text alone": ("{role}: {content}\n\n", None),
    "spaces alone": ("{role}: {content}    ", None),
}
ADDED = {  # added tokens that are text
    "none": [],
    "Gemma's": ["\n", "\n\n", "\n\n\n", "\t", "\t\t", "<h1>", "</h1>", "<table>"],
    "Phi-2's": [" " * 2, " " * 4, " " * 8, "\t\t", "\n\n"],
}


def tokenizer_of(form: str, added: list[str], special: bool) -> Any:
    """Build a tokenizer whose template writes a form; `special` is whether its marks are special tokens."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|end|>"]
    marks += ["<|user|>", "<|assistant|>", "<start_of_turn>", "<end_of_turn>"]
    letters = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    words = Tokenizer(models.BPE(letters, []))
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words.add_special_tokens(["<|endoftext|>"])
    words.add_tokens([AddedToken(text, normalized=False) for text in added])
    (words.add_special_tokens if special else words.add_tokens)([AddedToken(mark, normalized=False) for mark in marks])
    turn = json.dumps(form).replace("{role}", '" ~ turn.role ~ "').replace("{content}", '" ~ turn.content ~ "')
    template = "{% for turn in messages %}{{ " + turn + " }}{% endfor %}"
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<|endoftext|>", chat_template=template)


@pytest.mark.parametrize(("form", "added", "special"), itertools.product(FORMS, ADDED, (True, False)))
def test_training_and_chat_find_the_same_end_of_an_answer_and_it_is_never_blank(
    form: str, added: str, special: bool
) -> None:
    from preparing.chat_template import ends_of_answer
    from torch_backend import TorchBackend

    text, end = FORMS[form]
    tokenizer = tokenizer_of(text, ADDED[added], special)
    expected = sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", *([end] if end else [])]))
    backend: Any = object.__new__(TorchBackend)
    backend.tokenizer = tokenizer
    assert backend.end_of_answer(None) == ends_of_answer(tokenizer) == expected


# ---- what models/run.json says


def run_json(**changes: Any) -> dict[str, Any]:
    run = {"base_model": "models/demo", "revision": None, "method": "lora", "adapter": "models/adapter"}
    return run | {"dtype": "float32", "system_prompt": ""} | changes


def source_of(folder: Path, **changes: Any) -> Any:
    """Return the source that models/run.json describes."""
    from sources import tuned_source

    (folder / "models").mkdir(exist_ok=True)
    (folder / "models/run.json").write_text(json.dumps(run_json(**changes)), encoding="utf-8")
    return tuned_source(folder)


def test_the_stops_of_the_run_end_an_answer_and_no_others(workspace: Path, tmp_path: Path) -> None:
    from torch_backend import TorchBackend
    from training.tiny_model import build_demo

    build_demo()
    found = TorchBackend(source_of(tmp_path, adapter=None), workspace / "models/demo", workspace).stops
    assert len(found) == 2
    source = source_of(tmp_path, adapter=None, stops=[found[0], 77])
    backend = TorchBackend(source, workspace / "models/demo", workspace)
    assert backend.stops == backend.model.generation_config.eos_token_id == [found[0], 77]


DATED = "{{ strftime_now('%d %B %Y') }}{% for turn in messages %}[{{ turn.role }}]{{ turn.content }}{% endfor %}"


def test_a_template_that_writes_the_date_gets_the_run_s_with_both_engines(tmp_path: Path) -> None:
    from chat_template import ChatTemplate
    from onnx_backend import ChatTokenizer

    tokenizer = tokenizer_of("{role}{content}", [], True)
    tokenizer.chat_template = DATED
    tokenizer.save_pretrained(tmp_path)
    today = datetime.datetime.now().strftime("%d %B %Y")
    for changes, date in (({"date": "2026-03-04"}, "04 March 2026"), ({}, today)):
        source = source_of(tmp_path, **changes)
        with_torch = ChatTemplate(tokenizer.get_chat_template(), tokenizer.special_tokens_map, source)
        for engine in (with_torch, ChatTokenizer(tmp_path, tmp_path, source)):
            assert engine.render(HELLO) == f"{date}[user]hi"


def test_a_date_that_is_none_is_one_sentence(tmp_path: Path) -> None:
    from engine import ChatError

    with pytest.raises(ChatError, match=r"models/run\.json is damaged or incomplete \(Invalid isoformat string"):
        source_of(tmp_path, date="yesterday")


@pytest.mark.parametrize("where", ["quantization", "config"])
def test_qlora_quantises_as_the_run_did_and_not_as_the_settings_say_today(tmp_path: Path, where: str) -> None:
    from torch_backend import quantization_of_training

    (tmp_path / "finetuning").mkdir(exist_ok=True)
    config = {"passes": {"finetune": {"type": "QLoRA", "quant_type": "nf4", "double_quant": False}}}
    (tmp_path / "finetuning/olive-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    run = {"quant_type": "fp4", "double_quant": True, "compute_dtype": "float32"}
    changes = {"quantization": run} if where == "quantization" else {"config": {"adapter": run | {"r": 8}}}
    made = quantization_of_training(source_of(tmp_path, method="qlora", **changes), "cpu")
    assert (made.bnb_4bit_quant_type, made.bnb_4bit_use_double_quant) == ("fp4", True)
    assert str(made.bnb_4bit_compute_dtype) == "torch.float32"


# ---- the precision

LOAD = """
import sys
from pathlib import Path
sys.path.insert(0, sys.argv[1] + "/inference")
import load_engine
from engine import Source
from torch_backend import TorchBackend
root = Path(sys.argv[1])
for dtype in sys.argv[2:]:
    backend = TorchBackend(Source("models/demo", None, None, "lora", dtype, ""), root / "models/demo", root)
    print(backend.description, backend.model.dtype, *backend.notices, sep="|")
"""


@pytest.mark.parametrize(("dtype", "weights"), [("float16", "float32"), ("bfloat16", "bfloat16")])
@pytest.mark.parametrize(("gpus", "device"), [(1, "cuda"), (2, "auto")])
def test_a_gpu_computes_as_the_training_did_and_several_share_a_model(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, weights: str, gpus: int, device: str
) -> None:
    import torch

    import torch_backend
    from engine import ChatError, Source
    from reporting import evaluate
    from torch_loading import computing_in

    seen: list[dict[str, Any]] = []

    def load(*_: Any, **options: Any) -> None:
        seen.append(options)
        raise OSError("no GPU is here")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
    monkeypatch.setattr(torch_backend.AutoModelForCausalLM, "from_pretrained", load)  # the evaluation's too
    with pytest.raises(ChatError, match="no GPU is here"):
        torch_backend.TorchBackend(Source("demo", None, None, "lora", dtype, ""), workspace / "models/demo", workspace)
    with pytest.raises(OSError, match="no GPU is here"):
        evaluate.load_base(str(workspace / "models/demo"), dtype)
    assert [(options["dtype"], options["device_map"]) for options in seen] == [(getattr(torch, weights), device)] * 2
    for context in (computing_in(dtype), evaluate.computing_in(dtype)):
        assert isinstance(context, torch.autocast) == (dtype == "float16")


def test_float16_counts_keys_and_values_in_the_precision_of_its_weights(
    workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import torch_backend
    from engine import Source
    from training.tiny_model import build_demo

    build_demo()

    def bytes_of(dtype: str) -> int:
        monkeypatch.setattr(torch_backend, "computable", lambda *_: dtype)  # as on a GPU
        source = Source("models/demo", None, None, "lora", dtype, "")
        return int(torch_backend.TorchBackend(source, workspace / "models/demo", workspace).token_bytes)

    assert bytes_of("float16") == bytes_of("float32") == 2 * bytes_of("bfloat16")


@pytest.mark.parametrize("own", ["", "Be brief."])
def test_the_base_model_gets_the_system_prompt_of_all_rows_too(tmp_path: Path, own: str) -> None:
    from sources import base_source

    (tmp_path / "finetuning").mkdir()
    (tmp_path / "models").mkdir()
    config = {
        "input_model": {"model_path": "models/demo"},
        "data_configs": [{"pre_process_data_config": {"system_prompt": own} if own else None}],
        "passes": {"lora": {"type": "LoRA", "torch_dtype": "float32"}},
    }
    (tmp_path / "finetuning/olive-config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    assert base_source(tmp_path).system_prompt == own
    run = dict.fromkeys(("base_model", "adapter", "dtype"), "models/demo") | {"revision": None, "method": "lora"}
    run["system_prompt"] = "You sort feelings."
    (tmp_path / "models/run.json").write_text(json.dumps(run), encoding="utf-8")
    assert base_source(tmp_path).system_prompt == (own or "You sort feelings.")


@pytest.mark.parametrize("isa", ["AVX2", ""], ids=["AVX2", "this processor"])
def test_what_the_processor_lacks_is_computed_in_float32_and_said(workspace: Path, isa: str) -> None:
    import torch

    from training.tiny_model import build_demo

    if torch.cuda.is_available():
        pytest.skip("on a GPU the precision of the training is kept")
    build_demo()
    here = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    expected = {"bfloat16": "bfloat16" if here and not isa else "float32", "float16": "float32", "float32": "float32"}
    limit = {"ONEDNN_MAX_CPU_ISA": isa} if isa else {}
    done = subprocess.run(
        [sys.executable, "-B", "-c", LOAD, workspace, *expected],
        env=os.environ | limit,
        capture_output=True,
        text=True,
        check=True,
    )
    for (dtype, computes), line in zip(expected.items(), done.stdout.splitlines(), strict=True):
        description, loaded, *notices = line.split("|")
        assert loaded == f"torch.{computes}"
        if computes == dtype:
            assert (description, notices) == (f"torch, {dtype} on cpu", [])
        else:
            assert description == f"torch, {computes} instead of {dtype} on cpu"
            assert notices == [
                f"This processor is slow in {dtype}: the model computes in {computes}, and answers may differ a little "
                "from those of the run."
            ]


# ---- limits


class Recorded:
    """A backend that says what it is given, or fails; it counts what it is asked."""

    description, context, notices, switchable = "recorded", 4096, [], False  # type: ignore[var-annotated]

    def __init__(self, fails: Exception | None = None) -> None:
        self.fails, self.encoded, self.asked = fails, 0, []  # type: ignore[var-annotated]

    def render(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)

    def encode(self, text: str) -> list[int]:
        self.encoded += 1
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode()

    def generate(self, _: list[int], generation: Any) -> Iterator[int]:
        self.asked.append(generation)
        if self.fails:
            raise self.fails
        yield from b"yes"


def recorded(fails: Exception | None = None) -> Any:
    """Return an engine on a recorded backend."""
    from engine import Engine, Source

    return Engine(Source("models/demo", None, None, "lora", "float32", ""), Recorded(fails))


HELLO = [{"role": "user", "content": "hi"}]


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("temperature", 1e-40, "temperature is 1e-40: choose 0 (greedy), or 0.01 or more."),
        ("temperature", -1, "temperature is -1: choose 0 to 2."),
        ("temperature", float("nan"), "temperature is nan: choose 0 to 2."),
        ("temperature", float("inf"), "temperature is inf: choose 0 to 2."),
        ("top_p", 0, "top_p is 0: choose 1e-06 to 1."),
        ("top_p", 1.5, "top_p is 1.5: choose 1e-06 to 1."),
        ("repetition_penalty", 1e-40, "repetition_penalty is 1e-40: choose 0.1 to 10."),
        ("repetition_penalty", 11, "repetition_penalty is 11: choose 0.1 to 10."),
    ],
)
def test_a_setting_that_no_model_can_compute_with_is_one_sentence_for_every_front_end(
    field: str, value: float, says: str
) -> None:
    from engine import ChatError, Generation

    with pytest.raises(ChatError) as caught:
        list(recorded().stream(HELLO, Generation(**{field: value}), print))
    assert str(caught.value) == says


@pytest.mark.parametrize(("wanted", "bound"), [(0, 1000), (5, 5), (1000, 1000), (200_000, 1000)])
def test_never_more_than_a_thousand_tokens_are_sampled_from(wanted: int, bound: int) -> None:
    from engine import Generation

    engine = recorded()
    list(engine.stream(HELLO, Generation(temperature=1, top_k=wanted), print))
    assert engine.backend.asked[0].top_k == bound


def long_chat(turns: int) -> list[dict[str, str]]:
    """Return a chat of short turns that ends with a question."""
    return [{"role": ("user", "assistant")[i % 2], "content": f"turn {i} of this chat"} for i in range(turns)]


def test_dropping_the_oldest_of_many_turns_encodes_a_few_times_only() -> None:
    engine, notices = recorded(), []  # type: ignore[var-annotated]
    chat = long_chat(801)
    prompt, _ = engine.fit(chat, 256, notices.append)
    assert engine.backend.encoded <= 12
    kept = bytes(prompt).decode()
    dropped = next(i for i in range(0, 801, 2) if kept.startswith(f"[user]turn {i} "))
    assert notices == [f"The model reads 4096 tokens: the oldest {dropped} messages of this chat were left out."]
    # one question more would not have fitted
    assert len(prompt) <= 4096 - 256 < len(engine.backend.render(chat[dropped - 2 :]))


def test_what_may_not_be_shortened_is_encoded_once() -> None:
    from engine import TooLongError

    engine = recorded()
    with pytest.raises(
        TooLongError, match=r"^The conversation comes to \d+ tokens, but the model reads 4096 and 256 of"
    ):
        engine.fit(long_chat(801), 256, print, may_drop=False)
    assert engine.backend.encoded == 1


# ---- through the API


def asked(engine: Any, *requests: tuple[str, dict[str, Any] | None]) -> list[tuple[int, Any]]:
    """Serve an engine; return status and body of each answer."""
    from fastapi import FastAPI
    from served import serving

    answers = []
    with serving(lambda: engine, lambda _: FastAPI()) as (address, _, ready):
        assert ready.wait(60)
        for path, body in requests:
            answers.append(fetch(address + path, body))
    return answers


def fetch(url: str, body: dict[str, Any] | None) -> tuple[int, Any]:
    import urllib.error
    import urllib.request

    try:
        with urllib.request.urlopen(url, json.dumps(body).encode() if body else None) as response:
            return response.status, json.loads(response.read())
    except urllib.error.HTTPError as error:
        return error.code, json.loads(error.read())


ASK = ("v1/chat/completions", {"model": "base", "messages": HELLO})


def test_a_request_is_encoded_once() -> None:
    engine = recorded()
    ((status, _),) = asked(engine, ASK)
    assert (status, engine.backend.encoded) == (200, 1)


def test_a_lack_of_memory_is_the_request_s_fault_so_that_clients_do_not_try_again() -> None:
    engine = recorded(RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."))
    (status, body), (health, _) = asked(engine, ASK, ("health", None))
    assert (status, health) == (400, 200)
    assert body["error"]["message"] == "The memory is full: ask for a shorter answer, or clear the chat."
