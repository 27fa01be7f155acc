"""The front ends (console, page, API, prompt flow) give the same answers and the same errors, with torch and ONNX."""

from __future__ import annotations

import io
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import RENDERED, REPOSITORY, inference_of
from served import served
from terminal import Terminal
from test_export import held_out, tune

sys.path.append(str(REPOSITORY / ".cache" / "openai"))  # at the end: what a workspace has comes first
import openai

ENGINES = ("torch", "onnx")
# Their words tell the tiny model a tone: one of them changes what it answers to a question.
SYSTEMS = ("She was terrified and scared.", "We were gleeful, jubilant.", "He was mournful and gloomy.", "Startled!")


@pytest.fixture(scope="module")
def tuned(workspace: Path) -> Iterator[Path]:
    """The workspace with an adapter that knows the task, and its int4 export; afterwards with the demo alone."""
    os.chdir(workspace)
    tune(workspace, "lora", steps=150)
    import export
    from settings.startup import quiet

    quiet()
    export.export("onnx", None, 0.99, debug=False)
    with inference_of(workspace):
        yield workspace
    for path in (workspace / "models").iterdir():
        if path.name != "demo":
            shutil.rmtree(path, ignore_errors=True) if path.is_dir() else path.unlink()


@pytest.fixture(scope="module")
def engines(tuned: Path) -> dict[str, Any]:
    from load_engine import load

    return {name: load(engine=name, root=tuned) for name in ENGINES}


@pytest.fixture(scope="module", params=ENGINES)
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module")
def engine(engines: dict[str, Any], name: str) -> Any:
    return engines[name]


@pytest.fixture(scope="module")
def address(engine: Any) -> Iterator[str]:
    """Page and API, served."""
    with served(lambda: engine) as (address, _):
        yield address


@pytest.fixture(scope="module")
def api(address: str) -> Callable[[list[dict[str, str]]], str]:
    client = openai.OpenAI(base_url=f"{address}v1", api_key="none", max_retries=0, timeout=60)

    def ask(messages: list[dict[str, str]]) -> str:
        answer = client.chat.completions.create(model="tuned", messages=messages)  # type: ignore[arg-type]
        return str(answer.choices[0].message.content)

    return ask


@pytest.fixture(scope="module")
def page(address: str) -> Any:
    from gradio_client import Client

    return Client(address, verbose=False)


FLOW = """
import json, sys
from promptflow.client import load_flow
flow = load_flow("inference/flow")
print(json.dumps([flow(**inputs)["answer"] for inputs in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def promptflow(
    tuned: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run a program of the flow's own environment in the workspace, with a home of its own."""
    home = tmp_path_factory.mktemp("promptflow")

    def run(program: str, *arguments: str, typed: str = "", key: str = "") -> subprocess.CompletedProcess[str]:
        env = os.environ | {"PF_HOME_DIRECTORY": str(home), "CHAT_API_KEY": key}
        command = [str(RENDERED / ".venv-promptflow" / "bin" / program), *arguments]
        return subprocess.run(command, cwd=tuned, env=env, input=typed, capture_output=True, text=True, timeout=300)

    return run


@pytest.fixture(scope="module")
def flow(address: str, promptflow: Any) -> Callable[[list[dict[str, Any]]], list[str]]:
    """Put inputs to the flow, all in one process: `pf` takes two seconds for each."""

    def ask(inputs: list[dict[str, Any]]) -> list[str]:
        done = promptflow("python", "-c", FLOW, typed=json.dumps([{"api": f"{address}v1", **one} for one in inputs]))
        assert done.returncode == 0, done.stderr
        return list(json.loads(done.stdout.splitlines()[-1]))

    return ask


@pytest.fixture
def pipe(
    name: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Start the console with lines in its pipe; return its status, what it prints, and its errors."""

    def talk(*lines: str, options: tuple[str, ...] = ()) -> tuple[int, str, str]:
        import console_chat

        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(lines)))
        capsys.readouterr()
        status = console_chat.main(["--engine", name, *options])
        return status, *capsys.readouterr()

    return talk


# for tests of what asks over HTTP, whatever engine answers
ONE_ENGINE = pytest.mark.parametrize("name", ["onnx"], indirect=True)


def say(engine: Any, messages: list[dict[str, str]], **settings: Any) -> str:
    """Ask the engine itself."""
    from engine import Generation

    return "".join(engine.stream(messages, Generation(**settings), lambda _: None))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def conversation(engine: Any, questions: list[str], system: str | None) -> list[str]:
    """Return the engine's answers to questions that follow each other."""
    turns = [] if system is None else [{"role": "system", "content": system}]
    answers = []
    for question in questions:
        turns.append(user(question))
        answers.append(say(engine, turns))
        turns.append({"role": "assistant", "content": answers[-1]})
    return answers


def telling(engine: Any, questions: list[str]) -> tuple[str, list[str], list[str]]:
    """Return a conversation whose answers are others without its system prompt, and without its history."""
    for start in range(0, len(questions), 2):
        asked = questions[start : start + 2]
        without = conversation(engine, asked, None), [say(engine, [user(question)]) for question in asked]
        for system in SYSTEMS:
            if (answers := conversation(engine, asked, system)) not in without:
                return system, asked, answers
    raise AssertionError("system prompt and history are without effect")


# ---- the same answers


def test_twenty_questions_have_the_same_answers_in_every_front_end(
    engine: Any, pipe: Any, page: Any, api: Any, flow: Any, twenty_questions: list[str]
) -> None:
    assert len(set(twenty_questions)) == 20
    expected = [say(engine, [user(question)]) for question in twenty_questions]
    assert len(set(expected)) >= 4
    assert [api([user(question)]) for question in twenty_questions] == expected
    assert flow([{"question": question} for question in twenty_questions]) == expected
    for question, answer in zip(twenty_questions, expected, strict=True):
        assert page.predict(question, api_name="/chat") == answer
        assert pipe(options=("--prompt", question))[:2] == (0, f"{answer}\n")
    lines = [line for question in twenty_questions for line in (question, "/clear")]
    assert pipe(*lines)[:2] == (0, "".join(f"{answer}\n" for answer in expected))


def test_a_conversation_with_a_system_prompt_has_the_same_answers_in_every_front_end(
    engine: Any, pipe: Any, page: Any, api: Any, twenty_questions: list[str]
) -> None:
    system, questions, expected = telling(engine, twenty_questions)
    assert pipe(f"/system {system}", *questions)[:2] == (0, "".join(f"{answer}\n" for answer in expected))
    before: list[list[str]] = []
    for question in questions:
        answer = page.predict(question, system=system, history=before, api_name="/chat")
        before.append([question, answer])
    assert [answer for _, answer in before] == expected
    turns = [{"role": "system", "content": system}]
    for question, answer in zip(questions, expected, strict=True):
        turns.append(user(question))
        assert api(turns) == answer
        turns.append({"role": "assistant", "content": answer})


@ONE_ENGINE
def test_pf_flow_test_asks_the_served_model_and_remembers_the_conversation(
    tuned: Path, engine: Any, address: str, promptflow: Any, flow: Any, twenty_questions: list[str]
) -> None:
    default = yaml.safe_load((tuned / "inference/flow/flow.dag.yaml").read_text())["inputs"]["question"]["default"]
    test = "flow", "test", "--flow", "inference/flow"
    done = promptflow("pf", *test, "--inputs", f"api={address}v1")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout[done.stdout.index("{") :]) == {"answer": say(engine, [user(default)])}
    pairs = [twenty_questions[start : start + 2] for start in range(0, 20, 2)]
    asked = next(pair for pair in pairs if conversation(engine, pair, None)[1] != say(engine, [user(pair[1])]))
    first, second = conversation(engine, asked, None)
    said = [{"inputs": {"question": asked[0]}, "outputs": {"answer": first}}]
    assert flow([{"question": asked[1], "chat_history": said}]) == [second]
    # interactively it keeps the history itself
    done = promptflow("pf", *test, "--interactive", "--inputs", f"api={address}v1", typed="\n".join(asked))
    assert f"User: Bot: {first}\nUser: Bot: {second}\n" in done.stdout
    # nothing is left in the workspace but what git ignores
    assert {path.name for path in (tuned / "inference/flow").iterdir()} - {"__pycache__"} == {
        ".promptflow",
        "ask.py",
        "flow.dag.yaml",
        "requirements.txt",
    }


@ONE_ENGINE
def test_a_flow_that_gets_no_answer_says_why_in_its_last_line(engine: Any, promptflow: Any) -> None:
    def last_line(api: str, key: str = "") -> str:
        done = promptflow("pf", "flow", "test", "--flow", "inference/flow", "--inputs", f"api={api}", key=key)
        assert done.returncode == 1
        return str((done.stdout + done.stderr).splitlines()[-1])

    assert "Nothing answers at http://127.0.0.1:9/v1: run `python inference/gradio_chat.py`" in last_line(
        "http://127.0.0.1:9/v1"
    )
    with served(lambda: engine, key="secret") as (address, _):
        assert f"{address}v1 refuses the question (the variable CHAT_API_KEY): " in last_line(f"{address}v1", "wrong")


def test_the_engines_give_the_same_answer_to_95_of_100_held_out_rows(engines: dict[str, Any], tuned: Path) -> None:
    rows = held_out(tuned / "models")
    same = sum(say(engines["torch"], row[:-1]) == say(engines["onnx"], row[:-1]) for row in rows)
    print(f"the engines agree on {same} of {len(rows)} held-out rows")
    assert len(rows) == 160
    assert same >= 0.95 * len(rows)


# ---- the engine, with either library


QUESTION = [{"role": "user", "content": "the the the"}]


def test_settings_change_the_answer_as_they_should(engine: Any) -> None:
    hot = {"max_new_tokens": 12, "temperature": 2.0}
    assert say(engine, QUESTION, **hot, seed=1) == say(engine, QUESTION, **hot, seed=1)
    assert len({say(engine, QUESTION, **hot, seed=seed) for seed in (1, 2, 3, 2**40)}) > 1
    assert say(engine, QUESTION, **hot, top_k=10**6, seed=1)  # more than the vocabulary, which would crash ONNX Runtime
    greedy = say(engine, QUESTION)
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}):
        assert {say(engine, QUESTION, **hot, **narrow, seed=seed) for seed in (1, 2)} == {greedy}
    # the end of turn stands in the prompt: punished for that, the answer goes on, and says nothing twice
    words = say(engine, QUESTION, max_new_tokens=12, repetition_penalty=5.0)
    assert words.startswith(greedy)
    assert len(words) > len(greedy)


def test_an_answer_ends_before_a_stop_text(engine: Any) -> None:
    from engine import Generation, Usage

    whole = say(engine, QUESTION)
    usage = Usage()
    stopped = "".join(engine.stream(QUESTION, Generation(stop=("never said", whole[-3:])), print, usage))
    assert (stopped, usage.finish_reason) == (whole[:-3], "stop")


def test_closing_a_stream_stops_the_computation(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from engine import Generation

    steps: list[int] = []
    long = Generation(200, repetition_penalty=10.0)  # which lets no answer end
    if hasattr(engine.backend.model, "get_base_model"):
        hook = engine.backend.model.get_base_model().register_forward_pre_hook(lambda *_: steps.append(1))
    else:
        import onnx_backend

        class Counting(onnx_backend.onnxruntime_genai.Generator):  # type: ignore[misc]
            def generate_next_token(self) -> None:
                steps.append(1)
                super().generate_next_token()

        hook = None
        monkeypatch.setattr(onnx_backend.onnxruntime_genai, "Generator", Counting)
    try:
        say(engine, QUESTION, max_new_tokens=200, repetition_penalty=10.0)
        assert len(steps) >= 50
        steps.clear()
        stream = engine.stream(QUESTION, long, print)
        next(stream)
        stream.close()
        taken = len(steps)
        assert taken < 50
        assert say(engine, QUESTION) == say(engine, QUESTION, max_new_tokens=8)
    finally:
        if hook:
            hook.remove()


def test_a_conversation_that_is_too_long_loses_its_oldest_turns_and_every_front_end_says_so(
    engine: Any, pipe: Any, page: Any, api: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import gradio

    import console_chat

    monkeypatch.setattr(engine.backend, "context", 64)
    monkeypatch.setattr(console_chat, "load", lambda *_: engine)
    told: list[str] = []
    monkeypatch.setattr(gradio, "Info", told.append)
    questions = ["It was a long, long day in the market, and then another one.", "Who was jubilant?"] * 2
    notice = r"The model reads 64 tokens: the oldest \d messages of this chat were left out\."
    status, out, err = pipe("/system", *questions, options=("--max-new-tokens", "16"))
    assert status == 0
    assert re.search(f"^{notice}$", err, re.MULTILINE), err
    settings = {"system": "", "longest": 16, "api_name": "/chat"}
    before: list[list[str]] = []
    for question in questions:
        before.append([question, page.predict(question, history=before, **settings)])
    assert "".join(f"{answer}\n" for _, answer in before) == out
    assert re.fullmatch(notice, told[-1])
    with pytest.raises(openai.BadRequestError, match="leave out its oldest messages"):
        api([turn for question in questions for turn in (user(question), {"role": "assistant", "content": "joy"})])


# ---- the same refusals


def no_adapter(models: Path) -> None:
    shutil.rmtree(models / "adapter")


def torn_adapter(models: Path) -> None:
    cut(models / "adapter/adapter_model.safetensors")


def torn_tokenizer(models: Path) -> None:
    cut(models / "adapter/tokenizer.json")


def adapter_of_another_base(models: Path) -> None:
    change(models / "adapter/adapter_config.json", base_model_name_or_path="some/other")


def adapter_of_another_rank(models: Path) -> None:
    change(models / "adapter/adapter_config.json", r=4)


def no_base(models: Path) -> None:
    shutil.rmtree(models / "demo")


def torn_base(models: Path) -> None:
    cut(models / "demo/model.safetensors")


def torn_base_settings(models: Path) -> None:
    cut(models / "demo/config.json")


def no_export(models: Path) -> None:
    shutil.rmtree(models / "onnx")


def stale_export(models: Path) -> None:
    change(models / "onnx/export.json", adapter_sha256="0")


def torn_export(models: Path) -> None:
    cut(models / "onnx/model.onnx.data")


def overwritten_export(models: Path) -> None:
    file = models / "onnx/model.onnx"
    file.write_bytes(bytes(file.stat().st_size))


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-3])


def change(file: Path, **fields: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


TUNE, EXPORT = (
    "run `python finetuning/invoke_olive.py",
    "run `python finetuning/export.py` again, or use --engine torch",
)
GET = "run `python setup/get_model.py`"
REFUSED = [
    (no_adapter, "torch", rf"The adapter in models/adapter is missing or damaged \(.*\): {TUNE}` again"),
    (torn_adapter, "torch", rf"The adapter in models/adapter is missing or damaged \(.*\): {TUNE}` again"),
    (torn_tokenizer, "torch", rf"The (tokenizer|adapter) in models/adapter is (missing or )?damaged\b.*: {TUNE}"),
    (
        adapter_of_another_base,
        "torch",
        f"The adapter in models/adapter was trained on some/other, but .*: {TUNE}` again",
    ),
    (
        adapter_of_another_rank,
        "torch",
        f"The adapter in models/adapter .*does not fit .*models/demo.*: {TUNE} --fresh`",
    ),
    (no_base, "torch", f"models/demo is not on this machine yet: {GET}, which builds it"),
    (torn_base, "torch", rf"models/demo is not whole \(.*\): {GET}, which builds it again"),
    (torn_base_settings, "torch", rf"models/demo is not whole \(.*\): {GET}, which builds it again"),
    (
        no_export,
        "onnx",
        "There is no ONNX model in models/onnx yet: run `python finetuning/export.py`, or use --engine t",
    ),
    (
        stale_export,
        "onnx",
        f"The ONNX model in models/onnx was made from another adapter than models/adapter: {EXPORT}",
    ),
    (torn_export, "onnx", rf"The ONNX model in models/onnx is damaged \(model.onnx.data\): {EXPORT}"),
    (overwritten_export, "onnx", rf"The ONNX model in models/onnx is damaged \(.*\): delete it and {EXPORT}"),
    (bool, "abacus", "There is no engine 'abacus': choose one of auto, torch, onnx"),
]


@pytest.mark.parametrize(("damage", "library", "words"), REFUSED, ids=lambda value: getattr(value, "__name__", ""))
def test_every_error_of_a_front_end_is_one_sentence_with_status_1(
    tuned: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    library: str,
    words: str,
) -> None:
    import console_chat
    import export
    import gradio_chat

    front_ends = {
        "console": lambda: console_chat.main(["--engine", library, "--prompt", "hi"]),
        "page": lambda: gradio_chat.main(["--engine", library, "--port", "0"]),
    }
    if library == "torch":  # what concerns base and adapter concerns the export
        front_ends["export"] = export.main
    models = tuned / "models"
    shutil.copytree(models, tmp_path / "models")
    try:
        damage(models)
        if library == "torch":
            shutil.rmtree(models / "merged")  # or it would be used again
        monkeypatch.setattr(sys, "argv", ["export.py"])
        for front_end, start in front_ends.items():
            capsys.readouterr()
            assert start() == 1, front_end
            err = capsys.readouterr().err
            assert re.fullmatch(rf"error: {words}[^\n]*\.\n", err), (front_end, err)
            assert not re.search(r"\. [A-Z]", err), (front_end, err)
    finally:
        shutil.rmtree(models)
        shutil.copytree(tmp_path / "models", models)


# ---- the console in a terminal


def test_the_history_is_in_the_named_file_and_the_arrow_keys_find_it(tuned: Path, tmp_path: Path) -> None:
    history = tmp_path / "history"
    command = [sys.executable, "-B", str(tuned / "inference/console_chat.py"), "--history", str(history)]
    row = held_out(tuned / "models")[0]
    question, answer = row[-2]["content"], row[-1]["content"]
    with Terminal(command) as terminal:
        assert "ONNX Runtime, int" in terminal.wait_for("You: ")
        terminal.type("/help\n")
        screen = terminal.wait_for("You: ")
        for command_ in ("/system TEXT", "/clear", "/help", "#end", "Ctrl-C"):
            assert command_ in screen
        assert max(map(len, screen.splitlines())) <= 80
        terminal.type("/claer\n")
        terminal.wait_for("(there is no /claer: /help shows what there is)")
        terminal.wait_for("You: ")
        terminal.type(f"{question}\n")
        terminal.wait_for(f"Model: {answer}\n")
        terminal.wait_for("You: ")
        terminal.type("#end\n")
        assert terminal.process.wait(timeout=60) == 0
    assert history.read_text() == f"/help\n/claer\n{question}\n#end\n"
    assert history.stat().st_mode & 0o777 == 0o600
    with Terminal(command) as terminal:
        terminal.wait_for("You: ")
        terminal.type("\x1b[A\x1b[A\n")  # twice up
        terminal.wait_for(f"Model: {answer}\n")
        terminal.wait_for("You: ")
        terminal.type("\x04")
        assert terminal.process.wait(timeout=60) == 0
    with Terminal([*command[:-1], str(tmp_path / "missing" / "history")]) as terminal:
        terminal.wait_for("error: The history cannot be kept in ")
        assert terminal.process.wait(timeout=60) == 1
