"""PEFT's own reader of PEFT's own folders, to compare with what dreamrie puts on a model."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel
from torch import nn

from dreamrie.lora.pairs import LoraPair, lora_pairs

_NAME = "public"


def load_with_peft(model: nn.Module, folder: Path) -> list[LoraPair]:
    """Put a folder of PEFT on a model as any user of PEFT does.

    Args:
        model: carries no adapter; its layers are adapted in place.
        folder: with `adapter_config.json`.

    Returns:
        One pair for each adapted layer, with names relative to the model. What PEFT raises goes through.
    """
    PeftModel.from_pretrained(model, str(folder), adapter_name=_NAME)
    return lora_pairs(model, _NAME, use_dora=True)
