"""Find the folder of the model, for get_model.py, the check, the training, the chat and the export.

A model is a folder of the user, or a snapshot in the Hugging Face cache (set by HF_HOME or HF_HUB_CACHE). The hub is
never asked here: setup/get_model.py downloads, and looks for newer commits of a branch.

finetuning/ and inference/ import this file by its path, so it needs only the standard library and huggingface_hub.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import site
import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

DEMO = "models/demo"
INDEX = "model.safetensors.index.json"
# The files that transformers reads, at the top of a repository: no code, no other weight formats.
FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "tekken.json",
    "chat_template*",
    "LICENSE*",
    "model.safetensors",
    "model-*.safetensors",
    INDEX,
)
ROOT = Path(__file__).resolve().parents[1]
VOCABULARY = ("tokenizer.*", "vocab.*", "*.model", "*.tiktoken", "tekken.json")
# Downloaded but not required: a cache filled by another tool may lack these files.
EXTRA = ("LICENSE*",)
EXTRA_BESIDE_TOKENIZER_JSON = ("vocab.*", "merges.txt", "*.model", "*.tiktoken", "tekken.json")
POINTER = b"version https://git-lfs"  # what git keeps of a large file that was not fetched
COMMIT = re.compile(r"[0-9a-f]{40}")
CONVERT = (
    "convert them with transformers (from_pretrained, then save_pretrained), or on "
    "huggingface.co/spaces/safetensors/convert"
)
GET = "run `python setup/get_model.py`"


def prepare_process() -> None:
    """Import the packages of this environment first, and give libraries a home folder that they can write to.

    Called at the import of this file, which every script does before it imports a library.
    """
    others = [str(Path(folder).absolute()) for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    if Path(sys.prefix, "conda-meta").is_dir():  # a venv does not see the packages in ~/.local
        others.append(site.getusersitepackages())
    sys.path.sort(key=lambda folder: folder in others and ROOT not in Path(folder).parents)
    home = Path(os.path.expanduser("~"))  # noqa: PTH111 - Path's fails for an account without one
    # In a container an account may have none, or /. Without HOME, libraries make a folder named ~.
    if not (home / ".cache").is_dir() and not (home.is_absolute() and os.access(home, os.W_OK)):
        os.environ["HOME"] = str(ROOT / "models" / "home")


prepare_process()


class ModelError(Exception):
    """An error about the model: what is wrong, where, and what to do, in one sentence."""


class OldWeightsError(ModelError):
    """The model is whole, but its weights are not safetensors."""


class ModelMissingError(ModelError):
    """The model is missing or incomplete on this machine; setup/get_model.py fixes that."""


@dataclass(frozen=True)
class Found:
    """A complete model on this machine."""

    folder: Path
    commit: str | None = None  # of its repository on the hub; None: a folder of the user
    listed: bool = True  # whether the hub's list of the files was available for comparison


def find_model(model: str, revision: str | None, workspace: Path) -> Found:
    """Return the folder of a complete model.

    `model` is a folder, absolute or relative to the workspace, or a repository id on the hub; `revision` is a commit,
    branch or tag of that repository; None means its main branch. Raises ModelError.
    """
    try:
        folder = workspace / Path(os.path.expanduser(model))  # noqa: PTH111 - Path's fails for ~ and a name that nobody has
        if folder.is_dir():
            check_folder(folder, model)
            return Found(folder)
        if model == DEMO:
            raise ModelMissingError(f"{DEMO} is not on this machine yet: {GET}, which builds it.")
        if folder.is_file():
            raise ModelError(
                f"{folder} is a file: set model_path to the folder of a model (config.json, tokenizer.json, "
                f"model.safetensors){', a GGUF file cannot be trained' if folder.suffix == '.gguf' else ''}."
            )
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", model) or model.startswith((".", "models/")):
            raise ModelError(
                f"The folder {folder} is not there: put the model there, or correct model_path in "
                "finetuning/olive-config.yaml."
            )
        return find_snapshot(model, revision)
    except OSError as error:
        raise ModelError(
            f"{error.filename} cannot be read ({error.strerror}): give yourself read permission."
        ) from error


def check_folder(folder: Path, model: str) -> None:
    """Raise ModelError unless the user's folder contains a complete model."""
    try:
        names = needed([path.name for path in folder.iterdir()], str(folder))
    except ModelError as error:
        if model == DEMO:
            raise ModelMissingError(f"{DEMO} is not whole: {GET}, which builds it again.") from error
        raise
    for name, fault in faults(folder, names, {}).items():
        if model == DEMO:
            raise ModelMissingError(f"{DEMO} is not whole ({name} {fault}): {GET}, which builds it again.")
        what = f"run `git lfs pull` in {folder}" if "Git LFS" in fault else "copy that file there again"
        raise ModelError(f"{folder / name} {fault}: {what}.")
    if (folder / "adapter_config.json").is_file():
        raise ModelError(
            f"{folder} holds an adapter beside a model, and transformers would load the adapter's own base model: "
            "move adapter_config.json and adapter_model.safetensors to another folder."
        )


def find_snapshot(model: str, revision: str | None) -> Found:
    """Return the complete snapshot of a repository in the hub's cache. Raises ModelError."""
    from huggingface_hub import errors

    try:
        snapshot, sizes = cached(model, revision)
    except errors.HFValidationError:
        raise ModelError(
            f"{model} is neither a folder nor an id of the Hugging Face hub: correct model_path."
        ) from None
    if snapshot is None:
        raise ModelMissingError(not_here(model, revision))
    try:
        names = needed([path.name for path in snapshot.iterdir()] if sizes is None else sizes, model)
    except ModelError as error:
        if sizes is not None:
            raise
        part = (
            f"{model} is only partly on this machine: {GET}, which downloads the rest."  # the hub may have more files
        )
        if isinstance(error, OldWeightsError):
            part = f"{model} is on this machine with pytorch_model.bin, and safetensors are needed: {GET}, which "
            part += "downloads them if the hub has them."
        raise ModelMissingError(part) from error
    extra = EXTRA + (EXTRA_BESIDE_TOKENIZER_JSON if "tokenizer.json" in names else ())
    names = [name for name in names if not matches(name, extra)]
    for name, fault in faults(snapshot, names, sizes or {}).items():
        raise ModelMissingError(f"{model} is not whole on this machine ({name} {fault}): {GET}, which repairs it.")
    return Found(snapshot, snapshot.name, listed=sizes is not None)


def cached(model: str, revision: str | None) -> tuple[Path | None, dict[str, int] | None]:
    """Return the snapshot in the hub's cache, and the hub's list of its files with sizes in bytes.

    Each is None if it is missing: caches of older or other tools have no list.
    """
    from huggingface_hub import errors, get_cached_repo_tree, try_to_load_from_cache

    config = try_to_load_from_cache(model, "config.json", revision=revision)
    if not isinstance(config, str):
        return None, None
    snapshot = Path(config).parent
    try:
        return snapshot, {file.path: file.size for file in get_cached_repo_tree(model, revision=snapshot.name)}
    except (errors.CachedRepoTreeNotFoundError, OSError):
        return snapshot, None


def snapshot_of(model: str, commit: str) -> Path:
    """Return the folder of a commit in the cache, which may not exist yet."""
    from huggingface_hub import constants

    return Path(constants.HF_HUB_CACHE) / f"models--{model.replace('/', '--')}" / "snapshots" / commit


def not_here(model: str, revision: str | None) -> str:
    """Return the error for a model that is not in the cache, or only at other commits."""
    others = [path.parent for path in snapshot_of(model, "").glob("*/config.json")]
    if not others:
        return f"{model} is not on this machine yet: {GET}."
    if revision and COMMIT.fullmatch(revision):
        return (
            f"{model} is on this machine, but not its commit {revision}: {GET} with revision: {revision} in "
            "finetuning/olive-config.yaml."
        )
    newest = max(others, key=lambda folder: folder.stat().st_mtime).name
    return (
        f"{model} is on this machine, but not known as {revision or 'main'}: {GET}, or set revision: {newest}, which "
        "is here, in finetuning/olive-config.yaml."
    )


def needed(names: Collection[str], where: str) -> list[str]:
    """Return the files of a repository that make up the model. Raises ModelError if they are not a model."""
    chosen = [name for name in names if matches(name, FILES) and "/" not in name]
    weights = "model.safetensors" in chosen or INDEX in chosen
    if "adapter_config.json" in names and not weights:
        raise ModelError(
            f"{where} is an adapter, not a model: set model_path to the model it was trained on, which its "
            "adapter_config.json names (base_model_name_or_path)."
        )
    if "model_index.json" in names:
        raise ModelError(f"{where} is a pipeline of diffusers, which makes images: set model_path to a text model.")
    if not weights and "config.json" in names and any(name.startswith("pytorch_model") for name in names):
        raise OldWeightsError(
            f"{where} has its weights as pytorch_model.bin alone, and safetensors are needed, which cannot run code: "
            f"{CONVERT}, or take a revision or a model with model.safetensors."
        )
    if not weights and any(name.endswith(".gguf") for name in names):
        raise ModelError(
            f"{where} has GGUF files, which cannot be trained: set model_path to the model that they were made from, "
            "with model.safetensors."
        )
    if "config.json" not in names:
        empty = "is empty" if not names else "is no model: it has no config.json"
        raise ModelError(f"{where} {empty}; put a model there, or correct model_path.")
    if not weights:
        raise ModelError(f"{where} has no weights that transformers reads (model.safetensors): choose another model.")
    if "model.safetensors" in chosen:  # transformers reads it, and ignores a sharded copy
        chosen = [name for name in chosen if not fnmatch(name, "model-*.safetensors") and name != INDEX]
    if not any(matches(name, VOCABULARY) for name in chosen):
        raise ModelError(f"{where} has no tokenizer (tokenizer.json): copy or choose a model that has one.")
    return chosen


def matches(name: str, patterns: Collection[str]) -> bool:
    """Return whether a file's name matches one of the patterns."""
    return any(fnmatch(name, pattern) for pattern in patterns)


def faults(folder: Path, names: Collection[str], sizes: Mapping[str, int]) -> dict[str, str]:
    """Return what is wrong with the files of a model, by name: `is missing`, `is cut off or damaged`, or a pointer.

    `sizes` are bytes, as far as known.
    """
    parts: list[str] = []
    if INDEX in names:
        with contextlib.suppress(OSError, ValueError, KeyError, AttributeError):
            index = json.loads((folder / INDEX).read_text(encoding="utf-8"))
            parts = sorted(set(index["weight_map"].values()) - set(names))
    found = {}
    for name in [*names, *parts]:
        file = folder / name
        if not file.is_file():
            found[name] = "is missing"
        elif is_pointer(file):
            found[name] = "is a Git LFS pointer, not the file itself"
        elif sizes.get(name, file.stat().st_size) != file.stat().st_size or not is_whole(file):
            found[name] = "is cut off or damaged"
    return found


def is_pointer(file: Path) -> bool:
    """Return whether git has written a pointer to a large file instead of the file."""
    with file.open("rb") as stream:
        return stream.read(len(POINTER)) == POINTER


def is_whole(file: Path) -> bool:
    """Return whether JSON can be parsed, and weights have the length that their header gives."""
    try:
        if file.suffix == ".safetensors":
            header = weights_header(file)
            end = max((entry["data_offsets"][1] for entry in header.values()), default=0)
            with file.open("rb") as stream:
                return file.stat().st_size == 8 + int.from_bytes(stream.read(8), "little") + end
        if file.name in ("config.json", INDEX):
            return isinstance(json.loads(file.read_text(encoding="utf-8")), dict)
    except (OSError, ValueError, KeyError, TypeError, AttributeError, MemoryError):
        return False
    return True


def weights_header(file: Path) -> dict[str, Any]:
    """Return the tensors of a safetensors file, each with `dtype`, `shape` and `data_offsets` (bytes).

    The format: 8 bytes for the header's length, the header as JSON, the data.
    """
    with file.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if length > file.stat().st_size:
            raise ValueError(f"{file} is cut off")
        header: dict[str, Any] = json.loads(stream.read(length))
    header.pop("__metadata__", None)
    return header
