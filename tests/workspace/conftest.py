"""One workspace for all cases: rendered and installed by `make test`, copied here, and run in this process.

Importing torch, transformers and Olive takes most of the time of a run, so the scripts' `main` is called instead of
starting a Python for each case. The few tests that are about processes start one.
"""

from __future__ import annotations

import contextlib
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

REPOSITORY = Path(__file__).resolve().parents[2]
RENDERED = Path(os.environ.get("WORKSPACE", REPOSITORY / ".cache" / "workspace"))
os.environ.update(HF_HUB_OFFLINE="1", OMP_NUM_THREADS="1")


@pytest.fixture(scope="session")
def workspace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a copy of the rendered workspace, without its environment, whose scripts can be imported."""
    folder = tmp_path_factory.mktemp("workspaces") / "workspace"
    shutil.copytree(RENDERED, folder, ignore=shutil.ignore_patterns(".venv*", "models", ".git"))
    sys.path[:0] = [str(folder / "finetuning")]
    from settings.startup import quiet

    quiet()  # the libraries read their environment variables when they are imported
    return folder


@pytest.fixture(scope="session")
def twenty_questions(workspace: Path) -> list[str]:
    """Return twenty held-out questions of the sample, all different: every front end is asked these."""
    lines = (workspace / "dataset" / "sample-heldout.jsonl").read_text(encoding="utf-8").splitlines()
    asked = dict.fromkeys(json.loads(line)["messages"][0]["content"] for line in lines)
    return list(asked)[:20]


@contextlib.contextmanager
def inference_of(workspace: Path) -> Iterator[None]:
    """Let this process import inference/ of the workspace; afterwards all of it is forgotten."""
    folder = str(workspace / "inference")
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)
        for name, module in list(sys.modules.items()):
            if (getattr(module, "__file__", None) or "").startswith(folder):
                del sys.modules[name]


class Run:
    """What a run of invoke_olive.py gave: its exit status, what it said, and models/run.json."""

    def __init__(self, status: int, out: str, err: str, folder: Path) -> None:
        self.status, self.out, self.err = status, out, err
        self.json: dict[str, Any] = {}
        if (folder / "run.json").is_file():
            self.json = json.loads((folder / "run.json").read_text(encoding="utf-8"))


@pytest.fixture
def invoke(
    workspace: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., Run]]:
    """Run invoke_olive.py with settings changed in olive-config.yaml; afterwards the file is as it was."""
    config = workspace / "finetuning" / "olive-config.yaml"
    original = config.read_text(encoding="utf-8")

    def run(*arguments: str, settings: dict[str, Any] | None = None, edit: Callable[[str], str] = str) -> Run:
        import invoke_olive

        text = edit(original)
        for key, value in (settings or {}).items():
            line = rf"(?m)^(\s*)(?:# )?((?:- )?{key}:(?: &\w+)?) .*$"  # also one that is commented out
            text, found = re.subn(line, rf"\1\2 {json.dumps(value)}", text)
            assert found, f"{key} does not stand in olive-config.yaml"
        config.write_text(text, encoding="utf-8")
        monkeypatch.setattr(sys, "argv", ["invoke_olive.py", *arguments])
        capsys.readouterr()
        try:
            status = invoke_olive.main()
        except SystemExit as exit_:
            status = int(exit_.code or 0)
        out, err = capsys.readouterr()
        return Run(status, out, err, workspace / "models" / ("smoke" if "--smoke" in arguments else ""))

    yield run
    config.write_text(original, encoding="utf-8")


@pytest.fixture(scope="session")
def renders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Render a workspace of every catalogue entry, in one process of the repository's environment."""
    folder = tmp_path_factory.mktemp("renders")
    script = REPOSITORY / "tests" / "workspace" / "render_every_model.py"
    python = REPOSITORY / ".venv" / "bin" / "python"
    subprocess.run([python if python.is_file() else "python3", script, folder], check=True)
    return folder


def catalogue() -> list[str]:
    """Return the ids of the catalogue."""
    text = (REPOSITORY / "catalog" / "models.yml").read_text(encoding="utf-8")
    return [model["id"] for model in yaml.safe_load(text)["models"]]
