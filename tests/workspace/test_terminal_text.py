"""Rows, answers, logs and signatures in a terminal: nothing but rich's own sequences comes out of a command."""

from __future__ import annotations

import gzip
import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from terminal import Terminal

OVERRIDES = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
CONTROLS = {*map(chr, [*range(9), *range(11, 32), *range(127, 160)]), *OVERRIDES}
FORGED = (
    f"\x1b]52;c;aGk=\x07\x1b]8;;http://evil/\x07\x1b[2J\x1b[1A\x9b2J\x9d0;x\x9c{OVERRIDES}\x7f\b\rerror: all is well"
)
# what rich writes: colours, the cursor up, to the left and hidden, a line deleted; a terminal's line ends
RICH = re.compile(r"\x1b\[[\d;]*m|\x1b\[\?25[lh]|\x1b\[\d*[AKG]|\r")


def foreign(shown: str) -> set[str]:
    """Return the control characters that are not of rich."""
    assert "\x1b[2J" not in shown and "\x1b]" not in shown and "\rerror" not in shown
    return CONTROLS & set(RICH.sub("", shown))


def in_terminal(*command: str) -> str:
    """Run a command of the workspace in a terminal to its end; return all that it showed."""
    with Terminal([sys.executable, "-B", *command]) as terminal:
        return terminal.to_the_end()


@pytest.fixture(scope="module")
def hostile(workspace: Path) -> Iterator[Path]:
    """The workspace with rows that would forge lines: in texts, columns, a broken line and the name of a column."""
    row = {"prompt": f"{FORGED} asked", "completion": f"{FORGED} answered", f"a {FORGED}": FORGED}
    lines = [json.dumps({**row, "prompt": f"{number} {FORGED}"}, ensure_ascii=False) for number in range(60)]
    lines.insert(1, f"{FORGED} is no JSON")
    data = workspace / "dataset" / "mine.jsonl"
    data.write_bytes("\n".join(lines).encode())
    config = workspace / "finetuning" / "olive-config.yaml"
    before = config.read_text(encoding="utf-8")
    text = before.replace("max_steps: ", "max_steps: 4  # ")
    text = text.replace('"dataset/sample-train.jsonl"', '"dataset/mine.jsonl"')
    text = re.sub(r"held_out_file: \S+", "held_out_file: null", text)
    config.write_text(text.replace("model_at_end: true", "model_at_end: false"), encoding="utf-8")
    yield workspace
    config.write_text(before, encoding="utf-8")  # other files of tests have the same workspace
    for file in (data, data.with_name("mine.rejected.jsonl")):
        file.unlink()


@pytest.mark.parametrize("option", ["--check", "--smoke"])
def test_rows_write_nothing_but_text_to_the_terminal_of_a_run(hostile: Path, option: str) -> None:
    shown = in_terminal(str(hostile / "finetuning" / "invoke_olive.py"), option)
    assert foreign(shown) == set()
    assert "were rejected" in shown and "are not used" in shown
    rejected = (hostile / "dataset" / "mine.rejected.jsonl").read_text(encoding="utf-8")
    assert not CONTROLS & set(rejected)
    assert FORGED.startswith(json.loads(rejected.partition("\n")[0])["row"])  # to the letter, up to its line end
    if option == "--smoke":
        assert "expected" in shown and "Done in" in shown
        for file in ("report/index.html", "adapter/README.md", "run.json"):
            assert not CONTROLS & set((hostile / "models" / "smoke" / file).read_text(encoding="utf-8")), file
        kept = json.loads((hostile / "models" / "smoke" / "run.json").read_text(encoding="utf-8"))["examples"]
        assert kept and all(FORGED in example["expected"] for example in kept)


def test_an_error_and_its_traceback_write_nothing_but_text(hostile: Path) -> None:
    script = f"""if True:
        import sys
        sys.path.insert(0, {str(hostile / "finetuning")!r})
        import invoke_olive, planning.plan
        def fail(*_):
            raise RuntimeError({FORGED!r})
        planning.plan.read_rows = fail  # as a library that puts what it read into its error
        for option in ("--check", "--debug"):
            sys.argv = ["invoke_olive.py", "--check", option]
            invoke_olive.main()
    """
    shown = in_terminal("-c", script)
    assert "error: Unexpected error: \\u001b]52;c;aGk=" in shown and "RuntimeError: \\u001b]52;c;aGk=" in shown
    assert foreign(shown) == set()


CHAT = """if True:
    import sys
    sys.path.insert(0, sys.argv[1])
    import console_chat
    from engine import Engine, Generation, Source

    class Recorded:  # one byte at a time: every sequence comes in pieces
        description, context, notices, switchable = "recorded", 4096, [], False
        def render(self, messages): return "".join(turn["content"] for turn in messages)
        def encode(self, text): return list(text.encode(errors="replace"))
        def decode(self, tokens): return bytes(tokens).decode(errors="replace")
        def generate(self, prompt, generation): yield from FORGED.encode()

    engine = Engine(Source("models/demo", None, None, "lora", "float32", FORGED), Recorded())
    console_chat.chat(engine, Generation(max_new_tokens=2000), ["hello"], in_terminal=True)
"""


def test_an_answer_writes_nothing_but_text_to_the_terminal_and_is_exact_in_a_pipe(workspace: Path) -> None:
    command = ["-c", f"FORGED = {FORGED!r}\n{CHAT}", str(workspace / "inference")]
    shown = in_terminal(*command)
    assert "error: all is well" in shown and foreign(shown) == set()
    done = subprocess.run([sys.executable, *command], capture_output=True, check=True)
    assert FORGED in done.stdout.decode()


def test_what_azure_says_writes_nothing_but_text_and_no_signature(workspace: Path, tmp_path: Path) -> None:
    infra = tmp_path / "infra"
    shutil.copytree(Path(__file__).resolve().parents[2] / "template" / "infra", infra)
    names = ("SUBSCRIPTION_ID", "RESOURCE_GROUP_NAME", "STORAGE_ACCOUNT_NAME", "FILE_SHARE_NAME", "ACA_JOB_NAME")
    (infra / "finetuning.config.json").write_text(json.dumps({name: name.lower() for name in names}))
    az = tmp_path / "az"
    signature = "c2lnbmF0dXJlIG9mIHRoZSBzaGFyZSBvZiBtaW5l"
    az.write_text(f"#!/bin/sh\necho '\"se=2030&sp=rcwdl&sig={signature}%3D\"'\n")
    az.chmod(0o755)
    env = {**os.environ, "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}", "HTTPS_PROXY": "http://127.0.0.1:1"}
    for option in ([], ["--debug"]):
        command = [sys.executable, "-B", str(infra / "azure.py"), *option, "pull"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 1 and "Azure cannot be reached" in done.stderr
        assert signature not in done.stderr + done.stdout
        assert ("Traceback" in done.stderr) == bool(option)
    az.write_text(f"#!/bin/sh\nprintf '%s' '{FORGED}' >&2; exit 1\n")
    shown = in_terminal("-c", f"import os; os.environ |= {env!r}; os.execv({sys.executable!r}, {command!r})")
    assert "\\u001b]52;c;aGk=" in shown and foreign(shown) == set()


LOGS = """
import sys
from types import SimpleNamespace
sys.path.insert(0, sys.argv[1])
import logs
answer = {"properties": {"appLogsConfiguration": {"logAnalyticsConfiguration": {"customerId": "mine"}}}}
logs.az = lambda *_, **__: answer | {"tables": [{"rows": [[FORGED]]}]}
logs.lines, logs.replica = lambda *_, **__: iter([FORGED]), lambda *_: "stream"
for state, follow in (("Succeeded", False), ("Running", False), ("Running", True)):
    run = {"name": "one", "properties": {"status": state}}
    ended = {"properties": {"status": "Succeeded", "environmentId": "its"}}
    logs.Provisioned = lambda _: SimpleNamespace(executions=lambda: [run], az=lambda *_, **__: ended)
    logs.logs(follow)
"""


def test_a_log_writes_nothing_but_text_to_the_terminal() -> None:
    infra = Path(__file__).resolve().parents[2] / "template" / "infra"
    shown = in_terminal("-B", "-c", f"FORGED = {FORGED!r}\n{LOGS}", str(infra))
    assert shown.count("error: all is well") == 3 and foreign(shown) == set()


@pytest.mark.parametrize("ending", [".jsonl.gz", ".jsonl"])
def test_reading_stops_before_the_rows_fill_the_memory(
    workspace: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ending: str
) -> None:
    import psutil

    from preparing.conversations import read
    from preparing.problems import DataError

    many = b'{"prompt": "a", "completion": "b"}\n' * 1_500_000  # 50 MB, 0.1 packed
    file = tmp_path / f"rows{ending}"
    file.write_bytes(gzip.compress(many) if ending.endswith(".gz") else many[:6_000_000])
    memory = psutil.virtual_memory()
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory._replace(available=128 * 2**20))
    process: Any = psutil.Process()
    before = process.memory_info().rss
    with pytest.raises(
        DataError, match=r"rows\.jsonl(\.gz)?, line \d+: the rows up to here need more than half of the"
    ):
        read(str(file))
    assert process.memory_info().rss - before < 96 * 2**20
