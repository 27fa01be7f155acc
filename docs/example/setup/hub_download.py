"""Downloads from the hub: into its cache, the newest commit of a revision and only what is missing there.

get_model.py uses this file. The libraries are imported late: a Python without them gets a sentence of its own.
"""

from __future__ import annotations

import contextlib
import errno
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from model_folder import Found, ModelError, faults, find_model, needed, snapshot_of
from visible import visible

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "finetuning" / "olive-config.yaml"
WAIT = 15  # seconds for the hub's answer about a repository
LEFT_ALONE = 600  # seconds after which an unchanged file counts as abandoned


def download(model: str, revision: str | None, here: Found | None) -> Found:
    """Download the newest commit of a revision from the hub, and return the model. Raises ModelError.

    `here` is the revision's commit in the cache. It is used if the hub need not or cannot be asked.
    """
    from huggingface_hub import HfApi, constants

    if here and (constants.HF_HUB_OFFLINE or (here.listed and here.commit == revision)):
        if here.commit != revision:
            print(f"{model} at {revision or 'main'} is commit {here.commit} here; offline, no newer one is looked for.")
        return here
    try:
        about = HfApi().model_info(model, revision=revision, files_metadata=True, timeout=WAIT)
    except Exception as error:  # the library passes on HTTP client errors
        if here is None:
            raise ModelError(explain(error, model, revision)) from error
        print(f"{visible(explain(error, model, revision))} The commit that is here is used: {here.commit}.")
        return here
    commit, sizes = visible(about.sha), {file.rfilename: file.size or 0 for file in about.siblings or []}
    names = needed(sizes, model)
    if revision != commit:
        moved = f" (here it was {here.commit})" if here and here.commit != commit else ""
        print(f"{model} at {revision or 'main'} is commit {commit} now{moved}.")
        print(f"To keep this version, set revision to that commit in {CONFIG}.")
    try:
        fetch(model, commit, {name: sizes[name] for name in names})
        if revision != commit:  # only now: until the new commit is complete, the branch keeps the old one
            HfApi().resolve_revision(model, revision=revision)
    except ModelError:
        raise
    except Exception as error:
        raise ModelError(explain(error, model, revision)) from error
    return find_model(model, revision, ROOT)


def fetch(model: str, commit: str, sizes: dict[str, int]) -> None:
    """Download the files that the cache lacks, and damaged ones again. `sizes` are bytes by file name.

    Raises ModelError if the disk is too small, and the errors of the hub's library.
    """
    from huggingface_hub import constants, get_session, hf_hub_download, snapshot_download, utils

    get_session().event_hooks["request"].append(limit_wait)
    remove_leftovers(model)
    snapshot = snapshot_of(model, commit)
    lacking = faults(snapshot, sizes, sizes)
    missing = sum(sizes.get(name, 0) for name in lacking)
    check_disk(Path(constants.HF_HUB_CACHE), missing)
    if lacking:
        if "config.json" in lacking:
            check_kind(model, commit)
        print(f"Downloading {model}: {size(missing)}", flush=True)
    else:
        utils.disable_progress_bars()
    snapshot_download(model, revision=commit, allow_patterns=[*sizes])
    for name in faults(snapshot, sizes, sizes):  # the library does not check existing files
        hf_hub_download(model, name, revision=commit, force_download=True)
        if faults(snapshot, [name], sizes):  # this does not replace a copy (on Windows there are no links)
            (snapshot / name).unlink(missing_ok=True)
            hf_hub_download(model, name, revision=commit)


def check_kind(model: str, commit: str) -> None:
    """Raise ModelError if transformers cannot load this kind of model to train it, by its config.json on the hub.

    If that cannot be asked, the check does it after the download.
    """
    from huggingface_hub import get_session, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    config = get_session().get(hf_hub_url(model, "config.json", revision=commit), headers=build_hf_headers())
    if config.status_code == 200:
        command = [sys.executable, "-m", "planning.text_model", model]
        asked = subprocess.run(
            command, cwd=ROOT / "finetuning", input=config.text, capture_output=True, encoding="utf-8", check=False
        )
        if asked.stdout:
            raise ModelError(asked.stdout)


def limit_wait(request: Any) -> None:
    """Set a timeout on requests for which the library has none (the list of files): it would wait forever."""
    limits = request.extensions["timeout"]
    request.extensions["timeout"] = {kind: limits[kind] or WAIT for kind in limits}


def remove_leftovers(model: str) -> None:
    """Remove partial files of a killed download, which the library never resumes.

    A file that is being downloaded is locked; if locks do not work (some network disks), its age decides.
    """
    from filelock import FileLock, Timeout
    from huggingface_hub import constants

    repository = snapshot_of(model, "").parent
    for file in repository.glob("blobs/*.incomplete"):
        lock = Path(constants.HF_HUB_CACHE) / ".locks" / repository.name / f"{file.name.partition('.')[0]}.lock"
        with contextlib.suppress(OSError, Timeout), FileLock(lock, timeout=0):
            if time.time() - file.stat().st_mtime > LEFT_ALONE:
                file.unlink()


def size(number: int) -> str:
    """Return bytes in GB, small ones in MB."""
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"


def check_disk(cache: Path, missing: int) -> None:
    """Raise ModelError unless the cache has room for `missing` bytes."""
    folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ModelError(
            f"{folder} has {free / 1e9:.1f} GB free and the model needs {missing / 1e9:.1f} more:"
            " free some space, or set HF_HOME to a folder on another disk."
        )


def explain(error: BaseException, model: str, revision: str | None) -> str:
    """Return one sentence for an error of the hub's library."""
    from huggingface_hub import constants, errors

    while isinstance(error.__cause__, Exception) and not isinstance(error, errors.HfHubHTTPError):
        error = error.__cause__  # the library's message is about its options
    kinds = {kind.__name__ for kind in type(error).__mro__}  # names, since its HTTP client differs between releases
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    hub, page = constants.ENDPOINT, f"{constants.ENDPOINT}/{model}"
    again = "run this again, it keeps what is complete"
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated: accept its licence on {page}, then set HF_TOKEN to a token of yours and try again."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {revision}: correct revision in {CONFIG}; {page}/commits lists them."
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"{page} does not exist or is private: correct model_path in {CONFIG}, or set HF_TOKEN if it is private."
    if isinstance(error, errors.EntryNotFoundError):
        return f"{model} lacks a file that its own list names: choose another revision or model in {CONFIG}."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{model} is not whole on this machine and HF_HUB_OFFLINE forbids the download: unset it and try again."
    if status in (401, 403):
        return f"{hub} refuses the token: set HF_TOKEN to a valid one, or log in with `hf auth login`."
    if status == 429:
        return f"{hub} takes no more requests for now (429): wait some minutes, or set HF_TOKEN, then {again}."
    if status >= 500:
        return f"{hub} is out of order ({status}): wait, then {again}."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full: free space in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk."
    if isinstance(error, OSError) and error.filename:
        return f"{error.filename} cannot be written ({error.strerror}): set HF_HOME to a folder of your own."
    if "TimeoutException" in kinds:
        return f"{hub} does not answer in time: check the connection, then {again}."
    if kinds & {"ReadError", "ProtocolError", "RemoteProtocolError"} or "Consistency check" in str(error):
        return f"{hub} broke off the connection: {again}."
    reason = (str(error).strip().splitlines() or ["no reason given"])[0].rstrip(".:")
    return f"{hub} cannot be used ({reason}): check the connection, then {again}."
