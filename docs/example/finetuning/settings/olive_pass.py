"""The settings of Olive's pass for each method, and three of our own. Imports Olive, which takes seconds."""

from __future__ import annotations

from typing import Any

from olive.passes.olive_pass import PassConfigParam
from olive.passes.pytorch import lora

from settings.config_file import CONFIG, ConfigError, line_of
from settings.run_settings import METHODS

EXTRA_SETTINGS = {
    "packing": PassConfigParam(type_=bool, default_value=False, description="Lay rows end to end, without padding."),
    "early_stopping_patience": PassConfigParam(type_=int, default_value=0, description="0 never stops early."),
    "eval_rows": PassConfigParam(
        type_=int, default_value=None, description="Held-out rows per evaluation in the training; null: a tenth of it."
    ),
}
EMBEDDINGS = {"embed_tokens", "embed_in", "wte", "word_embeddings"}  # their names in transformers' models


class ExtraSettings(lora.LoRA):
    """Settings that the five methods share."""

    def __init__(self, accelerator_spec: Any, config: Any, host_device: Any = None) -> None:
        """Raise ConfigError for an embedding that the method cannot adapt: PEFT would only do so in the training."""
        super().__init__(accelerator_spec, config, host_device)
        method = type(self).__name__
        named = {name: name.rpartition(".")[2] for name in config.target_modules or []}
        refused = [name for name, last in named.items() if last in EMBEDDINGS]
        if refused and method in ("LoHa", "LoKr"):
            where = f"{CONFIG.name}, line {line_of(CONFIG, 'target_modules')}: passes.*.target_modules"
            raise ConfigError(
                f"{where}: {method} cannot adapt {refused[0]}, an embedding: remove it, or use LoRA or DoRA."
            )

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {**super()._default_config(accelerator_spec), **EXTRA_SETTINGS}


def pass_class(method: str, extension: type = ExtraSettings) -> Any:
    """Return Olive's pass class for a method, with `extension` as its first base class."""
    name = METHODS[method]
    return type(name, (extension, getattr(lora, name)), {})
