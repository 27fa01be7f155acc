"""The merged model: the adapter added to the base model's weights, as a Hugging Face folder, and compared with both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from exporting.agreement import prompts_of
from exporting.exported_folder import MERGED, MadeFrom, put_in_place
from exporting.tuned_model import held_out_rows
from preparing.chat_template import ends_of_answer
from preparing.tokens import load_tokenizer
from preparing.workspace import ROOT
from reporting.run_record import RunRecord
from settings.config_file import ConfigError
from training import batches
from training.whole_files import new_folder

ROWS = 16  # compared with base and adapter
PROMPT = 128  # tokens of a row, its last ones: this compares weights, not long prompts
DIFFERENCE = 0.2  # rounding to bfloat16 moves 0.01 to 0.04 of the probability in a real model, a wrong merge 0.7 to 1


def merge(run: RunRecord, base: Path, made_from: MadeFrom) -> dict[str, Any]:
    """Add the adapter to the base model's weights, in their precision, and save the result to models/merged.

    Returns how well the result agrees with base and adapter, as `differences` does. Raises ConfigError, also if it does
    not agree.
    """
    import transformers
    from peft import PeftModel

    transformers.utils.logging.disable_progress_bar()
    if run["method"] == "qlora":
        print(
            "QLoRA trained on 4-bit weights, and the adapter goes into the full ones: answers may differ a little "
            "from those of the run."
        )
    model = transformers.AutoModelForCausalLM.from_pretrained(
        base, dtype="auto", device_map="cpu", local_files_only=True
    )
    try:
        model = PeftModel.from_pretrained(model, str(ROOT / run["adapter"])).eval()
        tokenizer = load_tokenizer(str(ROOT / run["adapter"]))
        found = prompts_of(tokenizer, held_out_rows(run), run.get("thinking", False))
        prompts = [prompt[-PROMPT:] for prompt in found[:ROWS]]
        expected = first_logits(model, prompts)
        untie(model.get_base_model())
        model = model.merge_and_unload()
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise ConfigError(
            f"The adapter in {run['adapter']} is damaged, or does not fit {run['base_model']} ({reason}): run "
            "`python finetuning/invoke_olive.py --fresh`."
        ) from error
    figures = differences(expected, first_logits(model, prompts))
    if not figures["difference"] <= DIFFERENCE:  # also if it is not a number
        raise ConfigError(
            f"The merged model answers otherwise than base and adapter ({figures['first_tokens']:.0%} of "
            f"{figures['rows']} first tokens are the same), and is not published: chat with torch, which takes the "
            "adapter itself."
        )
    settings = model.generation_config
    known = settings.eos_token_id
    known = known if isinstance(known, list) else [] if known is None else [known]
    settings.eos_token_id = sorted({*known, *ends_of_answer(tokenizer)})
    settings.pad_token_id = tokenizer.pad_token_id
    try:
        settings.validate(strict=True)
    except ValueError:  # Llama 2's sets a temperature without sampling, which transformers reads but does not write
        settings.do_sample = True
    unfinished = new_folder(MERGED)
    model.save_pretrained(unfinished)
    tokenizer.save_pretrained(unfinished)
    put_in_place(unfinished, MERGED, made_from)
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


def first_logits(model: Any, prompts: list[list[int]]) -> Any:
    """Return the logits (prompts, vocabulary) of each answer's first token, in float32."""
    import torch

    keep = {"logits_to_keep": 1} if batches.takes_columns(model) else {}
    with torch.inference_mode():
        outputs = [model(input_ids=torch.tensor([prompt]), use_cache=False, **keep).logits for prompt in prompts]
        return torch.stack([logits[0, -1].float() for logits in outputs])


def differences(expected: Any, merged: Any) -> dict[str, Any]:
    """Return `rows`; `first_tokens`, the share of equal first tokens; and `difference`, a share of the probability.

    `difference` is the probability that the merged model gives to other tokens than base and adapter do, on average.
    """
    moved = (expected.softmax(-1) - merged.softmax(-1)).abs().sum(-1) / 2
    return {
        "rows": len(expected),
        "first_tokens": round((expected.argmax(-1) == merged.argmax(-1)).float().mean().item(), 4),
        "difference": round(moved.mean().item(), 4),
    }
