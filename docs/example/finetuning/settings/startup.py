"""What each command does at its start and end: silence libraries, and report an error in one sentence."""

from __future__ import annotations

import importlib.util
import logging
import os
import re
import sys
import traceback
import warnings
from unittest.mock import MagicMock

from preparing.problems import visible
from preparing.workspace import ROOT  # also turns off the telemetry


def explain(error: Exception) -> str:
    """Return what is wrong and what to do, in one sentence that a terminal may show."""
    return visible(meaning(error))


def meaning(error: Exception) -> str:
    """Return the sentence for an error; libraries put what they read into theirs."""
    kinds = {kind.__name__ for kind in type(error).__mro__}  # by name, since importing their modules is slow
    if kinds & {"ConfigError", "DataError", "ModelError"}:
        return str(error)
    if isinstance(error, ModuleNotFoundError):
        return f"{error.name} is not installed in {sys.prefix}: run `python setup/create_env.py`, then use its Python."
    if of := re.search(r"The repository (.+) (?:contains|references) custom code", str(error)):
        name = of[1].removeprefix(f"{ROOT}{os.sep}")
        return f"{name} runs only with code of its own, which is never run: choose a model that transformers knows."
    if "Timeout" in kinds:
        return "Another run is in progress in this workspace: wait for it or stop it, then run this again."
    reason = (str(error).splitlines() or ["no reason given"])[0].rstrip(".: ")
    return f"Unexpected error: {reason}. No existing result is lost; --debug shows the traceback."


def quiet() -> None:
    """Disable the output of the libraries, and make the texts in a traceback visible."""
    sys.excepthook = lambda _, error, __: print(visible("".join(traceback.format_exception(error))), file=sys.stderr)
    for name, value in (
        ("TOKENIZERS_PARALLELISM", "false"),
        ("HF_DATASETS_DISABLE_PROGRESS_BARS", "1"),
        ("HF_HUB_DISABLE_PROGRESS_BARS", "1"),
        ("TRANSFORMERS_VERBOSITY", "error"),
        ("OMP_WAIT_POLICY", "PASSIVE"),  # PyTorch's waiting threads sleep: awake, they slow down a busy machine
    ):
        os.environ.setdefault(name, value)
    warnings.filterwarnings("ignore", category=FutureWarning)
    for library in ("olive", "matplotlib"):
        logging.getLogger(library).setLevel(logging.ERROR)


def hide_gpus() -> None:
    """Let the libraries see no GPU, as `device: cpu` says. Without effect once PyTorch has looked for them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def leave_out(package: str) -> None:
    """Replace a package that is imported but not used with a stub: saves a second before the first step.

    Olive imports torchmetrics for its evaluators, and with it scipy and matplotlib; here evaluate.py evaluates.
    """
    sys.modules.setdefault(package, MagicMock(__spec__=importlib.util.find_spec(package)))
