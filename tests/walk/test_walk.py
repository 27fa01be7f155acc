"""A model from the hub passes every step: get_model → check → train → chat with the base model → chat → export.

As a user does it: a rendered workspace, and a process for each step. Two walks are here, all in test_every_walk.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import Hub
from walks import Named, environment_of, walk, workspace_for


@pytest.mark.parametrize("way", ["main", "catalogue"])
def test_a_model_from_the_hub_passes_every_step(
    hub: Hub, ways: dict[str, Named], tiny: Path, tmp_path: Path, way: str
) -> None:
    workspace = workspace_for(ways[way], tmp_path / "workspace", tiny)
    walk(workspace, environment_of(hub, tmp_path / "cache"), ways[way].commit, "onnx")
