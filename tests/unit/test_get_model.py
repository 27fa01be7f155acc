"""setup/get_model.py and model_folder.py: the demo, a folder, and downloads from a hub on this machine."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
from hub import SUNDRIES, Hub

REPOSITORY = Path(__file__).resolve().parents[2]
SETUP = REPOSITORY / "template" / "setup"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "89abcdef0123456789abcdef0123456789abcdef"

pytest.importorskip("yaml", reason="get_model.py reads YAML")


def safetensors(size: int) -> bytes:
    """Return a whole weights file with `size` bytes of data."""
    header = json.dumps({"weight": {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}}).encode()
    return len(header).to_bytes(8, "little") + header + bytes(size)


PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
MODEL = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    PARTS[0]: safetensors(600_000),
    PARTS[1]: safetensors(400_000),
    "model.safetensors.index.json": json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1]}}).encode(),
}
# What a real repository has beside it, and nobody needs: other formats, other folders, code.
REAL = SUNDRIES | MODEL | {"pytorch_model.bin": b"3" * 1000, "consolidated.safetensors": b"4" * 1000}
OLD = {name: body for name, body in MODEL.items() if "safetensors" not in name} | {"pytorch_model.bin": b"3" * 1000}


class Workspace:
    """The part of a workspace that get_model.py needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "setup").mkdir(parents=True)
        (root / "finetuning" / "training").mkdir(parents=True)
        for script in ("get_model.py", "hub_download.py", "model_folder.py", "no_telemetry.py", "visible.py"):
            shutil.copy(SETUP / script, root / "setup")
        self.env = {"PATH": os.defpath, "HF_HOME": str(root / "hub"), "HOME": str(root), "CI": "1"}
        self.before: list[str] = []  # options of setpriv

    def configure(self, model: str, revision: str | None = None) -> None:
        """Write finetuning/olive-config.yaml; JSON is YAML."""
        settings = {"input_model": {"model_path": model, "load_kwargs": {"revision": revision}}}
        (self.root / "finetuning" / "olive-config.yaml").write_text(json.dumps(settings))

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the script from another folder."""
        command = [sys.executable, str(self.root / "setup" / "get_model.py"), *options]
        command = [str(shutil.which("setpriv")), *self.before, *command] if self.before else command
        return subprocess.run(command, env=self.env, cwd="/", capture_output=True, text=True, check=False)

    def fails_with(self, *words: str, options: Sequence[str] = ()) -> None:
        """Assert that the script says one sentence with these words."""
        done = self.run(*options)
        assert done.returncode == 1
        lines = [line for line in done.stderr.splitlines() if line.startswith("get_model: ")]
        assert len(lines) == 1 and done.stderr.splitlines()[-1] == lines[0], done.stderr
        assert all(word in lines[0] for word in words), lines[0]


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    return Workspace(tmp_path / "workspace")


# ------------------------------------------------------------------------------------------- without the hub's library


def test_the_demo_is_built_by_its_script_and_only_once(workspace: Workspace) -> None:
    workspace.configure("models/demo")
    build = "import shutil\nfrom pathlib import Path\nroot = Path(__file__).parents[2]\n"
    build += "shutil.copytree(root / 'built', root / 'models/demo', dirs_exist_ok=True)\n"
    (workspace.root / "finetuning" / "training" / "tiny_model.py").write_text(build)
    (workspace.root / "built").mkdir()
    for name, body in MODEL.items():
        (workspace.root / "built" / name).write_bytes(body)
    assert workspace.run().returncode == 0
    done = workspace.run()
    assert done.returncode == 0 and "The demo model is there" in done.stdout
    (workspace.root / "models" / "demo" / PARTS[0]).write_bytes(b"torn")
    assert "The demo model is there" not in workspace.run().stdout
    done = workspace.run()
    assert done.returncode == 0 and "The demo model is there" in done.stdout
    assert done.stdout.endswith("  python finetuning/invoke_olive.py --check\n")


def test_a_demo_that_cannot_be_built_is_said(workspace: Workspace) -> None:
    workspace.configure("models/demo")
    (workspace.root / "finetuning" / "training" / "tiny_model.py").write_text("raise SystemExit('no torch')\n")
    workspace.fails_with("tiny_model.py failed")


def test_a_folder_must_be_there_and_hold_a_model(workspace: Workspace) -> None:
    workspace.configure("models/mine")
    workspace.fails_with("models/mine is not there", "olive-config.yaml")
    folder = workspace.root / "models" / "mine"
    folder.mkdir(parents=True)
    workspace.fails_with("models/mine is empty", "model_path")
    (folder / "notes.txt").touch()
    workspace.fails_with("has no config.json")
    (folder / "notes.txt").unlink()
    for name, body in MODEL.items():
        (folder / name).write_bytes(body)
    done = workspace.run()
    assert done.returncode == 0 and str(folder) in done.stdout
    (folder / "tokenizer.json").unlink()
    workspace.fails_with("models/mine has no tokenizer")
    (folder / "tokenizer.json").write_text("{}")
    weights = folder / PARTS[1]
    weights.write_bytes(weights.read_bytes()[:-1])
    workspace.fails_with(f"{PARTS[1]} is cut off or damaged", "copy that file there again")
    weights.unlink()
    workspace.fails_with(f"{PARTS[1]} is missing")
    assert {path.name for path in folder.iterdir()} == {*MODEL} - {PARTS[1]}  # nothing of the user's is touched


GOOD = {name: body for name, body in MODEL.items() if "safetensors" not in name}
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 538090408\n"


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (OLD, ("as pytorch_model.bin alone", "safetensors are needed", "from_pretrained, then save_pretrained")),
        (GOOD | {"pytorch_model-00001-of-00002.bin": b"3"}, ("as pytorch_model.bin alone", "save_pretrained")),
        (GOOD | {"model.gguf": b"GGUF"}, ("has GGUF files, which cannot be trained", "that they were made from")),
        ({"model.gguf": b"GGUF"}, ("has GGUF files, which cannot be trained", "that they were made from")),
        (
            {"adapter_config.json": b"{}", "adapter_model.safetensors": b""},
            ("is an adapter", "base_model_name_or_path"),
        ),
        (GOOD | {"adapter_config.json": b"{}"}, ("is an adapter", "base_model_name_or_path")),
        (MODEL | {"adapter_config.json": b"{}"}, ("an adapter beside a model", "move adapter_config.json")),
        ({"model_index.json": b"{}", "unet": b""}, ("is a pipeline of diffusers", "a text model")),
        (MODEL | {PARTS[1]: POINTER}, (f"{PARTS[1]} is a Git LFS pointer", "run `git lfs pull` in ")),
        (MODEL | {"tokenizer.json": POINTER}, ("tokenizer.json is a Git LFS pointer", "run `git lfs pull` in ")),
    ],
)
def test_a_folder_that_is_no_model_to_train_is_called_what_it_is_and_nothing_is_to_be_deleted(
    workspace: Workspace, files: dict[str, bytes], words: tuple[str, ...]
) -> None:
    folder = workspace.root / "models" / "mine"
    folder.mkdir(parents=True)
    for name, body in files.items():
        (folder / name).write_bytes(body)
    workspace.configure("models/mine")
    workspace.fails_with(*words)
    assert "delete" not in workspace.run().stderr
    assert {path.name for path in folder.iterdir()} == {*files}


def test_old_weights_beside_new_ones_do_no_harm(workspace: Workspace) -> None:
    folder = workspace.root / "models" / "mine"
    folder.mkdir(parents=True)
    for name, body in (MODEL | OLD).items():
        (folder / name).write_bytes(body)
    workspace.configure("models/mine")
    assert workspace.run().returncode == 0


@pytest.mark.parametrize(("name", "words"), [("mine.gguf", ("a GGUF file cannot be trained",)), ("config.json", ())])
def test_a_file_in_place_of_a_folder_is_said(workspace: Workspace, name: str, words: tuple[str, ...]) -> None:
    (workspace.root / "models").mkdir()
    (workspace.root / "models" / name).write_bytes(b"{}")
    workspace.configure(f"models/{name}")
    workspace.fails_with(f"models/{name} is a file: set model_path to the folder of a model", *words)


@pytest.mark.parametrize("model", ["./mine", "../mine", "/no/where", "~/no/where", "a/b/c"])
def test_what_can_only_be_a_folder_is_never_looked_for_on_the_hub(workspace: Workspace, model: str) -> None:
    workspace.configure(model)
    workspace.fails_with("is not there")


@pytest.mark.parametrize("text", ["", "input_model: 3", "input_model: {model_path: [", "passes: {}"])
def test_a_config_without_a_model_is_one_sentence(workspace: Workspace, text: str) -> None:
    (workspace.root / "finetuning" / "olive-config.yaml").write_text(text)
    workspace.fails_with("olive-config.yaml", "model_path")


def test_a_missing_config_is_one_sentence(workspace: Workspace) -> None:
    workspace.fails_with("olive-config.yaml is not there")


def test_another_python_is_told_which_one_has_the_packages(workspace: Workspace) -> None:
    workspace.configure("models/demo")
    script = str(workspace.root / "setup" / "get_model.py")
    command = [sys.executable, "-S", "-I", script]  # a Python without any package
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "run setup/create_env.py" in done.stderr and done.stderr.count("\n") == 1
    python = workspace.root / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    python.parent.mkdir(parents=True)
    python.touch()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1 and f"use {python}" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("options", [["--gguf"], ["--onnx", "--list"]])
def test_an_unknown_option_is_a_usage_error(workspace: Workspace, options: list[str]) -> None:
    assert workspace.run(*options).returncode == 2


def test_the_list_shows_what_is_offered_and_marks_what_fits_this_machine(workspace: Workspace) -> None:
    pytest.importorskip("psutil", reason="the memory is asked for")
    facts = {"name": "Some model", "licence": "MIT", "gated": False, "deprecated": False, "onnx": False}
    models = [
        facts | {"id": "small", "parameters": 10**6},
        facts | {"id": "huge", "parameters": 10**14, "gated": True, "onnx": True},
        facts | {"id": "gone", "parameters": 1, "deprecated": True, "replaced_by": "small"},
    ]
    restore = "`copier recopy --trust --vcs-ref :current:`"
    workspace.fails_with("setup/models.yaml cannot be read", restore, options=["--list"])
    (workspace.root / "setup" / "models.yaml").write_text(json.dumps(models))
    done = workspace.run("--list")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:3]}
    assert set(rows) == {"small", "huge"}
    assert rows["small"][1:] == ["Some", "model", "0.0", "GiB", "MIT", "yes"]
    assert rows["huge"][1:] == ["Some", "model", "186264.5", "GiB", "MIT,", "gated", "no", "ready"]
    assert "Deprecated, but still valid: gone (small is better)." in done.stdout


def test_a_full_disk_is_said_before_the_download(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.syspath_prepend(str(workspace.root / "setup"))
    for name in ("model_folder", "hub_download"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import hub_download

    monkeypatch.setattr(hub_download.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10**9))
    hub_download.check_disk(workspace.root / "not" / "yet", 10**9)
    with pytest.raises(hub_download.ModelError, match=r"1\.0 GB free and the model needs 7\.6 more"):
        hub_download.check_disk(workspace.root / "not" / "yet", int(7.6e9))


# -------------------------------------------------------------------------------------------------------- from the hub


@pytest.fixture(scope="module")
def running_hub() -> Iterator[Hub]:
    """Serve a hub with the repositories of these tests."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("this Python has no huggingface_hub: run this file with a workspace's Python")
    with Hub() as hub:
        hub.add("me/gated", REAL, commit=COMMIT, gated=True)
        hub.add("me/private", REAL, commit=COMMIT, private=True)
        hub.add("me/old", OLD, commit=COMMIT)
        hub.add("me/empty", {"config.json": b"{}"}, commit=COMMIT)
        hub.add(
            "me/adapter", {"adapter_config.json": b"{}", "adapter_model.safetensors": safetensors(8)}, commit=COMMIT
        )
        hub.add("me/gguf", {"model.gguf": b"GGUF", "README.md": b"#"}, commit=COMMIT)
        hub.add("me/wordless", {"config.json": b"{}", "model.safetensors": safetensors(8)}, commit=COMMIT)
        hub.add("me/short", {name: MODEL[name] for name in MODEL if name != PARTS[1]}, commit=COMMIT)
        hub.add("me/large", MODEL | {PARTS[0]: safetensors(24_000_000)}, commit=COMMIT)
        yield hub


@pytest.fixture
def hub(running_hub: Hub, workspace: Workspace) -> Iterator[Hub]:
    """The hub as it was, with the workspace's script asking it."""
    workspace.env["HF_ENDPOINT"] = running_hub.url
    running_hub.add("me/tiny", REAL, commit=COMMIT, tags=["v1"])  # main may have moved
    running_hub.asked.clear()
    running_hub.sent.clear()
    running_hub.tokens.clear()
    yield running_hub
    running_hub.mend()


class Here:
    """The workspace's scripts in this process: a Python for each of many cases would take most of the time."""

    def __init__(self, root: Path, cache: Path, patch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.root, self.cache, self.patch, self.capsys = root, cache, patch, capsys
        self.model_folder = module(root, "model_folder")  # first: the others import it
        self.hub_download = module(root, "hub_download")
        self.get_model = module(root, "get_model")
        self.snapshots = cache / "models--me--tiny" / "snapshots"

    def run(self) -> tuple[int, str, str]:
        """Run get_model.py; return its exit status and what it said."""
        self.patch.setattr(sys, "argv", ["get_model.py"])
        self.capsys.readouterr()
        status = self.get_model.main()
        out, err = self.capsys.readouterr()
        return status, out, err

    def find(self, model: str, revision: str | None) -> Path:
        """Return the folder that check, training, chat and export take. Raises ModelError."""
        return Path(self.model_folder.find_model(model, revision, self.root).folder)

    def says(self, *words: str) -> str:
        """Assert that get_model.py refuses with one sentence that has these words and no name of a Python class."""
        status, _, err = self.run()
        lines = [line for line in err.splitlines() if line.startswith("get_model: ")]
        assert status == 1 and len(lines) == 1, err
        assert all(word in lines[0] for word in words), lines[0]
        assert not re.search(r"\b[A-Z]\w+(Error|Exception|Timeout)\b", lines[0]), lines[0]
        return lines[0]


def module(root: Path, name: str) -> ModuleType:
    """Import a file of the workspace's setup/ as it stands there."""
    spec = importlib.util.spec_from_file_location(name, root / "setup" / f"{name}.py")
    assert spec and spec.loader
    loaded = importlib.util.module_from_spec(spec)
    sys.modules[name] = loaded
    spec.loader.exec_module(loaded)
    return loaded


@pytest.fixture
def here(
    workspace: Workspace, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Iterator[Here]:
    """Let this process's library ask the hub, with a cache of its own."""
    from huggingface_hub import close_session, constants

    close_session()  # it keeps what the test before gave it
    cache = workspace.root / "hub" / "hub"
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    monkeypatch.setattr(constants, "ENDPOINT", hub.url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", hub.url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(workspace.root / "no-token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    yield Here(workspace.root, cache, monkeypatch, capsys)
    for name in ("get_model", "hub_download", "model_folder"):
        del sys.modules[name]


def offline(patch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    patch.setattr(constants, "HF_HUB_OFFLINE", True)


def test_a_model_is_downloaded_at_its_revision_and_nothing_it_does_not_need(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny", COMMIT)
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    folder = workspace.root / "hub" / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    assert f"Downloading me/tiny: 1.0 MB\nThe model is in {folder}\n" in done.stdout
    assert {str(file.relative_to(folder)) for file in folder.rglob("*")} == {*MODEL, "LICENSE"}
    assert (folder / PARTS[0]).read_bytes() == MODEL[PARTS[0]]
    assert "keep this version" not in done.stdout and "python finetuning/invoke_olive.py --check" in done.stdout
    assert not [path for path in hub.asked if "telemetry" in path]

    hub.asked.clear()
    workspace.env["HF_HUB_OFFLINE"] = "1"
    assert workspace.run().returncode == 0
    assert hub.asked == []  # what is there needs no network


@pytest.mark.parametrize("revision", [COMMIT, "main", "v1", None])
def test_what_was_fetched_is_found_under_every_name_also_offline(
    here: Here, workspace: Workspace, hub: Hub, revision: str | None
) -> None:
    workspace.configure("me/tiny", revision)
    assert here.run()[0] == 0
    assert here.find("me/tiny", revision) == here.find("me/tiny", COMMIT) == here.snapshots / COMMIT
    hub.asked.clear()
    offline(here.patch)
    status, out, _ = here.run()
    assert status == 0 and f"The model is in {here.snapshots / COMMIT}\n" in out
    assert ("offline, no newer one is looked for" in out) == (revision != COMMIT)
    assert here.find("me/tiny", revision) == here.snapshots / COMMIT
    assert hub.asked == []


def test_a_branch_that_moved_is_looked_for_by_get_model_alone_and_both_commits_are_said(
    here: Here, workspace: Workspace, hub: Hub
) -> None:
    workspace.configure("me/tiny", "main")
    here.run()
    hub.add("me/tiny", REAL | {"generation_config.json": b'{"eos_token_id": 2}'}, commit=NEWER)
    assert here.find("me/tiny", "main").name == COMMIT
    status, out, _ = here.run()
    assert status == 0 and f"me/tiny at main is commit {NEWER} now (here it was {COMMIT})." in out
    assert hub.sent[PARTS[0]] == len(MODEL[PARTS[0]])  # what both have in common is not fetched twice
    assert here.find("me/tiny", "main").name == NEWER
    assert here.find("me/tiny", COMMIT).name == COMMIT  # the older one stays beside it


def test_a_newer_commit_that_could_not_be_fetched_leaves_the_older_one_in_use(
    here: Here, workspace: Workspace, hub: Hub
) -> None:
    workspace.configure("me/tiny", "main")
    here.run()
    hub.add("me/tiny", REAL | {PARTS[1]: safetensors(500_000)}, commit=NEWER)
    hub.fail(f"cdn:.*{PARTS[1]}", status=500)
    here.says("is out of order (500)")
    assert here.find("me/tiny", "main").name == COMMIT
    hub.mend()
    assert here.run()[0] == 0
    assert here.find("me/tiny", "main").name == NEWER


def test_a_hub_that_cannot_be_asked_leaves_what_is_here_in_use(here: Here, workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny", "v1")
    here.run()
    hub.fail("/api/", status=503)
    status, out, _ = here.run()
    assert status == 0 and "is out of order (503)" in out and f"The commit that is here is used: {COMMIT}." in out


def test_a_commit_that_is_not_here_names_itself_and_a_branch_names_what_is(here: Here, workspace: Workspace) -> None:
    workspace.configure("me/tiny", COMMIT)
    here.run()
    with pytest.raises(here.model_folder.ModelMissingError, match=f"not its commit {NEWER}: .*with revision: {NEWER}"):
        here.find("me/tiny", NEWER)
    with pytest.raises(here.model_folder.ModelMissingError, match=f"not known as main: .*set revision: {COMMIT}"):
        here.find("me/tiny", "main")
    with pytest.raises(here.model_folder.ModelMissingError, match="me/other is not on this machine yet: run `python"):
        here.find("me/other", None)


# ---- caches that others filled


def by_the_library(cache: Path) -> None:
    """The whole repository, as `hf download` takes it."""
    from huggingface_hub import snapshot_download

    snapshot_download("me/tiny", cache_dir=cache)


def by_single_files(cache: Path) -> None:
    """File by file, as transformers does: without the list of the repository's files."""
    from huggingface_hub import hf_hub_download

    for name in MODEL:
        hf_hub_download("me/tiny", name, cache_dir=cache)


def by_an_older_library(cache: Path) -> None:
    """The whole repository, but no list of its files: huggingface_hub before 1.22 wrote none."""
    by_the_library(cache)
    shutil.rmtree(cache / "models--me--tiny" / "trees")


def without_what_is_not_read(cache: Path) -> None:
    """What servers fetch: no licence, and not the other form of the vocabulary."""
    from huggingface_hub import snapshot_download

    snapshot_download("me/tiny", cache_dir=cache, allow_patterns=["*.json", "*.safetensors", "*.jinja"])


@pytest.mark.parametrize("fill", [by_the_library, by_single_files, by_an_older_library, without_what_is_not_read])
def test_a_cache_that_another_tool_filled_serves_before_and_after_get_model(
    here: Here, workspace: Workspace, hub: Hub, fill: Callable[[Path], None]
) -> None:
    fill(here.cache)
    for revision in (None, "main", COMMIT):
        assert here.find("me/tiny", revision) == here.snapshots / COMMIT
    hub.sent.clear()
    for revision in (None, COMMIT):
        workspace.configure("me/tiny", revision)
        assert here.run()[0] == 0
        assert here.find("me/tiny", revision) == here.snapshots / COMMIT
    assert not hub.sent[PARTS[0]]
    offline(here.patch)
    assert here.run()[0] == 0


@pytest.mark.parametrize("gone", [PARTS[1], "tokenizer.json", "model.safetensors.index.json", "chat_template.jinja"])
@pytest.mark.parametrize("with_list", [True, False])
def test_a_download_that_somebody_broke_off_is_found_and_completed(
    here: Here, workspace: Workspace, hub: Hub, gone: str, with_list: bool
) -> None:
    by_the_library(here.cache)
    (here.snapshots / COMMIT / gone).unlink()
    if not with_list:
        shutil.rmtree(here.snapshots.parent / "trees")
    if with_list or gone != "chat_template.jinja":  # which nobody can miss who does not know that there is one
        with pytest.raises(
            here.model_folder.ModelMissingError, match=r"me/tiny is (not whole|only partly) .*get_model"
        ):
            here.find("me/tiny", "main")
    hub.sent.clear()
    workspace.configure("me/tiny", COMMIT)
    assert here.run()[0] == 0
    assert here.find("me/tiny", "main") == here.snapshots / COMMIT
    assert (here.snapshots / COMMIT / gone).is_file()
    assert not set(hub.sent) & {*PARTS}  # its bytes lay in the cache all the time


@pytest.mark.parametrize("links", [True, False])
def test_a_damaged_file_is_found_and_fetched_again_alone(
    here: Here, workspace: Workspace, hub: Hub, links: bool
) -> None:
    workspace.configure("me/tiny", COMMIT)
    here.run()
    weights = here.snapshots / COMMIT / PARTS[0]
    if not links:  # as on Windows
        copy = weights.read_bytes()
        weights.unlink()
        weights.write_bytes(copy)
    weights.write_bytes(weights.read_bytes()[:-10])
    with pytest.raises(here.model_folder.ModelMissingError, match=f"{PARTS[0]} is cut off or damaged.*get_model"):
        here.find("me/tiny", COMMIT)
    hub.sent.clear()
    assert here.run()[0] == 0
    assert here.find("me/tiny", COMMIT)
    assert weights.read_bytes() == MODEL[PARTS[0]]
    assert set(hub.sent) <= {PARTS[0]}


def test_a_cache_that_can_only_be_read_serves(workspace: Workspace, hub: Hub) -> None:
    if sys.platform == "win32" or (os.geteuid() == 0 and not shutil.which("setpriv")):
        pytest.skip("root writes everywhere, and there is no setpriv (util-linux)")
    workspace.configure("me/tiny", "main")
    assert workspace.run().returncode == 0
    cache = workspace.root / "hub"
    folders = [cache, *(path for path in cache.rglob("*") if path.is_dir() and not path.is_symlink())]
    rights = "-dac_override,-dac_read_search"
    workspace.before = [f"--bounding-set={rights}", f"--inh-caps={rights}"] if os.geteuid() == 0 else []
    try:
        for folder in folders:
            folder.chmod(0o555)
        for revision in ("main", COMMIT, None):
            workspace.configure("me/tiny", revision)
            done = workspace.run()
            assert (done.returncode, done.stderr) == (0, "")
        hub.add("me/tiny", REAL | {"generation_config.json": b'{"eos_token_id": 2}'}, commit=NEWER)
        workspace.configure("me/tiny", NEWER)
        workspace.fails_with("cannot be written", "set HF_HOME to a folder of your own")
    finally:
        for folder in folders:
            folder.chmod(0o755)


# ---- what the hub may say


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("me/nothing", COMMIT, ("/me/nothing does not exist or is private", "model_path")),
        ("me/nothing", None, ("/me/nothing does not exist or is private", "model_path")),
        ("me/private", None, ("/me/private does not exist or is private", "HF_TOKEN")),
        ("me/tiny", "f" * 40, ("has no revision ffff", "olive-config.yaml")),
        ("me/tiny", "no-such-branch", ("has no revision no-such-branch", "olive-config.yaml")),
        ("me/-.-", None, ("is neither a folder nor an id of the Hugging Face hub",)),
        ("me/old", COMMIT, ("as pytorch_model.bin alone", "model.safetensors")),
        ("me/adapter", COMMIT, ("is an adapter, not a model",)),
        ("me/gguf", COMMIT, ("has GGUF files, which cannot be trained", "model_path")),
        ("me/empty", COMMIT, ("has no weights that transformers reads",)),
        ("me/wordless", COMMIT, ("has no tokenizer",)),
        ("me/short", COMMIT, ("lacks a file that its own list names",)),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(
    here: Here, workspace: Workspace, model: str, revision: str | None, words: tuple[str, ...]
) -> None:
    workspace.configure(model, revision)
    here.says(*words)


def test_old_weights_are_refused_before_anything_is_fetched_and_by_every_step(
    here: Here, workspace: Workspace, hub: Hub
) -> None:
    from huggingface_hub import snapshot_download

    workspace.configure("me/old", COMMIT)
    here.says("as pytorch_model.bin alone")
    assert not hub.sent
    snapshot_download("me/old", cache_dir=here.cache)
    with pytest.raises(here.model_folder.ModelError, match=r"as pytorch_model\.bin alone"):
        here.find("me/old", COMMIT)


def test_old_weights_of_which_the_hub_may_have_newer_ones_are_asked_for_there_and_not_fetched_again(
    here: Here, workspace: Workspace, hub: Hub
) -> None:
    from huggingface_hub import hf_hub_download

    workspace.configure("me/old", COMMIT)
    for name in OLD:  # without the list of the repository's files
        hf_hub_download("me/old", name, revision=COMMIT, cache_dir=here.cache)
    with pytest.raises(
        here.model_folder.ModelMissingError, match=r"with pytorch_model\.bin, and safetensors are needed"
    ):
        here.find("me/old", COMMIT)
    hub.sent.clear()
    here.says("as pytorch_model.bin alone")
    assert not hub.sent


def test_a_gated_model_names_the_page_of_its_licence_and_the_variable(
    here: Here, workspace: Workspace, hub: Hub
) -> None:
    workspace.configure("me/gated", COMMIT)
    here.says("gated", f"accept its licence on {hub.url}/me/gated", "HF_TOKEN")
    here.patch.setenv("HF_TOKEN", "hf_other")  # of somebody who has not accepted it
    here.says("gated", f"accept its licence on {hub.url}/me/gated")
    here.patch.setenv("HF_TOKEN", "hf_no")
    here.says("refuses the token", "HF_TOKEN")
    here.patch.setenv("HF_TOKEN", "hf_good")
    status, out, err = here.run()
    assert status == 0, err
    assert "hf_good" not in out + err
    assert hub.tokens == {"", "Bearer hf_other", "Bearer hf_no", "Bearer hf_good"}
    assert hub.cdn_tokens == {""}


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ({"status": 429}, ("takes no more requests for now (429)",)),
        ({"status": 500}, ("is out of order (500)",)),
        ({"status": 503}, ("is out of order (503)",)),
        ({"delay": 60}, ("does not answer in time", "check the connection")),
        ({"refuse": True}, ("broke off the connection", "run this again")),
    ],
    ids=lambda value: next(iter(value), "") if isinstance(value, dict) else "",
)
def test_a_hub_in_trouble_is_one_sentence(
    here: Here, workspace: Workspace, hub: Hub, fault: dict[str, Any], words: tuple[str, ...]
) -> None:
    here.patch.setattr(here.hub_download, "WAIT", 0.5)
    hub.fail("/api/models/me/tiny", **fault)
    workspace.configure("me/tiny", COMMIT)
    here.says(hub.url, *words)
    hub.mend()
    assert here.run()[0] == 0


def test_a_hub_that_answers_and_then_no_more_does_not_hold_for_ever(here: Here, workspace: Workspace, hub: Hub) -> None:
    here.patch.setattr(here.hub_download, "WAIT", 0.3)
    here.patch.setattr("time.sleep", lambda _seconds: None)  # the library's pauses before it tries again
    hub.fail("/api/models/me/tiny/tree", delay=60)
    workspace.configure("me/tiny", COMMIT)
    here.says(hub.url, "does not answer in time")


def test_a_hub_that_wants_a_pause_is_given_one(here: Here, workspace: Workspace, hub: Hub) -> None:
    hub.fail(f"cdn:.*{PARTS[0]}", status=429, retry_after=0, times=1)
    workspace.configure("me/tiny", COMMIT)
    assert here.run()[0] == 0


def test_a_connection_that_breaks_off_is_taken_up_where_it_broke(here: Here, workspace: Workspace, hub: Hub) -> None:
    hub.fail(f"cdn:.*{PARTS[0]}", break_after=15_000_000, times=1)
    workspace.configure("me/large", COMMIT)
    assert here.run()[0] == 0
    assert here.find("me/large", COMMIT)
    assert hub.sent[PARTS[0]] < 1.3 * 24_000_000  # the library keeps pieces of 10 MB


def test_a_download_that_was_killed_keeps_what_is_complete(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny", COMMIT)
    hub.fail(f"cdn:.*{PARTS[0]}", trickle=20_000)
    folder = workspace.root / "hub" / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    script = [sys.executable, str(workspace.root / "setup" / "get_model.py")]
    for runs, number in enumerate((signal.SIGKILL, signal.SIGINT), start=1):
        running = subprocess.Popen(script, env=workspace.env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        begun = f"GET cdn:.*{PARTS[0]}"
        wait_for(lambda: sum(bool(re.match(begun, path)) for path in hub.asked) == runs)  # noqa: B023
        wait_for((folder / PARTS[1]).exists)
        running.send_signal(number)
        _, err = running.communicate(timeout=60)
        assert running.returncode == (-9 if number == signal.SIGKILL else 130)
    assert err.endswith("Interrupted: run the same command again, it keeps what is complete.\n")
    hub.mend()
    assert workspace.run().returncode == 0
    assert hub.sent[PARTS[1]] == len(MODEL[PARTS[1]])  # once, in three runs
    blobs = workspace.root / "hub" / "hub" / "models--me--tiny" / "blobs"
    halves = [*blobs.glob("*.incomplete")]
    assert halves
    for half in halves:  # nobody writes to them for an hour
        os.utime(half, (time.time() - 3600,) * 2)
    workspace.configure("me/tiny", "main")
    assert workspace.run().returncode == 0
    assert not [*blobs.glob("*.incomplete")]
    assert (folder / PARTS[0]).read_bytes() == MODEL[PARTS[0]]


def wait_for(what: Callable[[], object], seconds: float = 60) -> None:
    """Wait until something is so."""
    moment = threading.Event()
    for _ in range(int(seconds / 0.02)):
        if what():
            return
        moment.wait(0.02)
    raise AssertionError("it did not happen in time")


def test_a_machine_kept_offline_and_a_hub_that_is_not_there_are_one_sentence(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny", COMMIT)
    workspace.env["HF_HUB_OFFLINE"] = "1"
    workspace.fails_with("HF_HUB_OFFLINE")
    del workspace.env["HF_HUB_OFFLINE"]
    workspace.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    workspace.fails_with("http://127.0.0.1:1 cannot be used", "check the connection")


# ----------------------------------------------------------------------------------------- ready-made, for ONNX Runtime


ONNX = {"genai_config.json": b"{}", "model.onnx": b"8", "model.onnx.data": b"9" * 300_000, "tokenizer.json": b"{}"}
READY_MADE = {f"{folder}/{name}": body for folder in ("cpu/int4", "cuda/int4") for name, body in ONNX.items()}


@pytest.fixture
def onnx(workspace: Workspace, hub: Hub) -> Path:
    """The folder that the ready-made model goes to, in a workspace whose model has some."""
    hub.add("me/onnx", READY_MADE, commit=COMMIT)
    pytest.importorskip("onnxruntime_genai", reason="it says what it runs on")
    workspace.configure("me/tiny", COMMIT)
    describe(workspace, COMMIT)
    return workspace.root / "models" / "onnx-base"


def describe(workspace: Workspace, revision: str | None, *proven: str) -> None:
    """Write setup/model.yaml; JSON is YAML."""
    folders = [{"folder": f"{name}/int4", "providers": [name], "gib": 0.1} for name in ("cuda", "cpu")]
    onnx = {"hub_id": "me/onnx", "revision": revision, "proven": proven, "folders": folders}
    (workspace.root / "setup" / "model.yaml").write_text(json.dumps({"onnx": onnx}))


def test_the_variant_for_this_machine_is_downloaded_alone_and_once(workspace: Workspace, hub: Hub, onnx: Path) -> None:
    done = workspace.run("--onnx")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("  python inference/console_chat.py --baseonly --engine onnx\n")
    assert {path.name: path.read_bytes() for path in onnx.iterdir() if path.name != "export.json"} == ONNX
    mark = json.loads((onnx / "export.json").read_text())
    assert (mark["base_model"], mark["base_revision"], mark["folder"]) == ("me/tiny", COMMIT, "cpu/int4")
    assert mark["files"] == {name: len(body) for name, body in ONNX.items()}
    assert [path.name for path in onnx.parent.iterdir()] == ["onnx-base"]
    assert not [path for path in hub.asked if "cuda" in path]

    hub.asked.clear()
    assert "The ONNX model is there" in workspace.run("--onnx").stdout
    assert hub.asked == []
    (onnx / "model.onnx.data").write_bytes(b"torn")
    assert workspace.run("--onnx").returncode == 0
    assert (onnx / "model.onnx.data").read_bytes() == ONNX["model.onnx.data"]


def test_a_ready_made_model_without_a_pinned_commit_says_which_one_it_is(
    workspace: Workspace, hub: Hub, onnx: Path
) -> None:
    describe(workspace, None)
    assert f"Downloading me/onnx, cpu/int4 at {COMMIT}, its newest commit: none is pinned: 0.3 MB" in (
        workspace.run("--onnx").stdout
    )


def test_files_that_nobody_has_run_with_this_release_are_said_to_be_unproven(
    workspace: Workspace, hub: Hub, onnx: Path
) -> None:
    import onnxruntime_genai

    said = f"Nobody has proven these files with ONNX Runtime GenAI {onnxruntime_genai.__version__}"
    assert said in workspace.run("--onnx").stdout
    describe(workspace, COMMIT, onnxruntime_genai.__version__)
    assert said not in workspace.run("--onnx").stdout


def test_what_keeps_the_ready_made_model_away_is_one_sentence(workspace: Workspace, hub: Hub, onnx: Path) -> None:
    del hub.repositories["model", "me/onnx"].commits[COMMIT]["cpu/int4/genai_config.json"]
    workspace.fails_with("cpu/int4 holds no genai_config.json", "setup/model.yaml", options=["--onnx"])
    del hub.repositories["model", "me/onnx"]
    workspace.fails_with("/me/onnx does not exist or is private", options=["--onnx"])
    workspace.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    workspace.fails_with("http://127.0.0.1:1 cannot be used", options=["--onnx"])
    (workspace.root / "setup" / "model.yaml").write_text("onnx: null")
    workspace.fails_with("me/tiny has no ready-made ONNX model for cpu", "finetuning/export.py", options=["--onnx"])
    (workspace.root / "setup" / "model.yaml").unlink()
    workspace.fails_with("setup/model.yaml cannot be read", options=["--onnx"])
    assert not onnx.exists()
