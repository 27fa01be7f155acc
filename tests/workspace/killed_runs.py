"""Kill runs of invoke_olive.py at random moments and let each go on to its end.

killed_runs.py WORKSPACE COUNT. What is heavy is imported once: each run is a fork of this process. Prints JSON: the
held-out loss of a run that nobody touched, and how each killed one ended and whether it went on from a checkpoint.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

workspace, count = Path(sys.argv[1]), int(sys.argv[2])
os.environ["OMP_NUM_THREADS"] = "1"
sys.path.insert(0, str(workspace / "finetuning"))
os.chdir(workspace)

import invoke_olive  # noqa: E402
from settings.startup import leave_out, quiet  # noqa: E402

quiet()
leave_out("torchmetrics")

import torch  # noqa: E402

from reporting import evaluate, report, run_record  # noqa: E402, F401
from settings.run_settings import read_settings  # noqa: E402
from settings.validation import validate  # noqa: E402
from training import train  # noqa: E402, F401

torch.set_num_threads(1)
validate(read_settings())
LOG = workspace / "log.txt"


def start(*arguments: str) -> int:
    """Fork a run and return its process id."""
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1)
        os.dup2(log, 2)
        sys.argv = ["invoke_olive.py", *arguments]
        status = invoke_olive.main()
        sys.stdout.flush()
        os._exit(status)
    return child


def end(child: int) -> dict[str, Any]:
    """Wait for a run; return its exit status, the held-out loss and whether it went on from a checkpoint."""
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = LOG.read_text(encoding="utf-8")
    run = json.loads((workspace / "models" / "run.json").read_text(encoding="utf-8"))
    return {
        "status": status,
        "base_loss": run["metrics"]["before"]["eval_loss"],
        "eval_loss": run["metrics"]["after"]["eval_loss"],
        "went_on": "Resuming from" in said,
        "said": said[-400:] if status else "",
    }


end(start("--fresh"))  # the first run builds the model
began = time.monotonic()
whole = end(start("--fresh"))
seconds = time.monotonic() - began

moments = random.Random(7)
killed = []
for _ in range(count):
    child = start("--fresh")
    time.sleep(moments.uniform(0.1, 0.95) * seconds)  # the moment is what is tried, so nothing is waited for
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    killed.append(end(start()))

shutil.rmtree(workspace / "models" / "checkpoints")  # so that the next one to appear is the next run's
child = start("--fresh")
while not list((workspace / "models" / "checkpoints").glob("*/checkpoints/checkpoint-*/sizes.json")):
    time.sleep(0.005)
os.kill(child, signal.SIGTERM)
terminated = end(child)
print(json.dumps({"whole": whole, "killed": killed, "terminated": terminated, "after": end(start())}))
