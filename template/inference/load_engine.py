"""Load the requested model with a suitable backend. Backends are imported here, only when needed."""

from __future__ import annotations

import contextlib
import json
import os
import sys
from pathlib import Path

from engine import ENGINES, Backend, ChatError, Engine
from sources import base_source, check_adapter, choose, tuned_source

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "setup"))  # two files for setup/, finetuning/ and this folder
import no_telemetry  # noqa: E402, F401 - before any library
from model_folder import ModelError, find_model  # noqa: E402

# read when torch is imported, later: waiting threads sleep, since awake they slow down a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(baseonly: bool = False, engine: str = "auto", root: Path = ROOT) -> Engine:
    """Load the tuned model of the workspace `root`, or only its base model. Raises ChatError, never falls back.

    `auto` takes the ONNX model of finetuning/export.py if it was made from this adapter and there is no GPU, and adds
    a notice about its choice. The base model runs with torch, unless `onnx` is requested.
    """
    if engine not in ENGINES:
        raise ChatError(f"There is no engine {engine!r}: choose one of {', '.join(ENGINES)}.")
    backend: Backend
    try:
        source = base_source(root) if baseonly else tuned_source(root)
        if not baseonly:
            check_adapter(source, root)
        folder, notices = choose(engine, source, root)
        # late, so errors come before seconds of imports
        if folder:
            from onnx_backend import OnnxBackend

            backend = OnnxBackend(source, folder, root)
        else:
            base = find_model(source.base, source.revision, root).folder
            check_tokens(source.base, base, root / source.adapter if source.adapter else base)
            from torch_backend import TorchBackend

            backend = TorchBackend(source, base, root)
    except ModelError as error:
        raise ChatError(str(error)) from error
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    backend.notices += notices
    return Engine(source, backend)


def check_tokens(name: str, base: Path, tokenizer: Path) -> None:
    """Raise ChatError if the tokenizer has special tokens that the model has no embeddings for.

    Only the special ones, and those that the chat template writes, are in every prompt. Other added tokens do no harm
    until somebody types one.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, AttributeError):  # what is damaged is told later
        config = json.loads((base / "config.json").read_text(encoding="utf-8"))
        size = int((config.get("text_config") or config)["vocab_size"])
        settings = json.loads((tokenizer / "tokenizer_config.json").read_text(encoding="utf-8"))
        file = tokenizer / "chat_template.jinja"
        template = file.read_text(encoding="utf-8") if file.is_file() else str(settings.get("chat_template"))
        special = [settings.get(f"{kind}_token") for kind in ("bos", "eos", "pad")]
        written = {one["content"] if isinstance(one, dict) else one for one in special}
        added = json.loads((tokenizer / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
        for token in added:
            if token["id"] >= size and (token["content"] in written or token["content"] in template):
                raise ChatError(
                    f"The tokenizer of {name} is larger than its model: {token['content']!r} has the id {token['id']}, "
                    f"and the embeddings end at {size - 1}: take the tokenizer that belongs to the model, or resize "
                    "the model with resize_token_embeddings and save both."
                )


def not_installed(error: ModuleNotFoundError) -> ChatError:
    """Return the error for a missing package, with the Python that lacks it."""
    return ChatError(f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`.")
