"""Conversations → tokens and labels; how rows become conversations is tested in tests/unit/test_rows.py."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from conftest import REPOSITORY

FAMILIES = yaml.safe_load((REPOSITORY / "catalog" / "chat_templates.yml").read_text(encoding="utf-8"))["families"]
CONVERSATION = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "Hello you"},
    {"role": "assistant", "content": "I am glad."},
    {"role": "user", "content": "And now?"},
    {"role": "assistant", "content": "joy\n\nmore  of it"},
]
TONE = [{"role": "user", "content": "Phrase: Hooray!"}, {"role": "assistant", "content": "joy"}]


@pytest.fixture(scope="module")
def dataset(workspace: Path) -> Any:
    from preparing import dataset

    return dataset


@pytest.fixture(scope="module")
def tokens(workspace: Path) -> Any:
    from preparing import tokens

    return tokens


def test_duplicate_rows_and_held_out_rows_that_are_trained_on_are_counted(workspace: Path) -> None:
    from planning.plan import repeated_rows

    other = [TONE[0], {"role": "assistant", "content": "fear"}]
    assert repeated_rows({"train": [TONE], "held_out": [other]}) == []
    doubled, leaked = repeated_rows({"train": [TONE, TONE, other], "held_out": [other]})
    assert "1 of 3 rows to train on are duplicates" in doubled
    assert "1 held-out rows are trained on too" in leaked


@pytest.mark.parametrize("eval_split", [0.2, 30])
def test_held_out_rows_are_not_trained_on_and_stay_when_rows_are_added(
    dataset: Any, tmp_path: Path, eval_split: float
) -> None:
    path = tmp_path / "rows.jsonl"

    def parts(count: int) -> tuple[set[str], set[str]]:
        path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(count)))
        read = [
            dataset.chat_rows(part, train_file=str(path), eval_split=eval_split, data_seed=1)
            for part in ("train", "held_out")
        ]
        return {row[0]["content"] for row in read[0]}, {row[0]["content"] for row in read[1]}

    train, held_out = parts(150)
    assert not train & held_out
    assert len(train | held_out) == 150
    assert 15 <= len(held_out) <= 45
    more = parts(300)[1]
    stayed = held_out == {name for name in more if int(name[1:]) < 150}
    # exactly 30 of 150 rows and exactly 30 of 300, without favouring the first: some must be trained on then
    assert (stayed, len(more) == len(held_out)) == ((True, False) if eval_split < 1 else (False, True))
    assert dataset.held_out_positions([TONE], 0.5, 1) in (set(), {0})


def test_without_a_share_all_rows_are_trained_on(dataset: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"prompt": f"p{i}", "completion": "c"}) for i in range(9)))
    assert len(dataset.chat_rows("train", train_file=str(path), eval_split=0, data_seed=1)) == 9
    with pytest.raises(Exception, match="leaves no rows for held_out: add rows or change eval_split"):
        dataset.chat_rows("held_out", train_file=str(path), eval_split=0, data_seed=1)


@pytest.fixture(scope="module")
def sample(dataset: Any, workspace: Path) -> Any:
    return dataset.chat_rows("train", str(workspace / "dataset" / "sample-train.jsonl"), "unused")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_labels_are_the_answers_with_their_end_of_turn(tokens: Any, sample: Any, family: str) -> None:
    from training import tiny_model

    facts = FAMILIES[family]
    tokenizer = tiny_model.build_tokenizer({**facts, "chat_template": facts["template"]}, sample)
    (example,) = tokens.tokenise(tokenizer, CONVERSATION, "responses")
    spans: list[list[int]] = [[]]
    for token, label in zip(example["input_ids"], example["labels"], strict=True):
        assert label in (token, tokens.IGNORED)
        if label == token:
            spans[-1].append(token)
        elif spans[-1]:
            spans.append([])
    learnt = [tokenizer.decode(span) for span in spans if span]
    end = facts["end_of_turn"]
    assert [text.removesuffix(end).strip() for text in learnt] == ["I am glad.", "joy\n\nmore  of it"]
    assert all(text.endswith(end) for text in learnt)
    (everything,) = tokens.tokenise(tokenizer, CONVERSATION, "all")
    assert everything["labels"] == everything["input_ids"]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_question_is_tokenised_as_in_training(tokens: Any, sample: Any, family: str) -> None:
    from training import tiny_model

    facts = FAMILIES[family]
    tokenizer = tiny_model.build_tokenizer({**facts, "chat_template": facts["template"]}, sample)
    asked = tokenizer.apply_chat_template(CONVERSATION[:-1], add_generation_prompt=True, return_dict=False)
    assert tokens.tokenise(tokenizer, CONVERSATION, "responses")[0]["input_ids"][: len(asked)] == asked


def test_a_thinking_model_learns_only_the_answer_in_every_turn(tokens: Any, sample: Any) -> None:
    from training import tiny_model

    # as Qwen3 does it: an empty thought before the last answer only, and in the prompt when thinking is off
    template = """{% for message in messages %}<|im_start|>{{ message.role }}
{% if message.role == 'assistant' and loop.last %}<think>

</think>

{% endif %}{{ message.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% if not enable_thinking %}<think>

</think>

{% endif %}{% endif %}"""
    facts = {**FAMILIES["chatml"], "chat_template": template}
    tokenizer = tiny_model.build_tokenizer(facts, sample)
    examples = tokens.tokenise(tokenizer, CONVERSATION, "responses")
    learnt = [tokenizer.decode([label for label in one["labels"] if label != tokens.IGNORED]) for one in examples]
    # the first answer too is learnt after the empty thought, as it is asked, and so in an example of its own
    assert learnt == ["I am glad.<|im_end|>", "joy\n\nmore  of it<|im_end|>"]
    for example, last in zip(examples, (2, 4), strict=True):
        options = {"add_generation_prompt": True, "enable_thinking": False, "return_dict": False}
        asked = tokenizer.apply_chat_template(CONVERSATION[:last], **options)
        assert example["input_ids"][: len(asked)] == asked
        assert set(example["labels"][: len(asked)]) == {tokens.IGNORED}


def test_rows_that_are_too_long_are_truncated_and_counted(
    dataset: Any, workspace: Path, sample: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    from training.tiny_model import build_demo

    demo = workspace / "models" / "demo"
    if not demo.is_dir():
        build_demo()
    capsys.readouterr()
    whole = dataset.chat_tokens(sample, str(demo), max_seq_len=256)
    assert len(whole) == len(sample), "no row is dropped because the data is short"
    assert capsys.readouterr().out == ""
    longest = max(len(row["input_ids"]) for row in whole)
    assert len(dataset.chat_tokens(sample, str(demo), max_seq_len=longest - 3)) < len(sample)
    out = capsys.readouterr().out
    assert re.match(rf"\d+ of 800 rows are longer than max_seq_len {longest - 3} and were cut; [1-9]", out)
    assert re.search(r"were left out \(the first: .*sample-train\.jsonl, line \d+\)\.\n$", out)
    for length, share in ((20, 0.05), (4, 1)):
        with pytest.raises(
            dataset.DataError, match=rf"line \d+: max_seq_len {length} cuts off the whole answer, as in"
        ):
            dataset.chat_tokens(sample, str(demo), max_seq_len=length, max_bad_rows=share)
    assert dataset.chat_tokens(sample, str(demo), max_seq_len=20, max_bad_rows=1)


def test_a_row_that_the_chat_template_refuses_is_named(tokens: Any, sample: Any) -> None:
    from training import tiny_model

    # as Gemma and Mistral have it
    template = """{% for message in messages %}{% if (message.role == 'user') != (loop.index0 % 2 == 0) %}
{{ raise_exception('Conversation roles must alternate') }}{% endif %}{{ message.content }}{% endfor %}"""
    tokenizer = tiny_model.build_tokenizer({**FAMILIES["chatml"], "chat_template": template}, sample)
    row = type(sample[0])([TONE[0], *TONE], "rows.jsonl", 7)
    for refused in (row, tokens.with_system(row, "Be kind.")):
        with pytest.raises(tokens.DataError, match=r"^rows\.jsonl, line 7: .* take this row \(Conversation roles must"):
            tokens.tokenise(tokenizer, refused, "responses")


def test_rows_of_parquet_and_of_the_hub_are_named_by_their_number(
    dataset: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import datasets

    rows = [{"messages": TONE, "id": i} for i in range(20)] + [{"messages": [], "id": 20}]
    (tmp_path / "mine").mkdir()
    path = tmp_path / "mine" / "train.parquet"
    datasets.Dataset.from_list(rows).to_parquet(str(path))
    read = dataset.chat_rows("train", train_file=str(path), held_out_file="unused")
    assert [list(row) for row in read] == [TONE] * 20
    assert read[-1].place == f"{path}, row 20"
    assert "the first is row 21: column 'messages' is missing or empty" in capsys.readouterr().out
    # a folder is read as a dataset of the hub is
    read = dataset.chat_rows("train", dataset_name=str(path.parent), held_out_file="unused")
    assert len(read) == 20
    assert read[-1].place == f"{path.parent}, row 20"


def test_a_damaged_parquet_file_and_a_missing_dataset_are_named(dataset: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.parquet"
    path.write_bytes(b"PAR1" + bytes(100))
    with pytest.raises(dataset.DataError, match=r"rows\.parquet, row 1: it cannot be read as Parquet: "):
        dataset.chat_rows("train", train_file=str(path))
    with pytest.raises(
        dataset.DataError, match=r"The dataset nobody/nothing, split train, cannot be read: .* HF_TOKEN"
    ):
        dataset.chat_rows("train", dataset_name="nobody/nothing")


def test_a_held_out_file_is_read_even_with_a_dataset_of_the_hub(dataset: Any, workspace: Path) -> None:
    held_out = str(workspace / "dataset" / "sample-heldout.jsonl")
    assert len(dataset.chat_rows("held_out", dataset_name="nobody/nothing", held_out_file=held_out)) == 160


def test_too_few_rows_to_learn_from_are_refused(workspace: Path) -> None:
    from planning.fit import check_count
    from settings.config_file import ConfigError

    check_count({"train": [TONE] * 8, "held_out": [TONE]})
    with pytest.raises(ConfigError, match="7 rows to train on are too few"):
        check_count({"train": [TONE] * 7, "held_out": [TONE]})


def test_olive_finds_what_the_user_script_imports(workspace: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from olive.common import import_lib

    config = yaml.safe_load((workspace / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8"))
    ((script, folder),) = {(entry["user_script"], entry["script_dir"]) for entry in config["data_configs"]}
    # as in a process of `olive run`, which knows nothing of the folder
    monkeypatch.chdir(workspace)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path != str(workspace / "finetuning")])
    for module in [name for name in sys.modules if name.partition(".")[0] == "preparing"]:
        monkeypatch.delitem(sys.modules, module)
    for known in (import_lib.import_user_module, import_lib.import_module_from_file):
        known.cache_clear()
    with pytest.raises(ModuleNotFoundError):
        import_lib.import_user_module(script)
    assert import_lib.import_user_module(script, folder).chat_rows


def test_a_run_rejects_bad_rows_and_reports_them_once(invoke: Any, workspace: Path) -> None:
    rows = [{"messages": [{"role": "user", "content": f"Phrase {i}"}, TONE[1]], "id": i} for i in range(98)]
    lines = [json.dumps(row) for row in rows]
    lines.insert(16, json.dumps({"messages": [*TONE, TONE[0]]}))
    data = workspace / "dataset" / "mine.jsonl"
    data.write_text("\n".join([*lines, '{"messages": [{"ro']), encoding="utf-8")
    mine = {"train_file": "dataset/mine.jsonl", "held_out_file": None, "max_steps": 2}
    run = invoke(settings=mine)
    assert run.status == 0, run.err
    assert run.out.splitlines()[:2] == [
        "2 of 100 rows of dataset/mine.jsonl were rejected, see dataset/mine.rejected.jsonl; the first is line 17: the "
        "last turn is the user's: add the answer to it, or drop the turn.",
        "dataset/mine.jsonl: columns id are not used.",
    ]
    assert "were rejected" not in run.out.partition("\n")[2]
    assert len((workspace / "dataset" / "mine.rejected.jsonl").read_text(encoding="utf-8").splitlines()) == 2

    run = invoke("--check", settings={**mine, "max_bad_rows": 0.01})
    assert run.status == 1
    assert run.err.startswith("error: dataset/mine.jsonl, line 17: the last turn is the user's")
    assert run.err.count("\n") == 1


def test_truncated_answers_stop_a_run_before_it_trains(invoke: Any, workspace: Path) -> None:
    run = invoke(settings={"max_seq_len": 16})
    assert run.status == 1
    assert run.err.startswith("error: max_seq_len 16 cuts off every answer of 795 in 800 rows")
