"""The sample data: its properties, and that the files are what the generator writes."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).resolve().parents[2]
GENERATOR = ROOT / "tools" / "make_sample_dataset.py"
FOLDER = ROOT / "template" / "dataset"
TONES = {"joy", "sadness", "fear", "surprise"}
TRAIN, HELDOUT = "sample-train.jsonl", "sample-heldout.jsonl"


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_sample_dataset", GENERATOR)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def made(generator: ModuleType) -> dict[str, list]:
    return generator.make_dataset()


@pytest.fixture(scope="module")
def pairs() -> dict[str, list[tuple[str, str]]]:
    """Return the phrase and tone of every row on disk."""
    return {
        name: [
            (row["messages"][0]["content"], row["messages"][1]["content"])
            for row in map(json.loads, (FOLDER / name).read_text(encoding="utf-8").splitlines())
        ]
        for name in (TRAIN, HELDOUT)
    }


def plain(phrase: str) -> str:
    """Return the letters and digits of a phrase in lower case, one space between words."""
    return " ".join(re.findall(r"\w+", phrase.lower()))


def cues_in(phrase: str, generator: ModuleType) -> list[tuple[str, str]]:
    """Return every (tone, cue) that the phrase has as whole words."""
    return [
        (tone, cue)
        for tone, kinds in generator.CUES.items()
        for cues in kinds.values()
        for cue in cues
        if re.search(rf"\b{re.escape(cue)}\b", phrase, re.IGNORECASE)
    ]


@pytest.mark.parametrize("name", [TRAIN, HELDOUT])
def test_every_line_is_one_row_with_a_user_and_an_assistant(name: str) -> None:
    content = (FOLDER / name).read_bytes()
    assert b"\r" not in content
    assert not content.startswith(b"\xef\xbb\xbf")
    assert content.endswith(b"\n")
    for line in content.decode("utf-8").splitlines():
        row = json.loads(line)
        assert list(row) == ["messages"]
        assert [list(message) for message in row["messages"]] == [["role", "content"]] * 2
        assert [message["role"] for message in row["messages"]] == ["user", "assistant"]


@pytest.mark.parametrize(("name", "rows_per_tone"), [(TRAIN, 200), (HELDOUT, 40)])
def test_every_tone_has_the_same_number_of_rows(pairs: dict, name: str, rows_per_tone: int) -> None:
    assert Counter(tone for _, tone in pairs[name]) == dict.fromkeys(TONES, rows_per_tone)


def test_no_phrase_occurs_twice_not_even_with_other_case_or_punctuation(pairs: dict) -> None:
    phrases = Counter(plain(phrase) for rows in pairs.values() for phrase, _ in rows)
    assert [phrase for phrase, count in phrases.items() if count > 1] == []


def test_phrases_have_5_to_18_words_and_vary_in_length(pairs: dict) -> None:
    lengths = {len(phrase.split()) for rows in pairs.values() for phrase, _ in rows}
    assert min(lengths) >= 5
    assert max(lengths) <= 18
    assert len(lengths) >= 8


def test_no_phrase_names_a_tone(pairs: dict) -> None:
    named = [phrase for rows in pairs.values() for phrase, _ in rows if any(tone in phrase.lower() for tone in TONES)]
    assert named == []


def test_every_tone_has_20_to_25_cues_and_shares_none(generator: ModuleType) -> None:
    assert set(generator.CUES) == TONES
    cues = {tone: [cue for group in kinds.values() for cue in group] for tone, kinds in generator.CUES.items()}
    assert all(20 <= len(words) <= 25 for words in cues.values())
    every = [cue for words in cues.values() for cue in words]
    assert len(set(every)) == len(every)


def test_each_phrase_holds_exactly_one_cue_and_it_gives_the_label(pairs: dict, generator: ModuleType) -> None:
    wrong = [
        (phrase, tone)
        for rows in pairs.values()
        for phrase, tone in rows
        if [found for found, _ in cues_in(phrase, generator)] != [tone]
    ]
    assert wrong == []


def test_every_heldout_cue_is_met_in_at_least_three_training_rows(pairs: dict, generator: ModuleType) -> None:
    trained = Counter(cue for phrase, _ in pairs[TRAIN] for cue in cues_in(phrase, generator))
    heldout = {cue for phrase, _ in pairs[HELDOUT] for cue in cues_in(phrase, generator)}
    assert len(heldout) >= 60
    assert [cue for cue in heldout if trained[cue] < 3] == []


def test_no_heldout_row_combines_parts_as_a_training_row_does(made: dict) -> None:
    scenes = {(row.cue, row.scene) for row in made[TRAIN]}
    people = {(row.frame, row.person, row.cue) for row in made[TRAIN]}
    leaks = [
        row.phrase
        for row in made[HELDOUT]
        if (row.cue, row.scene) in scenes or (row.frame, row.person, row.cue) in people
    ]
    assert leaks == []


@pytest.mark.parametrize("part", ["frame", "scene", "person"])
def test_only_the_cue_is_tied_to_a_tone(made: dict, part: str) -> None:
    counts = Counter((getattr(row, part), row.tone) for row in made[TRAIN])
    for value in {value for value, _ in counts}:
        shares = [counts[value, tone] for tone in TONES]
        assert min(shares) > 0, value
        assert max(shares) <= 2 * sum(shares) / len(shares), value


def test_any_four_rows_from_the_top_hold_every_tone_once(pairs: dict) -> None:
    for rows in pairs.values():
        assert all({tone for _, tone in rows[at : at + 4]} == TONES for at in range(0, len(rows), 4))


def test_the_files_are_what_the_generator_writes(generator: ModuleType, made: dict) -> None:
    for name, examples in made.items():
        assert (FOLDER / name).read_bytes() == generator.to_jsonl(examples), "run python tools/make_sample_dataset.py"


def test_check_accepts_fresh_files_and_names_the_one_that_was_changed_or_lost(tmp_path: Path) -> None:
    def run(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, str(GENERATOR), "--folder", str(tmp_path / "dataset"), *arguments]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=False)

    assert run().returncode == 0
    assert run("--check").returncode == 0

    with (tmp_path / "dataset" / HELDOUT).open("ab") as file:
        file.write(b"{}\n")
    changed = run("--check")
    assert changed.returncode == 1
    assert HELDOUT in changed.stderr
    assert TRAIN not in changed.stderr

    (tmp_path / "dataset" / TRAIN).unlink()
    lost = run("--check")
    assert lost.returncode == 1
    assert TRAIN in lost.stderr
    assert "Traceback" not in lost.stderr
    assert not (tmp_path / "dataset" / TRAIN).exists()
