"""Each step finds the folder that get_model.py downloaded: every name of a model × every cache, online and offline.

One process calls the workspace's own functions: all combinations as real walks take an hour (test_every_walk.py).
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hub import Hub
from walks import WAYS, Named, fill, render

CACHES = ("get_model", "hf", "transformers", "older")


@pytest.fixture(scope="module")
def workspace(tmp_path_factory: pytest.TempPathFactory, tiny: Path) -> Iterator[SimpleNamespace]:
    """Import the steps of a rendered workspace; which model it names is changed by the tests."""
    root = render(tmp_path_factory.mktemp("lookups") / "workspace", model="custom", custom_model_id="me/tiny")
    shutil.copytree(tiny, root / "models" / "mine")
    folders = [str(root / name) for name in ("setup", "finetuning", "inference")]
    sys.path[:0] = folders
    try:
        import engine
        import get_model
        import load_engine
        from exporting import tuned_model
        from planning import model_facts
        from preparing import dataset

        steps = (dataset, engine, get_model, load_engine, model_facts, tuned_model)
        yield SimpleNamespace(root=root, **{step.__name__.rpartition(".")[2]: step for step in steps})
    finally:
        sys.path[:] = [path for path in sys.path if path not in folders]
        for name, module in list(sys.modules.items()):
            if str(getattr(module, "__file__", "") or "").startswith(str(root)):
                del sys.modules[name]


@pytest.fixture(scope="module")
def filled(hub: Hub, ways: dict[str, Named], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that fills a cache as a tool does, once; each way's model is in it."""
    made: dict[str, Path] = {}

    def cache(how: str) -> Path:
        if how not in made:
            made[how] = tmp_path_factory.mktemp(how) / "cache"
            if how != "get_model":
                fill(how, [ways[way] for way in WAYS if ways[way].commit], made[how], hub)
        return made[how] / "hub"

    return cache


@pytest.mark.parametrize("how", CACHES)
@pytest.mark.parametrize("way", WAYS)
def test_every_step_finds_the_model_under_every_name_in_every_cache(
    workspace: SimpleNamespace,
    filled: Callable[[str], Path],
    hub: Hub,
    ways: dict[str, Named],
    monkeypatch: pytest.MonkeyPatch,
    way: str,
    how: str,
) -> None:
    from huggingface_hub import constants

    named = ways[way]
    cache = filled(how)
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(sys, "argv", ["get_model.py"])
    settings = settings_for(named)
    monkeypatch.setattr(workspace.get_model, "read_config", lambda: (named.model, named.revision))
    expected = workspace.root / named.model
    if named.commit:
        expected = cache / f"models--{named.model.replace('/', '--')}" / "snapshots" / named.commit

    for offline in (False, True) if how == "get_model" else (True, False, True):
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", offline)
        hub.asked.clear()
        assert workspace.get_model.main() == 0
        assert not (offline and hub.asked)
        for step, folder in folders(workspace, settings, named).items():
            assert folder.resolve() == expected.resolve(), step
        assert not (offline and hub.asked)


def settings_for(named: Named) -> Any:
    """Return the settings of olive-config.yaml with the model named in this way."""
    from settings.config_file import read_file
    from settings.run_settings import Settings

    config = read_file()
    config["input_model"]["model_path"] = named.model
    config["input_model"]["load_kwargs"]["revision"] = named.revision
    return Settings.of(config)


def folders(workspace: SimpleNamespace, settings: Any, named: Named) -> dict[str, Path]:
    """Return the folder that each step takes the model from."""
    found = {
        "check": Path(workspace.model_facts.find(settings).folder),
        "training": workspace.model_facts.base_model(settings).folder,
        "export": workspace.tuned_model.base_folder({"base_model": named.model, "revision": named.commit}),
    }
    tokens = workspace.dataset.chat_tokens(
        [[{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]], named.model, named.revision
    )
    assert tokens
    for chat, revision in (("base chat", named.revision), ("tuned chat", named.commit)):
        source = workspace.engine.Source(named.model, revision, None, "lora", "float32", "")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(workspace.load_engine, "base_source", lambda root, source=source: source)
            loaded = workspace.load_engine.load(baseonly=True, engine="torch", root=workspace.root)
        found[chat] = Path(loaded.backend.model.config._name_or_path)
    return found


def test_the_check_says_which_commit_a_branch_is(
    workspace: SimpleNamespace,
    filled: Callable[[str], Path],
    ways: dict[str, Named],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from huggingface_hub import constants
    from transformers import AutoModelForCausalLM

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(filled("hf")))
    from planning import plan, show_plan

    for way, words in (("main", f": main is commit {ways['main'].commit} here"), ("commit", "")):
        settings = settings_for(ways[way])
        facts = plan.model_facts(workspace.model_facts.find(settings), settings)
        show_plan.show("model", facts)
        assert ("get_model.py looks for a newer one" in capsys.readouterr().out) == (way == "main")
        assert words in json.dumps(show_plan.model_lines(facts))
        assert facts["parameters"] == AutoModelForCausalLM.from_pretrained(facts["folder"]).num_parameters()
