"""SmolLM2 135M instruct, a real model, goes the whole way from a hub on this machine, by its id in the catalogue.

Its weights come from a package of the index (make_models.py) and are dequantised from four bits: what it says is its
own, what the published weights would score is not measured here. The tests of this file are the steps of one walk, in
their order; the figures that they saw are shown at the end.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from typing import Any

import four_bits
import pytest
from hub import SUNDRIES, Hub
from real_walk import Walk, set_in
from walks import CATALOGUED, PINNED, REPOSITORY, environment_of, render

MODEL = REPOSITORY / ".cache" / "smollm2"
SETTINGS = {
    "max_steps": 40,
    "learning_rate": 0.002,
    "lora_dropout": 0,
    "max_seq_len": 128,
    "train_batch_size": 4,
    "eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
}
HELD_OUT = 32  # rows: more of them would take most of the time
PARAMETERS = 134_515_008
SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"  # of its own template

sys.path.append(str(REPOSITORY / ".cache" / "openai"))  # at the end: what a workspace has comes first


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.add(CATALOGUED, SUNDRIES | {path.name: path for path in MODEL.iterdir()}, commit=PINNED)
        yield running


@pytest.fixture(scope="module")
def walk(hub: Hub, tmp_path_factory: pytest.TempPathFactory, figures: dict[str, str]) -> Walk:
    """Render the workspace of the catalogue's model, with a short run."""
    folder = tmp_path_factory.mktemp("smollm2")
    root = render(folder / "workspace", model="smollm2-135m-instruct", device="cpu", **SETTINGS)
    walk = Walk(root, environment_of(hub, folder / "cache"), figures, "SmolLM2")
    held_out = walk.rows("sample-heldout.jsonl")[:HELD_OUT]
    lines = "".join(json.dumps({"messages": row}) + "\n" for row in held_out)
    (root / "dataset" / "heldout.jsonl").write_text(lines, encoding="utf-8")
    set_in(root, held_out_file="dataset/heldout.jsonl", eval_steps=20, save_steps=20)
    return walk


def test_it_is_fetched_at_the_pinned_commit_and_no_more_than_is_needed(walk: Walk, hub: Hub) -> None:
    said = walk.step("setup/get_model.py")
    assert f"Downloading {CATALOGUED}: 0.27 GB" in said and PINNED in said
    assert not hub.sent["onnx/model.onnx"] and not hub.sent["modeling_odd.py"]


def test_the_check_counts_parameters_and_tokens_exactly(walk: Walk) -> None:
    report = json.loads(walk.step("finetuning/invoke_olive.py", "--check", "--json"))
    assert report["problem"] is None
    assert report["model"]["parameters"] == PARAMETERS
    assert report["model"]["commit"] == PINNED
    assert report["model"]["own_template"] is True
    counted = sorted(tokens_of(row) for row in walk.rows("sample-train.jsonl"))
    tokens = report["data"]["tokens"]
    assert (tokens["min"], tokens["max"]) == (counted[0], counted[-1])
    assert tokens["median"] == counted[len(counted) // 2]
    assert not report["data"]["tokens_estimated"]
    share = sum(answer_tokens(row) for row in walk.rows("sample-train.jsonl")) / sum(counted)
    assert report["data"]["answer_share"] == pytest.approx(share, abs=1e-4)
    walk.estimate = report["estimate"]
    walk.figures["memory, estimated"] = f"{report['estimate']['memory']['total'] / 2**30:.2f} GiB"
    walk.figures["time, estimated"] = f"{report['estimate']['seconds']} s"


def tokens_of(row: list[dict[str, str]]) -> int:
    """Count a row's tokens with its tokenizer.json alone, in ChatML as its model card shows it."""
    turns = [{"role": "system", "content": SYSTEM}, *row]
    text = "".join(f"<|im_start|>{turn['role']}\n{turn['content']}<|im_end|>\n" for turn in turns)
    return len(tokenizer().encode(text, add_special_tokens=False).ids)


def answer_tokens(row: list[dict[str, str]]) -> int:
    """Count the tokens of the answer, with the one that ends it."""
    return len(tokenizer().encode(row[-1]["content"] + "<|im_end|>", add_special_tokens=False).ids)


def tokenizer() -> Any:
    from tokenizers import Tokenizer

    if not hasattr(tokenizer, "loaded"):
        tokenizer.loaded = Tokenizer.from_file(str(MODEL / "tokenizer.json"))  # type: ignore[attr-defined]
    return tokenizer.loaded  # type: ignore[attr-defined]


def test_a_killed_run_is_resumed_and_learns_the_task(walk: Walk) -> None:
    running = walk.start("finetuning/invoke_olive.py")
    checkpoints = walk.root / "models" / "checkpoints"
    while not (whole := [*checkpoints.glob("*/checkpoints/checkpoint-20/sizes.json")]):
        assert running.poll() is None, running.communicate()
        time.sleep(0.1)  # nothing tells of a file that another process writes
    running.send_signal(signal.SIGKILL)
    running.communicate()
    assert len(whole) == 1

    started = time.monotonic()
    running = walk.start("finetuning/invoke_olive.py")
    assert running.stdout and running.stderr
    out = running.stdout.read()
    _, status, used = os.wait4(running.pid, 0)
    assert status == 0, out[-2000:] + running.stderr.read()[-2000:]
    assert "Resuming from checkpoint-20 of an interrupted run" in out
    before, after = walk.run["metrics"]["before"], walk.run["metrics"]["after"]
    assert before["accuracy"] == 0
    assert after["accuracy"] >= 0.9
    assert after["eval_loss"] < 0.1 * before["eval_loss"]
    assert (walk.run["base_model"], walk.run["revision"]) == (CATALOGUED, PINNED)
    assert walk.estimate["memory"]["total"] == pytest.approx(used.ru_maxrss * 2**10, rel=0.2)
    timings = walk.run["timings"]
    walk.figures |= {
        "accuracy, before and after": f"{before['accuracy']:.1%}, {after['accuracy']:.1%} of {HELD_OUT}",
        "eval_loss, before and after": f"{before['eval_loss']}, {after['eval_loss']}",
        "memory, peak": f"{used.ru_maxrss / 2**20:.2f} GiB",
        "the resumed run": f"{time.monotonic() - started:.1f} s, its 20 steps {timings['training']:.1f} s",
    }


def test_base_and_tuned_model_answer_in_the_console(walk: Walk) -> None:
    ask = ("inference/console_chat.py", "--prompt")
    assert "Paris" in walk.step(*ask, "What is the capital of France?", "--baseonly")
    learnt = next(one for one in walk.run["examples"] if one["after"] == one["expected"])
    assert walk.step(*ask, learnt["question"]).strip() == learnt["expected"]
    start = ("--baseonly", "--max-new-tokens", "24")
    assert walk.step(*ask, learnt["question"], *start).strip() != learnt["expected"]


@pytest.fixture(scope="module")
def server(walk: Walk) -> Iterator[str]:
    """Serve page and API as a process; gives their address."""
    running = walk.start("inference/gradio_chat.py", "--port", "0", PYTHONUNBUFFERED="1")
    assert running.stdout
    address = ""
    while not address:
        line = running.stdout.readline()
        assert line, running.communicate()
        address = next(iter(re.findall(r"Chat at (http://\S+)", line)), "")
    try:
        started = time.monotonic()
        while health(address).get("status") != "ok":
            assert running.poll() is None and time.monotonic() - started < 120
            time.sleep(0.2)  # the server loads the model meanwhile
        yield address
    finally:
        running.send_signal(signal.SIGINT)
        running.communicate(timeout=60)


def health(address: str) -> dict[str, Any]:
    """Return what the server says of itself; nothing while it loads."""
    try:
        with urllib.request.urlopen(f"{address}health", timeout=5) as answer:
            read: dict[str, Any] = json.loads(answer.read())
            return read
    except OSError:
        return {}


def test_the_api_keeps_a_conversation_of_three_turns_with_a_system_prompt(walk: Walk, server: str) -> None:
    import openai

    client = openai.OpenAI(base_url=f"{server}v1", api_key="none", max_retries=0, timeout=120)
    models = [model.id for model in client.models.list()]
    base = next(name for name in models if "base" in name)
    turns: Any = [{"role": "system", "content": "You answer in one short sentence."}]
    answers = []
    for question in ("What is the capital of France?", "And of Italy?", "Which of the two lies further south?"):
        turns.append({"role": "user", "content": question})
        answer = client.chat.completions.create(model=base, messages=turns, max_tokens=40, temperature=0)
        answers.append(str(answer.choices[0].message.content))
        assert answer.usage and answer.usage.prompt_tokens > sum(len(turn["content"].split()) for turn in turns)
        turns.append({"role": "assistant", "content": answers[-1]})
    assert "Paris" in answers[0] and "Rome" in answers[1] and answers[2].strip()
    stream = client.chat.completions.create(model=base, messages=turns[:2], max_tokens=40, temperature=0, stream=True)
    pieces = [piece.choices[0].delta.content or "" for piece in stream if piece.choices]
    assert "".join(pieces) == answers[0] and len(pieces) > 3
    walk.figures["base, three turns over the API"] = " / ".join(answers)


def test_the_page_answers_as_the_console_does(walk: Walk, server: str) -> None:
    from gradio_client import Client

    learnt = next(one for one in walk.run["examples"] if one["after"] == one["expected"])
    client = Client(server, verbose=False)
    said = client.predict(learnt["question"], api_name="/chat")
    assert learnt["expected"] in json.dumps(said, ensure_ascii=False)


def test_it_is_exported_merged_and_in_fewer_bits_and_keeps_its_answers(walk: Walk) -> None:
    walk.step("finetuning/export.py", "--format", "merged")
    said = walk.step("finetuning/export.py")
    figures = walk.run["export"]["onnx"]
    assert (figures["precision"], figures["rows"]) == ("int8", HELD_OUT), said
    assert figures["answers"] + figures["close_calls"] >= 0.99
    assert figures["bytes"] < 0.8 * 200e6, "not smaller than the int4 model of release 0.5.0"
    walk.figures["ONNX, equal to base and adapter"] = (
        f"{figures['quantization']}, {figures['bytes'] / 1e6:.0f} MB: {figures['answers']:.1%} of answers and "
        f"{figures['close_calls']:.1%} after a close call, {figures['tokens']:.1%} of tokens"
    )
    learnt = next(one for one in walk.run["examples"] if one["after"] == one["expected"])
    said = walk.step("inference/console_chat.py", "--engine", "onnx", "--prompt", learnt["question"]).strip()
    assert said == learnt["expected"]


def test_an_adapter_on_the_output_layer_that_shares_the_embedding_is_merged_without_changing_it(walk: Walk) -> None:
    config = walk.root / "finetuning" / "olive-config.yaml"
    text = config.read_text(encoding="utf-8")
    changed, found = re.subn(r"(?m)^(    target_modules:) \[.*?\]", r"\1 [q_proj, v_proj, lm_head]", text)
    assert found
    config.write_text(changed, encoding="utf-8")
    set_in(walk.root, max_steps=15, eval_steps=15, save_steps=15)
    try:
        walk.step("finetuning/invoke_olive.py", "--fresh")
        walk.step("finetuning/export.py")
    finally:
        config.write_text(text, encoding="utf-8")
    expected = first_tokens(walk, "base and adapter")
    assert len(expected) == 64 and len(set(expected)) > 1
    assert first_tokens(walk, "merged in float32") == expected
    same, made = sum(map(int.__eq__, expected, first_tokens(walk, "published"))), walk.run["export"]
    # rounded to bfloat16 if that keeps the answers; those of a short training are close calls
    assert same >= (64 if made["merged"]["precision"] == "float32" else 60)
    assert made["onnx"]["answers"] + made["onnx"]["close_calls"] >= 0.99
    moved = made["merged"]["difference"]
    walk.figures["lm_head, merged"] = f"{same} of 64 first tokens as base and adapter, {moved} of the probability moved"
    walk.figures["lm_head, ONNX"] = f"{made['onnx']['quantization']}, {made['onnx']['tokens']:.1%} of tokens"


def first_tokens(walk: Walk, which: str) -> list[int]:
    """Return the first token of 64 answers, computed in float32, the precision of the training."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = walk.root / "models" / "merged" if which == "published" else MODEL
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    if which != "published":
        model = PeftModel.from_pretrained(model, str(walk.root / "models" / "adapter"))
    if which == "merged in float32":
        sys.path.insert(0, str(walk.root / "finetuning"))
        from exporting.merged import untie

        untie(model.get_base_model())
        model = model.merge_and_unload()
    chat, options = AutoTokenizer.from_pretrained(MODEL), {"add_generation_prompt": True, "return_tensors": "pt"}
    rows = walk.rows("sample-heldout.jsonl")[:64]
    with torch.inference_mode():
        return [
            int(model.eval()(**chat.apply_chat_template(row[:-1], return_dict=True, **options)).logits[0, -1].argmax())
            for row in rows
        ]


def test_qlora_trains_it_in_four_bits(walk: Walk) -> None:
    if not (four_bits.PACKAGES / "bitsandbytes").is_dir():
        pytest.skip("bitsandbytes is not in .cache: `make test` puts it there")
    config = walk.root / "finetuning" / "olive-config.yaml"
    text = config.read_text(encoding="utf-8")
    settings = "    type: QLoRA\n    quant_type: nf4\n    double_quant: true\n    compute_dtype: float32\n"
    changed, found = re.subn(r"(?m)^    type: LoRA .*\n", settings, text)
    changed = re.sub(r"(?m)^    target_modules: .*\n", "", changed)
    assert found
    config.write_text(changed, encoding="utf-8")
    set_in(walk.root, max_steps=10, eval_steps=10, save_steps=10)
    command = [sys.executable, four_bits.__file__, str(walk.root / "finetuning" / "invoke_olive.py"), "--fresh"]
    started = time.monotonic()
    try:
        done = subprocess.run(command, env=walk.environment, capture_output=True, encoding="utf-8", check=False)
    finally:
        config.write_text(text, encoding="utf-8")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    before, after = walk.run["metrics"]["before"], walk.run["metrics"]["after"]
    assert walk.run["method"] == "qlora"
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    walk.figures["QLoRA, 10 steps"] = (
        f"{time.monotonic() - started:.1f} s, eval_loss {before['eval_loss']} → {after['eval_loss']}, "
        f"accuracy {before['accuracy']:.1%} → {after['accuracy']:.1%}"
    )


def test_nothing_of_it_needed_a_second_download(hub: Hub) -> None:
    assert hub.sent["model.safetensors"] == (MODEL / "model.safetensors").stat().st_size
