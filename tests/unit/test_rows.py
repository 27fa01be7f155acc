"""Files → rows → messages: what is read, rejected and refused, always with file and line.

The modules need no package, so thousands of broken files can be tried in seconds.
"""

from __future__ import annotations

import codecs
import copy
import gzip
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "template" / "finetuning"))

from preparing.conversations import Conversation, shared_system_prompt
from preparing.conversations import read as read_file
from preparing.formats import to_messages
from preparing.problems import DataError

INPUTS = 5200
ASKED, ANSWERED = {"role": "user", "content": "Phrase: Hooray!"}, {"role": "assistant", "content": "joy"}
CALL = {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Kyōto"}'}}
# a valid row of every format, and of every variant of it
VALID: list[Any] = [
    {"messages": [{"role": "system", "content": "Be kind."}, ASKED, ANSWERED], "id": 7},
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}, ANSWERED]},
    {"messages": [ASKED, {"role": "assistant", "content": None, "tool_calls": [CALL]}, ASKED, ANSWERED]},
    [ASKED, ANSWERED],
    {"conversations": [{"from": "human", "value": "Hi\nyou"}, {"from": "gpt", "value": "joy"}], "system": "Be."},
    {"conversation": [ASKED, {"from": "function_call", "value": "{}"}, {"from": "observation", "value": ""}, ANSWERED]},
    {"instruction": "And?", "input": "Hi", "output": "ïœ", "system": "Be.", "history": [["a", "b"], ["c", "d"]]},
    {"prompt": 'Phrase; Hooray, "you"', "completion": "joy\n\nmore", "source": "web"},
    {"prompt": [ASKED], "completion": [ANSWERED]},
    {"text": "The red button, 日本."},
]
FLAT = [row for row in VALID if isinstance(row, dict) and all(isinstance(value, str) for value in row.values())]
JUNK = st.one_of(
    st.sampled_from([None, True, 0, -1.5, 10**400, float("nan"), "", " ", "\0", "\ud800", "\x1b[2J\r\n", [], {}]),
    st.sampled_from([[[]], [None], ["x"], {"role": "user"}, [ASKED], [ANSWERED, 7], {"content": []}, "x" * 3000]),
    st.text(max_size=8),
    st.dictionaries(st.sampled_from(["role", "content", "from", "value", "text", "a\nb"]), st.text(max_size=3)),
)
NUMBER = st.integers(0, 2**16)


def places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every place inside a value as (container, key)."""
    for key in list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ():
        yield value, key
        yield from places(value[key])


def corrupted_row(number: int, place: int, change: str, junk: Any) -> Any:
    """Return a valid row with one change at one of its places."""
    box = [copy.deepcopy(VALID[number % len(VALID)])]
    spots = list(places(box))
    container, key = spots[place % len(spots)]
    if change == "drop":
        del container[key]
    elif change == "rename" and isinstance(container, dict):
        container[str(junk)] = container.pop(key)
    elif change == "wrap":
        container[key] = [container[key]]
    elif change == "text":
        container[key] = json.dumps(container[key])
    else:
        container[key] = junk
    return box[0] if box else junk


def as_csv(rows: list[dict[str, str]], separator: str = ",") -> str:
    records = [list(rows[0]), *(list(row.values()) for row in rows)]
    return "\r\n".join(separator.join('"' + str(cell).replace('"', '""') + '"' for cell in cells) for cells in records)


def written(kind: str, rows: list[Any]) -> bytes:
    """Return rows as a file of a kind."""
    text = {
        "jsonl": lambda: "\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n",
        "json": lambda: json.dumps(rows, indent=1),
        "csv": lambda: as_csv([row for row in rows if row in FLAT[:1]] or [FLAT[0]] * 3),
        "txt": lambda: "\n".join(str(row) for row in rows),
    }[kind.removesuffix(".gz")]()
    raw = text.encode("utf-8", "surrogatepass")
    return gzip.compress(raw, 1) if kind.endswith(".gz") else raw


KINDS = ("jsonl", "json", "csv", "txt", "jsonl.gz", "csv.gz")
WHOLE = {kind: written(kind, [*VALID, *VALID]) for kind in KINDS}


def corrupted_bytes(kind: str, change: str, first: int, second: int, junk: bytes) -> bytes:
    """Return a valid file of a kind with one change to its bytes."""
    raw = WHOLE[kind]
    start, end = sorted((first % (len(raw) + 1), second % (len(raw) + 1)))
    if change == "flip":
        at = first % len(raw)
        return raw[:at] + bytes([raw[at] ^ (1 << second % 8)]) + raw[at + 1 :]
    if change == "encode" and not kind.endswith(".gz"):
        encoding = ("latin-1", "utf-16", "utf-16-le", "utf-32", "utf-8-sig", "cp1252", "utf-7")[second % 7]
        return raw.decode().encode(encoding, "replace")[: None if first % 3 else -1 - first % 50]
    return {
        "cut": raw[:start],
        "behead": raw[start:],
        "remove": raw[:start] + raw[end:],
        "insert": raw[:start] + junk + raw[start:],
        "line": raw[: raw.find(b"\n", start) + 1] + junk + b"\n" + raw[raw.find(b"\n", start) + 1 :],
        "repeat": raw[:end] + raw[start:],
        "join": raw[:end] + WHOLE[KINDS[second % len(KINDS)]],
        "pack": gzip.compress(raw[:start], 1),
        "mark": codecs.BOM_UTF16_LE + raw[start:],
        "fill": raw[:start] + bytes(second % 5000),
    }.get(change, junk)


CHANGED_ROWS = st.tuples(
    st.lists(
        st.builds(
            corrupted_row, NUMBER, NUMBER, st.sampled_from(["junk", "junk", "drop", "rename", "wrap", "text"]), JUNK
        ),
        min_size=1,
        max_size=3,
    ),
    st.sampled_from(KINDS),
)
CHANGED_BYTES = st.tuples(
    st.sampled_from(KINDS),
    st.sampled_from(
        [
            "flip",
            "flip",
            "cut",
            "behead",
            "remove",
            "insert",
            "line",
            "repeat",
            "join",
            "pack",
            "mark",
            "fill",
            "encode",
            "junk",
        ]
    ),
    NUMBER,
    NUMBER,
    st.one_of(
        st.binary(max_size=12), st.sampled_from([b'"', b"\n", b"[" * 9999, b"{", b"\\", b"\0", b"\xff\xfe", b'"\n"'])
    ),
)


def test_a_corrupted_input_is_read_or_refused_by_file_and_line_and_never_a_traceback(tmp_path: Path) -> None:
    outcomes: Counter[str] = Counter()

    def judge(name: str, raw: bytes, max_bad_rows: float) -> None:
        path = tmp_path / name
        path.write_bytes(raw)
        outcomes["all"] += 1
        rejected = tmp_path / "rows.rejected.jsonl"
        rejected.unlink(missing_ok=True)
        try:
            conversations = read_file(str(path), max_bad_rows=max_bad_rows)
        except DataError as error:
            said = str(error)
            assert re.search(rf"{name}, (line|row) \d+: ", said) or "unknown ending" in said, said
            assert said.splitlines() == [said] and said.isprintable(), said
            outcomes["refused"] += 1
        else:
            outcomes["set aside" if rejected.exists() else "read"] += 1
            for conversation in conversations:
                assert re.fullmatch(rf".*{name}, line \d+", conversation.place)
                assert conversation[-1]["role"] == "assistant"
                assert "".join(turn["content"] for turn in conversation).encode()
            for line in rejected.read_bytes().splitlines() if rejected.exists() else ():
                assert json.loads(line).keys() == {"file", "line", "reason", "row"}
        assert path.read_bytes() == raw

    # each example is two inputs: one with a changed row, one with changed bytes
    @settings(
        max_examples=INPUTS // 2,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    @given(CHANGED_ROWS, CHANGED_BYTES, st.sampled_from([0, 0.05, 0.5, 1]))
    def corrupt(changed: tuple[list[Any], str], damaged: tuple[str, str, int, int, bytes], share: float) -> None:
        rows, kind = changed
        judge(f"rows.{kind}", written(kind, [*rows, VALID[0]]), share)
        judge(f"rows.{damaged[0]}", corrupted_bytes(*damaged), share)

    corrupt()
    assert outcomes["all"] >= 5000
    assert min(outcomes[name] for name in ("read", "set aside", "refused")) >= 300, outcomes
    print(outcomes)


def read(path: Path, text: str | bytes, **options: Any) -> list[Conversation]:
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return read_file(str(path), **options)


def refused(path: Path, text: str | bytes, **options: Any) -> str:
    """Return what is said about a file that is refused."""
    with pytest.raises(DataError) as refusal:
        read(path, text, **options)
    return str(refusal.value)


TONE = [ASKED, ANSWERED]
SYSTEM = {"role": "system", "content": "Be kind."}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"messages": TONE, "id": 7}, TONE),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "Phrase: Hooray!"}]}, ANSWERED]}, TONE),
        ({"messages": [{"role": "developer", "content": "Be kind."}, *TONE]}, [SYSTEM, *TONE]),
        ({"messages": [{"role": "system", "content": ""}, *TONE]}, TONE),
        (TONE, TONE),
        ({"conversations": [{"from": "human", "value": "Phrase: Hooray!"}, {"from": "gpt", "value": "joy"}]}, TONE),
        ({"conversation": TONE, "system": "Be kind."}, [SYSTEM, *TONE]),
        ({"instruction": "Phrase: Hooray!", "input": "", "output": "joy"}, TONE),
        (
            {"instruction": "Phrase:", "input": "Hooray!", "output": "joy"},
            [{**ASKED, "content": "Phrase:\n\nHooray!"}, ANSWERED],
        ),
        (
            {"instruction": "Phrase: Hooray!", "output": "joy", "system": "Be kind.", "history": [["Hi", "Hello"]]},
            [SYSTEM, {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}, *TONE],
        ),
        ({"prompt": "Phrase: Hooray!", "completion": "joy"}, TONE),
        ({"prompt": [SYSTEM, ASKED], "completion": [ANSWERED]}, [SYSTEM, *TONE]),
        ({"text": "joy"}, [ANSWERED]),
        ({"messages": None, "text": "joy"}, [ANSWERED]),
    ],
)
def test_the_format_of_a_row_is_found_from_its_columns(row: Any, expected: Any) -> None:
    assert to_messages(row) == expected


def test_tool_calls_are_learned_as_lines_of_json_and_tool_results_are_read() -> None:
    call = {"name": "weather", "arguments": {"city": "Kyōto"}}
    expected = json.dumps(call, ensure_ascii=False)
    result = {"role": "tool", "content": "22 °C", "tool_call_id": "1"}
    opened = {"role": "assistant", "content": None, "tool_calls": [CALL]}
    row = to_messages({"messages": [ASKED, opened, result, ANSWERED], "tools": []})
    assert [turn["role"] for turn in row] == ["user", "assistant", "tool", "assistant"]
    assert row[1]["content"] == expected
    assert row[2] == {"role": "tool", "content": "22 °C"}
    both = {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL, CALL]}
    row = to_messages({"messages": [ASKED, both]})
    assert row[1]["content"] == f"Let me look.\n{expected}\n{expected}"
    shared = [{"from": "human", "value": "?"}, {"from": "function_call", "value": expected}]
    shared += [{"from": "observation", "value": "22 °C"}, {"from": "gpt", "value": "Warm."}]
    assert [turn["role"] for turn in to_messages({"conversations": shared})] == [
        "user",
        "assistant",
        "tool",
        "assistant",
    ]


def test_columns_are_inserted_into_templates_and_other_braces_stay() -> None:
    row = {"phrase": "Hooray!", "the tone": "joy {sic}", "note": None, "year": 1999}
    asked, answered = to_messages(row, "columns", 'Phrase: {phrase}{note} {year} {"as": 1} {0}', "{the tone}")
    assert (asked["content"], answered["content"]) == ('Phrase: Hooray! 1999 {"as": 1} {0}', "joy {sic}")


@pytest.mark.parametrize(
    "name", ["Ticket Text", "ticket text", " Ticket text ", "the body", "body", "Ticket-Nr.", "Größe"]
)
@pytest.mark.parametrize("setting", ["prompt_template", "completion_template"])
def test_a_name_in_braces_that_is_no_column_is_refused(name: str, setting: str) -> None:
    templates = {"prompt_template": "{Ticket text}", "completion_template": "{Category}"}
    templates[setting] += f" {{{name}}}"
    row = {"Ticket text": "It broke.", "Category": "repair"}
    with pytest.raises(
        DataError, match=re.escape(f"{setting} names {{{name}}}, but the row has Ticket text, Category.")
    ):
        to_messages(row, "columns", **templates)


def test_an_answer_that_is_the_same_for_every_row_is_refused() -> None:
    with pytest.raises(
        DataError, match="completion_template 'Category' is the same answer for every row: name a column"
    ):
        to_messages({"Ticket text": "It broke.", "Category": "repair"}, "columns", "{Ticket text}", "Category")


def test_the_templates_that_an_error_names_read_the_row() -> None:
    row = {"id": 7, "Ticket text": "It broke.", "Category": "repair"}
    with pytest.raises(DataError) as refusal:
        to_messages(row)
    named = dict(re.findall(r'(\w+_template): "(.*?)"', str(refusal.value)))
    assert [turn["content"] for turn in to_messages(row, "auto", **named)] == ["It broke.", "repair"]
    for changed, missing in (
        (named | {"prompt_template": None}, "question"),
        (named | {"completion_template": ""}, "answer"),
    ):
        with pytest.raises(
            DataError, match=f"is empty: name the column with the {missing} .* in braces; the row has id"
        ):
            to_messages(row, "columns", **changed)
    with pytest.raises(DataError, match=r"see dataset_format in olive-config\.yaml for the columns"):
        to_messages({"id": 7, "Ticket text": "It broke."})


@pytest.mark.parametrize(("prompts", "shared"), [("AA", "A"), ("AB", ""), ("A-", ""), ("--", ""), ("A", "A"), ("", "")])
def test_a_system_prompt_is_shared_when_all_rows_begin_with_it(prompts: str, shared: str) -> None:
    said = [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]
    rows = [[{"role": "system", "content": one}, *said] if one != "-" else said for one in prompts]
    assert shared_system_prompt(rows) == shared


@pytest.mark.parametrize(
    ("row", "words"),
    [
        (
            {"a": "x", "b": "y"},
            'columns a, b fit no known format: set prompt_template: "{a}" and completion_template: "{b}"',
        ),
        (7, "it is a number, not an object"),
        (
            [{"prompt": "a", "completion": "b"}],
            "it is a list, but not of turns. A file that is one JSON array must end",
        ),
        ({"messages": "Hello"}, "column 'messages' is text, not a list of turns"),
        ({"messages": [ASKED, "joy"]}, "turn 2 is text, not an object with role and content"),
        ({"messages": [ASKED, {"role": "robot", "content": "joy"}]}, 'turn 2 has the role "robot": use system, user'),
        ({"messages": [ASKED]}, "no assistant turn with text"),
        ({"messages": [*TONE, ASKED]}, "the last turn is the user's: add the answer to it, or drop the turn"),
        ({"messages": [{"role": "user", "content": " "}, ANSWERED]}, "the user's content is empty"),
        ({"messages": [*TONE, ASKED, {"role": "assistant", "content": ""}]}, "the assistant's content is empty"),
        ({"messages": [{"role": "user", "content": 7}, ANSWERED]}, "the user's content is a number, not text"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url"}]}, ANSWERED]}, "has a part that is not text"),
        ({"messages": [ASKED, {"role": "assistant", "tool_calls": [{"id": 1}]}]}, "a tool call has no name"),
        ({"prompt": "x", "completion": ""}, "column 'completion' is missing or empty; the row has prompt, completion"),
        ({"prompt": {}, "completion": "y"}, "column 'prompt' is an object, not a list of turns"),
        ({"instruction": "x", "output": "y", "history": [["a"]]}, "'history' is not a list of pairs"),
        ({"instruction": ["x"], "output": "y"}, "column 'instruction' is a list, not text"),
        ({"text": "half \ud83d a smile"}, "the assistant's content has a NUL or half a character"),
        ({"text": "a\0b"}, "the assistant's content has a NUL or half a character"),
    ],
)
def test_an_unusable_row_says_why(row: Any, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        to_messages(row)


@pytest.mark.parametrize(
    ("template", "words"),
    [(None, "completion_template is empty"), ("{tune}", "completion_template names {tune}, but the row has")],
)
def test_a_template_that_does_not_fit_is_named(template: str | None, words: str) -> None:
    with pytest.raises(DataError, match=re.escape(words)):
        to_messages({"phrase": "Hooray!", "tone": "joy"}, "columns", "{phrase}", template)


ROWS = [{"prompt": f"Phrase: {i}, ü", "completion": "jöy"} for i in range(3)]
TEXTS = {
    "jsonl": "\n\n".join(json.dumps(row, ensure_ascii=False) for row in ROWS),
    "json": json.dumps(ROWS, ensure_ascii=False, indent=2),
    "csv": as_csv(ROWS),
    "txt": "".join(f"Phrase: {i}, ü\r\n \r\n" for i in range(3)),
}


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16-le", "utf-16-be"])
@pytest.mark.parametrize("ending", TEXTS)
def test_files_of_every_kind_and_encoding_give_the_same_rows(
    tmp_path: Path, ending: str, encoding: str, packed: str
) -> None:
    mark = "\ufeff" if encoding.startswith("utf-16") else ""
    raw = (mark + TEXTS[ending]).encode(encoding)
    rows = read(tmp_path / f"Rows.{ending.upper()}{packed}", gzip.compress(raw) if packed else raw)
    assert [row[0]["content"] for row in rows] == [f"Phrase: {i}, ü" for i in range(3)]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_the_first_line_of_a_csv_shows_its_separator(tmp_path: Path, separator: str) -> None:
    rows = [{" prompt": "a, b; c\td", "completion ": 'he said "x"', "n": "1"}]
    (row,) = read(tmp_path / "rows.csv", as_csv(rows, separator))
    assert [turn["content"] for turn in row] == ["a, b; c\td", 'he said "x"']


def test_a_cell_may_be_larger_than_the_csv_library_s_own_limit(tmp_path: Path) -> None:
    (row,) = read(tmp_path / "rows.csv", "text\n" + "x" * 200_000)
    assert len(row[0]["content"]) == 200_000


@pytest.mark.parametrize(
    ("ending", "text", "expected"),
    [
        ("jsonl", '{"text": "a"}\n\n{"text": "b\u2028c"}\r\n{"text": "d"}\n', [1, 3, 4]),
        ("json", '\n[ {"text": "a"},\n  {"text":\n "b"}\n ,\n{"text": "c"} ]\n', [2, 3, 6]),
        ("csv", 'text,n\n"a\nb",1\n\n"c\r\nd\n",2\ne,3\n', [2, 5, 8]),
        ("txt", "\na\n\nb", [2, 4]),
    ],
)
def test_a_row_is_named_by_the_line_where_it_starts(
    tmp_path: Path, ending: str, text: str, expected: list[int]
) -> None:
    rows = read(tmp_path / f"rows.{ending}", text)
    assert [row.place for row in rows] == [f"{tmp_path}/rows.{ending}, line {line}" for line in expected]


def test_rows_of_a_file_may_have_different_formats(tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.jsonl", "\n".join(json.dumps(row) for row in VALID))
    assert len(rows) == len(VALID)


@pytest.mark.parametrize(
    ("name", "raw", "words"),
    [
        ("rows.jsonl", b"", "rows.jsonl, line 1: there are no rows"),
        ("rows.csv", b"prompt,completion\n", "rows.csv, line 1: there are no rows"),
        ("rows.json", b"[]", "rows.json, line 1: there are no rows"),
        ("rows.json", b'[{"text": "a"},\n{"text": "b"', "rows.json, line 2: it is damaged or not JSON"),
        (
            "rows.json",
            b'[{"text": "a"}\n{"text": "b"}]',
            "rows.json, line 2: it is damaged or not JSON (Expecting a comma",
        ),
        ("rows.json", b'[{"text": "a"}]\n\nx', "rows.json, line 3: it is damaged or not JSON (Extra data after"),
        ("rows.json", b"[\n" + b"[" * 99999, "rows.json, line 2: it is not JSON that can be read"),
        ("rows.csv", b'text\na\n"b\nc\n', "rows.csv, line 3: a quote is opened here and never closed"),
        ("rows.csv", b"text,text\na,b", "rows.csv, line 1: two columns have the same name"),
        ("rows.jsonl", '{"text": "a"}\n{"text": "ü"}'.encode("latin-1"), "rows.jsonl, line 2: byte 25 is not UTF-8"),
        ("rows.csv", "text\nü".encode("utf-16-le"), "rows.csv, line 1: not text, or UTF-16 without its mark"),
        ("rows.txt", "日本\n".encode("utf-16")[:-1], "rows.txt, line 1: byte 7 is not UTF-16"),
        ("rows.txt", b"\x89PNG\r\n\x1a\n\0", "rows.txt, line 3: not text, or UTF-16 without its mark"),
        ("rows.txt.gz", b"not packed", "rows.txt.gz, line 1: the gzip file is damaged or not gzip"),
        ("rows.rejected.jsonl", b"{}", "rows.rejected.jsonl, line 1: these rows were rejected"),
        ("rows.docx", b"x", "rows.docx has an unknown ending: use .jsonl, .json, .csv"),
        ("rows.parquet.gz", b"x", "rows.parquet.gz has an unknown ending"),
    ],
)
def test_a_file_that_is_empty_damaged_or_not_text_is_refused(tmp_path: Path, name: str, raw: bytes, words: str) -> None:
    said = refused(tmp_path / name, raw, max_bad_rows=1)
    assert words in said
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_a_truncated_gzip_file_is_refused_with_the_line_where_it_ends(tmp_path: Path) -> None:
    whole = gzip.compress("".join(f'{{"text": "{i * 7919}"}}\n' for i in range(9999)).encode())
    said = refused(tmp_path / "rows.jsonl.gz", whole[: len(whole) // 2])
    line = re.search(r"rows\.jsonl\.gz, line (\d+): the gzip file is damaged", said)
    assert line and 1000 < int(line[1]) < 9000


def test_a_json_array_in_a_jsonl_file_is_explained(tmp_path: Path) -> None:
    said = refused(tmp_path / "rows.jsonl", json.dumps(ROWS, indent=1))
    assert "rows.jsonl, line 1: it is not JSON (Expecting value, column 2). Write one row a line, or an array" in said


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"absent\.jsonl is not there: put it there, or change the path"):
        read_file(str(tmp_path / "absent.jsonl"))


def rows_with(bad: int, good: int) -> str:
    lines = ['{"text": ""}'] * bad + [f'{{"text": "{i}"}}' for i in range(good)]
    return "\n".join(lines[1:] + lines[:1])


def test_bad_rows_are_rejected_up_to_the_share_and_stop_the_run_above_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, rejected = tmp_path / "rows.jsonl", tmp_path / "rows.rejected.jsonl"
    said = refused(path, rows_with(bad=6, good=94))
    assert "rows.jsonl, line 1: column 'text' is missing or empty" in said
    assert "6 of 100 rows cannot be used (max_bad_rows allows a share of 0.05): repair them, or raise" in said
    assert not rejected.exists()

    rows = read(path, rows_with(bad=5, good=95))
    assert len(rows) == 95
    assert rows[0].place.endswith("rows.jsonl, line 5")
    listed = [json.loads(line) for line in rejected.read_text(encoding="utf-8").splitlines()]
    assert [row["line"] for row in listed] == [1, 2, 3, 4, 100]
    assert listed[0]["file"] == str(path)
    assert listed[0]["row"] == {"text": ""}
    assert "column 'text' is missing or empty" in listed[0]["reason"]
    read_file(str(path))
    out = capsys.readouterr().out
    assert out.count("5 of 100 rows of ") == 1, "a run reads its rows several times, and says it once"
    assert "rows.rejected.jsonl; the first is line 1: column 'text' is missing" in out

    assert len(read(path, rows_with(bad=0, good=9))) == 9
    assert list(tmp_path.iterdir()) == [path], "the list goes when nothing is set aside any more"


def test_the_last_line_of_a_truncated_file_is_rejected(tmp_path: Path) -> None:
    assert len(read(tmp_path / "rows.jsonl", rows_with(bad=0, good=20) + '\n{"text": "b')) == 20
    (line,) = (tmp_path / "rows.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert json.loads(line)["line"] == 21
    assert json.loads(line)["row"] == '{"text": "b'


def test_a_row_that_is_nested_too_deeply_is_rejected(tmp_path: Path) -> None:
    deep = "[" * 99_999
    nearly = '{"text": "a", "b": ' + "[" * 900 + "]" * 900 + "}"  # read, and too deep to be written into the list
    text = "\n".join([deep, json.dumps({"messages": deep}), nearly, nearly.replace("text", "none"), '{"text": "b"}'])
    assert [row.place[-6:] for row in read(tmp_path / "rows.jsonl", text, max_bad_rows=1)] == ["line 3", "line 5"]
    rejected = (tmp_path / "rows.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line)["line"] for line in rejected] == [1, 2, 4]
    assert json.loads(rejected[0])["reason"] == "it is nested too deeply."


def test_a_csv_row_with_too_few_cells_or_a_stray_quote_is_rejected(tmp_path: Path) -> None:
    rows = read(tmp_path / "rows.csv", 'prompt,completion\na,b\nc\n"d" e,f\ng,h\n', max_bad_rows=0.5)
    assert [row.place[-6:] for row in rows] == ["line 2", "line 5"]
    rejected = [
        json.loads(line) for line in (tmp_path / "rows.rejected.jsonl").read_text(encoding="utf-8").splitlines()
    ]
    assert [row["line"] for row in rejected] == [3, 4]
    assert "it has 1 cells, and 2 columns are named" in rejected[0]["reason"]
    assert "it is not CSV" in rejected[1]["reason"]


def test_a_file_of_the_user_is_never_overwritten_with_rejected_rows(tmp_path: Path) -> None:
    mine = tmp_path / "rows.rejected.jsonl"
    other = '{"file": "other.jsonl", "line": 1, "reason": "", "row": null}\n'
    for text in ("mine\n", other, '{"file": "rows.jsonl", "note": "mine"}\n', "7", ""):
        mine.write_text(text)
        assert "not the rows rejected from" in refused(tmp_path / "rows.jsonl", rows_with(bad=1, good=99))
        read(tmp_path / "rows.jsonl", rows_with(bad=0, good=99))
        assert mine.read_text() == text


def test_a_file_with_only_bad_rows_is_refused(tmp_path: Path) -> None:
    said = refused(tmp_path / "rows.jsonl", rows_with(bad=2, good=0), max_bad_rows=1)
    assert said.endswith("None of the 2 rows can be used.")
    assert "max_bad_rows" not in said, "it would not help"


@pytest.mark.parametrize("share", ["many", None, True, -0.1, 1.5, float("nan")])
def test_an_invalid_share_is_refused(tmp_path: Path, share: Any) -> None:
    assert "write a share from 0 to 1" in refused(tmp_path / "rows.jsonl", rows_with(bad=0, good=9), max_bad_rows=share)


def test_unused_columns_are_reported_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = json.dumps({"prompt": "a", "completion": "b", "source": "web", "id": 1})
    for _ in range(2):
        read(tmp_path / "rows.jsonl", f"{row}\n{row}")
    assert capsys.readouterr().out == f"{tmp_path}/rows.jsonl: columns id, source are not used.\n"
    columns = {"dataset_format": "columns", "prompt_template": "{prompt}", "completion_template": "{source}"}
    read(tmp_path / "rows.jsonl", row, **columns)
    assert "columns completion, id are not used" in capsys.readouterr().out
