"""Fingerprints of base weights, the same before, during and after an adapter is attached.

`base_fingerprint` is equal exactly if every byte is. It cannot tell whether two loads of one file are the same model,
because a load in half precision rounds. `rounded_fingerprints` can: it rounds as the load does.
"""

from __future__ import annotations

import hashlib
import weakref
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from dreamrie.loi.session import is_packed, stored

if TYPE_CHECKING:
    from collections.abc import Callable

_WIDE = frozenset({torch.float64, torch.float32})
_HALVES = (torch.float16, torch.bfloat16)
EXACT = "exact"

# Hashing a U-Net of SD2 takes seconds, and a run saves often. The stamp tells whether any tensor was replaced, moved
# or written since; the entry goes with the model.
_known: weakref.WeakKeyDictionary[nn.Module, tuple[Any, dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)
# Of models whose weights are no longer whole in this process.
_kept: weakref.WeakKeyDictionary[nn.Module, tuple[str, dict[str, str]]] = (
    weakref.WeakKeyDictionary()
)


def keep_fingerprints(model: nn.Module) -> None:
    """Take both fingerprints now, for good: its weights are about to be spread over processes.

    Args:
        model: with whole weights.
    """
    _kept[model] = base_fingerprint(model), rounded_fingerprints(model)


def base_fingerprint(model: nn.Module) -> str:
    """Digest of all parameters and buffers that do not belong to an adapter.

    PEFT moves a weight from `to_q.weight` to `to_q.base_layer.weight`; names are brought back, so
    the digest is equal exactly if every base tensor is equal to the bit.

    Returns:
        64 hexadecimal digits.
    """
    if model in _kept:
        return _kept[model][0]
    return _digest(base_tensors(model), lambda tensor: tensor, with_dtype=True)


def rounded_fingerprints(model: nn.Module) -> dict[str, str]:
    """Digests of the base weights that survive loading the same file in another precision.

    Rounding to nearest is what a load in half precision does, so the fp32 and the fp16 load of one file have equal
    "float16" digests, and its fp32 and bf16 loads equal "bfloat16" digests, exactly. No digest can join fp16 and bf16
    loads: each has lost what the other kept. A model in fp32 or fp64 therefore has both digests, a model in half
    precision that of its own kind. Two fp32 models that differ by less than the rounding of fp16 count as one, and so
    do two models whose weights are equal and whose settings are not (prediction type, heads): this is about weights.

    Computed once for a model; again after a tensor was moved, replaced or written in place (writes through `.data`
    are not seen: base weights are never written here).

    Args:
        model: any module, with or without adapter.

    Returns:
        "float16" and "bfloat16", or one of them; "exact", see `base_fingerprint`, for a model that mixes the two or
        holds quantized weights. 64 hexadecimal digits each.
    """
    if model in _kept:
        return dict(_kept[model][1])
    tensors = base_tensors(model)
    stamp = tuple(_stamp(tensor) for tensor in tensors.values())
    if model in _known and _known[model][0] == stamp:
        return dict(_known[model][1])
    found = _rounded(tensors)
    _known[model] = (stamp, found)
    return dict(found)


def base_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers that do not belong to an adapter, under the names that they have without one.

    Args:
        model: any module.

    Returns:
        Name to tensor, in the order of the module; a quantized weight as the parts that it is kept as.
    """
    inside = [
        (f"{name}." if name else "", f"{name}.base_layer." if name else "base_layer.")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer)
    ]
    tensors: dict[str, Tensor] = {}
    for name, tensor in [*model.named_parameters(), *model.named_buffers(), *_beside(model)]:
        owner = next((pair for pair in inside if name.startswith(pair[0])), None)
        if owner is None:
            tensors |= stored(tensor, name)
        elif name.startswith(owner[1]):
            tensors |= stored(tensor, owner[0] + name.removeprefix(owner[1]))
    return tensors


def _beside(model: nn.Module) -> list[tuple[str, Tensor]]:
    """What quantized layers need beside their bytes and keep in no parameter or buffer: the scales of bitsandbytes."""
    if not any(is_packed(parameter) for parameter in model.parameters()):
        return []
    known = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    known |= {name for name, _ in model.named_buffers(remove_duplicate=False)}
    saved = model.state_dict().items()
    return [
        (name, value) for name, value in saved if name not in known and isinstance(value, Tensor)
    ]


def _rounded(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """One digest for each half precision that can be derived from these tensors."""
    kinds = {tensor.dtype for tensor in tensors.values() if not _is_whole_number(tensor)}
    for half in _HALVES:
        if half in kinds and kinds <= {*_WIDE, half}:
            return {_name(half): _digest_rounded(tensors, half)}
    if kinds <= _WIDE:
        return {_name(half): _digest_rounded(tensors, half) for half in _HALVES}
    return {EXACT: _digest(tensors, lambda tensor: tensor, with_dtype=True)}


def _digest_rounded(tensors: Mapping[str, Tensor], half: torch.dtype) -> str:
    def rounded(tensor: Tensor) -> Tensor:
        # By way of fp32, as the file was: rounding fp64 at once could differ in the last bit.
        return tensor if _is_whole_number(tensor) else tensor.float().to(half)

    return _digest(tensors, rounded, with_dtype=False)


def _digest(
    tensors: Mapping[str, Tensor], seen_as: Callable[[Tensor], Tensor], *, with_dtype: bool
) -> str:
    """SHA-256 over names, shapes and bytes, one tensor in memory at a time."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        # Rounded on the CPU, wherever the model is: one rounding for all devices.
        tensor = seen_as(tensors[name].detach().cpu())
        kind = f"{tensor.dtype} " if with_dtype else ""
        digest.update(f"{name} {kind}{tuple(tensor.shape)}\n".encode())
        flat = tensor.contiguous().reshape(-1)
        if flat.numel():
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _is_whole_number(tensor: Tensor) -> bool:
    """Counters and masks, which no precision changes."""
    return tensor.dtype in (torch.bool, torch.int64, torch.int32)


def _stamp(tensor: Tensor) -> Iterable[object]:
    """Changes whenever the tensor is moved, cast or written in place."""
    version = 0 if tensor.is_inference() else tensor._version
    return (tensor.data_ptr(), tensor.dtype, tuple(tensor.shape), version)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
