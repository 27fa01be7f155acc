"""Synchronise the workspace with its file share: send changes, and download results.

The share has a manifest of the sent files with their hashes. A file is removed from the manifest before it is sent,
and added again once it is complete: after an interruption, the next call sends the rest.
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
# Never sent, even if git does not ignore it: environments, caches, and the repository itself.
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
NOTE = 100  # files between writes of the manifest: the maximum that is sent again after a crash
RESULTS = ("models/adapter", "models/report")  # folders; models/run.json comes last, when they are complete


def send(share: Share, root: Path = ROOT) -> tuple[int, int]:
    """Send changed files, remove deleted ones; return how many of each. Raises AzureError."""
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
            level = [folder for folder in needed if folder.count("/") + 1 == depth]  # parents before their folders
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
    """Return the files to send: those that git does not ignore, and the data files even if ignored."""
    found = set(dataset_files(root))
    for path in not_ignored(root):
        parts = PurePosixPath(path).parts
        ours = parts[0] == "models" or re.fullmatch(r"\.env.*|.*\.config\.json", parts[-1])
        if not ours and not NEVER & set(parts) and (root / path).is_file():
            found.add(path)
    return sorted(found)


def not_ignored(root: Path) -> Iterator[str]:
    """Yield the files that git does not ignore, also if the workspace is not a repository."""
    git = ["git", "-C", str(root), "ls-files", "--others", "--exclude-standard", "-z"]
    try:
        done = subprocess.run([*git, "--cached"], capture_output=True, encoding="utf-8", check=False)
        if done.returncode:  # no repository: an empty one elsewhere applies the same .gitignore
            with tempfile.TemporaryDirectory() as folder:
                subprocess.run(["git", "init", "--quiet", "--bare", folder], check=True, capture_output=True)
                env = {**os.environ, "GIT_DIR": folder, "GIT_WORK_TREE": str(root)}
                done = subprocess.run(git, env=env, capture_output=True, encoding="utf-8", check=True)
    except (OSError, subprocess.CalledProcessError) as error:
        raise AzureError(
            f"git does not work ({error}), and decides which files to send: check `git --version`."
        ) from error
    yield from (path for path in done.stdout.split("\0") if path and not path.endswith("/"))


def dataset_files(root: Path) -> Iterator[str]:
    """Yield the data files that the settings name. Raises AzureError for paths that the job cannot see."""
    config = yaml.safe_load((root / "finetuning" / "olive-config.yaml").read_text(encoding="utf-8"))
    model = str(config["input_model"]["model_path"])
    is_folder = (root / model).is_dir() or model.startswith((".", "/", "~", "models/")) or re.match(r"[A-Za-z]:", model)
    if is_folder and model != "models/demo":  # which the job builds
        raise AzureError(
            f"The model is the folder {model}, which the job cannot see: choose one of the hub; "
            "`python setup/get_model.py --list` shows some."
        )
    for part in config["data_configs"]:
        rows = part["load_dataset_config"]
        for named in [rows.get("train_file"), rows.get("held_out_file")] if not rows.get("dataset_name") else []:
            for file in filter(None, named if isinstance(named, list) else [named]):
                if not (root / file).resolve().is_relative_to(root.resolve()):
                    raise AzureError(f"{file} in olive-config.yaml is outside the workspace: copy it to dataset/.")
                for path in files_of(root, file):
                    yield path.relative_to(root).as_posix()


def files_of(root: Path, named: str) -> list[Path]:
    """Return the files that a path, a folder or a pattern names; what exists is never taken for a pattern."""
    path = root / named
    if path.is_dir():
        return [file for file in sorted(path.rglob("*")) if file.is_file()]
    start = next(parent for parent in [path, *path.parents] if parent.exists())
    return [start] if start.is_file() else [*start.glob(str(path.relative_to(start)))] if start != path else []


def fingerprint(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def manifest(share: Share) -> dict[str, str]:
    """Return the manifest; {} if there is none or it is damaged: then everything is sent again."""
    with contextlib.suppress(ValueError):
        found = json.loads(share.read(MANIFEST) or b"{}")
        if isinstance(found, dict):
            return found
    return {}


def write_manifest(share: Share, entries: dict[str, str]) -> None:
    """Write the manifest of the complete files on the share."""
    text = json.dumps(entries, indent=0, sort_keys=True).encode()
    share.write(MANIFEST, io.BytesIO(text), len(text))


def together(action: Callable[[str], object], paths: Iterable[str], now_and_then: Callable[[], object] = bool) -> None:
    """Call an action for every path, several in parallel; the first error stops all."""
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
    """Show a progress bar in a terminal; yield a function that advances it by bytes."""
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task(title, total=size)
        yield lambda piece: progress.advance(task, piece)


def send_results(share: Share, root: Path = ROOT) -> bool:
    """Send the tuned model of this machine, unless the share has a newer one; return whether it was sent."""
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
    """Return when a run finished, "" if there is none."""
    return str(json.loads(run_json).get("finished") or "") if run_json else ""


def fetch(share: Share, root: Path = ROOT) -> str | None:
    """Download the results of the job to models/; return when its run finished, None if there is none yet."""
    text = share.read("models/run.json")
    if not text:
        return None
    models, new = root / "models", root / "models" / ".pull"
    shutil.rmtree(new, ignore_errors=True)
    sizes = {path: size for folder in RESULTS for path, size in share.files(folder)}
    targets = {path: new / PurePosixPath(path).relative_to("models") for path in sizes}
    for path, target in targets.items():  # names come from the share, which others may write to
        if ".." in PurePosixPath(path).parts or "\\" in path or not target.resolve().is_relative_to(new.resolve()):
            raise AzureError(
                f"The share has a file named {path}, which would be written outside of models/: nothing was "
                "downloaded; find out who can write to the share, and delete the file in the portal."
            )
    with bar("Downloading", sum(sizes.values())) as note:
        together(lambda path: share.fetch(path, targets[path], note), sizes)
    if share.read("models/run.json") != text:
        raise AzureError("A run ended while its results were downloaded: run `python infra/azure.py pull` again.")
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
