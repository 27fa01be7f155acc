"""A model from the hub passes every step: get_model → check → train → chat with the base model → chat → export.

As a user does it: a rendered workspace, and a process for each step. One walk is here, all in test_every_walk.py; that
each step finds a model under each of its names is in test_lookups.py.
"""

from __future__ import annotations

from pathlib import Path

from hub import Hub
from walks import Named, environment_of, walk, workspace_for


def test_a_model_from_the_hub_passes_every_step(hub: Hub, ways: dict[str, Named], tiny: Path, tmp_path: Path) -> None:
    named = ways["catalogue"]
    workspace = workspace_for(named, tmp_path / "workspace", tiny)
    walk(workspace, environment_of(hub, tmp_path / "cache"), named.commit, "onnx")
