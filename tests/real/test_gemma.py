"""Gemma 3 270M base, for what SmolLM2 cannot show: no chat template, 262,144 words, added tokens that are plain text.

It goes from a hub on this machine as a model of the user's own choice, with a chat template that the workspace gives.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest
import yaml
from hub import SUNDRIES, Hub
from real_walk import Walk, set_in
from walks import REPOSITORY, environment_of, render

MODEL = REPOSITORY / ".cache" / "gemma3-270m"
HUB_ID = "google/gemma-3-270m"
PARAMETERS = 268_098_176
SETTINGS = {
    "max_steps": 10,
    "learning_rate": 0.001,
    "max_seq_len": 128,
    "train_batch_size": 4,
    "eval_batch_size": 16,
    "gradient_accumulation_steps": 1,
}


@pytest.fixture(scope="module")
def hub() -> Iterator[Hub]:
    with Hub() as running:
        running.add(HUB_ID, SUNDRIES | {path.name: path for path in MODEL.iterdir()})
        yield running


@pytest.fixture(scope="module")
def walk(hub: Hub, tmp_path_factory: pytest.TempPathFactory, figures: dict[str, str]) -> Walk:
    """Render a workspace of a model of the user's own choice, and give it the family's chat template."""
    folder = tmp_path_factory.mktemp("gemma")
    root = render(folder / "workspace", model="custom", custom_model_id=HUB_ID, device="cpu", **SETTINGS)
    walk = Walk(root, environment_of(hub, folder / "cache"), figures, "Gemma")
    lines = (root / "dataset" / "sample-heldout.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:16]
    (root / "dataset" / "heldout.jsonl").write_text("".join(lines), encoding="utf-8")
    set_in(root, held_out_file="dataset/heldout.jsonl", eval_steps=10, save_steps=10)
    families = yaml.safe_load((REPOSITORY / "catalog" / "chat_templates.yml").read_text(encoding="utf-8"))["families"]
    facts = root / "setup" / "model.yaml"
    known = yaml.safe_load(facts.read_text(encoding="utf-8")) | {"chat_template": families["gemma"]["template"]}
    facts.write_text(yaml.safe_dump(known), encoding="utf-8")
    return walk


def test_a_base_model_without_a_chat_template_is_trained_with_the_workspaces_own(walk: Walk) -> None:
    walk.step("setup/get_model.py")
    report = json.loads(walk.step("finetuning/invoke_olive.py", "--check", "--json"))
    assert report["problem"] is None
    assert report["model"]["parameters"] == PARAMETERS
    assert report["model"]["own_template"] is False
    walk.step("finetuning/invoke_olive.py")
    before, after = walk.run["metrics"]["before"], walk.run["metrics"]["after"]
    assert after["eval_loss"] < 0.5 * before["eval_loss"]
    walk.figures["Gemma, eval_loss"] = f"{before['eval_loss']} → {after['eval_loss']}"
    ask = ("inference/console_chat.py", "--baseonly", "--max-new-tokens", "20")
    said = walk.step(*ask, "--prompt", "The capital of France is")
    assert said.strip()
