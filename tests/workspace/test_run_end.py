"""How a run ends: with a better adapter, or with a sentence and the earlier one; and the time that it took."""

from __future__ import annotations

import contextlib
import io
import json
import re
import sys
import unicodedata
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import Run
from terminal import Terminal

Invoke = Callable[..., Run]
SHORT = {"max_rows": 40, "max_steps": 6, "warmup_steps": 0, "logging_steps": 1}


def results(workspace: Path) -> dict[str, bytes]:
    """Return what a run publishes."""
    files = [workspace / "models" / "run.json", *(workspace / "models" / "adapter").glob("*")]
    return {file.name: file.read_bytes() for file in files}


def strict(text: str) -> Any:
    """Read JSON as RFC 8259 has it: without NaN."""

    def refuse(name: str) -> None:
        raise ValueError(name)

    return json.loads(text, parse_constant=refuse)


@pytest.fixture
def earlier(invoke: Invoke, workspace: Path) -> dict[str, bytes]:
    """The results of a good run."""
    assert invoke("--fresh", settings=SHORT).status == 0
    return results(workspace)


def test_a_loss_that_is_not_a_number_stops_the_run_and_names_the_step(
    invoke: Invoke, workspace: Path, earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import batches

    real, calls = batches.answer_loss, []

    def breaks(model: Any, batch: Any) -> Any:
        loss = real(model, batch)
        calls.extend([1] * model.training)
        return loss * float("nan") if model.training and len(calls) == 3 else loss

    monkeypatch.setattr(batches, "answer_loss", breaks)
    run = invoke("--fresh", settings=SHORT | {"gradient_accumulation_steps": 1})
    assert (run.status, run.err) == (
        1,
        "error: The loss is not a number at step 3, so the training stopped and no earlier result has changed: lower "
        "learning_rate in olive-config.yaml.\n",
    )
    assert results(workspace) == earlier


def test_a_held_out_loss_that_is_not_a_number_stops_the_run(
    invoke: Invoke, workspace: Path, earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import train

    real = train.AnswerTrainer.training_step

    def breaks(self: Any, model: Any, *arguments: Any) -> Any:
        loss = real(self, model, *arguments)
        next(weight for weight in model.parameters() if weight.requires_grad).data.fill_(float("nan"))
        return loss

    monkeypatch.setattr(train.AnswerTrainer, "training_step", breaks)
    run = invoke("--fresh", settings=SHORT | {"eval_steps": 1, "save_steps": 1})
    assert run.status == 1
    assert "error: The loss is not a number at step 1, so the training stopped" in run.err
    assert results(workspace) == earlier


def test_a_run_that_ends_worse_keeps_the_earlier_adapter_unless_asked(
    invoke: Invoke, workspace: Path, earlier: dict[str, bytes]
) -> None:
    harmful = SHORT | {"learning_rate": 30.0, "max_steps": 2, "load_best_model_at_end": False}
    run = invoke("--fresh", settings=harmful)
    assert run.status == 1
    said = re.fullmatch(
        r"error: The run made the model worse: its loss on the held-out rows went from (\S+) to (\S+)\. The adapter of "
        r"an earlier run stays as it is, and this one lies in (models/checkpoints/\S+/output/adapter): lower "
        r"learning_rate, or take more steps if these were few, in olive-config\.yaml, or publish it with "
        r"--keep-worse\.\n",
        run.err,
    )
    assert said, run.err
    assert float(said[1]) < float(said[2])
    assert re.search(rf"eval loss +│ {said[1]} +│ {said[2]} +│", run.out), "the figures are shown"
    assert (workspace / said[3] / "adapter_model.safetensors").is_file()
    assert results(workspace) == earlier
    run = invoke("--keep-worse", settings=harmful)
    assert run.status == 0, run.err
    assert run.json["metrics"]["after"]["eval_loss"] > run.json["metrics"]["before"]["eval_loss"]
    assert results(workspace) != earlier


def test_a_tuned_model_whose_loss_is_not_a_number_is_never_published(
    invoke: Invoke, workspace: Path, earlier: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    from reporting import evaluate

    real = evaluate.load_model

    def broken(folder: str, adapter: Path | None, settings: Any) -> Any:
        model = real(folder, adapter, settings)
        if adapter:
            model.get_output_embeddings().weight.data.fill_(float("nan"))
        return model

    monkeypatch.setattr(evaluate, "load_model", broken)
    run = invoke("--fresh", "--keep-worse", settings=SHORT)
    assert (run.status, run.err) == (
        1,
        "error: The tuned model's loss on the held-out rows is not a number, so no earlier result has changed: lower "
        "learning_rate in olive-config.yaml.\n",
    )
    assert results(workspace) == earlier


def test_the_first_run_that_ends_worse_says_that_nothing_is_published(
    workspace: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from preparing.workspace import ROOT
    from reporting.run_record import refuse_worse
    from settings.config_file import ConfigError

    def run(before: float, after: float) -> Any:
        return {"metrics": {"before": {"eval_loss": before}, "after": {"eval_loss": after}}}

    refuse_worse(run(2.0, 1.99), ROOT / "new", tmp_path)
    assert capsys.readouterr().out == ""
    for after in (2.0, 2.09):  # a little: published, and said
        refuse_worse(run(2.0, after), ROOT / "new", tmp_path)
        assert capsys.readouterr().out.startswith(
            f"Nothing was gained: the held-out loss went from 2.0000 to {after:.4f}."
        )
    with pytest.raises(ConfigError, match=r"No adapter is published, and this one lies in new: lower"):
        refuse_worse(run(2.0, 2.11), ROOT / "new", tmp_path)


def test_a_number_that_json_does_not_have_is_written_as_null(workspace: Path, tmp_path: Path) -> None:
    from training.whole_files import write_json

    value = {"a": [float("nan"), 1.5], "b": {"c": float("inf")}, "d": (float("-inf"), True, None, "NaN")}
    write_json(tmp_path / "run.json", value)
    assert strict((tmp_path / "run.json").read_text()) == {
        "a": [None, 1.5],
        "b": {"c": None},
        "d": [None, True, None, "NaN"],
    }


def test_the_time_of_all_sessions_counts_even_if_one_was_killed(
    invoke: Invoke, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import progress

    real = progress.Progress.on_log

    def killed(self: Any, args: Any, state: Any, *others: Any, **options: Any) -> None:
        real(self, args, state, *others, **options)
        if state.global_step == 4:
            raise KeyboardInterrupt  # as far as the files are concerned, the same as SIGKILL

    settings = SHORT | {"save_steps": 2, "eval_steps": 2}
    monkeypatch.setattr(progress.Progress, "on_log", killed)
    assert invoke("--fresh", settings=settings).status == 130
    files = workspace.glob("models/checkpoints/*/sessions.json")
    file = max(files, key=lambda path: path.stat().st_mtime)
    (first,) = json.loads(file.read_text())["sessions"]
    assert first["seconds"] > first["before"] + first["training"] > first["training"] > 0
    monkeypatch.setattr(progress.Progress, "on_log", real)
    run = invoke(settings=settings)
    assert run.status == 0, run.err
    assert "Resuming from checkpoint-2" in run.out
    assert re.search(r"Done in \d+ s, over 2 sessions\.", run.out)
    assert run.json["sessions"] == 2
    _, second = json.loads(file.read_text())["sessions"]
    for name in ("before", "training"):
        assert run.json["timings"][name] == pytest.approx(first[name] + second[name], abs=0.02)
    assert run.json["seconds"] == pytest.approx(first["seconds"] + second["seconds"], abs=0.02)
    tokens, seconds = (first[name] + second[name] for name in ("tokens", "training"))
    assert run.json["timings"]["tokens_per_second"] == pytest.approx(tokens / seconds, rel=0.01)
    assert run.json["timings"]["start_to_first_step"] == pytest.approx(second["start_to_first_step"], abs=0.01)


def test_the_time_left_after_a_resume_is_that_of_the_steps_of_this_session(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from training import progress

    now = [1000.0]
    monkeypatch.setattr(progress, "time", SimpleNamespace(time=lambda: now[0]))
    noted: dict[str, float] = {}
    shown = progress.Progress(lambda **values: noted.update(values))
    state = SimpleNamespace(global_step=790, max_steps=1000, num_input_tokens_seen=5000)
    shown.on_train_begin(None, state, None)
    now[0], state.global_step, state.num_input_tokens_seen = 1020.0, 800, 5100
    shown.on_step_end(None, state, None)
    shown.on_log(None, state, None, logs={"eval_loss": 1.5})
    assert capsys.readouterr().out == "step 800/1000  eval loss 1.5000  5 tokens/s  400 s left\n"
    assert (noted["training"], noted["tokens"]) == (20.0, 100)


def test_run_json_has_the_settings_as_they_were_used(invoke: Invoke, monkeypatch: pytest.MonkeyPatch) -> None:
    from training import train

    monkeypatch.setattr(train.batches, "keeps_apart", lambda model, rows: False)
    run = invoke("--fresh", settings=SHORT | {"packing": True, "gradient_accumulation_steps": 2})
    assert run.status == 0, run.err
    assert "the batches are padded, as with packing: false" in run.out
    used = run.json["config"]
    assert used["adapter"]["packing"] is False
    assert used["training"]["gradient_checkpointing"] is False, "the run decided it: it is commented out"
    batch = used["training"]["per_device_train_batch_size"]
    assert (used["training"]["processes"], used["training"]["rows_a_step"]) == (1, 2 * batch)
    assert used["model"]["model_path"] == "models/demo"


def test_the_system_prompt_of_all_rows_is_kept_for_the_chat_and_said(
    invoke: Invoke, workspace: Path, tmp_path: Path
) -> None:
    file = workspace / "dataset" / "advised.jsonl"
    rows = [json.loads(line) for line in (workspace / "dataset/sample-train.jsonl").read_text().splitlines()[:60]]
    system = {"role": "system", "content": "You sort feelings."}
    file.write_text("".join(json.dumps({"messages": [system, *row["messages"]]}) + "\n" for row in rows))
    settings = {"train_file": "dataset/advised.jsonl", "held_out_file": None, "max_steps": 4, "warmup_steps": 0}
    said = "All rows have this system prompt, which chat, API and exports use too: You sort feelings."
    from preparing.conversations import print_once

    for arguments in (("--check",), ("--fresh",)):
        print_once.cache_clear()
        run = invoke(*arguments, settings=settings)
        assert (run.status, said in run.out) == (0, True), run.err
    assert run.json["system_prompt"] == "You sort feelings."
    assert run.json["config"]["tokens"]["system_prompt"] == "You sort feelings."
    assert "You sort feelings." in (workspace / "models" / "adapter" / "README.md").read_text()
    print_once.cache_clear()
    run = invoke("--fresh", settings=settings | {"system_prompt": "Answer."})
    assert (run.json["system_prompt"], said in run.out) == ("Answer.", False)


def test_rejected_rows_stand_in_run_json_and_in_the_report(invoke: Invoke, workspace: Path) -> None:
    rows = (workspace / "dataset/sample-train.jsonl").read_text().splitlines()[:60]
    (workspace / "dataset" / "two-bad.jsonl").write_text("\n".join([*rows, '{"messages": []}', "7"]) + "\n")
    settings = {"train_file": "dataset/two-bad.jsonl", "held_out_file": None, "max_steps": 4, "warmup_steps": 0}
    run = invoke("--fresh", settings=settings)
    assert run.status == 0, run.err
    assert run.json["data"]["set_aside_rows"] == 2
    page = (workspace / "models" / "report" / "index.html").read_text()
    assert re.search(r">rows rejected, listed next to the data</th><td[^>]*>2<", page)


def width(line: str) -> int:
    return sum(2 if unicodedata.east_asian_width(letter) in "WF" else 1 for letter in line)


def table(workspace: Path, monkeypatch: pytest.MonkeyPatch, **example: str) -> list[str]:
    """Return the lines of the table of answers, in a terminal of 80 columns."""
    from reporting.show_results import show_figures

    figures = {"accuracy": 0.5, "eval_loss": 1.0, "perplexity": 2.7}
    run: Any = {
        "metrics": {"before": figures, "after": figures},
        "examples": [{"question": "Q", "expected": "E", "before": "B", "after": "A"} | example],
    }
    monkeypatch.setenv("COLUMNS", "80")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        show_figures(run)
    return out.getvalue().splitlines()[8:]


def test_texts_without_spaces_are_whole_in_the_table(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    thanks = "ありがとうございました。またお越しください。"
    lines = table(workspace, monkeypatch, question=thanks, expected=thanks, before=thanks, after=thanks)
    columns = zip(*(line.strip("│").split("│") for line in lines if line.startswith("│")), strict=True)
    assert ["".join(map(str.strip, column)) for column in columns] == [thanks] * 4
    assert {width(line) for line in lines} == {width(lines[0])}
    assert width(lines[0]) <= 80


@pytest.mark.parametrize("letter", ["x", "語", "ab "])
def test_a_long_text_takes_a_few_lines_of_the_table_and_ends_with_a_mark(
    workspace: Path, monkeypatch: pytest.MonkeyPatch, letter: str
) -> None:
    long = "\n".join([f"{letter * 20}"] * 30)
    lines = table(workspace, monkeypatch, before=long, after=long)
    body = [line for line in lines if line.startswith("│")]
    assert len(body) <= 5, body
    assert sum(line.count("…") for line in body) == 2
    assert {width(line) for line in lines} == {width(lines[0])}


def test_the_last_turn_of_a_conversation_is_in_the_table(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from reporting.run_record import asked

    row: Any = [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Where is my parcel? " * 9},
        {"role": "assistant", "content": "Which number? " * 9},
        {"role": "user", "content": "It is 42."},
        {"role": "assistant", "content": "At the door."},
    ]
    question = asked(row)
    assert question.startswith("user: Where is my parcel? ")
    assert question.endswith("\nuser: It is 42.")
    assert "Be kind." not in question
    assert asked(row[3:]) == "It is 42."
    body = [line.split("│")[1].strip() for line in table(workspace, monkeypatch, question=question) if "│" in line]
    shown = "".join(body).replace(" ", "")
    assert shown.startswith("user:Whereismyparcel?")
    assert "…" in shown
    assert shown.endswith("user:Itis42.")


def test_an_evaluation_shows_its_progress_in_a_terminal_only(
    invoke: Invoke, workspace: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    script = (
        f"import sys; sys.path.insert(0, {str(workspace / 'finetuning')!r})\n"
        "import time\nfrom training.progress import shown\n"
        "for start in shown(range(0, 20, 10), 'answers'):\n    time.sleep(0.3)\n"
        "print('end')"
    )
    with Terminal([sys.executable, "-c", script]) as terminal:
        seen = terminal.wait_for("end")
    assert "answers" in seen
    assert "%" in seen
    with contextlib.redirect_stdout(io.StringIO()) as out:
        from training.progress import shown

        assert [*shown(range(0, 20, 10), "answers")] == [0, 10]
    assert not out.getvalue().strip()

    from reporting import evaluate

    seen: list[str] = []
    monkeypatch.setattr(evaluate, "shown", lambda steps, what: seen.append(what) or shown(steps, what))
    run = invoke("--fresh", settings={"max_steps": 1, "warmup_steps": 0})
    assert seen == ["loss", "answers"] * 2
    # the examples that are kept are spread over the questions, and these over the held-out rows
    rows = (workspace / "dataset/sample-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = [json.loads(row)["messages"][0]["content"] for row in rows]
    places = [asked.index(example["question"]) for example in run.json["examples"]]
    assert places[0] < len(rows) / 8 and places[-1] > len(rows) * 7 / 8


@pytest.mark.parametrize("dropout", [0.05, 0.5])
def test_lokr_is_as_strong_in_training_as_later(workspace: Path, dropout: float) -> None:

    from settings.config_file import read_file
    from settings.run_settings import Settings, olive_config

    config = read_file()
    (chosen,) = config["passes"].values()
    chosen |= {"type": "LoKr", "rank_dropout": dropout}
    chosen.pop("lora_dropout")
    (used,) = olive_config(Settings.of(config))["passes"].values()
    import peft
    import torch

    torch.manual_seed(0)
    scale = used.get("rank_dropout_scale", False)
    adapted = peft.get_peft_model(
        torch.nn.Sequential(torch.nn.Linear(64, 64)),
        peft.LoKrConfig(
            r=8, alpha=16, rank_dropout=dropout, rank_dropout_scale=scale, target_modules=["0"], init_weights=False
        ),
    )
    layer = adapted.base_model.model[0]
    whole = layer.get_delta_weight("default").abs().mean()
    drawn = torch.stack([layer.get_delta_weight("default", apply_rank_dropout=True).abs().mean() for _ in range(400)])
    assert float((drawn.mean() / whole).detach()) == pytest.approx(1, abs=0.03)


def test_rows_that_several_processes_take_twice_are_counted(workspace: Path) -> None:
    from accelerate.data_loader import BatchSamplerShard
    from torch.utils.data import BatchSampler

    from settings.run_settings import read_settings

    for rows, batch, processes in ((33, 8, 4), (64, 8, 4), (33, 8, 1), (10, 3, 2), (5, 8, 4)):
        settings = replace(read_settings(), per_device_train_batch_size=batch, processes=processes)
        shards = [BatchSamplerShard(BatchSampler(range(rows), batch, False), processes, i) for i in range(processes)]
        taken = sum(len(one) for shard in shards for one in shard)
        assert settings.repeated_rows(rows) == (taken - rows if processes > 1 else 0)
