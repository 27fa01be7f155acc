"""What each command does first: quiet libraries; and what it does last: one sentence for an error."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import warnings
from unittest.mock import MagicMock


def explain(error: Exception) -> str:
    """Return what is wrong and what to do, in one sentence."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, as importing their files takes long
    if kinds & {"ConfigError", "DataError", "ModelError"}:
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`, then use its Python."
    if "Timeout" in kinds:
        return "Another run is under way in this workspace: wait for its end, or stop it, then run this again."
    reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".: ")
    return f"Unforeseen: {reason}. Nothing that was there is lost; --debug shows where it happened."


def quiet() -> None:
    """Keep every library from calling home and from talking over the run. Olive sends nothing where CI is set."""
    os.environ.update(
        OLIVE_DISABLE_TELEMETRY="1", HF_HUB_DISABLE_TELEMETRY="1", ORT_DISABLE_TELEMETRY="1", DO_NOT_TRACK="1"
    )
    os.environ["HF_UPDATE_DOWNLOAD_COUNTS"] = "0"  # `datasets` counts every file that it reads, also a local one
    for name, value in (
        ("CI", "1"),
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
    ):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("olive", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)


def leave_out(package: str) -> None:
    """Let a stand-in take the place of a package that is imported and not used: a second less before the first step.

    Olive imports torchmetrics for its evaluators, and scipy and matplotlib with it; evaluate.py evaluates here.
    """
    sys.modules.setdefault(package, MagicMock(__spec__=importlib.util.find_spec(package)))
