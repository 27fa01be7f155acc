"""Fetch the model that finetuning/olive-config.yaml names: build the demo, look for a folder, or download from the hub.

--onnx fetches it ready-made for ONNX Runtime instead, into models/onnx-base: a chat before any fine-tuning.

A download goes to the Hugging Face cache (HF_HOME says where), so that all workspaces share it. A gated or private
model needs a token: HF_TOKEN, or a login with `hf auth login`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

# Before anything imports the hub's library.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "finetuning" / "olive-config.yaml"
DEMO = "models/demo"
ONNX = ROOT / "models" / "onnx-base"
PLATFORMS = {"linux": "linux", "win32": "windows", "darwin": "macos"}
# What transformers reads, at the top of the repository; no code, and no second copy of the weights in another format.
FILES = [
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.tiktoken",
    "chat_template*",
    "LICENSE*",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model-*.bin",
    "pytorch_model.bin.index.json",
]


class ModelError(Exception):
    """Something the user can put right; its text says what is wrong, where, and what to do."""


def get_model() -> None:
    """Make the configured model be there. Raises ModelError."""
    model, revision = read_config()
    folder = ROOT / Path(model).expanduser()
    if model == DEMO:
        build_demo(folder)
    elif folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(f"{folder} is no model: it has no config.json. Correct model_path in {CONFIG}.")
        print(f"The model is a folder, and it is there: {folder}")
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) and not model.startswith((".", "models/")):
        print(f"The model lies in {download(model, revision)}")
    else:
        raise ModelError(f"The folder {folder} is not there: put the model there, or correct model_path in {CONFIG}.")
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
        raise ModelError(f"{CONFIG} is not there: restore it with `copier recopy --trust`.") from None
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{CONFIG}: input_model.model_path is unreadable ({error!r}); restore it.") from error
    return str(model), None if revision is None else str(revision)


def read_facts(name: str) -> Any:
    """Read a file of setup/. Raises ModelError."""
    try:
        import yaml

        return yaml.safe_load((ROOT / "setup" / name).read_text(encoding="utf-8"))
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ModelError(f"setup/{name} cannot be read ({error}): restore it with `copier recopy --trust`.") from error


def no_packages(error: ModuleNotFoundError) -> str:
    """Return what to say when this is not the environment's Python."""
    python = ROOT / ".venv" / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
    if not python.exists():
        return f"{sys.executable} has no {error.name}: run setup/create_env.py, and activate the environment it makes."
    return f"{sys.executable} has no {error.name}: use {python}, or activate that environment first."


def build_demo(folder: Path) -> None:
    """Build the demo model unless it is there. Raises ModelError."""
    if (folder / "config.json").is_file():
        print(f"The demo model is there: {folder}")
    elif subprocess.run([sys.executable, str(ROOT / "finetuning" / "tiny_model.py")], check=False).returncode != 0:
        raise ModelError("finetuning/tiny_model.py failed, as shown above: correct that and run this again.")


def download(model: str, revision: str | None) -> str:
    """Download the model at a fixed commit, or complete what is there; return its folder. Raises ModelError."""
    try:
        from huggingface_hub import HfApi, constants, snapshot_download, utils
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    here = find_cached(model, revision) if revision or constants.HF_HUB_OFFLINE else None
    if here:
        return here
    try:
        commit = HfApi().model_info(model, revision=revision, timeout=15).sha
        if revision != commit:
            print(f"Revision {revision or 'main'} of {model} is now {commit}: set it in {CONFIG} to keep this version.")
        utils.disable_progress_bars()
        plan = snapshot_download(model, revision=commit, allow_patterns=FILES, ignore_patterns="*/*", dry_run=True)
        utils.enable_progress_bars()
        names = without_copies([file.filename for file in plan])
        missing = sum(file.file_size or 0 for file in plan if file.will_download and file.filename in names)
        check_disk(Path(constants.HF_HUB_CACHE), missing)
        print(f"Downloading {model}: {missing / 1e9:.2f} GB", flush=True)
        return str(snapshot_download(model, revision=commit, allow_patterns=names, ignore_patterns="*/*"))
    except ModelError:
        raise
    except Exception as error:  # the library lets those of its HTTP client through
        raise ModelError(explain(error, model, revision)) from error


def get_onnx() -> None:
    """Put the model's ready-made ONNX variant for this platform into models/onnx-base. Raises ModelError."""
    try:
        import onnxruntime_genai
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    model, revision = read_config()
    gpu = onnxruntime_genai.is_cuda_available() or onnxruntime_genai.is_dml_available()  # what was installed, runs
    wanted = {"platform": PLATFORMS.get(sys.platform), "device": "gpu" if gpu else "cpu"}
    variants = read_facts("model.yaml")["onnx"]
    variant = next((one for one in variants if wanted.items() <= one.items()), None)
    if variant is None:
        raise ModelError(
            f"{model} has no ready-made ONNX model for {wanted['platform']} and {wanted['device']} in setup/model.yaml:"
            " fine-tune, and finetuning/export.py makes one."
        )
    made_from = {"base_model": model, "hub_id": variant["hub_id"], "hub_revision": variant["revision"]}
    made_from |= {"base_revision": revision, "folder": variant["folder"]}
    if is_made_from(made_from):
        print(f"The ONNX model is there: {ONNX}")
    else:
        unfinished = ONNX.with_name(".onnx-base.new")  # what an interrupted download left there is gone on from
        what = {"repo_id": variant["hub_id"], "revision": variant["revision"], "local_dir": unfinished}
        what["allow_patterns"] = f"{variant['folder']}/*"
        try:
            # asked first: a download that cannot reach the hub takes what lies in local_dir for all there is
            HfApi().model_info(variant["hub_id"], revision=variant["revision"], timeout=15)
            plan = snapshot_download(**what, dry_run=True)
            missing = sum(file.file_size or 0 for file in plan if file.will_download)
            check_disk(unfinished, missing)
            print(f"Downloading {variant['hub_id']}, {variant['folder']}: {missing / 1e9:.2f} GB", flush=True)
            snapshot_download(**what)
            for file in plan:
                if (unfinished / file.filename).stat().st_size != file.file_size:
                    raise OSError(f"{file.filename} is cut off")
        except ModelError:
            raise
        except Exception as error:  # the library lets those of its HTTP client through
            raise ModelError(explain(error, variant["hub_id"], variant["revision"])) from error
        put_in_place(unfinished, variant["folder"], made_from)
        print(f"The ONNX model lies in {ONNX}")
    print(f"Next, in {ROOT}:\n  python inference/console_chat.py --baseonly --engine onnx")


def is_made_from(made_from: dict[str, str | None]) -> bool:
    """Tell whether models/onnx-base is complete and of this model."""
    try:
        mark = json.loads((ONNX / "export.json").read_text(encoding="utf-8"))
        whole = all((ONNX / name).stat().st_size == size for name, size in mark.pop("files").items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(whole and mark == made_from)


def put_in_place(downloaded: Path, folder: str, made_from: dict[str, str | None]) -> None:
    """Mark the folder of a download as complete and make it models/onnx-base; what was there goes at the end."""
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
    """Print the models that the template offers, and which fit into this machine's memory. Raises ModelError."""
    try:
        from rich.console import Console
        from rich.table import Table

        memory = memory_gib()
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    table = Table("model=", "name", "size", "licence", f"fits {memory:.0f} GiB", "ONNX", box=None, pad_edge=False)
    for model in read_facts("models.yaml"):
        if not model["deprecated"]:
            gib = model["parameters"] * 2 / 2**30  # two bytes a weight, as models are published
            fits = "yes" if gib * 1.2 < memory else "no"
            licence = f"{model['licence']}{', gated' if model['gated'] else ''}"
            row = (model["id"], model["name"], f"{gib:.1f} GiB", licence, fits, "ready" if model["onnx"] else "")
            table.add_row(*row)
    Console().print(table)
    print("Fits: to chat in 16 bits, a fifth on top. Training needs more: python finetuning/invoke_olive.py --check")


def memory_gib() -> float:
    """Return the memory of the largest NVIDIA GPU in GiB, and where there is none, that of the machine."""
    import psutil

    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return max(float(line) for line in shown.splitlines()) / 1024
    return float(psutil.virtual_memory().total / 2**30)


def find_cached(model: str, revision: str | None) -> str | None:
    """Return the folder of a model that was downloaded completely, without asking the network."""
    from huggingface_hub import errors, get_cached_repo_tree, snapshot_download, utils

    try:
        tree = [file.path for file in get_cached_repo_tree(model, revision=revision)]
        names = without_copies(list(utils.filter_repo_objects(tree, allow_patterns=FILES, ignore_patterns="*/*")))
        return str(snapshot_download(model, revision=revision, allow_patterns=names, local_files_only=True))
    except (errors.CachedRepoTreeNotFoundError, errors.LocalEntryNotFoundError, errors.HFValidationError, ModelError):
        return None


def without_copies(names: list[str]) -> list[str]:
    """Return the names without the .bin copies of safetensors weights. Raises ModelError when there are no weights."""
    weights = [name for name in names if name.startswith(("model", "pytorch_model")) and "index" not in name]
    if not weights:
        raise ModelError("The model has no weights that transformers reads (model.safetensors): choose another model.")
    safe = any(name.endswith(".safetensors") for name in weights)
    return [name for name in names if not (safe and ".bin" in name)]


def check_disk(cache: Path, missing: int) -> None:
    """Raise ModelError unless the cache has room for `missing` bytes."""
    folder = next(folder for folder in (cache, *cache.parents) if folder.exists())
    free = shutil.disk_usage(folder).free
    if missing > free:
        raise ModelError(
            f"{folder} has {free / 1e9:.1f} GB free and the model needs {missing / 1e9:.1f} more:"
            " make room, or set HF_HOME to a folder on another disk."
        )


def explain(error: Exception, model: str, revision: str | None) -> str:
    """Return one sentence for what the hub's library raised."""
    from huggingface_hub import constants, errors

    cause = error.__cause__ if isinstance(error, errors.DryRunError | errors.LocalEntryNotFoundError) else None
    error = cause if isinstance(cause, Exception) else error
    status = error.response.status_code if isinstance(error, errors.HfHubHTTPError) else 0
    page = f"{constants.ENDPOINT}/{model}"
    if isinstance(error, errors.GatedRepoError):
        return f"{model} is gated: accept its licence on {page}, then set HF_TOKEN to a token of yours and try again."
    if isinstance(error, errors.RevisionNotFoundError):
        return f"{model} has no revision {revision}: correct revision in {CONFIG}; {page}/commits lists them."
    if isinstance(error, errors.RepositoryNotFoundError | errors.HFValidationError):
        return f"{page} does not exist or is private: correct model_path in {CONFIG}, or set HF_TOKEN if it is private."
    if status in (401, 403):
        return f"{constants.ENDPOINT} refuses the token: set HF_TOKEN to a valid one, or log in with `hf auth login`."
    if isinstance(error, errors.OfflineModeIsEnabled):
        return f"{model} is not on this machine and HF_HUB_OFFLINE forbids the download: unset it and try again."
    if isinstance(error, OSError) and error.errno == errno.ENOSPC:
        return f"The disk is full: make room in {constants.HF_HUB_CACHE}, or set HF_HOME to a folder on another disk."
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return f"{constants.ENDPOINT} cannot be used ({reason}): check the connection and run this again; it goes on."


def main() -> int:
    """Read the command line and fetch the model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--onnx", action="store_true", help="the ready-made ONNX model for this platform, to chat with")
    what.add_argument("--list", action="store_true", help="show the models that there are, and which fit this machine")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        (show_list if args.list else get_onnx if args.onnx else get_model)()
    except KeyboardInterrupt:
        print("\nInterrupted: run the same command again, it goes on from here.", file=sys.stderr)
        return 130
    except ModelError as error:
        if args.debug:
            raise
        print(f"get_model: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
