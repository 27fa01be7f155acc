"""Turn off the telemetry of the libraries: `import no_telemetry` before any of them, as they read their variables then.

setup/, finetuning/ and inference/ import this file by its path, at the start of each command. The containers in
infra/provision/ set the same variables. az has its own, in infra/az.py, and prompt flow a file, pf.yaml.
"""

from __future__ import annotations

import os

# Set even if they have other values.
OFF = {
    "ORT_DISABLE_TELEMETRY": "1",  # onnxruntime: otherwise a device id in ~/.cache, and reports after some seconds
    "OLIVE_DISABLE_TELEMETRY": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",  # huggingface_hub, transformers, gradio
    "HF_UPDATE_DOWNLOAD_COUNTS": "0",  # datasets: otherwise it reports every file that it reads, even a local one
    "GRADIO_ANALYTICS_ENABLED": "False",
    "DO_NOT_TRACK": "1",
}
# Set unless they have a value.
OFF_BY_DEFAULT = {
    "CI": "1",  # Olive: otherwise it looks up its server's name, even with its telemetry off
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "WANDB_ERROR_REPORTING": "false",
}

os.environ.update(OFF)
for name, value in OFF_BY_DEFAULT.items():
    os.environ[name] = os.environ.get(name) or value
