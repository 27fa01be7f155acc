"""setup/get_model.py: the demo, a folder, and downloads from a small hub on 127.0.0.1."""

from __future__ import annotations

import hashlib
import http.server
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
COMMIT = "0123456789abcdef0123456789abcdef01234567"
NEWER = "89abcdef0123456789abcdef0123456789abcdef"

pytest.importorskip("yaml", reason="get_model.py reads YAML")


class Workspace:
    """The part of a workspace that get_model.py needs."""

    def __init__(self, root: Path) -> None:
        self.root = root
        (root / "setup").mkdir(parents=True)
        (root / "finetuning").mkdir()
        shutil.copy(REPOSITORY / "template" / "setup" / "get_model.py", root / "setup")
        self.env = {"PATH": os.defpath, "HF_HOME": str(root / "hub"), "HOME": str(root), "CI": "1"}

    def configure(self, model: str, revision: str | None = None) -> None:
        """Write finetuning/olive-config.yaml; JSON is YAML."""
        settings = {"input_model": {"model_path": model, "load_kwargs": {"revision": revision}}}
        (self.root / "finetuning" / "olive-config.yaml").write_text(json.dumps(settings))

    def run(self, *options: str) -> subprocess.CompletedProcess[str]:
        """Run the script from another folder."""
        command = [sys.executable, str(self.root / "setup" / "get_model.py"), *options]
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
    build = "from pathlib import Path\nfile = Path(__file__).parents[1] / 'models/demo/config.json'\n"
    build += "file.parent.mkdir(parents=True)\nfile.write_text('{}')\n"
    (workspace.root / "finetuning" / "tiny_model.py").write_text(build)
    assert workspace.run().returncode == 0
    assert (workspace.root / "models" / "demo" / "config.json").is_file()
    done = workspace.run()
    assert done.returncode == 0 and "The demo model is there" in done.stdout
    assert done.stdout.endswith("  python finetuning/invoke_olive.py --check\n")


def test_a_demo_that_cannot_be_built_is_said(workspace: Workspace) -> None:
    workspace.configure("models/demo")
    (workspace.root / "finetuning" / "tiny_model.py").write_text("raise SystemExit('no torch')\n")
    workspace.fails_with("tiny_model.py failed")


def test_a_folder_must_be_there_and_hold_a_model(workspace: Workspace) -> None:
    workspace.configure("models/mine")
    workspace.fails_with("models/mine is not there", "olive-config.yaml")
    folder = workspace.root / "models" / "mine"
    folder.mkdir(parents=True)
    workspace.fails_with("has no config.json")
    (folder / "config.json").write_text("{}")
    done = workspace.run()
    assert done.returncode == 0 and str(folder) in done.stdout


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
        facts | {"id": "gone", "parameters": 1, "deprecated": True},
    ]
    workspace.fails_with("setup/models.yaml cannot be read", "copier recopy", options=["--list"])
    (workspace.root / "setup" / "models.yaml").write_text(json.dumps(models))
    done = workspace.run("--list")
    assert done.returncode == 0, done.stderr
    rows = {line.split()[0]: line.split() for line in done.stdout.splitlines()[1:3]}
    assert set(rows) == {"small", "huge"}
    assert rows["small"][1:] == ["Some", "model", "0.0", "GiB", "MIT", "yes"]
    assert rows["huge"][1:] == ["Some", "model", "186264.5", "GiB", "MIT,", "gated", "no", "ready"]
    assert "gone" not in done.stdout


def test_a_full_disk_is_said_before_the_download(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = importlib.util.spec_from_file_location("get_model", workspace.root / "setup" / "get_model.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.shutil, "disk_usage", lambda _folder: SimpleNamespace(free=10**9))
    module.check_disk(workspace.root / "not" / "yet", 10**9)
    with pytest.raises(module.ModelError, match=r"1\.0 GB free and the model needs 7\.6 more"):
        module.check_disk(workspace.root / "not" / "yet", int(7.6e9))


# ---------------------------------------------------------------------------------------------------- from a small hub

FILES = {
    "config.json": b'{"model_type": "llama"}',
    "generation_config.json": b"{}",
    "tokenizer.json": b"{}",
    "tokenizer_config.json": b"{}",
    "chat_template.jinja": b"{{ messages }}",
    "model-00001-of-00002.safetensors": b"1" * 600_000,
    "model-00002-of-00002.safetensors": b"2" * 400_000,
    "model.safetensors.index.json": b"{}",
    # what is not needed: other formats, other folders, code
    "pytorch_model.bin": b"3" * 1000,
    "consolidated.safetensors": b"4" * 1000,
    "model.gguf": b"5",
    "onnx/model.onnx": b"6",
    "original/model.safetensors": b"7",
    "modeling_odd.py": b"raise SystemExit('this code must not come along')",
    "README.md": b"#",
}
ONNX = {"genai_config.json": b"{}", "model.onnx": b"8", "model.onnx.data": b"9" * 300_000, "tokenizer.json": b"{}"}
NEEDED = {name for name in FILES if name.startswith(("config", "gen", "tok", "chat", "model-", "model.safe"))}


class Hub(http.server.ThreadingHTTPServer):
    """The routes of a hub that a download uses, for me/tiny, me/gated and me/old (which has only .bin weights)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.asked: list[str] = []
        self.tokens: set[str] = set()
        self.onnx = {f"{folder}/{name}": body for folder in ("cpu/int4", "cuda/int4") for name, body in ONNX.items()}

    def files(self, repository: str) -> dict[str, bytes]:
        """Return what a repository holds."""
        old = {"config.json": b"{}", "pytorch_model.bin": b"3" * 1000}
        if repository == "me/onnx":
            return self.onnx
        return {"me/tiny": FILES, "me/gated": FILES, "me/old": old, "me/empty": {"config.json": b"{}"}}.get(
            repository, {}
        )


class HubHandler(http.server.BaseHTTPRequestHandler):
    """Answers as the hub does."""

    server: Hub

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        self.server.asked.append(f"{self.command} {path}")
        self.server.tokens.add(self.headers.get("Authorization", ""))
        parts = path.strip("/").split("/")
        api = parts[:2] == ["api", "models"]
        repository = "/".join(parts[2:4] if api else parts[:2])
        files = self.server.files(repository)
        what, revision = (parts[4:6] if api else parts[2:4]) or ("revision", "main")
        if not files:
            return self.answer(404, error="RepoNotFound")
        if revision not in ("main", COMMIT, NEWER):
            return self.answer(404, error="RevisionNotFound")
        if what == "revision":
            return self.answer(
                200, json.dumps({"id": repository, "sha": NEWER if revision == "main" else revision}).encode()
            )
        if what == "tree":
            rows = [{"type": "file", "path": n, "size": len(b), "oid": etag(b)} for n, b in files.items()]
            return self.answer(200, json.dumps(rows).encode())
        if repository == "me/gated" and self.headers.get("Authorization") != "Bearer hf_good":
            return self.answer(403, error="GatedRepo")
        body = files["/".join(parts[4:])]
        return self.answer(200, body, commit=revision)

    do_HEAD = do_GET  # noqa: N815

    def answer(self, status: int, body: bytes = b"", error: str = "", commit: str = "") -> None:
        """Send one answer."""
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("ETag", f'"{etag(body)}"')
        if error:
            self.send_header("X-Error-Code", error)
        if commit:
            self.send_header("X-Repo-Commit", commit)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Say nothing."""


def etag(body: bytes) -> str:
    return hashlib.sha1(body).hexdigest()


@pytest.fixture
def hub(workspace: Workspace) -> Iterator[Hub]:
    """Serve a hub that the workspace's script asks."""
    if importlib.util.find_spec("huggingface_hub") is None:
        pytest.skip("this Python has no huggingface_hub: run this file with a workspace's Python")
    server = Hub()
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    workspace.env["HF_ENDPOINT"] = f"http://127.0.0.1:{server.server_port}"
    yield server
    server.shutdown()
    server.server_close()


def test_a_model_is_downloaded_at_its_revision_and_nothing_it_does_not_need(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny", COMMIT)
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    folder = workspace.root / "hub" / "hub" / "models--me--tiny" / "snapshots" / COMMIT
    assert f"The model lies in {folder}\n" in done.stdout
    assert {str(file.relative_to(folder)) for file in folder.rglob("*")} == NEEDED
    assert (folder / "model-00001-of-00002.safetensors").read_bytes() == FILES["model-00001-of-00002.safetensors"]
    assert "is now" not in done.stdout and "python finetuning/invoke_olive.py --check" in done.stdout
    assert not [path for path in hub.asked if "telemetry" in path or NEWER in path]

    hub.asked.clear()
    workspace.env["HF_HUB_OFFLINE"] = "1"
    assert workspace.run().returncode == 0
    assert hub.asked == []  # what is there needs no network


def test_without_a_revision_the_commit_is_resolved_and_shown(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny")
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert f"Revision main of me/tiny is now {NEWER}" in done.stdout
    assert done.stdout.count(NEWER) == 2  # and the folder's name


def test_an_older_model_without_safetensors_comes_as_it_is(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/old", COMMIT)
    assert workspace.run().returncode == 0
    assert any("pytorch_model.bin" in path for path in hub.asked)
    workspace.configure("me/empty", COMMIT)
    workspace.fails_with("no weights")


def test_a_gated_model_names_the_page_of_its_licence_and_the_variable(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/gated", COMMIT)
    workspace.fails_with("gated", f"{workspace.env['HF_ENDPOINT']}/me/gated", "HF_TOKEN")
    workspace.env["HF_TOKEN"] = "hf_good"
    done = workspace.run()
    assert done.returncode == 0, done.stderr
    assert "hf_good" not in done.stdout + done.stderr
    assert hub.tokens == {"", "Bearer hf_good"}


@pytest.mark.parametrize(
    ("model", "revision", "words"),
    [
        ("me/nothing", COMMIT, ("/me/nothing does not exist or is private", "model_path")),
        ("me/nothing", None, ("/me/nothing does not exist or is private", "model_path")),
        ("me/tiny", "f" * 40, ("has no revision ffff", "olive-config.yaml")),
        ("me/-.-", None, ("does not exist",)),
    ],
)
def test_what_the_hub_does_not_have_is_one_sentence(
    workspace: Workspace, hub: Hub, model: str, revision: str | None, words: tuple[str, ...]
) -> None:
    workspace.configure(model, revision)
    workspace.fails_with(*words)


def test_a_hub_that_does_not_answer_and_a_machine_kept_offline_are_one_sentence(workspace: Workspace, hub: Hub) -> None:
    workspace.configure("me/tiny", COMMIT)
    workspace.env["HF_HUB_OFFLINE"] = "1"
    workspace.fails_with("HF_HUB_OFFLINE")
    del workspace.env["HF_HUB_OFFLINE"]
    workspace.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    workspace.fails_with("http://127.0.0.1:1 cannot be used", "check the connection")


# ----------------------------------------------------------------------------------------- ready-made, for ONNX Runtime


@pytest.fixture
def onnx(workspace: Workspace, hub: Hub) -> Path:
    """The folder that the ready-made model goes to, in a workspace whose model has some."""
    pytest.importorskip("onnxruntime_genai", reason="it says what it runs on")
    workspace.configure("me/tiny", COMMIT)
    variant = {"hub_id": "me/onnx", "revision": COMMIT, "gib": 0.1}
    variants = [
        variant | {"platform": platform, "device": device, "folder": f"{folder}/int4"}
        for platform in ("windows", "linux", "macos")
        for device, folder in (("gpu", "cuda"), ("cpu", "cpu"))
    ]
    (workspace.root / "setup" / "model.yaml").write_text(json.dumps({"onnx": variants}))
    return workspace.root / "models" / "onnx-base"


def test_the_variant_for_this_platform_is_downloaded_alone_and_once(workspace: Workspace, hub: Hub, onnx: Path) -> None:
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


def test_what_keeps_the_ready_made_model_away_is_one_sentence(workspace: Workspace, hub: Hub, onnx: Path) -> None:
    hub.onnx.pop("cpu/int4/genai_config.json")
    workspace.fails_with("cpu/int4 holds no genai_config.json", "setup/model.yaml", options=["--onnx"])
    hub.onnx.clear()
    workspace.fails_with("/me/onnx does not exist or is private", options=["--onnx"])
    workspace.env["HF_ENDPOINT"] = "http://127.0.0.1:1"
    workspace.fails_with("http://127.0.0.1:1 cannot be used", options=["--onnx"])
    (workspace.root / "setup" / "model.yaml").write_text("onnx: []")
    workspace.fails_with("me/tiny has no ready-made ONNX model for", "finetuning/export.py", options=["--onnx"])
    (workspace.root / "setup" / "model.yaml").unlink()
    workspace.fails_with("setup/model.yaml cannot be read", options=["--onnx"])
    assert not onnx.exists()
