"""A base model in a folder elsewhere: its code is never run, and what is published does not name that folder."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from terminal import Terminal

CLASSES = {"AutoConfig": "odd.Config", "AutoModelForCausalLM": "odd.Model", "AutoTokenizer": ["odd.Slow", "odd.Fast"]}
NEEDS = "code of its own, which is never run"


@pytest.fixture(scope="module")
def trained(workspace: Path) -> Iterator[Path]:
    """A workspace with an adapter for a base model in a folder elsewhere, and its exports."""
    import export
    import invoke_olive
    from training.tiny_model import build_demo

    build_demo()
    base_of(workspace).parent.mkdir()
    shutil.move(workspace / "models" / "demo", base_of(workspace))
    shutil.copy(workspace / "dataset" / "sample-train.jsonl", base_of(workspace).with_name("rows.jsonl"))
    config = workspace / "finetuning" / "olive-config.yaml"
    text = config.read_text(encoding="utf-8")
    short = text.replace("max_steps: ", "max_steps: 4  # ").replace("model_at_end: true", "model_at_end: false")
    for named, elsewhere in (("models/demo", "base"), ("dataset/sample-train.jsonl", "rows.jsonl")):
        short = short.replace(json.dumps(named), json.dumps(str(base_of(workspace).with_name(elsewhere))))
    config.write_text(short, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(sys, "argv", ["invoke_olive.py", "--keep-worse"])
        assert invoke_olive.main() == 0
        patches.setattr(sys, "argv", ["export.py", "--agreement", "0"])
        assert export.main() == 0
    yield workspace
    config.write_text(text, encoding="utf-8")  # other files of tests have the same workspace
    shutil.rmtree(workspace / "models")
    shutil.rmtree(base_of(workspace).parent)


def base_of(workspace: Path) -> Path:
    """Return the base model's folder."""
    return workspace.parent / "somebody" / "base"


@pytest.fixture
def touched(trained: Path, tmp_path: Path) -> Iterator[Callable[..., None]]:
    """Return a function that makes model files ask for code; afterwards they are as they were."""
    changed = trained / "models", base_of(trained)
    for folder in changed:
        shutil.copytree(folder, tmp_path / folder.name)

    def touch(folder: Path, *files: str) -> None:
        for name in files:
            file = folder / name
            value = json.loads(file.read_text(encoding="utf-8")) | {"auto_map": CLASSES, "trust_remote_code": True}
            value |= {"config.json": {"model_type": "odd9"}}.get(name, {})
            value |= {"tokenizer_config.json": {"tokenizer_class": "OddTokenizer"}}.get(name, {})
            file.write_text(json.dumps(value), encoding="utf-8")
        code = f"open({str(trained / 'it-has-run')!r}, 'w').close()\n"
        (folder / "odd.py").write_text(code, encoding="utf-8")

    yield touch
    for folder in changed:
        shutil.rmtree(folder)
        shutil.copytree(tmp_path / folder.name, folder)


def said(workspace: Path, script: str, *arguments: str) -> str:
    """Run a command in a terminal where y is typed whenever it asks; return what it showed."""
    with Terminal([sys.executable, "-B", str(workspace / script), *arguments]) as terminal:
        terminal.type("y\n" * 3)
        shown = terminal.to_the_end()
    assert not (workspace / "it-has-run").exists(), shown
    assert "[y/N]" not in shown and "Traceback" not in shown
    return shown


@pytest.mark.parametrize(
    "command",
    [
        "finetuning/invoke_olive.py --check",
        "finetuning/invoke_olive.py --fresh",
        "finetuning/export.py",
        "inference/console_chat.py --engine torch",
        "inference/console_chat.py --baseonly",
        "inference/gradio_chat.py --baseonly --port 0",
    ],
)
def test_a_base_model_that_needs_code_is_called_so(trained: Path, touched: Callable[..., None], command: str) -> None:
    touched(base_of(trained), "config.json", "tokenizer_config.json")
    shown = said(trained, *command.split())
    assert NEEDS in shown
    assert "damaged" not in shown and "torn" not in shown and "Unexpected" not in shown


@pytest.mark.parametrize(
    "command",
    [
        "inference/console_chat.py --engine torch",
        "inference/gradio_chat.py --engine torch --port 0",
        "finetuning/export.py",
    ],
)
def test_an_adapter_that_needs_code_is_called_so(trained: Path, touched: Callable[..., None], command: str) -> None:
    touched(trained / "models" / "adapter", "adapter_config.json", "tokenizer_config.json")
    shown = said(trained, *command.split())
    assert NEEDS in shown and "models/adapter" in shown
    assert "damaged" not in shown and "torn" not in shown and "Unexpected" not in shown


@pytest.mark.parametrize(
    "command",
    [
        "finetuning/invoke_olive.py --check",  # for this architecture, transformers has a tokenizer of its own
        "finetuning/invoke_olive.py --smoke",
        "inference/console_chat.py --baseonly --prompt hello",
        "setup/get_model.py",
        "setup/get_model.py --onnx",
    ],
)
def test_what_works_without_the_code_does_not_run_it_either(
    trained: Path, touched: Callable[..., None], command: str
) -> None:
    touched(base_of(trained), "tokenizer_config.json")
    said(trained, *command.split())


def test_what_is_published_names_no_folder_of_this_machine(trained: Path) -> None:
    published = [
        path for name in ("adapter", "merged", "onnx", "report") for path in (trained / "models" / name).iterdir()
    ]
    assert len(published) > 15
    folders = str(base_of(trained).parent).encode(), str(trained).encode()
    named = {str(path) for path in published if any(folder in path.read_bytes() for folder in folders)}
    assert named == set()
    adapter = json.loads((trained / "models" / "adapter" / "adapter_config.json").read_text(encoding="utf-8"))
    assert adapter["base_model_name_or_path"] == "base"


@pytest.mark.parametrize("engine", ["onnx", "torch"])
def test_a_model_whose_folder_is_not_named_is_chatted_with(trained: Path, engine: str) -> None:
    shown = said(trained, "inference/console_chat.py", "--engine", engine, "--prompt", "hello")
    assert "error" not in shown
