"""Run a script of a workspace with bitsandbytes on a CPU: four_bits.py [--packed] SCRIPT OPTION …

bitsandbytes 0.50 packs a layer's weights at its first evaluation where the processor has AVX512-BF16, and from then on
its gradients are wrong. GPUs are not concerned. Without the packing a CPU computes what they do; --packed leaves it on.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

PACKAGES = Path(__file__).resolve().parents[1] / ".cache" / "bitsandbytes"


def main() -> None:
    """Switch the packing off, and run the script as if it had been called."""
    sys.path.append(str(PACKAGES))
    from bitsandbytes.nn import modules

    del sys.argv[0]
    if sys.argv[0] == "--packed":
        del sys.argv[0]
    else:
        modules.has_avx512bf16 = lambda: False  # each layer asks when it is made, for its support_avx512bf16_for_cpu
    sys.path[0] = str(Path(sys.argv[0]).resolve().parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


if __name__ == "__main__":
    main()
