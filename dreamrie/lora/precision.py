"""LoRA layers under autocast: inputs are not made wide and narrow again."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn


def keep_inputs_narrow(model: nn.Module) -> None:
    """Let the LoRA layers of a model take inputs in autocast's own type as they are.

    PEFT casts an input to the type of the factors, fp32, and autocast casts it back for the product: four kernels a
    layer and step, and a copy that is kept for the backward pass by q, k and v each. The numbers are the same without.
    Outside autocast, for DoRA and for factors in fp64 nothing changes. Dropout may draw other entries: what it draws
    depends on the type.

    Args:
        model: with LoRA layers, as `attach_lora` leaves it; calling it again does no harm.
    """
    for module in model.modules():
        if isinstance(module, LoraLayer):
            module._cast_input_dtype = partial(_cast_if_needed, module)


def _cast_if_needed(layer: Any, x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    """What PEFT does, unless autocast would undo it."""
    # Factors in fp64 are none of autocast's business.
    if x is not None and dtype == torch.float32 and not layer.lora_variant:
        kind = x.device.type
        if torch.is_autocast_enabled(kind) and x.dtype == torch.get_autocast_dtype(kind):
            return x
    cast: Tensor | None = type(layer)._cast_input_dtype(layer, x, dtype)
    return cast
