"""The report of a run: one page that needs no network, with the content of run.json and the Trainer's log."""

from __future__ import annotations

import base64
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

PNG = b"\x89PNG\r\n\x1a\n"
HISTORY = [
    {"step": 5, "loss": 2.5, "learning_rate": 0.004},
    {"step": 5, "eval_loss": 2.25, "eval_runtime": 0.1},
    {"step": 10, "loss": 1.5, "learning_rate": 0.002},
    {"step": 10, "eval_loss": 1.75, "eval_runtime": 0.1},
    {"step": 10, "train_loss": 2.0, "train_runtime": 3.0},
]


class Page(HTMLParser):
    """The tags, their attributes and the text of a page, as a browser reads them."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.texts.append(data.strip())

    def one(self, tag: str) -> dict[str, str | None]:
        (attributes,) = [attributes for name, attributes in self.tags if name == tag]
        return attributes


def run_json(**changes: Any) -> dict[str, Any]:
    """What models/run.json says after a run."""
    return {
        "base_model": "models/demo",
        "revision": None,
        "method": "lora",
        "adapter": "models/adapter",
        "system_prompt": "",
        "dtype": "float32",
        "dataset_sha256": "da7a" * 16,
        "config": {
            "model": {"attn_implementation": "sdpa", "trust_remote_code": False},
            "adapter": {"r": 16, "target_modules": ["q_proj", "v_proj"]},
            "training": {"eval_rows": 20},
        },
        "packages": {"olive-ai": "0.13.0", "torch": "2.13.0"},
        "machine": {"python": "3.12.1", "gpu": None},
        "data": {
            "source": "dataset/sample-train.jsonl",
            "train_rows": 800,
            "held_out_rows": 200,
            "answer_share": 0.0845,
            "tokens_per_row": {"min": 18, "median": 24, "p95": 28, "max": 33},
        },
        "metrics": {
            "before": {"eval_loss": 2.4, "perplexity": 11.0232, "accuracy": 0.25},
            "after": {"eval_loss": 1.75, "perplexity": 5.7546, "accuracy": 0.975},
        },
        "examples": [
            {"question": "We won!", "expected": "joy", "before": "anger", "after": " joy\n"},
            {"question": "Boo!", "expected": "fear", "before": "", "after": "fears"},
        ],
        "timings": {"training": 12345.6, "tokens_per_second": 12229.2},
        "seconds": 30.82,
        "finished": "2026-01-31T12:00:00+00:00",
    } | changes


def write(workspace: Path, folder: Path, run: dict[str, Any], history: list[dict[str, float]] = HISTORY) -> Page:
    """Write a report with the workspace's own code, and read it."""
    from reporting.report import write_report

    path = write_report(run, history, folder)
    assert path == folder / "index.html"
    return Page(path)


def test_the_page_is_self_contained(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json())
    assert not {"script", "link", "iframe"} & {tag for tag, _ in page.tags}
    addresses = [
        value
        for _, attributes in page.tags
        for name, value in attributes.items()
        if name in {"src", "srcset", "href", "action", "data", "poster"}
    ]
    plots = [base64.b64decode(str(address).removeprefix("data:image/png;base64,")) for address in addresses]
    assert len(plots) == 2 and all(plot.startswith(PNG) for plot in plots)  # for dark and for light screens
    assert (tmp_path / "report" / "loss.png").read_bytes() == plots[1] != plots[0]
    text = (tmp_path / "report" / "index.html").read_text(encoding="utf-8")
    assert "url(" not in text and "@import" not in text


def test_metrics_before_and_after_are_side_by_side(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json())
    assert {"25.0% → 97.5%", "2.4000 → 1.7500", "11.02 → 5.75"} <= set(page.texts)


def test_answers_are_marked_in_words_and_count_as_the_accuracy_does(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json())
    shown = [
        text for text in page.texts if text in {"✓ exact", "✗ differs", "joy", "anger", "(empty)", "fear", "fears"}
    ]
    assert shown == [
        "joy",
        "✗ differs",
        "anger",
        "✓ exact",
        "joy",
        "fear",
        "✗ differs",
        "(empty)",
        "✗ differs",
        "fears",
    ]


def test_every_fact_of_the_run_is_in_the_page(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json(extra={"cores in use": 800}, note="kept"))
    expected = {"olive-ai": "0.13.0", "torch": "2.13.0", "python": "3.12.1", "gpu": "–"}
    expected |= {"cores in use": "800", "note": "kept", "revision": "–", "system prompt": "–"}
    expected |= {"rows from": "dataset/sample-train.jsonl", "rows to train on": "800", "share of answer tokens": "8.5%"}
    expected |= {"tokens per row": "min 18, median 24, p95 28, max 33", "SHA-256 of the rows": "da7a" * 16}
    expected |= {"total": "30.82 s", "training": "3:25:46", "tokens a second, in training": "12229.2"}
    assert expected.items() <= {*zip(page.texts, page.texts[1:], strict=False)}


def test_settings_are_named_and_written_as_in_the_configuration(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json())
    following = dict(zip(page.texts, page.texts[1:], strict=False))
    expected = {
        "attn_implementation": "sdpa",
        "trust_remote_code": "false",
        "r": "16",
        "target_modules": "q_proj, v_proj",
    }
    assert {name: following.get(name) for name in expected} == expected


def test_the_plot_has_an_alternative_text(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json())
    assert page.one("img")["alt"] == (
        "Training loss: 2.500 at step 5, 1.500 at step 10. "
        "Held-out loss (20 of 200 rows): 2.250 at step 5, 1.750 at step 10."
    )


def test_both_curves_are_in_the_plot(workspace: Path, tmp_path: Path) -> None:
    plots = set()
    for number, left_out in enumerate(("nothing", "loss", "eval_loss")):
        history = [{key: value for key, value in entry.items() if key != left_out} for entry in HISTORY]
        write(workspace, tmp_path / str(number), run_json(), history)
        plots.add((tmp_path / str(number) / "loss.png").read_bytes())
    assert len(plots) == 3


def test_a_run_without_losses_or_questions_has_a_report(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path / "report", run_json(examples=[]), history=[])
    assert page.one("img")["alt"] == "Training loss: not reported. Held-out loss (20 of 200 rows): not reported."
    assert "2.4000 → 1.7500" in page.texts
    assert "25.0% → 97.5%" not in page.texts


@pytest.mark.parametrize("text", ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7 * 7 }} & <b>"])
def test_texts_of_models_and_rows_are_never_markup(workspace: Path, tmp_path: Path, text: str) -> None:
    usual = write(workspace, tmp_path / "usual", run_json())
    example = {"question": text, "expected": text, "before": text, "after": text}
    run = run_json(base_model=text, system_prompt=text, examples=[example] * 2, packages={text: text, "torch": text})
    page = write(workspace, tmp_path / "report", run)
    assert sorted(tag for tag, _ in page.tags if tag not in {"i", "th", "td", "tr"}) == sorted(
        tag for tag, _ in usual.tags if tag not in {"i", "th", "td", "tr"}
    )
    assert page.texts.count(text) == 2 + 1 + 2 * 4 + 3  # heading and facts, system prompt, examples, packages


def test_a_report_that_fails_leaves_the_last_one(workspace: Path, tmp_path: Path) -> None:
    write(workspace, tmp_path / "report", run_json())
    before = {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()}
    with pytest.raises(KeyError):
        write(workspace, tmp_path / "report", {**run_json(), "metrics": {}}, HISTORY[:1])
    assert {path.name: path.read_bytes() for path in (tmp_path / "report").iterdir()} == before
    assert set(before) == {"index.html", "loss.png"}


def test_a_new_report_replaces_the_last_one(workspace: Path, tmp_path: Path) -> None:
    write(workspace, tmp_path / "report", run_json())
    page = write(workspace, tmp_path / "report", run_json(base_model="microsoft/phi-2"))
    assert "microsoft/phi-2" in page.texts and "models/demo" not in page.texts
    assert {path.name for path in (tmp_path / "report").iterdir()} == {"index.html", "loss.png"}


@pytest.fixture
def demo_model(workspace: Path) -> str:
    """Return the folder of the demo model, built unless a run has done it."""
    from training.tiny_model import build_demo

    folder = workspace / "models" / "demo"
    if not folder.is_dir():
        build_demo()
    return str(folder)


def settings_with(**tokens: Any) -> Any:
    """Return the settings of olive-config.yaml with other ones for the tokens."""
    from settings.config_file import read_file
    from settings.run_settings import Settings

    config = read_file()
    for data_config in config["data_configs"]:
        data_config["pre_process_data_config"] |= tokens
    return Settings.of(config)


def test_the_data_facts_describe_the_tokens_that_are_trained_on(workspace: Path, demo_model: str) -> None:
    from preparing.dataset import chat_tokens
    from preparing.tokenised import tokenise_rows
    from preparing.tokens import IGNORED, load_tokenizer
    from reporting.run_record import data_facts

    def row(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    train = [row("We won!", "joy")] * 3 + [row("Boo!", "fear"), row("Boo! " * 40, "fear"), row("Oh?", "surprise " * 40)]
    rows = {"train": train, "held_out": [train[0], row("No.", "anger")]}
    tokenizer = load_tokenizer(demo_model)
    found = tokenise_rows(tokenizer, train, max_seq_len=40)
    facts = data_facts(settings_with(max_seq_len=40), rows, found, tokenizer)
    uncut = sorted(len(example["input_ids"]) for example in chat_tokens(train, demo_model, max_seq_len=1000))
    kept = chat_tokens(train, demo_model, max_seq_len=40, max_bad_rows=1)
    assert len(kept) == 5  # one question fills the row, so that no answer is left
    answers = sum(label != IGNORED for example in kept for label in example["labels"])
    assert facts == {
        "source": "dataset/sample-train.jsonl",
        "held_out_source": "dataset/sample-heldout.jsonl",
        "train_rows": 6,
        "held_out_rows": 2,
        "tokens": sum(len(example["input_ids"]) for example in kept),
        "answer_share": round(answers / sum(len(example["input_ids"]) for example in kept), 4),
        "tokens_per_row": {"min": uncut[0], "median": uncut[2], "p95": uncut[5], "max": uncut[5]},
        "cut_rows": 2,
        "left_out_rows": 1,
        "set_aside_rows": 0,
        "repeated_rows": 0,
        "duplicate_rows": 2,
        "held_out_rows_trained_on": 1,
        "end_of_answer": ["<|endoftext|>", "<|end|>"],
    }


def test_the_settings_are_recorded_as_the_training_used_them_with_defaults_and_without_internals(
    workspace: Path,
) -> None:
    from reporting.run_record import settings_as_used
    from settings.run_settings import read_settings

    loaded = replace(read_settings(), model_path="/a/folder", revision=None)
    run: Any = {"base_model": "some/model", "revision": "c0ffee"}
    decided: Any = {"packing": False, "gradient_checkpointing": True, "processes": 2, "rows_a_step": 64}
    used = settings_as_used(loaded, run, decided)
    assert used["rows"]["dataset_split"] == "train"
    assert used["tokens"] == {"system_prompt": None, "max_seq_len": 256, "train_on": "responses", "thinking": "auto"}
    assert (used["adapter"]["r"], used["training"]["learning_rate"]) == (16, 0.004)
    assert (used["model"]["model_path"], used["model"]["revision"]) == ("some/model", "c0ffee")
    assert {name: used["training"][name] for name in decided if name != "packing"} == {
        name: value for name, value in decided.items() if name != "packing"
    }
    assert used["adapter"]["packing"] is False
    assert not any(isinstance(value, dict) for group in used.values() for value in group.values())


def test_an_absolute_folder_is_not_in_the_title(workspace: Path, tmp_path: Path) -> None:
    page = write(workspace, tmp_path, run_json(base_model="/home/me/models/smollm2"))
    assert "smollm2: what the fine-tuning changed" in page.texts
    assert "smollm2" in page.texts


def test_a_run_of_several_sessions_says_so(workspace: Path, tmp_path: Path) -> None:
    for sessions in (1, 3):
        page = write(workspace, tmp_path, run_json(sessions=sessions))
        assert (f"over {sessions} sessions" in " ".join(page.texts)) == (sessions > 1)
