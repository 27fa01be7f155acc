"""The merged model: the adapter added to the base model's weights, as a Hugging Face folder, and compared with both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exporting.agreement import Reference, agrees, ask_folder, compare, four_bit_agreement, refusal, share_of
from exporting.exported_folder import MERGED, MadeFrom, put_in_place
from exporting.tuned_model import with_adapter
from reporting.evaluate import set_greedy, weights_in
from reporting.run_record import RunRecord
from training.whole_files import new_folder

UNFINISHED = MERGED.with_name(".merged.new")  # where new_folder is


def merge(run: RunRecord, base: Path, made_from: MadeFrom, reference: Reference, agreement: float) -> dict[str, Any]:
    """Add the adapter to the base model's weights, in their precision, and save the result to models/merged.

    If rounding the sums to 16 bits loses too many answers of an adapter that was trained on float32, they are saved in
    float32. Returns how well its answers agree with those of base and adapter. Raises ConfigError if it is too little.
    """
    stored = save_merged(run, base, reference, "auto")
    figures, example = compare(reference, ask_folder(reference, UNFINISHED, run["dtype"]))
    if not agrees(figures, agreement) and stored != "float32" and weights_in(run["dtype"]) == "float32":
        print(f"Rounded to {stored}, it gives {share_of(figures):.1%} of the answers: saving it in float32", flush=True)
        stored = save_merged(run, base, reference, "float32")
        figures, example = compare(reference, ask_folder(reference, UNFINISHED, run["dtype"]))
    if not agrees(figures, agreement):
        shutil.rmtree(UNFINISHED)
        instead = "chat with torch, which takes the adapter itself"
        raise refusal("merged model", figures, example, agreement, instead)
    put_in_place(UNFINISHED, MERGED, made_from)
    figures["precision"] = stored
    if run["method"] == "qlora":
        figures["four_bit"] = four_bit_agreement(reference, run, base)
        print("QLoRA trained on 4-bit weights, and the adapter goes into the full ones: answers may differ a little.")
    return figures


def save_merged(run: RunRecord, base: Path, reference: Reference, dtype: str) -> str:
    """Save base and adapter as one model beside models/merged; `auto`: in the base's precision. Returns which."""
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype=dtype, device_map="cpu", local_files_only=True, trust_remote_code=False
    )
    model = with_adapter(model, run)
    untie(model.get_base_model())
    model = model.merge_and_unload()
    set_greedy(model, reference.tokenizer)
    model.save_pretrained(new_folder(MERGED))
    reference.tokenizer.save_pretrained(UNFINISHED)
    return str(model.dtype).removeprefix("torch.")


def untie(model: Any) -> None:
    """Give the output layer its own weights if it shares the embedding's, and one of the two has an adapter.

    Merged into shared weights, the adapter of one would change the other too. `model` is the one inside a PEFT model.
    """
    import torch
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [model.get_input_embeddings(), model.get_output_embeddings()]
    adapted = [isinstance(layer, BaseTunerLayer) for layer in layers]
    embedding, output = (layer.base_layer if own else layer for layer, own in zip(layers, adapted, strict=True))
    if any(adapted) and output.weight is embedding.weight:
        output.weight = torch.nn.Parameter(output.weight.detach().clone(), requires_grad=False)
        for config in (model.config, model.config.get_text_config()):
            config.tie_word_embeddings = False
