"""Print the error of the gradients with 4-bit weights, packed or padded, with and without checkpointing, as JSON.

gradients_in_four_bits.py WORKSPACE, run by four_bits.py; on the GPU if there is one, and otherwise on the CPU.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path


def main() -> None:
    """Quantise a model as QLoRA does, train an adapter, and check the gradients."""
    sys.path[:0] = [str(Path(sys.argv[1]) / "finetuning"), *(str(Path(__file__).parents[up]) for up in (0, 1))]
    from settings.startup import quiet

    quiet()
    import torch
    from test_gradients import batch_of, trained
    from test_packing import model_and_rows
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    from training.gradients import STEP, gradient_error

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_compute_dtype=torch.float32, bnb_4bit_quant_type="nf4"
    )
    device, errors = "cuda" if torch.cuda.is_available() else "cpu", {}
    model, rows = model_and_rows("llama")
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        for packing in (False, True):
            for checkpointing in (False, True):
                model = AutoModelForCausalLM.from_pretrained(
                    folder, dtype=torch.float32, quantization_config=quantization, device_map=device
                )
                adapted = trained(model, "qlora", rows)
                batch = batch_of(adapted, rows, packing, checkpointing)
                name = f"packing={packing} checkpointing={checkpointing}"
                errors[name] = gradient_error(adapted, batch, STEP["float32"])
    print(json.dumps(errors))


if __name__ == "__main__":
    main()
