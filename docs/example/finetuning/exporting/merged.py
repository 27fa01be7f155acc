"""The merged model: the adapter added to the base model's weights, as a Hugging Face folder, and compared with both."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from exporting.agreement import Reference, ask_folder, check, four_bit_agreement
from exporting.exported_folder import MERGED, MadeFrom, put_in_place
from exporting.tuned_model import with_adapter
from reporting.evaluate import set_greedy
from reporting.run_record import RunRecord
from settings.config_file import ConfigError
from training.whole_files import new_folder


def merge(run: RunRecord, base: Path, made_from: MadeFrom, reference: Reference, agreement: float) -> dict[str, Any]:
    """Add the adapter to the base model's weights, in their precision, and save the result to models/merged.

    Returns how well its answers agree with those of base and adapter. Raises ConfigError if it is too little.
    """
    import transformers

    transformers.utils.logging.disable_progress_bar()
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", device_map="cpu", local_files_only=True, trust_remote_code=False
    )
    model = with_adapter(model, run)
    untie(model.get_base_model())
    model = model.merge_and_unload()
    set_greedy(model, reference.tokenizer)
    unfinished = new_folder(MERGED)
    model.save_pretrained(unfinished)
    reference.tokenizer.save_pretrained(unfinished)
    del model
    try:
        answers = ask_folder(reference, unfinished, run["dtype"])
        figures = check("merged", reference, answers, agreement, "chat with torch, which takes the adapter itself")
    except ConfigError:
        shutil.rmtree(unfinished)
        raise
    put_in_place(unfinished, MERGED, made_from)
    if run["method"] == "qlora":
        figures["four_bit"] = four_bit_agreement(reference, run, base)
        print("QLoRA trained on 4-bit weights, and the adapter goes into the full ones: answers may differ a little.")
    return figures


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
