"""Load the requested model with a suitable backend. Backends are imported here, only when needed."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from engine import ENGINES, Backend, ChatError, Engine
from sources import base_source, check_adapter, choose, tuned_source

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "setup"))
from model_folder import ModelError, find_model  # noqa: E402 - one file for setup/, finetuning/ and this folder

# read when torch is imported, later: waiting threads sleep, since awake they slow down a busy machine
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def load(baseonly: bool = False, engine: str = "auto", root: Path = ROOT) -> Engine:
    """Load the tuned model of the workspace `root`, or only its base model. Raises ChatError, never falls back.

    `auto` takes the int4 model of finetuning/export.py if it was made from this adapter and there is no GPU, and adds
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

            backend = OnnxBackend(folder, root)
        else:
            base = find_model(source.base, source.revision, root).folder
            from torch_backend import TorchBackend

            backend = TorchBackend(source, base, root)
    except ModelError as error:
        raise ChatError(str(error)) from error
    except ModuleNotFoundError as error:
        raise not_installed(error) from error
    backend.notices += notices
    return Engine(source, backend)


def not_installed(error: ModuleNotFoundError) -> ChatError:
    """Return the error for a missing package, with the Python that lacks it."""
    return ChatError(f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`.")
