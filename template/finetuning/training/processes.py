"""The processes of a run on several GPUs: which one this is, and how they share a value."""

from __future__ import annotations

import os
from datetime import timedelta
from typing import Any

# set by accelerate launch and torchrun; the first process does everything except training
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))


def share(value: Any = None) -> Any:
    """Return the first process's value in all processes, once each has reached this point."""
    if PROCESSES == 1:  # no accelerate launch, no torchrun
        return value
    import torch

    if not torch.distributed.is_initialized():
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
        # the others wait while the first process evaluates, which can take hours
        torch.distributed.init_process_group(backend, timeout=timedelta(days=1))
    box = [value]
    torch.distributed.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]
