"""What it takes to walk a model through a workspace: a render, a cache, the steps as a user's processes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from hub import Hub

REPOSITORY = Path(__file__).resolve().parents[1]
TINY, CATALOGUED = "me/tiny", "HuggingFaceTB/SmolLM2-135M-Instruct"
PINNED = "12fd25f77366fa6b3b4b768ec3050bf629380bac"
FOLDER = "./models/mine"
# How the settings name the model.
WAYS = ("commit", "tag", "main", "none", "branch", "proposal", "catalogue", "folder")
SHORT = {  # as the demo's: what it learns shows
    "epochs": 8,
    "learning_rate": 0.004,
    "max_seq_len": 256,
    "train_batch_size": 16,
    "eval_batch_size": 32,
    "gradient_accumulation_steps": 1,
}
COPIER = REPOSITORY / ".venv" / "bin" / "copier"


def render(folder: Path, **answers: object) -> Path:
    """Render a workspace with these answers, as a user does; without an environment, which is this Python's."""
    data = [option for name, answer in answers.items() for option in ("-d", f"{name}={answer}")]
    command = [COPIER, "copy", "--quiet", "--defaults", "--skip-tasks", "--vcs-ref", "HEAD", *data, REPOSITORY, folder]
    subprocess.run([str(part) for part in command], check=True, capture_output=True, text=True)
    return folder


def fill(how: str, models: Iterable[Named], cache: Path, hub: Hub) -> None:
    """Fill the cache as another tool does, in a process of its own."""
    script = "import json, sys\n"
    if how == "transformers":
        script += (
            "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
            "for model, revision in json.loads(sys.argv[1]):\n"
            "    for kind in (AutoTokenizer, AutoModelForCausalLM):\n"
            "        kind.from_pretrained(model, revision=revision or 'main')\n"
        )
    else:
        script += (
            "from huggingface_hub import snapshot_download\n"
            "for model, revision in json.loads(sys.argv[1]):\n"
            "    snapshot_download(model, revision=revision)\n"
        )
    names = json.dumps([(named.model, named.revision) for named in models])
    environment = environment_of(hub, cache)
    subprocess.run([sys.executable, "-c", script, names], env=environment, check=True, capture_output=True)
    if how == "older":  # huggingface_hub before 1.22 kept no list of a repository's files
        for trees in cache.glob("hub/models--*/trees"):
            shutil.rmtree(trees)


def environment_of(hub: Hub, cache: Path, **more: str) -> dict[str, str]:
    """Return the variables of a user whose hub is this one."""
    names = ("PATH", "HOME", "LANG", "TMPDIR", "LD_LIBRARY_PATH", "OMP_WAIT_POLICY", "SYSTEMROOT")
    # beside one other busy process, threads that wait actively are up to twenty times slower
    kept = {"OMP_WAIT_POLICY": "PASSIVE"} | {name: os.environ[name] for name in names if name in os.environ}
    return kept | {"HF_ENDPOINT": hub.url, "HF_HOME": str(cache), "HF_HUB_DISABLE_TELEMETRY": "1"} | more


@dataclass(frozen=True)
class Named:
    """A model as settings name it, and the commit that is meant; None: a folder of the user's."""

    model: str
    revision: str | None
    commit: str | None


def workspace_for(named: Named, folder: Path, tiny: Path) -> Path:
    """Render a workspace that names the model in this way."""
    if named.model == CATALOGUED:
        return render(folder, model="smollm2-135m-instruct", device="cpu", **SHORT)
    answers = {"custom_model_id": named.model, "custom_model_revision": named.revision or "main"}
    workspace = render(folder, model="custom", device="cpu", **answers, **SHORT)
    if named.commit is None:
        shutil.copytree(tiny, workspace / named.model)
    elif named.revision is None:
        config = workspace / "finetuning" / "olive-config.yaml"
        text = config.read_text(encoding="utf-8")
        assert 'revision: &revision "main"' in text
        config.write_text(text.replace('revision: &revision "main"', "revision: &revision null"), encoding="utf-8")
    return workspace


def walk(workspace: Path, environment: dict[str, str], commit: str | None, kind: str) -> None:
    """Go all the steps; each must end with status 0 and say what the next one is."""

    def step(*command: str) -> str:
        script = [sys.executable, str(workspace / command[0]), *command[1:]]
        done = subprocess.run(script, cwd="/", env=environment, capture_output=True, encoding="utf-8", check=False)
        assert done.returncode == 0, f"{command}: {done.stdout[-2000:]}{done.stderr[-2000:]}"
        return done.stdout

    said = step("setup/get_model.py")
    assert "python finetuning/invoke_olive.py --check" in said and (commit is None or commit in said)
    assert "This run fits. Next: python finetuning/invoke_olive.py" in step("finetuning/invoke_olive.py", "--check")
    assert "Next: python inference/console_chat.py" in step("finetuning/invoke_olive.py", "--fresh")
    run = json.loads((workspace / "models" / "run.json").read_text(encoding="utf-8"))
    assert run["revision"] == commit
    assert run["metrics"]["before"]["accuracy"] < 0.5 < 0.9 < run["metrics"]["after"]["accuracy"]
    learnt = next(one for one in run["examples"] if one["after"] == one["expected"] != one["before"])
    ask = ("inference/console_chat.py", "--prompt", learnt["question"])
    assert step(*ask, "--baseonly").strip() == learnt["before"]
    assert step(*ask, "--engine", "torch").strip() == learnt["after"]
    step("finetuning/export.py", "--format", kind)
