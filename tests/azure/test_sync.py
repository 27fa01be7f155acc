"""Which files are sent to the share and which are not; after any interruption, the next command sends the rest."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import arm
import pytest
from conftest import Azure
from emulator import SUBSCRIPTION, Emulator, Request

SETTINGS = """\
input_model: {model_path: owner/name}
data_configs:
- name: train
  load_dataset_config: {train_file: dataset/rows.jsonl, held_out_file: null}
"""


@pytest.fixture(scope="module")
def config(emulator: Emulator) -> dict[str, str]:
    """The configuration of a share that is there."""
    account = f"/subscriptions/{SUBSCRIPTION}/resourceGroups/rg-sync/providers/Microsoft.Storage/storageAccounts/sync"
    arm.store(emulator, {"id": account, "name": "sync", "type": "Microsoft.Storage/storageAccounts"})
    emulator.share("sync", "share").mkdir(parents=True)
    return {"SUBSCRIPTION_ID": SUBSCRIPTION, "STORAGE_ACCOUNT_NAME": "sync", "FILE_SHARE_NAME": "share"}


@pytest.fixture
def folder(emulator: Emulator) -> Path:
    """The folder that stands in for the share, empty."""
    folder = emulator.share("sync", "share")
    shutil.rmtree(folder)
    folder.mkdir()
    return folder


@pytest.fixture(scope="module")
def share(azure: Azure, environment: dict[str, str], config: dict[str, str]) -> Any:
    """The share, as a command opens it."""
    from share import Share

    with pytest.MonkeyPatch.context() as patches:
        patches.setattr(os, "environ", environment)
        return Share(config)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A small workspace."""
    files = {
        ".gitignore": "/models/\n.env\n/dataset/rows.jsonl\n/secret.txt\n.venv/\n",
        "finetuning/olive-config.yaml": SETTINGS,
        "finetuning/run.py": "print()\n",
        "dataset/rows.jsonl": "{}\n",
        "dataset/odd näme #1 100%.md": "odd\n",
        "empty.txt": "",
        "secret.txt": "ignored\n",
        ".env": "HF_TOKEN=hf_x\n",
        ".env.local": "not ignored, and a secret all the same\n",
        "models/adapter/adapter_model.safetensors": "here\n",
        "infra/finetuning.config.json": "{}",
        ".venv/bin/python": "",
        "finetuning/__pycache__/run.pyc": "",
    }
    for name, text in files.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text, encoding="utf-8")
    return tmp_path


SENDER = """
import json, pathlib, sys
sys.path.insert(0, sys.argv[1])
import share, sync
sync.send(share.Share(json.loads(sys.argv[2])), pathlib.Path(sys.argv[3]))
"""
SENT = {".gitignore", "finetuning/olive-config.yaml", "finetuning/run.py", "dataset/rows.jsonl", "empty.txt"}
SENT |= {"dataset/odd näme #1 100%.md"}
START = Path(__file__).resolve().parents[2] / "template" / "infra" / "start.sh"


def start(folder: Path, digest: str) -> subprocess.CompletedProcess[str]:
    """Start a container on the share, as the job and the app do; return what it printed of the workspace's files."""
    script = (
        START.read_text(encoding="utf-8") + "find . -type f | sort && bash finetuning/run.sh && cat dataset/rows.jsonl"
    )
    env = {"PATH": os.environ["PATH"], "WORKSPACE_MOUNT": str(folder), "CODE_SHA256": digest}
    command = ["bash", "-euo", "pipefail", "-c", script]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)


def there(folder: Path) -> set[str]:
    """Return the files on the share, but for the manifest."""
    found = {file.relative_to(folder).as_posix() for file in folder.rglob("*") if file.is_file()}
    return {path for path in found if not path.startswith((".azure-sync.json", ".azure-code/"))}


def test_ignored_files_are_not_sent_except_the_training_rows(root: Path, share: Any, folder: Path) -> None:
    from sync import send

    assert send(share, root) == (len(SENT), 0)
    assert there(folder) == SENT
    assert all((folder / name).read_bytes() == (root / name).read_bytes() for name in SENT)


def test_a_git_repository_sends_the_same_files(root: Path, share: Any, folder: Path) -> None:
    from sync import send

    subprocess.run(["git", "init", "--quiet", root], check=True)
    assert send(share, root) == (len(SENT), 0)
    assert there(folder) == SENT


def test_only_changed_files_are_sent_and_deleted_ones_removed(root: Path, share: Any, folder: Path) -> None:
    from sync import send

    send(share, root)
    assert send(share, root) == (0, 0)
    (root / "finetuning/run.py").write_text("print(1)\n", encoding="utf-8")
    (root / "empty.txt").unlink()
    assert send(share, root) == (1, 1)
    assert there(folder) == SENT - {"empty.txt"}
    assert (folder / "finetuning/run.py").read_text() == "print(1)\n"


def test_files_that_the_job_wrote_stay(root: Path, share: Any, folder: Path) -> None:
    from sync import send

    (folder / "models/adapter").mkdir(parents=True)
    (folder / "models/adapter/README.md").write_text("made there")
    send(share, root)
    assert (folder / "models/adapter/README.md").read_text() == "made there"


def test_a_large_file_is_sent_in_ranges(root: Path, share: Any, folder: Path) -> None:
    from sync import send

    (root / "large.bin").write_bytes(os.urandom(9 * 2**20 + 7))
    send(share, root)
    assert (folder / "large.bin").read_bytes() == (root / "large.bin").read_bytes()


def test_after_a_damaged_manifest_everything_is_sent_again(root: Path, share: Any, folder: Path) -> None:
    from sync import send

    send(share, root)
    (folder / ".azure-sync.json").write_text('{"empty.txt": "')
    assert send(share, root) == (len(SENT), 0)


def test_after_a_killed_upload_the_next_one_sends_the_rest(
    root: Path, share: Any, folder: Path, emulator: Emulator, environment: dict[str, str], config: dict[str, str]
) -> None:
    from sync import send

    for number in range(250):
        (root / f"file-{number}.txt").write_text(str(number))
    infra = Path(sys.modules["sync"].__file__ or "").parent
    process = subprocess.Popen([sys.executable, "-c", SENDER, infra, json.dumps(config), root], env=environment)
    made: list[str] = []

    def kill_after(request: Request) -> None:
        if request.headers.get("x-ms-type") == "file":
            made.append(request.path)
            if len(made) == 200:
                os.kill(process.pid, signal.SIGKILL)

    emulator.watch = kill_after
    process.wait()
    emulator.watch = lambda request: None
    assert process.returncode == -signal.SIGKILL
    rest, _ = send(share, root)
    assert 250 + len(SENT) - 200 <= rest <= 250 + len(SENT) - 100
    assert all((folder / f"file-{number}.txt").read_text() == str(number) for number in range(250))


def test_an_interrupted_edit_that_was_reverted_is_sent_again(
    root: Path, share: Any, folder: Path, emulator: Emulator
) -> None:
    from az import AzureError
    from sync import send

    send(share, root)
    original = (root / "finetuning/run.py").read_text()
    (root / "finetuning/run.py").write_text("x" * 9000)
    emulator.room = 5000
    with pytest.raises(AzureError, match="full"):
        send(share, root)
    emulator.room = None
    (root / "finetuning/run.py").write_text(original)
    assert send(share, root) == (1, 0)
    assert (folder / "finetuning/run.py").read_text() == original


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            SETTINGS.replace("dataset/rows.jsonl", "../rows.jsonl"),
            "is outside the workspace: copy it to dataset/.",
        ),
        (
            SETTINGS.replace("owner/name", "../my-model"),
            "The model is the folder ../my-model, which the job cannot see",
        ),
    ],
)
def test_paths_that_the_job_cannot_see_are_refused(root: Path, share: Any, settings: str, sentence: str) -> None:
    from az import AzureError
    from sync import send

    (root / "finetuning/olive-config.yaml").write_text(settings)
    with pytest.raises(AzureError) as refused:
        send(share, root)
    assert sentence in str(refused.value)


def test_results_are_downloaded_completely_and_replace_the_local_ones(root: Path, share: Any, folder: Path) -> None:
    from sync import fetch

    assert fetch(share, root) is None
    (folder / "models/adapter/deep").mkdir(parents=True)
    for number in range(210):  # more than a page of the emulator's
        (folder / f"models/adapter/deep/{number}.txt").write_text(str(number))
    (folder / "models/run.json").write_text('{"finished": "2026-11-01T00:00:00+00:00"}')
    assert fetch(share, root) == "2026-11-01T00:00:00+00:00"
    assert len(list((root / "models/adapter/deep").iterdir())) == 210
    assert not (root / "models/adapter/adapter_model.safetensors").exists()
    assert sorted(path.name for path in (root / "models").iterdir()) == ["adapter", "run.json"]


def test_a_local_model_is_sent_unless_the_share_has_a_newer_one(root: Path, share: Any, folder: Path) -> None:
    from sync import send_results

    assert send_results(share, root) is False
    (root / "models/run.json").write_text('{"finished": "2026-11-02"}')
    assert send_results(share, root) is True
    assert (folder / "models/adapter/adapter_model.safetensors").read_text() == "here\n"
    (folder / "models/run.json").write_text('{"finished": "2026-11-03"}')
    assert send_results(share, root) is False


# ------------------------------------------------------------------------- What others wrote to the share does not run


@pytest.fixture
def code(root: Path, share: Any, folder: Path) -> str:
    """The workspace with a program and a large file, sent; what a container gets of it."""
    from code_archive import send_code
    from sync import send

    (root / "finetuning/run.sh").write_text("echo ours\n")
    (root / "large.bin").write_bytes(bytes(2**20 + 1))
    send(share, root)
    return send_code(share, root)


def test_a_container_runs_what_was_sent_and_nothing_else_from_the_share(root: Path, folder: Path, code: str) -> None:
    (folder / "finetuning/run.sh").write_text("echo theirs\n")
    (folder / "finetuning/yaml.py").write_text("imported instead of the package\n")
    (folder / "models").mkdir()
    done = start(folder, code)
    assert done.returncode == 0, done.stderr
    *files, ours, rows = done.stdout.splitlines()
    assert set(files) == {f"./{path}" for path in {*SENT, "finetuning/run.sh", "large.bin", ".data.sha256"}}
    assert (ours, rows) == ("ours", "{}")


def test_a_changed_archive_is_refused_and_sent_again(root: Path, share: Any, folder: Path, code: str) -> None:
    from code_archive import send_code

    archive = folder / f".azure-code/{code}.tar"
    archive.write_bytes(archive.read_bytes().replace(b"echo ours", b"echo evil"))
    done = start(folder, code)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: The code on the share was changed there, and nothing of it ran: ")
    assert (
        start(folder, code).stderr.splitlines()[-1].startswith("error: The share does not have the workspace that was")
    )
    assert send_code(share, root) == code
    assert start(folder, code).returncode == 0


@pytest.mark.parametrize("how", ["changed", "removed", "a link", "a folder"])
def test_changed_data_is_refused_and_sent_again(root: Path, share: Any, folder: Path, code: str, how: str) -> None:
    from sync import send

    rows = folder / "dataset/rows.jsonl"
    rows.unlink()
    if how == "changed":
        rows.write_text("{ }\n")
    elif how == "a link":
        rows.symlink_to("/etc/passwd")
    elif how == "a folder":
        (rows / "deep").mkdir(parents=True)
    done = start(folder, code)
    assert done.returncode == 1
    assert "dataset/rows.jsonl: FAILED" in done.stdout and "ours" not in done.stdout
    assert "error: These data files on the share are not the ones that were sent, and nothing ran: " in done.stderr
    if how == "a folder":
        shutil.rmtree(rows)
    elif how == "a link":
        rows.unlink()
    send(share, root)
    assert start(folder, code).returncode == 0


def test_the_app_starts_from_its_own_code_whatever_a_run_sent_since(root: Path, share: Any, folder: Path) -> None:
    from code_archive import send_code
    from sync import send

    (root / "finetuning/run.sh").write_text("echo ours\n")
    send(share, root)
    app = send_code(share, root, with_data=False)
    assert app != send_code(share, root)
    (root / "finetuning/run.sh").write_text("echo newer\n")
    (root / "dataset/rows.jsonl").write_text("newer\n")
    send(share, root)
    assert send_code(share, root) != app
    assert "ours" in start(folder, app).stdout.splitlines()


def test_the_same_workspace_has_the_same_archive_on_every_machine(
    root: Path, share: Any, folder: Path, code: str
) -> None:
    from code_archive import send_code

    for path in [root, *root.rglob("*")]:
        os.utime(path, (0, 0))
        path.chmod(0o700)
    assert send_code(share, root) == code
    assert [path.name for path in (folder / ".azure-code").iterdir()] == [f"{code}.tar"]


@pytest.mark.parametrize("name", ["../../infra/azure.py", "a/../../../x", "..\\..\\x"])
def test_results_are_written_below_models_alone(
    root: Path, share: Any, folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    from az import AzureError
    from sync import fetch

    (folder / "models").mkdir()
    (folder / "models/run.json").write_text('{"finished": "2026-11-01T00:00:00+00:00"}')
    before = {path: path.read_bytes() for path in root.rglob("*") if path.is_file()}
    # Azure refuses such names, so the listing is a stand-in's.
    monkeypatch.setattr(type(share), "files", lambda self, of: iter([(f"{of}/{name}", 1)]))
    with pytest.raises(AzureError, match="which would be written outside of models/: nothing was downloaded"):
        fetch(share, root)
    assert {path: path.read_bytes() for path in root.rglob("*") if path.is_file()} == before


def test_no_traceback_has_the_signature(share: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import traceback

    from az import AzureError

    monkeypatch.setattr(share.session, "proxies", {"https": "http://127.0.0.1:1"})  # nobody listens there
    share.session.get_adapter(share.url).proxy_manager.clear()
    with pytest.raises(AzureError) as caught:
        share.read("models/run.json")
    assert "sig=" not in "".join(traceback.format_exception(caught.value))
