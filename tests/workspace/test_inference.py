"""Chatting with a tuned model: the engine, the console and the page, on a tiny model that is taught a few sentences."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import inference_of
from served import served, wait_for_health
from terminal import Terminal

INFERENCE = Path(__file__).resolve().parents[2] / "template" / "inference"
HUB_ID, REVISION = "someone/some-model", "0" * 40
TEMPLATE = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% else %}{{ eos_token }}{% endif %}"
)
NUMBERS = " ".join(map(str, range(40)))
ANSWER_TOKENS = 40  # of NUMBERS, one for each
TUNED_SAYS = {"hello": "joy", "count": NUMBERS, "poem": "def sun():\n    moon"}
# an adapter cannot teach letters that the base model has never used: hence the last one
BASE_SAYS = {"hello": "base", "count": NUMBERS, "poem": "rain", "letters": " ".join(TUNED_SAYS.values())}
SYSTEM_PROMPT = "Be kind."


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A workspace after a run of fine-tuning, with everything but models that transformers can load."""
    root = tmp_path_factory.mktemp("workspace")
    shutil.copytree(INFERENCE, root / "inference", ignore=shutil.ignore_patterns("__pycache__"))
    for folder in ("models/demo", "models/adapter", "finetuning", "setup"):
        (root / folder).mkdir(parents=True)
    write_json(root / "models/run.json", run_json())
    write_json(root / "models/demo/config.json", {})
    write_json(root / "models/adapter/adapter_config.json", {"base_model_name_or_path": "models/demo"})
    write_json(root / "models/adapter/tokenizer_config.json", {})
    write_safetensors(root / "models/adapter/adapter_model.safetensors")
    (root / "finetuning/olive-config.yaml").write_text(
        "input_model: {model_path: models/demo, load_kwargs: {revision: null}}\n"
        f"data_configs: [{{name: train, pre_process_data_config: {{system_prompt: {SYSTEM_PROMPT}}}}}]\n"
        "passes: {finetune: {type: LoRA, torch_dtype: float32}}\n"
    )
    for name in ("model_folder.py", "no_telemetry.py"):
        shutil.copy(INFERENCE.parent / "setup" / name, root / "setup")
    (root / "setup/model.yaml").write_text(f"chat_template: {json.dumps(TEMPLATE)}\n")
    return root


def run_json(**changes: Any) -> dict[str, Any]:
    """What models/run.json says after a run."""
    metrics = {"eval_loss": 1.5, "perplexity": 4.4817, "accuracy": 0.27}
    return {
        "base_model": "models/demo",
        "revision": None,
        "method": "lora",
        "adapter": "models/adapter",
        "system_prompt": SYSTEM_PROMPT,
        "dtype": "float32",
        "metrics": {"before": metrics, "after": metrics | {"accuracy": 0.98}},
    } | changes


def write_json(path: Path, value: Any) -> None:
    """Write a JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")


def write_safetensors(path: Path) -> None:
    """Write a file of weights with one of them."""
    header = json.dumps({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}).encode()
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(8))


def start(root: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run a script of the workspace as a user does, from another folder."""
    return subprocess.run(
        [sys.executable, "-B", str(root / "inference" / script), *arguments],
        cwd=root.parent,
        env=os.environ | {"HF_HOME": str(root / "hub")},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def no_run(root: Path) -> None:
    (root / "models/run.json").unlink()


def torn_run(root: Path) -> None:
    (root / "models/run.json").write_text('{"base_model": "mod')


def incomplete_run(root: Path) -> None:
    write_json(root / "models/run.json", {"base_model": "models/demo"})


def unnamed_adapter(root: Path) -> None:
    write_json(root / "models/run.json", run_json(adapter=None))


def no_adapter(root: Path) -> None:
    shutil.rmtree(root / "models/adapter")


def torn_adapter(root: Path) -> None:
    weights = root / "models/adapter/adapter_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-3])


def unreadable_adapter(root: Path) -> None:
    (root / "models/adapter/adapter_config.json").write_text("{")


def other_base(root: Path) -> None:
    write_json(root / "models/adapter/adapter_config.json", {"base_model_name_or_path": "models/other"})


def no_base(root: Path) -> None:
    shutil.rmtree(root / "models/demo")


def no_folder(root: Path) -> None:
    write_json(root / "models/run.json", run_json(base_model="../mine"))
    write_json(root / "models/adapter/adapter_config.json", {"base_model_name_or_path": "/elsewhere/mine"})


def not_downloaded(root: Path) -> None:
    write_json(root / "models/run.json", run_json(base_model=HUB_ID, revision=REVISION))
    write_json(root / "models/adapter/adapter_config.json", {"base_model_name_or_path": HUB_ID})


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (
            no_run,
            r"No tuned model yet \(models/run.json is missing\): run `python finetuning/invoke.*`, or .*--baseonly",
        ),
        (torn_run, r"models/run.json is damaged or incomplete .*invoke_olive.py` again, or .*--baseonly"),
        (incomplete_run, r"models/run.json is damaged or incomplete \(it has no 'revision'\)"),
        (unnamed_adapter, r"The adapter in None is missing or damaged"),
        (no_adapter, r"The adapter in models/adapter is missing or damaged .*invoke_olive.py` again"),
        (torn_adapter, r"The adapter in models/adapter is missing or damaged"),
        (unreadable_adapter, r"The adapter in models/adapter is missing or damaged"),
        (
            other_base,
            r"The adapter in models/adapter was trained on models/other, but models/run.json names models/demo",
        ),
        (no_base, "models/demo is not on this machine yet: run `python setup/get_model.py`, which builds it"),
        (no_folder, r"The folder .*\.\./mine is not there: put the model there, or correct model_path"),
        (not_downloaded, "someone/some-model is not on this machine yet: run `python setup/get_model.py`"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_tuned_model_that_cannot_be_loaded_is_one_sentence_and_never_the_base_model(
    workspace: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(workspace, root)
    damage(root)
    done = start(root, "console_chat.py", "--prompt", "hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert re.search("error: " + says, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


def test_the_traceback_of_an_error_is_shown_with_debug(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(workspace, root)
    no_run(root)
    assert "Traceback" in start(root, "console_chat.py", "--debug", "--prompt", "hello").stderr


def test_the_base_model_alone_needs_no_run_but_a_readable_config(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(workspace, root)
    no_run(root)
    (root / "finetuning/olive-config.yaml").write_text("a: [")
    done = start(root, "gradio_chat.py", "--baseonly", "--port", str(free_port()))
    assert done.returncode == 1
    assert done.stderr.startswith("error: finetuning/olive-config.yaml cannot be read"), done.stderr


def test_an_empty_question_is_an_error(workspace: Path) -> None:
    for arguments in (["--prompt", " "], []):
        done = start(workspace, "console_chat.py", *arguments)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith("error: The question is empty")


@pytest.mark.parametrize("arguments", [["--temperature", "3"], ["--max-new-tokens", "0"]])
def test_a_wrong_option_is_a_usage_error(workspace: Path, arguments: list[str]) -> None:
    assert start(workspace, "console_chat.py", *arguments).returncode == 2


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2", "example.org"])
def test_the_page_does_not_listen_on_a_network_without_a_key(workspace: Path, host: str) -> None:
    done = start(workspace, "gradio_chat.py", "--host", host)
    assert done.returncode == 1
    assert "Binding to anything but loopback" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_port_in_use_is_reported_and_the_next_free_one_is_used(workspace: Path, tmp_path: Path) -> None:
    root = tmp_path / "damaged"
    shutil.copytree(workspace, root)
    no_run(root)  # what ends the server as soon as it listens
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = start(root, "gradio_chat.py", "--port", str(port))
    assert done.returncode == 1
    said = re.match(rf"Port {port} is taken: using (\d+)\.\n", done.stdout)
    assert said, done.stdout + done.stderr
    assert port < int(said[1]) < port + 100
    assert done.stderr.startswith("error: No tuned model yet")


def test_a_port_that_cannot_be_opened_is_one_sentence(workspace: Path) -> None:
    done = start(workspace, "gradio_chat.py", "--port", "70000")
    assert done.returncode == 1
    assert re.fullmatch(r"error: Port 70000 of 127.0.0.1 cannot be opened \(.*\): choose another .*\n", done.stderr)


def test_help_imports_nothing_heavy(workspace: Path) -> None:
    program = f"""
import contextlib, io, sys
sys.path.insert(0, {str(workspace / "inference")!r})
import console_chat, gradio_chat
for front_end in (console_chat, gradio_chat):
    with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
        front_end.main(["--help"])
heavy = {{"torch", "transformers", "peft", "gradio", "fastapi", "uvicorn", "huggingface_hub", "yaml"}}
print(sorted(heavy & set(sys.modules)))
"""
    done = subprocess.run([sys.executable, "-B", "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"


# ---- in this process, with torch


@pytest.fixture(scope="module", autouse=True)
def connections() -> list[str]:
    """Every host that this process looks up or connects to from here on."""
    hosts: list[str] = []

    def watch(event: str, arguments: tuple[Any, ...]) -> None:
        if event == "socket.getaddrinfo":
            hosts.append(str(arguments[0]))
        elif event == "socket.connect" and isinstance(arguments[1], tuple):
            hosts.append(str(arguments[1][0]))

    sys.addaudithook(watch)
    return hosts


@pytest.fixture(scope="module")
def modules(workspace: Path) -> Iterator[Path]:
    """The workspace whose inference/ this process imports."""
    with inference_of(workspace):
        yield workspace


class Recorded:
    """A backend that says recorded bytes, and drops a space at the start of a text as Llama's tokenizer does."""

    description, context, notices, switchable = "recorded", 64, [], False  # type: ignore[var-annotated]

    def __init__(self, says: bytes) -> None:
        self.says = says

    def render(self, messages: list[dict[str, str]]) -> str:
        return "".join(f"[{turn['role']}]{turn['content']}" for turn in messages)

    def encode(self, text: str) -> list[int]:
        return list(text.encode())

    def decode(self, tokens: list[int]) -> str:
        return bytes(tokens).decode(errors="replace").removeprefix(" ")

    def generate(self, _prompt: list[int], generation: Any) -> Generator[int, None, None]:
        yield from self.says[: generation.max_new_tokens]


def recorded(says: str, system_prompt: str = "") -> Any:
    """An engine on a recorded backend."""
    from engine import Engine, Source

    return Engine(Source("models/demo", None, None, "lora", "float32", system_prompt), Recorded(says.encode()))


@pytest.mark.usefixtures("modules")
def test_a_temperature_that_would_end_the_int4_model_s_process_is_refused() -> None:
    from engine import ChatError, Generation

    with pytest.raises(ChatError, match=r"temperature is 1e-40: choose 0 \(greedy\), or 0\.01 or more\."):
        list(recorded("yes").stream([{"role": "user", "content": "hi"}], Generation(temperature=1e-40), print))


def ask(engine: Any, *turns: str, generation: Any = None) -> tuple[str, list[str]]:
    """Ask with the turns of a conversation, user first; return the answer and the notices."""
    from engine import Generation

    roles = ("user", "assistant")
    messages = [{"role": roles[i % 2], "content": text} for i, text in enumerate(turns)]
    notices: list[str] = []
    return "".join(engine.stream(messages, generation or Generation(), notices.append)), notices


@pytest.mark.usefixtures("modules")
def test_the_pieces_of_an_answer_add_up_to_it_whatever_the_backend_does_with_spaces() -> None:
    from engine import Generation

    text = "a:\n    b — ü 🙂"
    pieces = list(recorded(text).stream([{"role": "user", "content": "?"}], Generation(), print))
    assert "".join(pieces) == text
    assert "🙂" in pieces
    assert len(pieces) == len(text.encode())  # one for each token, so that a reader can stop between any two


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("stop", "answer", "reason"),
    [
        (("c",), "ab", "stop"),
        (("bc", "abcd"), "a", "stop"),  # which is said first
        (("x", "cd"), "ab", "stop"),
        (("efg",), "abcdef", "length"),
        (("f",), "abcde", "stop"),
    ],
)
def test_a_stop_text_ends_the_answer_and_is_no_part_of_it(stop: tuple[str, ...], answer: str, reason: str) -> None:
    from engine import Generation, Usage

    usage, notices = Usage(), []  # type: ignore[var-annotated]
    generation = Generation(max_new_tokens=6, stop=stop)
    pieces = recorded("abcdefgh").stream([{"role": "user", "content": "?"}], generation, notices.append, usage)
    assert "".join(pieces) == answer
    assert (usage.finish_reason, usage.prompt_tokens) == (reason, len("[user]?"))
    assert bool(notices) == (reason == "length")


@pytest.mark.usefixtures("modules")
def test_a_truncated_answer_says_so() -> None:
    from engine import Generation

    assert ask(recorded("abcdef"), "?", generation=Generation(max_new_tokens=3)) == (
        "abc",
        ["The answer was cut at 3 tokens."],
    )


@pytest.mark.usefixtures("modules")
def test_a_conversation_longer_than_the_context_loses_its_oldest_turns_and_says_so() -> None:
    engine, notices = recorded("yes", "Rule"), []
    turns = [{"role": role, "content": f"{role[0]}{i}"} for i in range(3) for role in ("user", "assistant")]
    turns += [{"role": "user", "content": "now?"}]
    prompt, room = engine.fit(turns, 16, notices.append)
    assert bytes(prompt).decode() == "[system]Rule[user]u2[assistant]a2[user]now?"
    assert room == 16
    assert notices == ["The model reads 64 tokens: the oldest 4 messages of this chat were left out."]


@pytest.mark.usefixtures("modules")
def test_bytes_that_are_not_text_become_question_marks() -> None:
    prompt, _ = recorded("yes").fit([{"role": "user", "content": "gr\udcfc?"}], 16, print)
    assert bytes(prompt).decode() == "[user]gr??"


@pytest.mark.usefixtures("modules")
def test_a_message_longer_than_the_context_is_an_error() -> None:
    from engine import ChatError

    with pytest.raises(ChatError, match=r"comes to 86 tokens, but the model reads 64 and 32 of them are kept"):
        ask(recorded("yes"), "x" * 80)


@pytest.mark.usefixtures("modules")
def test_the_system_prompt_of_the_training_comes_first_unless_the_conversation_sets_its_own_or_none() -> None:
    engine = recorded("yes", "Rule")
    user = {"role": "user", "content": "?"}
    for system, expected in (
        ([], "[system]Rule[user]?"),
        ([{"role": "system", "content": "Mine"}], "[system]Mine[user]?"),
        ([{"role": "system", "content": ""}], "[user]?"),
    ):
        prompt, _ = engine.fit([*system, user], 16, print)
        assert bytes(prompt).decode() == expected


@pytest.fixture(scope="module")
def tuned(modules: Path) -> Path:
    """The workspace with a tiny Phi-3 that says BASE_SAYS, and an adapter that makes it say TUNED_SAYS."""
    import torch
    import transformers
    from peft import LoraConfig, get_peft_model
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    words = Tokenizer(models.BPE())
    words.pre_tokenizer, words.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    special = ["<|endoftext|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    words.train_from_iterator([NUMBERS], trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, eos_token=special[0], pad_token=special[0], additional_special_tokens=special[1:]
    )
    tokenizer.save_pretrained(modules / "models/demo")  # without a template, as base models are
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(modules / "models/adapter")

    torch.set_num_threads(1)  # for matrices this small a second thread only waits for the first
    torch.manual_seed(0)
    config = transformers.Phi3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=320, eos_token_id=0, bos_token_id=0, pad_token_id=0, tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.Phi3ForCausalLM(config)
    # what an instruct model on the hub brings along: chat must not inherit it
    model.generation_config = transformers.GenerationConfig(do_sample=True, temperature=2.0, eos_token_id=0)
    teach(model, tokenizer, BASE_SAYS, lr=2e-3)
    model.save_pretrained(modules / "models/demo")
    adapted = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"))
    teach(adapted, tokenizer, TUNED_SAYS, lr=5e-3)
    adapted.save_pretrained(modules / "models/adapter")
    config_file = modules / "models/adapter/adapter_config.json"
    write_json(config_file, json.loads(config_file.read_text()) | {"base_model_name_or_path": "models/demo"})
    return modules


def teach(model: Any, tokenizer: Any, says: dict[str, str], lr: float) -> None:
    """Teach the answers, with the system prompt before the question, until they are known by heart."""
    import torch

    rows = []
    for question, answer in says.items():
        messages = [{"role": "system", "content": SYSTEM_PROMPT}, {"role": "user", "content": question}]
        prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        rows.append((prompt, tokenizer(answer + "<|end|>")["input_ids"]))
    longest = max(len(prompt + answer) for prompt, answer in rows)
    ids = torch.tensor([prompt + answer + [0] * (longest - len(prompt + answer)) for prompt, answer in rows])
    labels = torch.tensor(
        [[-100] * len(prompt) + answer + [-100] * (longest - len(prompt + answer)) for prompt, answer in rows]
    )
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    for _ in range(300):
        loss = model(input_ids=ids, labels=labels).loss  # what pads stands behind, where a causal model does not look
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss.item() < 0.02:
            return
    raise AssertionError(f"the tiny model has not learnt its answers: loss {loss.item():.3f}")


@pytest.fixture(scope="module")
def engine(tuned: Path) -> Any:
    """The tuned model, loaded."""
    from load_engine import load

    return load(root=tuned)


def test_the_adapter_that_was_trained_is_the_one_that_answers(tuned: Path, engine: Any) -> None:
    from load_engine import load

    base = load(baseonly=True, root=tuned)
    for question in ("hello", "poem"):
        assert ask(base, question) == (BASE_SAYS[question], [])
        assert ask(engine, question) == (TUNED_SAYS[question], [])


@pytest.mark.parametrize("method", ["lora", "dora", "loha", "lokr"])
def test_without_the_adapter_the_base_model_answers_and_with_it_the_tuned_one_again(
    tuned: Path, tmp_path: Path, method: str
) -> None:
    import peft
    import torch
    from transformers import AutoModelForCausalLM

    from engine import Generation
    from load_engine import load

    shutil.copytree(tuned, tmp_path, dirs_exist_ok=True)
    kind = {"loha": peft.LoHaConfig, "lokr": peft.LoKrConfig}.get(method, peft.LoraConfig)
    config = kind(r=4, target_modules=["qkv_proj", "down_proj"], task_type="CAUSAL_LM")
    config.use_dora = method == "dora"
    adapted = peft.get_peft_model(AutoModelForCausalLM.from_pretrained(tuned / "models/demo"), config)
    torch.manual_seed(0)
    for weight in filter(lambda weight: weight.requires_grad, adapted.parameters()):
        torch.nn.init.normal_(weight)  # an adapter begins as one that changes nothing
    adapted.save_pretrained(tmp_path / "models/adapter")
    write_json(tmp_path / "models/run.json", run_json(method=method))

    def answers(engine: Any, adapter: bool = True) -> list[str]:
        how = Generation(16, adapter=adapter)
        return [ask(engine, question, generation=how)[0] for question in BASE_SAYS]

    switched = load(root=tmp_path)
    with_adapter, base = answers(switched), answers(load(baseonly=True, root=tmp_path))
    assert all(said != of_base for said, of_base in zip(with_adapter, base, strict=True))
    for _ in range(2):
        assert answers(switched, adapter=False) == base
        assert answers(switched) == with_adapter


def test_an_answer_of_the_base_model_that_is_stopped_or_fails_leaves_the_adapter_on(engine: Any) -> None:
    from engine import Generation

    base = Generation(adapter=False)
    stream = engine.stream([{"role": "user", "content": "count"}], base, print)
    next(stream)
    stream.close()
    assert ask(engine, "hello")[0] == "joy"

    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    hook = engine.backend.model.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        ask(engine, "hello", generation=base)
    hook.remove()
    assert ask(engine, "hello")[0] == "joy"


@pytest.mark.usefixtures("modules")
def test_a_backend_that_cannot_disable_the_adapter_never_answers_as_the_base_model() -> None:
    from engine import ChatError, Engine, Generation, Source

    merged = Engine(Source("models/demo", None, "models/adapter", "lora", "float32", ""), Recorded(b"yes"))
    with pytest.raises(ChatError, match="start with --engine torch"):
        ask(merged, "?", generation=Generation(adapter=False))


def test_messages_are_tokenised_as_the_template_of_the_training_says(engine: Any) -> None:
    prompt, _ = engine.fit([{"role": "user", "content": "hello"}], 16, print)
    text = engine.backend.tokenizer.decode(prompt)
    assert text == f"<|system|>{SYSTEM_PROMPT}<|end|><|user|>hello<|end|><|assistant|>"


def test_an_answer_ends_at_the_end_of_turn_that_only_the_template_knows(engine: Any) -> None:
    tokenizer = engine.backend.tokenizer
    assert engine.backend.stops == sorted(tokenizer.convert_tokens_to_ids(["<|endoftext|>", "<|end|>"]))


@pytest.fixture
def steps(engine: Any) -> Iterator[list[int]]:
    """A list that grows by one each time the model computes a token, which takes as long as on a large model."""
    taken: list[int] = []

    def compute_slowly(*_: Any) -> None:
        taken.append(1)
        time.sleep(0.03)

    hook = engine.backend.model.get_base_model().register_forward_pre_hook(compute_slowly)
    yield taken
    hook.remove()


def test_closing_the_stream_stops_the_computation_and_the_next_question_is_answered(
    engine: Any, steps: list[int]
) -> None:
    from engine import Generation

    stream = engine.stream([{"role": "user", "content": "count"}], Generation(), print)
    assert next(stream) == "0"
    stream.close()
    assert len(steps) < ANSWER_TOKENS / 2
    steps.clear()
    assert ask(engine, "count")[0] == NUMBERS
    assert len(steps) > ANSWER_TOKENS / 2


def test_an_exception_during_an_answer_reaches_the_caller(engine: Any) -> None:
    def fail(*_: Any) -> None:
        raise RuntimeError("the device is gone")

    hook = engine.backend.model.get_base_model().register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="the device is gone"):
        ask(engine, "hello")
    hook.remove()
    assert ask(engine, "hello")[0] == "joy"


def test_the_same_seed_gives_the_same_answer(engine: Any) -> None:
    from engine import Generation

    def draw(seed: int) -> str:
        return ask(engine, "count", generation=Generation(24, temperature=2.0, seed=seed))[0]

    assert draw(1) == draw(1)
    assert len({draw(seed) for seed in range(1, 5)}) > 1


def test_an_adapter_that_does_not_fit_the_base_model_is_an_error(tuned: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    from engine import ChatError
    from load_engine import load

    weights = load_file(tuned / "models/adapter/adapter_model.safetensors")
    first = next(iter(weights))
    for damaged, reason in (
        ({key: value for key, value in weights.items() if key != first}, "missing adapter keys"),
        (weights | {first: weights[first][:, :-1].contiguous()}, "size mismatch|Error"),
    ):
        root = tmp_path / reason[:4]
        shutil.copytree(tuned, root)
        save_file(damaged, root / "models/adapter/adapter_model.safetensors")
        with pytest.raises(ChatError, match=f"does not fit the base model models/demo .*({reason})"):
            load(root=root)


def test_a_damaged_base_model_is_an_error(tuned: Path, tmp_path: Path) -> None:
    from engine import ChatError
    from load_engine import load

    root = tmp_path / "torn"
    shutil.copytree(tuned, root)
    weights = root / "models/demo/model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(
        ChatError,
        match=r"models/demo is not whole \(model.safetensors .*\): run `python setup/get_model.py`, which builds it",
    ):
        load(root=root)


# ---- the console


@pytest.mark.usefixtures("tuned")
def test_prompt_prints_only_the_answer(capsys: pytest.CaptureFixture[str]) -> None:
    import console_chat

    assert console_chat.main(["--prompt", "poem"]) == 0
    assert capsys.readouterr().out == TUNED_SAYS["poem"] + "\n"
    assert console_chat.main(["--baseonly", "--prompt", "poem"]) == 0
    assert capsys.readouterr().out == BASE_SAYS["poem"] + "\n"


@pytest.mark.usefixtures("tuned")
def test_each_line_of_a_pipe_is_a_message_or_a_command_and_only_the_answers_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import console_chat

    seen = []
    answer = console_chat.answer

    def watch(engine: Any, messages: list[dict[str, str]], *rest: Any) -> None:
        seen.append([turn["content"] for turn in messages])
        answer(engine, messages, *rest)

    monkeypatch.setattr(console_chat, "answer", watch)
    lines = "hello\n\npoem\n/clear\n/help\n/system Be kind.\nhello\n/system\nhello\n#end\nhello\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(lines))
    assert console_chat.main([]) == 0
    out, err = capsys.readouterr()
    assert (out.splitlines()[0], err) == ("joy", "")
    assert [asked[-1] for asked in seen] == ["hello", "poem", "hello", "hello"]
    assert seen[1] == ["hello", "joy", "poem"]
    assert seen[2] == ["Be kind.", "hello"]
    assert seen[3] == ["", "hello", "joy", "hello"]


@pytest.mark.usefixtures("tuned")
def test_a_message_in_a_pipe_that_cannot_be_answered_ends_it_with_one_sentence(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    import console_chat

    monkeypatch.setattr(sys, "stdin", io.StringIO(f"hello\n{'x' * 900}\nhello\n"))
    assert console_chat.main([]) == 1
    out, err = capsys.readouterr()
    assert out == "joy\n"
    assert re.fullmatch(r"error: The message comes to \d+ tokens, .*\n", err)


# ---- the page


@pytest.fixture(scope="module")
def url(engine: Any) -> Iterator[str]:
    """The page, served."""
    with served(lambda: engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def client(url: str) -> Any:
    """A client of the page."""
    from gradio_client import Client

    return Client(url, verbose=False)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return int(server.getsockname()[1])


def test_the_page_answers_as_the_console_does(client: Any) -> None:
    for question in ("hello", "poem"):
        assert client.predict(question, api_name="/chat") == TUNED_SAYS[question]
        client.reset_session()


def test_the_settings_of_the_page_reach_the_model(client: Any) -> None:
    settings = {"system": SYSTEM_PROMPT, "longest": 1, "temperature": 0, "top_p": 1}
    assert client.predict("count", **settings, api_name="/chat") == "0"
    client.reset_session()


def test_a_program_that_gets_no_answer_gets_the_reason_in_one_sentence(client: Any) -> None:
    from gradio_client.exceptions import AppError

    with pytest.raises(AppError, match="shorten the message or ask for a shorter answer"):
        client.predict("count " * 200, api_name="/chat")


def test_stopping_an_answer_on_the_page_stops_the_computation(client: Any, url: str, steps: list[int]) -> None:
    job = client.submit("count", api_name="/chat")
    next(iter(job))
    job.cancel()
    wait_for_health(url)
    assert 0 < len(steps) < ANSWER_TOKENS / 2
    client.reset_session()


def test_the_page_names_model_adapter_engine_and_metrics(url: str) -> None:
    config = json.loads(fetch(f"{url}config"))
    texts = "\n".join(str(part["props"].get("value")) for part in config["components"])
    for expected in ("models/demo", "models/adapter", "torch, float32 on", "| exact answers | 27.0% | 98.0% |"):
        assert expected in texts


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize(
    ("adapter", "switchable"), [("models/adapter", True), ("models/adapter", False), (None, False)]
)
def test_the_page_offers_to_compare_if_it_can_and_says_how_if_it_cannot(adapter: str | None, switchable: bool) -> None:
    from engine import Engine, Source
    from page import build_page
    from request_queue import RequestQueue

    backend = Recorded(b"yes")
    backend.switchable = switchable  # type: ignore[misc]
    engine = Engine(Source("models/demo", None, adapter, "lora", "float32", ""), backend)
    parts = build_page(RequestQueue(engine)).get_config_file()["components"]
    (switch,) = [part["props"] for part in parts if part["props"].get("elem_id") == "compare"]
    texts = "\n".join(str(part["props"].get("value")) for part in parts)
    assert switch["visible"] == switchable
    assert ("start with --engine torch" in texts) == bool(adapter and not switchable)
    assert ("the base model alone" in texts) == (adapter is None)


@pytest.mark.usefixtures("modules")
@pytest.mark.parametrize("markdown", [False, True])
def test_the_page_keeps_every_space_of_a_conversation(markdown: bool) -> None:
    import gradio

    from page import Chat

    chat = Chat(["  first\n    second"], {True: [TUNED_SAYS["poem"]], False: []}, markdown)
    column = gradio.Chatbot(render=False)
    tuned, base = (column.preprocess(column.postprocess(turns)) for turns in chat.columns())
    assert Chat.shown(tuned, base, markdown) == chat


def test_the_page_lets_the_browser_load_nothing_from_elsewhere(url: str) -> None:
    with urllib.request.urlopen(url) as response:
        html, policy = response.read().decode(), response.headers["Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; ")
    loaded = re.findall(r"""<(?:script|link|img|iframe)[^>]+(?:src|href)=["']?(https?:[^"' >]+)""", html)
    assert [address for address in loaded if not address.startswith(url)] == []


def fetch(address: str) -> str:
    """Get a page of the server."""
    with urllib.request.urlopen(address) as response:
        return str(response.read().decode())


@pytest.mark.usefixtures("url")
def test_loading_chatting_and_serving_connect_to_this_machine_only(connections: list[str]) -> None:
    assert connections  # the clients of the tests above are seen
    assert set(connections) <= {"127.0.0.1", "localhost"}


# ---- a start of its own, with a terminal


# For so slow a model that an answer is still under way when the test stops it.
SLOWLY = """
import sys, time
sys.path.insert(0, sys.argv[1])
import console_chat, torch_backend
from torch.nn.modules.module import register_module_forward_pre_hook
register_module_forward_pre_hook(lambda *_: time.sleep(0.001))
sys.exit(console_chat.main(sys.argv[2:]))
"""


def test_a_folder_of_gradio_s_that_is_another_user_s_does_not_end_the_page(tuned: Path, tmp_path: Path) -> None:
    (tmp_path / "gradio").touch()  # no folder can be made there, as in one that another user has closed
    command = [sys.executable, "-B", str(tuned / "inference" / "gradio_chat.py"), "--port", "0"]
    with Terminal(["env", f"TMPDIR={tmp_path}", *command]) as terminal:
        terminal.wait_for("Chat at http://")
        terminal.type("\x03")
        assert "Traceback" not in terminal.to_the_end()
    assert [path.name for path in tmp_path.iterdir()] == ["gradio"]


def test_ctrl_c_stops_an_answer_and_the_chat_goes_on_until_ctrl_c_at_its_prompt(tuned: Path) -> None:
    with Terminal([sys.executable, "-B", "-c", SLOWLY, str(tuned / "inference")]) as terminal:
        banner = terminal.wait_for("You: ")
        assert "models/adapter · lora" in banner
        assert "#end" in banner
        assert max(map(len, banner.splitlines())) <= 80
        terminal.type("count\n")
        terminal.wait_for("Model: 0 1")
        terminal.type("\x03")
        assert "(stopped)" in terminal.wait_for("You: ")
        terminal.type("/clear\n")
        terminal.wait_for("a new chat")
        terminal.wait_for("You: ")
        terminal.type("hello\n")
        terminal.wait_for("Model: joy\n")
        terminal.wait_for("You: ")
        assert terminal.end("\x03") == 0
