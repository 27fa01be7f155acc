"""The merged model: the adapter added to the base model's weights, as a Hugging Face folder."""

from __future__ import annotations

from pathlib import Path

from exporting.exported_folder import MERGED, MadeFrom, put_in_place
from preparing.chat_template import ends_of_answer
from preparing.tokens import load_tokenizer
from preparing.workspace import ROOT
from reporting.run_record import RunRecord
from settings.config_file import ConfigError
from training.whole_files import new_folder


def merge(run: RunRecord, base: Path, made_from: MadeFrom) -> None:
    """Add the adapter to the base model's weights, in their precision, and save the result to models/merged.

    Raises ConfigError.
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
        model = PeftModel.from_pretrained(model, str(ROOT / run["adapter"])).merge_and_unload()
        tokenizer = load_tokenizer(str(ROOT / run["adapter"]))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        reason = str(error).partition("\n")[0].rstrip(": ")
        raise ConfigError(
            f"The adapter in {run['adapter']} is damaged, or does not fit {run['base_model']} ({reason}): run "
            "`python finetuning/invoke_olive.py --fresh`."
        ) from error
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
