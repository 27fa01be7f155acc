"""The paths of the workspace, and the folder of a model. Importing this file turns off the libraries' telemetry."""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
MODELS = ROOT / "models"
SAMPLE = ROOT / "dataset" / "sample-train.jsonl"
MODEL_FACTS = ROOT / "setup" / "model.yaml"

sys.path.append(str(ROOT / "setup"))  # two files for setup/, inference/ and this folder
import no_telemetry  # noqa: E402, F401 - before any library
from model_folder import (  # noqa: E402
    DEMO,
    Found,
    ModelError,
    ModelMissingError,
    find_model,
    needed,
    weights_header,
)

__all__ = [
    "DEMO",
    "MODELS",
    "MODEL_FACTS",
    "ROOT",
    "SAMPLE",
    "Found",
    "ModelError",
    "ModelMissingError",
    "find_model",
    "needed",
    "weights_header",
]
