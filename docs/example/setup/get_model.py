"""Get the model that finetuning/olive-config.yaml names: build the demo, check a folder, or download from the hub.

--onnx downloads its ready-made ONNX Runtime version to models/onnx-base instead, to chat before fine-tuning.

Downloads go to the Hugging Face cache (set by HF_HOME), so all workspaces share them. Only this script looks for the
newest commit of a branch: the check, the training and the chat use the commit that is on this machine. A gated or
private model needs a token: HF_TOKEN, or a login with `hf auth login`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "setup"))
import no_telemetry  # noqa: E402, F401 - before any library
from model_folder import (  # noqa: E402 - shared with finetuning/ and inference/
    DEMO,
    Found,
    ModelError,
    ModelMissingError,
    faults,
    find_model,
    needed,
    snapshot_of,
)

CONFIG = ROOT / "finetuning" / "olive-config.yaml"
ONNX = ROOT / "models" / "onnx-base"
PLATFORMS = {"linux": "linux", "win32": "windows", "darwin": "macos"}
WAIT = 15  # seconds for the hub's answer about a repository
LEFT_ALONE = 600  # seconds after which an unchanged file counts as abandoned


def get_model() -> None:
    """Get the configured model. Raises ModelError."""
    model, revision = read_config()
    try:
        found = find_model(model, revision, ROOT)
    except ModelMissingError:
        found = None
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    if model == DEMO:
        build_demo(found)
    elif found and found.commit is None:
        print(f"The model is the folder {found.folder}")
    else:
        print(f"The model is in {download(model, revision, found).folder}")
    print(f"Next, in {ROOT}:\n  python finetuning/invoke_olive.py --check")


def read_config() -> tuple[str, str | None]:
    """Return the model's hub id or folder, and its revision. Raises ModelError."""
    try:
        import yaml
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    try:
        settings = yaml.safe_load(CONFIG.read_text(encoding="utf-8"))["input_model"]
        model, revision = settings["model_path"], (settings.get("load_kwargs") or {}).get("revision")
    except FileNotFoundError:
        raise ModelError(
            f"{CONFIG} is not there: restore it with `copier recopy --trust --vcs-ref :current:`."
        ) from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(
            f"{CONFIG}: input_model.model_path cannot be read: restore it with git or "
            "`copier recopy --trust --vcs-ref :current:`."
        ) from error
    return str(model), None if revision is None else str(revision)


def read_facts(name: str) -> Any:
    """Read a YAML file in setup/. Raises ModelError."""
    try:
        import yaml

        return yaml.safe_load((ROOT / "setup" / name).read_text(encoding="utf-8"))
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(
            f"setup/{name} cannot be read ({error}): restore it with `copier recopy --trust --vcs-ref :current:`."
        ) from error


def no_packages(error: ModuleNotFoundError) -> str:
    """Return the error for a Python other than the environment's."""
    python = ROOT / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        return f"{sys.executable} has no {error.name}: run setup/create_env.py, and activate the environment it makes."
    return f"{sys.executable} has no {error.name}: use {python}, or activate that environment first."


def build_demo(found: Found | None) -> None:
    """Build the demo model unless it exists. Raises ModelError."""
    if found:
        print(f"The demo model is there: {found.folder}")
        return
    command = [sys.executable, "-m", "training.tiny_model"]
    env = {**os.environ, "PYTHONSAFEPATH": ""}  # -m finds it in the current folder
    if subprocess.run(command, cwd=ROOT / "finetuning", env=env, check=False).returncode != 0:
        raise ModelError("finetuning/training/tiny_model.py failed: fix the error shown above, and run this again.")


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
        print(f"{explain(error, model, revision)} The commit that is here is used: {here.commit}.")
        return here
    commit, sizes = str(about.sha), {file.rfilename: file.size or 0 for file in about.siblings or []}
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


def get_onnx() -> None:
    """Download the model's ready-made ONNX variant for this platform to models/onnx-base. Raises ModelError."""
    try:
        import onnxruntime_genai
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    model, revision = read_config()
    gpu = onnxruntime_genai.is_cuda_available() or onnxruntime_genai.is_dml_available()  # the package decides
    wanted = {"platform": PLATFORMS.get(sys.platform), "device": "gpu" if gpu else "cpu"}
    variants = read_facts("model.yaml")["onnx"]
    variant = next((one for one in variants if wanted.items() <= one.items()), None)
    if variant is None:
        raise ModelError(
            f"{model} has no ready-made ONNX model for {wanted['platform']} and {wanted['device']} in setup/model.yaml:"
            " fine-tune, then create one with `python finetuning/export.py`."
        )
    made_from = {"base_model": model, "hub_id": variant["hub_id"], "hub_revision": variant["revision"]}
    made_from |= {"base_revision": revision, "folder": variant["folder"]}
    if is_made_from(made_from):
        print(f"The ONNX model is there: {ONNX}")
    else:
        unfinished = ONNX.with_name(".onnx-base.new")  # an interrupted download is resumed there
        what = {"repo_id": variant["hub_id"], "revision": variant["revision"], "local_dir": unfinished}
        what["allow_patterns"] = f"{variant['folder']}/*"
        try:
            # ask first: a download that cannot reach the hub takes local_dir for complete
            HfApi().model_info(variant["hub_id"], revision=variant["revision"], timeout=15)
            plan = snapshot_download(**what, dry_run=True)
            missing = sum(file.file_size or 0 for file in plan if file.will_download)
            check_disk(unfinished, missing)
            print(f"Downloading {variant['hub_id']}, {variant['folder']}: {size(missing)}", flush=True)
            snapshot_download(**what)
            for file in plan:
                if (unfinished / file.filename).stat().st_size != file.file_size:
                    raise OSError(f"{file.filename} is cut off")
        except ModelError:
            raise
        except Exception as error:  # the library passes on HTTP client errors
            raise ModelError(explain(error, variant["hub_id"], variant["revision"])) from error
        put_in_place(unfinished, variant["folder"], made_from)
        print(f"The ONNX model is in {ONNX}")
    print(f"Next, in {ROOT}:\n  python inference/console_chat.py --baseonly --engine onnx")


def is_made_from(made_from: dict[str, str | None]) -> bool:
    """Return whether models/onnx-base is complete and made from this model."""
    try:
        mark = json.loads((ONNX / "export.json").read_text(encoding="utf-8"))
        whole = all((ONNX / name).stat().st_size == size for name, size in mark.pop("files").items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(whole and mark == made_from)


def put_in_place(downloaded: Path, folder: str, made_from: dict[str, str | None]) -> None:
    """Mark a download as complete and rename it to models/onnx-base; the previous folder is removed at the end."""
    new, old = downloaded / folder, ONNX.with_name(".onnx-base.old")
    sizes = {path.name: path.stat().st_size for path in new.iterdir() if path.is_file()} if new.is_dir() else {}
    if "genai_config.json" not in sizes:
        raise ModelError(f"The folder {folder} holds no genai_config.json: correct setup/model.yaml.")
    (new / "export.json").write_text(json.dumps(made_from | {"files": sizes}, indent=2) + "\n", encoding="utf-8")
    shutil.rmtree(old, ignore_errors=True)
    if ONNX.exists():
        ONNX.rename(old)
    new.rename(ONNX)
    for done in (old, downloaded):
        shutil.rmtree(done, ignore_errors=True)


def show_list() -> None:
    """Print the template's models, and which fit into this machine's memory. Raises ModelError."""
    try:
        from rich.console import Console
        from rich.table import Table

        memory = memory_gib()
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    table = Table("model=", "name", "size", "licence", f"fits {memory:.0f} GiB", "ONNX", box=None, pad_edge=False)
    for model in read_facts("models.yaml"):
        if not model["deprecated"]:
            gib = model["parameters"] * 2 / 2**30  # two bytes per weight, as published
            fits = "yes" if gib * 1.2 < memory else "no"
            licence = f"{model['licence']}{', gated' if model['gated'] else ''}"
            row = (model["id"], model["name"], f"{gib:.1f} GiB", licence, fits, "ready" if model["onnx"] else "")
            table.add_row(*row)
    Console().print(table)
    print("Fits: to chat in 16 bits, plus a fifth. Training needs more: python finetuning/invoke_olive.py --check")


def memory_gib() -> float:
    """Return the memory of the largest NVIDIA GPU in GiB, or of the machine if there is none."""
    import psutil

    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return max(float(line) for line in shown.splitlines()) / 1024
    return float(psutil.virtual_memory().total / 2**30)


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


def main() -> int:
    """Parse the command line and get the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--onnx", action="store_true", help="the ready-made ONNX model for this platform, to chat with")
    what.add_argument("--list", action="store_true", help="list the models, and which fit this machine")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        (show_list if args.list else get_onnx if args.onnx else get_model)()
    except ModelError as error:
        if args.debug:
            raise
        print(f"get_model: {error}", file=sys.stderr)
        return 1
    return 0


def stop(_number: int, _frame: object) -> None:
    """Stop at once: the library would first wait for unfinished files, which can take hours."""
    print("\nInterrupted: run the same command again, it keeps what is complete.", file=sys.stderr, flush=True)
    os._exit(130)


if __name__ == "__main__":
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, stop)
    sys.exit(main())
