"""Get the model that finetuning/olive-config.yaml names: build the demo, check a folder, or download from the hub.

--onnx downloads its ready-made ONNX Runtime version to models/onnx-base instead, to chat before fine-tuning.

Downloads go to the Hugging Face cache (set by HF_HOME), so all workspaces share them. Only this script looks for the
newest commit of a branch: the check, the training and the chat use the commit that is on this machine. A gated or
private model needs a token: HF_TOKEN, or a login with `hf auth login`.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "setup"))
import no_telemetry  # noqa: E402, F401 - before any library
from hub_download import CONFIG, WAIT, check_disk, download, explain, size  # noqa: E402
from model_folder import DEMO, Found, ModelError, ModelMissingError, find_model  # noqa: E402
from visible import visible  # noqa: E402

ONNX = ROOT / "models" / "onnx-base"


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


def get_onnx() -> None:
    """Download the model's ready-made ONNX variant for this machine to models/onnx-base. Raises ModelError."""
    try:
        import onnxruntime_genai
        from huggingface_hub import HfApi, snapshot_download
    except ModuleNotFoundError as error:
        raise ModelError(no_packages(error)) from error
    model, revision = read_config()
    # the installed package decides
    cuda, dml = onnxruntime_genai.is_cuda_available(), onnxruntime_genai.is_dml_available()
    provider = "cuda" if cuda else "dml" if dml else "cpu"
    ready = read_facts("model.yaml")["onnx"] or {"folders": []}
    variant = next((one for one in ready["folders"] if provider in one["providers"]), None)
    if variant is None:
        raise ModelError(
            f"{model} has no ready-made ONNX model for {provider} in setup/model.yaml: fine-tune, then create one with "
            "`python finetuning/export.py`."
        )
    made_from = {"base_model": model, "hub_id": ready["hub_id"], "hub_revision": ready["revision"]}
    made_from |= {"base_revision": revision, "folder": variant["folder"]}
    if is_made_from(made_from):
        print(f"The ONNX model is there: {ONNX}")
    else:
        unfinished = ONNX.with_name(".onnx-base.new")  # an interrupted download is resumed there
        what = {"repo_id": ready["hub_id"], "revision": ready["revision"], "local_dir": unfinished}
        what["allow_patterns"] = f"{variant['folder']}/*"
        try:
            # ask first: a download that cannot reach the hub takes local_dir for complete
            commit = HfApi().model_info(ready["hub_id"], revision=ready["revision"], timeout=WAIT).sha
            plan = snapshot_download(**what, dry_run=True)
            missing = sum(file.file_size or 0 for file in plan if file.will_download)
            check_disk(unfinished, missing)
            at = "" if ready["revision"] else f" at {visible(commit)}, its newest commit: none is pinned"
            print(f"Downloading {ready['hub_id']}, {variant['folder']}{at}: {size(missing)}", flush=True)
            snapshot_download(**what)
            for file in plan:
                if (unfinished / file.filename).stat().st_size != file.file_size:
                    raise OSError(f"{file.filename} is cut off")
        except ModelError:
            raise
        except Exception as error:  # the library passes on HTTP client errors
            raise ModelError(explain(error, ready["hub_id"], ready["revision"])) from error
        put_in_place(unfinished, variant["folder"], made_from)
        print(f"The ONNX model is in {ONNX}")
    if (runtime := onnxruntime_genai.__version__) not in ready["proven"]:
        print(
            f"Nobody has proven these files with ONNX Runtime GenAI {runtime}: if the chat fails, use --engine torch."
        )
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
    models = read_facts("models.yaml")
    for model in models:
        if not model["deprecated"]:
            gib = model["parameters"] * 2 / 2**30  # two bytes per weight, as published
            fits = "yes" if gib * 1.2 < memory else "no"
            licence = f"{model['licence']}{', gated' if model['gated'] else ''}"
            row = (model["id"], model["name"], f"{gib:.1f} GiB", licence, fits, "ready" if model["onnx"] else "")
            table.add_row(*row)
    Console().print(table)
    if old := [f"{model['id']} ({model['replaced_by']} is better)" for model in models if model["deprecated"]]:
        print(f"Deprecated, but still valid: {', '.join(old)}.")
    print("Fits: to chat in 16 bits, plus a fifth. Training needs more: python finetuning/invoke_olive.py --check")


def memory_gib() -> float:
    """Return the memory of the largest NVIDIA GPU in GiB, or of the machine if there is none."""
    import psutil

    query = ["nvidia-smi", "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError, ValueError):
        shown = subprocess.run(query, capture_output=True, text=True, check=True).stdout
        return max(float(line) for line in shown.splitlines()) / 1024
    return float(psutil.virtual_memory().total / 2**30)


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
        print(f"get_model: {visible(error)}", file=sys.stderr)
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
