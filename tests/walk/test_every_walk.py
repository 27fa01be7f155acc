"""Every way to name a model, online and offline, and with a cache filled by another tool: `make test-all`."""

from __future__ import annotations

from pathlib import Path

import pytest
from hub import Hub
from walks import WAYS, Named, environment_of, fill, walk, workspace_for


@pytest.mark.parametrize("way", WAYS)
def test_a_model_passes_every_step_and_again_offline(
    hub: Hub, ways: dict[str, Named], tiny: Path, tmp_path: Path, way: str
) -> None:
    workspace = workspace_for(ways[way], tmp_path / "workspace", tiny)
    environment = environment_of(hub, tmp_path / "cache")
    walk(workspace, environment, ways[way].commit, "merged")
    hub.asked.clear()
    walk(workspace, environment | {"HF_HUB_OFFLINE": "1"}, ways[way].commit, "merged")
    assert hub.asked == []


@pytest.mark.parametrize("how", ["hf", "transformers", "older"])
@pytest.mark.parametrize("way", [way for way in WAYS if way != "folder"])
def test_a_cache_filled_by_another_tool_passes_every_step_offline(
    hub: Hub, ways: dict[str, Named], tiny: Path, tmp_path: Path, way: str, how: str
) -> None:
    workspace = workspace_for(ways[way], tmp_path / "workspace", tiny)
    fill(how, [ways[way]], tmp_path / "cache", hub)
    environment = environment_of(hub, tmp_path / "cache")
    walk(workspace, environment | {"HF_HUB_OFFLINE": "1"}, ways[way].commit, "merged")
