"""The settings of Olive's pass for each method, and two of our own. Imports Olive, which takes seconds."""

from __future__ import annotations

from typing import Any

from olive.passes.olive_pass import PassConfigParam
from olive.passes.pytorch import lora

from settings.run_settings import METHODS

EXTRA_SETTINGS = {
    "packing": PassConfigParam(type_=bool, default_value=False, description="Lay rows end to end, without padding."),
    "early_stopping_patience": PassConfigParam(type_=int, default_value=0, description="0 never stops early."),
}


class ExtraSettings(lora.LoRA):
    """Settings that the five methods share."""

    @classmethod
    def _default_config(cls, accelerator_spec: Any) -> dict[str, Any]:
        return {**super()._default_config(accelerator_spec), **EXTRA_SETTINGS}


def pass_class(method: str, extension: type = ExtraSettings) -> Any:
    """Return Olive's pass class for a method, with `extension` as its first base class."""
    name = METHODS[method]
    return type(name, (extension, getattr(lora, name)), {})
