"""The files that rows come from, with what other tools and spreadsheets write into them."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "template" / "finetuning"))

from preparing.conversations import Conversation, read
from preparing.data_files import data_files
from preparing.dataset import held_out_positions
from preparing.problems import DataError

ROWS = [{"prompt": f"What colour is item {i}?", "completion": ("red", "blue")[i % 2]} for i in range(4)]
SAID = [[row["prompt"], row["completion"]] for row in ROWS]
LINES = "".join(json.dumps(row) + "\n" for row in ROWS)


def said(rows: list[Conversation]) -> list[list[str]]:
    return [[turn["content"] for turn in row] for row in rows]


def written(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


# ---- JSON


@pytest.mark.parametrize("ending", ["json", "jsonl"])
@pytest.mark.parametrize("indent", [None, 2])
def test_rows_under_a_key_of_one_object_are_read_with_their_lines(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], ending: str, indent: int | None
) -> None:
    path = written(tmp_path / f"{ending}{indent}.{ending}", json.dumps({"version": "1", "train": ROWS}, indent=indent))
    rows = read(str(path))
    assert said(rows) == SAID
    assert rows[1].place == f"{path}, line {7 + 1 if indent else 1}"
    assert f"{path}: the rows are those under 'train'; 'version' are not used." in capsys.readouterr().out


def test_an_object_without_one_key_for_the_rows_is_refused_with_its_keys(tmp_path: Path) -> None:
    for value in ({"some": ROWS, "other": ROWS}, {"0": ROWS[0], "1": ROWS[1]}):
        path = written(tmp_path / "rows.json", json.dumps(value, indent=1))
        with pytest.raises(DataError, match=r"rows\.json, line 1: it is one JSON object with the keys '.*': write"):
            read(str(path))


def test_a_file_with_one_object_can_be_one_row(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert said(read(str(written(tmp_path / "rows.json", json.dumps({"messages": turns}))))) == [["a", "b"]]


def test_a_comma_after_each_line_is_ignored(tmp_path: Path) -> None:
    text = LINES.replace("}\n", "},\n")
    assert said(read(str(written(tmp_path / "rows.jsonl", text)))) == SAID


# ---- CSV, as spreadsheets write it


@pytest.mark.parametrize(
    "text",
    [
        "sep=;\nprompt;completion\n{rows}",
        "SEP=\t\r\nprompt\tcompletion\r\n{rows}",
        "prompt;completion;;\n{rows}",
        ";;\n\nprompt;completion\n{rows};;;\n;;;;\n",
        "\ufeffprompt;completion\n{rows}",
    ],
)
def test_extra_lines_and_columns_of_spreadsheets_are_skipped(tmp_path: Path, text: str) -> None:
    mark = "\t" if "\t" in text else ";"
    blank = mark * 2 if ";;\n{rows}" in text else ""
    rows = "".join(f"{row['prompt']}{mark}{row['completion']}{blank}\n" for row in ROWS)
    assert said(read(str(written(tmp_path / "rows.csv", text.replace("{rows}", rows))))) == SAID


def test_blank_cells_after_the_last_column_are_skipped_in_the_rows_that_have_them(tmp_path: Path) -> None:
    rows = "".join(f"{row['prompt']};{row['completion']}{';' * number}\n" for number, row in enumerate(ROWS))
    assert said(read(str(written(tmp_path / "rows.csv", f"prompt;completion\n{rows}")))) == SAID


def test_a_cell_in_a_column_without_a_name_is_rejected_with_its_position(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "sep=,\nprompt,completion,\na,b,\nc,d,lost\n")
    with pytest.raises(DataError, match=r"rows\.csv, line 4: cell 3 has content, but its column has no name"):
        read(str(path))


def test_a_cp1252_file_is_refused_with_a_preview_and_read_with_the_setting(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "prompt,completion\nWie heißt die größte Stadt?,Köln\n".encode("cp1252"))
    with pytest.raises(DataError) as raised:
        read(str(path))
    assert "line 2: byte 26 is not UTF-8: save it as UTF-8, or set encoding: cp1252 in" in str(raised.value)
    assert "heißt die größte" in str(raised.value)
    assert said(read(str(path), encoding="cp1252")) == [["Wie heißt die größte Stadt?", "Köln"]]
    with pytest.raises(DataError, match="encoding is 'klingon'"):
        read(str(path), encoding="klingon")


def test_a_column_whose_name_differs_in_case_from_the_template_is_named(tmp_path: Path) -> None:
    path = written(tmp_path / "rows.csv", "Ticket text,Category\nHelp!,urgent\n")
    with pytest.raises(DataError, match=r"prompt_template names \{Ticket Text\}, but the row has Ticket text"):
        read(str(path), None, "train", "columns", "{Ticket Text}", "{Category}")


# ---- several files


def test_a_list_a_folder_and_a_pattern_name_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.csv", "b.rejected.jsonl", ".hidden.jsonl", "notes.docx", "deep/c.jsonl"):
        written(Path("data") / name, LINES)
    assert data_files("data") == ["data/a.jsonl", "data/b.csv"]
    assert data_files("data/*.jsonl") == ["data/a.jsonl"]
    assert data_files("data/**/*.jsonl") == ["data/a.jsonl", "data/deep/c.jsonl"]
    assert data_files(["data/deep", "data/a.jsonl", "data/*.jsonl"]) == ["data/deep/c.jsonl", "data/a.jsonl"]
    assert said(read(["data/a.jsonl", "data/deep"])) == SAID + SAID
    for named, words in (("other", "is not there"), ("data/*.parquet", "No data file fits"), ([], "empty list")):
        with pytest.raises(DataError, match=words):
            data_files(named)


@pytest.mark.parametrize("name", ["a[1]", "b*", "c?d", "[", "{x}"])
def test_an_existing_path_is_never_read_as_a_pattern(tmp_path: Path, name: str) -> None:
    path = written(tmp_path / name / f"{name}.jsonl", LINES)
    assert data_files(str(path)) == [str(path)]
    assert data_files(str(path.parent)) == [str(path)]
    assert data_files(str(path.parent / "*.jsonl")) == [path.as_posix()]


def test_rejected_rows_are_listed_next_to_their_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = written(tmp_path / "one.jsonl", LINES)
    two = written(tmp_path / "two.jsonl", LINES + '{"prompt": "?"}\n')
    assert len(read([str(one), str(two)], max_bad_rows=0.2)) == 8
    assert f"1 of 5 rows of {two} were rejected" in capsys.readouterr().out
    assert [path.name for path in tmp_path.glob("*.rejected.jsonl")] == ["two.rejected.jsonl"]


# ---- marks of good and bad


@pytest.mark.parametrize("column", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [False, "False", "false"])
def test_files_with_rows_that_mark_bad_answers_are_refused(tmp_path: Path, column: str, value: Any) -> None:
    rows = [row | {column: True} for row in ROWS] * 20 + [ROWS[0] | {column: value}]
    path = written(tmp_path / "rows.jsonl", "\n".join(map(json.dumps, rows)))
    with pytest.raises(DataError, match=rf"rows\.jsonl, line 81: the column {column} marks the answer as a bad"):
        read(str(path), max_bad_rows=1)
    assert len(read(str(path), None, "train", "columns", "{prompt}", f"{{{column}}}")) == 81  # here it is the answer


# ---- held out


@pytest.mark.parametrize("share", [0.1, 0.02, 0.5, 0.9])
def test_at_least_one_row_is_held_out_and_appended_rows_change_nothing(share: float) -> None:
    rows: list[Any] = [[{"role": "user", "content": f"What is item {i}?"}] for i in range(300)]
    for seed in range(200):
        few = held_out_positions(rows[:20], share, seed)
        assert 1 <= len(few) <= 20
        for count in (21, 60, 300):
            assert few == {i for i in held_out_positions(rows[:count], share, seed) if i < 20}
    assert held_out_positions(rows, 0, 1) == set() == held_out_positions([], 0.1, 1)
    held = sum(len(held_out_positions(rows, 0.1, seed)) for seed in range(200)) / 200
    assert 29 < held < 31.5
