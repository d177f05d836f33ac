"""Less copying where autocast trains a frozen U-Net whose weights are bf16 or fp16.

Autocast has group and layer norms work in fp32: their input is copied to fp32 and kept, their output is fp32 and kept
by what follows, and each of the products behind it copies it back, LoRA layers once more than the others. The kernels
for bf16 and fp16 sum in fp32 by themselves, so that all that is lost without these copies is the difference between an
output in fp32 and one that is rounded; the next product rounds it anyway, or what an activation makes of it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from dreamrie.lora.precision import keep_inputs_narrow


def copy_less(unet: nn.Module) -> None:
    """Let a U-Net with LoRA layers make no copies that autocast alone asks for.

    Gradients are rounded in the norms, too. Without autocast, and for weights in fp32, it computes what it did before.
    Weights, their names, and the classes of modules stay as they are.

    Args:
        unet: with its adapters; calling it again does no harm.
    """
    for module in unet.modules():
        if type(module) in (nn.GroupNorm, nn.LayerNorm) and module.weight is not None:
            module.forward = partial(_normalize, module)
    keep_inputs_narrow(unet)


def _normalize(norm: Any, x: Tensor) -> Tensor:
    """What the norm does, outside autocast where its input has the type of its weights."""
    kind = x.device.type
    if torch.is_autocast_enabled(kind) and x.dtype == norm.weight.dtype:
        with torch.autocast(kind, enabled=False):
            return type(norm).forward(norm, x)
    return type(norm).forward(norm, x)
