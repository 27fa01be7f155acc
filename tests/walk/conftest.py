"""A small model on a hub on this machine, under all the names that a model can have.

These tests run in the environment of a workspace (see the Makefile), with the newest releases in place of the lock too.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub import SUNDRIES, Hub
from walks import CATALOGUED, FOLDER, PINNED, TINY, Named, render

BUILD = """
import yaml
from preparing.dataset import chat_rows
from preparing.workspace import ROOT, SAMPLE
from training.tiny_model import build
facts = yaml.safe_load((ROOT / "setup" / "model.yaml").read_text(encoding="utf-8"))
build(ROOT / "models" / "tiny", facts, chat_rows("train", train_file=str(SAMPLE), held_out_file=str(SAMPLE)))
"""


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build a small llama that knows the form of the sample task; it stands for every model here."""
    workspace = render(tmp_path_factory.mktemp("tiny") / "workspace", model="custom", custom_model_id=TINY)
    subprocess.run([sys.executable, "-c", BUILD], cwd=workspace / "finetuning", check=True, capture_output=True)
    return workspace / "models" / "tiny"


@pytest.fixture(scope="session")
def hub() -> Iterator[Hub]:
    """Serve a hub, empty at first."""
    with Hub() as running:
        yield running


@pytest.fixture(scope="session")
def ways(hub: Hub, tiny: Path) -> dict[str, Named]:
    """Publish the model as real repositories are: a branch that went on, tags, a proposal, code, other formats."""
    model = SUNDRIES | {path.name: path for path in tiny.iterdir()}
    older = hub.add(TINY, model | {"README.md": b"# Older\n"}, branch="older", tags=["v0.9"])
    main = hub.add(TINY, model, tags=["v1.0"])
    proposal = hub.add(TINY, model | {"README.md": b"# A proposal\n"}, branch="refs/pr/1")
    hub.add(CATALOGUED, model, commit=PINNED)
    hub.add(CATALOGUED, model | {"README.md": b"# Newer than what the catalogue names\n"})
    return {
        "commit": Named(TINY, main, main),
        "tag": Named(TINY, "v0.9", older),
        "main": Named(TINY, "main", main),
        "none": Named(TINY, None, main),
        "branch": Named(TINY, "older", older),
        "proposal": Named(TINY, "refs/pr/1", proposal),
        "catalogue": Named(CATALOGUED, PINNED, PINNED),
        "folder": Named(FOLDER, None, None),
    }
