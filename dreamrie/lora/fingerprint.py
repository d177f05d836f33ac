"""A sha256 of the base weights, the same before, during and after an adapter is attached."""

from __future__ import annotations

import hashlib

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn


def base_fingerprint(model: nn.Module) -> str:
    """Digest of all parameters and buffers that do not belong to an adapter.

    PEFT moves a weight from `to_q.weight` to `to_q.base_layer.weight`; names are brought back, so
    the digest is equal exactly if every base tensor is equal to the bit.

    Returns:
        64 hexadecimal digits.
    """
    inside = [
        (f"{name}." if name else "", f"{name}.base_layer." if name else "base_layer.")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        owner = next((pair for pair in inside if name.startswith(pair[0])), None)
        if owner is None:
            tensors[name] = tensor
        elif name.startswith(owner[1]):
            tensors[owner[0] + name.removeprefix(owner[1])] = tensor
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).cpu().numpy().tobytes())
    return digest.hexdigest()
