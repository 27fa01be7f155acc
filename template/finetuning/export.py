"""Make one model of base and adapter: int4 for ONNX Runtime, or a Hugging Face folder at full precision.

python finetuning/export.py                    models/merged, then models/onnx: fast chat, on a CPU above all
python finetuning/export.py --format merged    models/merged alone: for transformers, vLLM and other tools

The int4 model is compared with the merged one on held-out rows before it takes its place. What is whole and made from
this adapter is used again. The figures go into models/run.json.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import io
import json
import logging
import os
import shutil
import sys
import time
from pathlib import Path
from typing import Any

from invoke_olive import MODELS, ROOT, explain, quiet

MERGED, ONNX = MODELS / "merged", MODELS / "onnx"
MARK = "export.json"  # in a folder that is complete: what it was made from, its files and their sizes in bytes
INT4_BYTES = 0.65  # for a weight, with the scale of each block of 32


def main() -> int:
    """Read the command line, export, and turn a user's mistake into one sentence."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--format", choices=("onnx", "merged"), default="onnx", help="(default: onnx)")
    parser.add_argument(
        "--provider",
        choices=("cpu", "cuda", "dml"),
        help="what the int4 model is for (default: what the installed onnxruntime-genai computes with)",
    )
    parser.add_argument(
        "--agreement",
        type=share,
        default=0.95,
        metavar="SHARE",
        help="of the answer tokens that int4 must choose as the merged model does, 0 to 1 (default: 0.95)",
    )
    parser.add_argument(
        "--debug", action="store_true", help="show what the libraries say and the traceback of an error"
    )
    options = parser.parse_args()
    sys.stdout.reconfigure(encoding="utf-8")  # type: ignore[union-attr]  # a pipe on Windows has another encoding
    os.chdir(ROOT)  # paths of data files are relative to the workspace
    quiet()
    logging.getLogger("onnxruntime").setLevel(logging.ERROR)
    try:
        export(options.format, options.provider, options.agreement, options.debug)
    except KeyboardInterrupt:
        print("\nStopped. The same command uses again what is complete.", file=sys.stderr)
        return 130
    except Exception as error:
        if options.debug:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    return 0


def share(text: str) -> float:
    """Parse a number from 0 to 1."""
    with contextlib.suppress(ValueError):
        if 0 <= float(text) <= 1:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number from 0 to 1")


def export(kind: str, provider: str | None, agreement: float, debug: bool) -> None:
    """Merge, and for `onnx` build the int4 model, compare and publish it. Raises ConfigError and DataError."""
    run = read_run()
    if kind == "onnx":
        from int4 import choose_provider

        provider = choose_provider(provider)
    from filelock import FileLock

    with FileLock(MODELS / ".lock", timeout=0):  # a run would change the adapter meanwhile
        made_from = {"adapter_sha256": check_adapter(run), "base_model": run["base_model"], "revision": run["revision"]}
        base = base_folder(run)
        check_disk(base, kind, made_from)
        made = run.setdefault("export", {})
        if is_made_from(MERGED, made_from) and "merged" in made:
            print(f"Using {shown(MERGED)} again: it was made from this adapter.")
        else:
            print(f"Merging {run['adapter']} into {run['base_model']}", flush=True)
            started = time.monotonic()
            merge(run, base, made_from)
            record(run, "merged", made_from, started, {})
        made_for = made_from | {"provider": provider}
        if kind == "onnx" and is_made_from(ONNX, made_for) and made.get("onnx", {}).get("tokens", -1) >= agreement:
            print(f"Using {shown(ONNX)} again: it was made from this adapter.")
        elif kind == "onnx":
            print(f"Building the int4 model for {provider} (minutes where weights are billions)", flush=True)
            started = time.monotonic()
            figures = build(run, agreement, debug, made_for)
            record(run, "onnx", made_from, started, {"precision": "int4", "provider": provider} | figures)
    show(made, kind)


def read_run() -> dict[str, Any]:
    """Return models/run.json. Raises ConfigError."""
    from check import ConfigError

    again = "run `python finetuning/invoke_olive.py`"
    try:
        run: dict[str, Any] = json.loads((MODELS / "run.json").read_text(encoding="utf-8"))
        missing = {"base_model", "revision", "method", "adapter", "dtype", "system_prompt", "config"} - set(run)
    except FileNotFoundError:
        raise ConfigError(f"There is no tuned model yet (models/run.json): {again} first.") from None
    except (OSError, ValueError, TypeError) as error:
        raise ConfigError(f"models/run.json is torn ({error}): {again} again.") from error
    if missing:
        raise ConfigError(f"models/run.json has no {sorted(missing)[0]}: {again} again.")
    return run


def check_adapter(run: dict[str, Any]) -> str:
    """Return the hash of the adapter, settings and weights, as inference/engine.py makes it. Raises ConfigError."""
    from check import ConfigError
    from safetensors import SafetensorError, safe_open

    folder = ROOT / run["adapter"]
    weights, settings = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    try:
        with safe_open(weights, framework="numpy"):  # a torn file is noticed on opening
            pass
        trained_on = json.loads(settings.read_text(encoding="utf-8"))["base_model_name_or_path"]
        json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        with weights.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256")
        digest.update(settings.read_bytes())
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        again = "run `python finetuning/invoke_olive.py` again"
        raise ConfigError(f"The adapter in {run['adapter']} is missing or torn ({error}): {again}.") from error
    if trained_on != run["base_model"]:
        raise ConfigError(
            f"The adapter in {run['adapter']} was trained on {trained_on}, but models/run.json names "
            f"{run['base_model']}: run `python finetuning/invoke_olive.py` again."
        )
    return digest.hexdigest()


def base_folder(run: dict[str, Any]) -> Path:
    """Return the folder of the base model that the run used. Raises ModelError when it is missing or torn."""
    from check import find_model

    return find_model(run["base_model"], run["revision"], ROOT).folder


def check_disk(base: Path, kind: str, made_from: dict[str, Any]) -> None:
    """Raise ConfigError unless there is room for what will be made, beside what is there."""
    from check import ConfigError
    from safetensors import safe_open

    files = list(base.glob("*.safetensors"))
    needed = 0.0 if is_made_from(MERGED, made_from) else float(sum(file.stat().st_size for file in files))
    for file in files if kind == "onnx" else []:
        with safe_open(file, framework="numpy") as weights:
            for name in weights.keys():  # noqa: SIM118 - it is no dict
                size = 1
                for length in weights.get_slice(name).get_shape():
                    size *= length
                needed += size * (4 if "embed" in name else INT4_BYTES)  # the embedding stays in float32
    free = shutil.disk_usage(MODELS).free
    if needed > free:
        raise ConfigError(
            f"{MODELS} has {free / 2**30:.1f} GiB of disk free and the export needs {needed / 2**30:.1f}: free some "
            "and run again."
        )


def is_made_from(folder: Path, made_from: dict[str, Any]) -> bool:
    """Tell whether a folder is complete and was made from this adapter and base model."""
    try:
        mark = json.loads((folder / MARK).read_text(encoding="utf-8"))
        whole = all((folder / name).stat().st_size == size for name, size in mark.pop("files").items())
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(whole and mark == made_from)


def merge(run: dict[str, Any], base: Path, made_from: dict[str, Any]) -> None:
    """Add the adapter to the base model's own weights, in their precision, and put the result into models/merged.

    Raises ConfigError.
    """
    import transformers
    from check import ConfigError
    from dataset import load_tokenizer
    from peft import PeftModel

    transformers.utils.logging.disable_progress_bar()
    if run["method"] == "qlora":
        print(
            "QLoRA trained on 4-bit weights, and the adapter goes into the full ones: answers may differ a little "
            "from those of the run."
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", device_map="cpu", local_files_only=True
    )
    try:
        model = PeftModel.from_pretrained(model, str(ROOT / run["adapter"])).merge_and_unload()
        tokenizer = load_tokenizer(str(ROOT / run["adapter"]))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise ConfigError(
            f"The adapter in {run['adapter']} is torn, or does not fit {run['base_model']} ({reason}): run "
            "`python finetuning/invoke_olive.py --fresh`."
        ) from error
    settings = model.generation_config
    settings.eos_token_id = ends_of_answer(run, tokenizer, settings.eos_token_id)
    settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # Llama 2's has a temperature but does not draw, which can be read and not be written
        settings.do_sample = True
    unfinished = empty(MERGED)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    put_in_place(unfinished, MERGED, made_from)


def ends_of_answer(run: dict[str, Any], tokenizer: Any, end_of_text: int | list[int] | None) -> list[int]:
    """Return the tokens at which an answer ends: the base model's, the tokenizer's, and the template's end of turn."""
    from dataset import tokenise
    from evaluate import end_of_turn

    examples = [tokenise(tokenizer, row, "responses") for row in held_out_rows(run)]
    known = end_of_text if isinstance(end_of_text, list) else [] if end_of_text is None else [end_of_text]
    return sorted({*known, *end_of_turn(tokenizer, examples)})


def held_out_rows(run: dict[str, Any]) -> list[Any]:
    """Return some of the held-out rows that the run had, with its system prompt. Raises DataError."""
    from dataset import chat_rows, with_system
    from int4 import COMPARED_ROWS

    rows = chat_rows("held_out", **run["config"]["rows"])[:COMPARED_ROWS]
    return [with_system(row, run["system_prompt"]) for row in rows]


def build(run: dict[str, Any], agreement: float, debug: bool, made_for: dict[str, Any]) -> dict[str, Any]:
    """Build models/onnx of models/merged and return how far they agree. Raises ConfigError when that is not enough."""
    import int4
    from check import ConfigError

    unfinished = empty(ONNX)
    try:
        with contextlib.ExitStack() as stack:
            if not debug:  # the builder prints a line for every weight
                stack.enter_context(contextlib.redirect_stdout(io.StringIO()))
                stack.enter_context(contextlib.redirect_stderr(io.StringIO()))
            int4.build(MERGED, unfinished, made_for["provider"])
    except (OSError, MemoryError, ImportError):
        raise
    except Exception as error:  # for a model that the builder does not know, and for one that it knows an older form of
        (architecture,) = json.loads((MERGED / "config.json").read_text(encoding="utf-8"))["architectures"]
        raise ConfigError(
            f"ONNX Runtime GenAI's builder cannot convert {architecture} ({error}): chat with "
            f"torch, or serve {shown(MERGED)}, which is complete."
        ) from error
    print("Comparing it with the merged model on held-out rows", flush=True)
    figures = int4.compare(MERGED, unfinished, held_out_rows(run), run["dtype"])
    if figures["tokens"] < agreement:
        shutil.rmtree(unfinished)
        raise ConfigError(
            f"The int4 model chooses {figures['tokens']:.1%} of the answer tokens as the merged model does, less than "
            f"the {agreement:.0%} that are wanted: use {shown(MERGED)}, or allow it with --agreement."
        )
    put_in_place(unfinished, ONNX, made_for)
    return figures


def empty(folder: Path) -> Path:
    """Return an empty folder with a temporary name beside `folder`."""
    unfinished = folder.with_name(f".{folder.name}.new")
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)
    return unfinished


def put_in_place(unfinished: Path, folder: Path, made_from: dict[str, Any]) -> None:
    """Mark a folder as complete and rename it; what was there before goes when the new one is in its place."""
    sizes = {path.name: path.stat().st_size for path in unfinished.iterdir() if path.is_file()}
    (unfinished / MARK).write_text(json.dumps(made_from | {"files": sizes}, indent=2) + "\n", encoding="utf-8")
    old = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if folder.exists():
        folder.rename(old)
    unfinished.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def record(run: dict[str, Any], kind: str, made_from: dict[str, Any], started: float, figures: dict[str, Any]) -> None:
    """Add what was made to models/run.json, under `export`."""
    from record import write_json

    folder = {"merged": MERGED, "onnx": ONNX}[kind]
    run["export"][kind] = {
        "folder": shown(folder),
        "adapter_sha256": made_from["adapter_sha256"],
        "bytes": sum(path.stat().st_size for path in folder.iterdir()),
        "seconds": round(time.monotonic() - started, 2),
        **figures,
    }
    write_json(MODELS / "run.json", run)


def show(made: dict[str, Any], kind: str) -> None:
    """Print what was made, and the next command."""
    for name in ("merged", "onnx") if kind == "onnx" else ("merged",):
        print(f"  {name:6} {made[name]['folder']}, {made[name]['bytes'] / 2**20:,.1f} MiB")
    if kind == "onnx":
        figures = made["onnx"]
        print(
            f"On {figures['rows']} held-out rows {figures['answers']:.1%} of its answers, and {figures['tokens']:.1%} "
            f"of their tokens, are the merged model's; logits differ by {figures['logits_mean']} on average, "
            f"{figures['logits_max']} at most."
        )
    serve = f"transformers serve {shown(MERGED)} (after python -m pip install openai), or vllm serve {shown(MERGED)}"
    print(f"Next: {'python inference/console_chat.py' if kind == 'onnx' else serve}")


def shown(folder: Path) -> str:
    """Return a folder's path in the workspace."""
    return folder.relative_to(ROOT).as_posix()


if __name__ == "__main__":
    sys.exit(main())
