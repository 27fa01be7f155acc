"""The time and cost of a run in Azure, from the estimate of --check."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import Any

from az import AzureError
from azure_settings import INFRA, Settings

PRICES = "https://azure.microsoft.com/pricing/details/container-apps/"
OLD = 90  # days after which the age of a price is said
FREE = (
    "  (each month, 180,000 vCPU-seconds and 360,000 GiB-seconds of a subscription are free: 5.40 US dollars in eastus)"
)
NOT_IN_IT = """\
Not included: the first start, which installs the packages and downloads the model to the share (some minutes, once),
and the share itself (per GiB and month, while it exists). Waiting for a GPU costs nothing."""


def estimate() -> None:
    """Print time and price of a run on the hardware in infra/azure.yaml. Raises AzureError."""
    profile = Settings.read().profile
    check = [sys.executable, str(INFRA.parent / "finetuning" / "invoke_olive.py"), "--check", "--json"]
    done = subprocess.run(check, capture_output=True, encoding="utf-8", check=False)
    try:
        report = json.loads(done.stdout)
    except ValueError as error:
        said = done.stderr.strip().removeprefix("error: ")
        raise AzureError(f"{said} (`python finetuning/invoke_olive.py --check` shows more)") from error
    if report["problem"]:
        raise AzureError(f"{report['problem']} (`python finetuning/invoke_olive.py --check` shows more)")
    if "estimate" not in report and report["model"]["parameters"]:
        raise AzureError("What a run of this model takes cannot be estimated: it is not of the dense kind.")
    if "estimate" not in report:
        raise AzureError(
            "The model's size is not known yet: download it with `python setup/get_model.py`, then run this again."
        )
    print(f"A run of {report['data']['steps']} steps:")
    print("\n".join(on_cpu(report) if profile == "Consumption" else on_gpu(report)))
    print(NOT_IN_IT)


def on_cpu(report: dict[str, Any]) -> list[str]:
    """Return the estimate for a run without a GPU."""
    seconds = report["estimate"]["seconds"]
    time = f"{seconds:.0f} seconds" if seconds < 120 else f"{seconds / 60:.0f} minutes"
    return [f"  about {time} on this machine, and similar on 4 cores there", f"  price: {PRICES}"]


def on_gpu(report: dict[str, Any]) -> list[str]:
    """Return the estimate for the chosen GPU: hours and price."""
    gpu = next(gpu for gpu in report["azure"]["gpus"] if gpu["chosen"])
    lines = [f"  about {gpu['hours']:.2f} hours on one {gpu['name']}, calculated"]
    if gpu["dollars"] is None:
        return [*lines, f"  price: {PRICES}"]
    old = f", {gpu['price_days']} days ago: see {PRICES}" if gpu["price_days"] > OLD else ""
    rate = f"{gpu['price']['usd_per_hour']} an hour at most ({gpu['price']['region']}, {gpu['price']['date']}{old})"
    return [*lines, f"  about {gpu['dollars']:.2f} US dollars, at {rate}", FREE]
