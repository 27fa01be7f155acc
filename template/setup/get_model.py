"""Fetch the model that finetuning/olive-config.yaml names: build the demo, look for a folder, or download from the hub.

A download goes to the Hugging Face cache (HF_HOME says where), so that all workspaces share it. A gated or private
model needs a token: HF_TOKEN, or a login with `hf auth login`.
"""

from __future__ import annotations

import argparse
import errno
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

# Before anything imports the hub's library.
os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"

ROOT = Path(__file__).resolve().parents[1]
CONFIG = ROOT / "finetuning" / "olive-config.yaml"
DEMO = "models/demo"
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
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args()
    try:
        get_model()
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
