"""Memory that a step no longer needs goes back to the system, so that the next step does not come on top of it."""

from __future__ import annotations

import contextlib
import ctypes
import gc


def free_memory() -> None:
    """Give back what a model that nothing uses any more has held.

    Model, Trainer and optimizer refer to each other, so they stay until the collector runs. The C library then keeps
    their weights for later, in pieces that the next model does not fit into: 1.0 GiB after a run on SmolLM2-135M.
    """
    gc.collect()
    with contextlib.suppress(AttributeError, OSError, TypeError):  # macOS and Windows return memory by themselves
        ctypes.CDLL(None).malloc_trim(0)
