"""The workspace and its file share: send what changed, and bring the results back.

The share keeps a manifest of what was sent, with a hash of each file. A file leaves the manifest before it is sent, and
stands in it again once it is whole: whatever interrupts this, the next time sends the rest.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path, PurePosixPath

import yaml
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

from az import AzureError
from share import CONNECTIONS, Share

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ".azure-sync.json"
# What never leaves this machine, whatever git says: secrets, what is made here, and what the job makes there.
NEVER = {
    ".git",
    ".venv",
    ".venv-promptflow",
    ".promptflow",
    "venv",
    "__pycache__",
    ".cache",
    ".pytest_cache",
    ".ruff_cache",
    ".mypy_cache",
}
NOTE = 100  # files, after which the manifest is written in between: so much is sent again after a crash, at most
RESULTS = ("models/adapter", "models/report")  # folders; models/run.json comes last, when they are whole


def send(share: Share, root: Path = ROOT) -> tuple[int, int]:
    """Send what changed since the last time, remove what is gone; return how many of each. Raises AzureError."""
    wanted = {path: fingerprint(root / path) for path in chosen(root)}
    there = manifest(share)
    changed = [path for path, mark in wanted.items() if there.get(path) != mark]
    gone = [path for path in there if path not in wanted]
    if not changed and not gone:
        return 0, 0
    keep = {path: mark for path, mark in there.items() if path not in {*changed, *gone}}
    write_manifest(share, keep)
    known = {str(folder) for path in keep for folder in PurePosixPath(path).parents}
    needed = {str(folder) for path in changed for folder in PurePosixPath(path).parents} - known - {"."}
    try:
        for depth in range(1, 1 + max((folder.count("/") + 1 for folder in needed), default=0)):
            level = [folder for folder in needed if folder.count("/") + 1 == depth]  # a folder after its parent
            together(share.make_folder, level)
        with bar("Sending", sum((root / path).stat().st_size for path in changed)) as note:

            def send_one(path: str) -> None:
                keep[path] = share.send(path, root / path, note)

            together(send_one, changed, lambda: write_manifest(share, dict(keep)))
        together(share.remove, gone)
    finally:
        write_manifest(share, keep)
    return len(changed), len(gone)


def chosen(root: Path) -> list[str]:
    """Return the files to send: what git does not ignore, and the rows to train on even where it does."""
    found = set(dataset_files(root))
    for path in not_ignored(root):
        parts = PurePosixPath(path).parts
        ours = parts[0] == "models" or re.fullmatch(r"\.env.*|.*\.config\.json", parts[-1])
        if not ours and not NEVER & set(parts) and (root / path).is_file():
            found.add(path)
    return sorted(found)


def not_ignored(root: Path) -> Iterator[str]:
    """Yield the files that git does not ignore, also where the workspace is no repository."""
    git = ["git", "-C", str(root), "ls-files", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run([*git, "--cached"], capture_output=True, encoding="utf-8", check=False)
        if done.returncode:  # no repository: an empty one beside it reads the same .gitignore
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(["git", "init", "--quiet", "--bare", folder], check=True, capture_output=True)
                env = {**os.environ, "GIT_DIR": folder, "GIT_WORK_TREE": str(root)}
                done = subprocess.run(git, env=env, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AzureError(
            f"git does not work ({error}), and it knows what to send: `git --version` should answer."
        ) from error
    yield from (path for path in done.stdout.split("\0") if path and not path.endswith("/"))


def dataset_files(root: Path) -> Iterator[str]:
    """Yield the files of rows that the settings name. Raises AzureError for what lies where the job cannot see it."""
    config = yaml.safe_load((root / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8"))
    model = str(config["input_model"]["model_path"])
    is_folder = (root / model).is_dir() or model.startswith((".", "/", "~", "models/")) or re.match(r"[A-Za-z]:", model)
    if is_folder and model != "models/demo":  # which the job builds
        raise AzureError(
            f"The model is the folder {model}, which the job cannot see: choose one of the hub, as "
            "`python setup/get_model.py --list` shows them."
        )
    for part in config["data_configs"]:
        rows = part["load_dataset_config"]
        for file in [rows.get("train_file"), rows.get("held_out_file")] if not rows.get("dataset_name") else []:
            if not file:
                continue
            path = (root / file).resolve()
            if not path.is_relative_to(root.resolve()):
                raise AzureError(f"{file} in olive-config.yaml lies outside of the workspace: `cp` it to dataset/.")
            if path.is_file():
                yield path.relative_to(root.resolve()).as_posix()


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(share: Share) -> dict[str, str]:
    """Return what was sent, {} when nothing was or the manifest is torn: then all is sent again."""
    with contextlib.suppress(ValueError):
        found = json.loads(share.read(MANIFEST) or b"{}")
        if isinstance(found, dict):
            return found
    return {}


def write_manifest(share: Share, entries: dict[str, str]) -> None:
    """Write down what is whole on the share."""
    text = json.dumps(entries, indent=0, sort_keys=True).encode()
    share.write(MANIFEST, io.BytesIO(text), len(text))


def together(action: Callable[[str], object], paths: Iterable[str], now_and_then: Callable[[], object] = bool) -> None:
    """Do something for every path, several at a time; the first error ends it."""
    pool = ThreadPoolExecutor(CONNECTIONS)
    try:
        for count, future in enumerate(as_completed([pool.submit(action, path) for path in paths]), start=1):
            future.result()
            if count % NOTE == 0:
                now_and_then()
    finally:
        pool.shutdown(cancel_futures=True)


@contextlib.contextmanager
def bar(title: str, size: int) -> Iterator[Callable[[int], object]]:
    """Show a bar of bytes in a terminal; yield what takes the bytes that have gone."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=size)
        yield lambda piece: progress.advance(task, piece)


def send_results(share: Share, root: Path = ROOT) -> bool:
    """Send a tuned model that was trained here, unless the share has a newer one; return whether it did."""
    here = root / "models" / "run.json"
    if not here.is_file() or finished(here.read_bytes()) <= finished(share.read("models/run.json")):
        return False
    files = [path.relative_to(root).as_posix() for path in (root / "models" / "adapter").rglob("*") if path.is_file()]
    for folder in ("models", "models/adapter"):
        share.make_folder(folder)
    with bar("Sending the model", sum((root / path).stat().st_size for path in files)) as note:
        together(lambda path: share.send(path, root / path, note), files)
    share.send("models/run.json", here)
    return True


def finished(run_json: bytes | None) -> str:
    """Return when a run finished, "" when there is none."""
    return str(json.loads(run_json).get("finished") or "") if run_json else ""


def fetch(share: Share, root: Path = ROOT) -> str | None:
    """Bring the results of the job into models/; return when its run finished, None when there is none yet."""
    text = share.read("models/run.json")
    if not text:
        return None
    models, new = root / "models", root / "models" / ".pull"
    shutil.rmtree(new, ignore_errors=True)
    sizes = {path: size for folder in RESULTS for path, size in share.files(folder)}
    with bar("Fetching", sum(sizes.values())) as note:
        together(lambda path: share.fetch(path, new / PurePosixPath(path).relative_to("models"), note), sizes)
    if share.read("models/run.json") != text:
        raise AzureError("A run ended while its results were fetched: run `python infra/azure.py pull` again.")
    (new / "run.json").write_bytes(text)
    for entry in [*(Path(folder).name for folder in RESULTS), "run.json"]:
        old = models / f".{entry}.old"
        if not (new / entry).exists():
            continue
        shutil.rmtree(old, ignore_errors=True)
        if (models / entry).is_dir():
            (models / entry).rename(old)
        (new / entry).replace(models / entry)
        shutil.rmtree(old, ignore_errors=True)
    shutil.rmtree(new)
    return finished(text)
