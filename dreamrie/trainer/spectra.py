"""Singular values of what was trained, from the thin factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from dreamrie.errors import NumericalError
from dreamrie.lora import LoraPair


def change_spectra(pairs: Sequence[LoraPair]) -> dict[str, list[float]]:
    """Singular values of each layer's whole change, largest first; anchor included, DoRA's magnitude left out.

    Layers of one shape are stacked: one small SVD per shape, no (out, in) matrix. The device is waited for twice.

    Args:
        pairs: any layers.

    Returns:
        By name, in the order given.

    Raises:
        NumericalError: a factor is not finite.
    """
    by_shape: dict[tuple[Any, ...], list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        left, right = pair.left_matrix(), pair.right_matrix()
        by_shape[(*left.shape, right.shape[1], pair.scaling)].append(pair)
    with torch.no_grad():
        cores = [_core(members) for members in by_shape.values()]
        sound = torch.cat([core.isfinite().all(-1).all(-1).to(cores[0].device) for core in cores])
        if not all(sound.tolist()):
            raise NumericalError("the LoRA factors of a layer hold values that are not finite.")
        values = [row for core in cores for row in torch.linalg.svdvals(core)]
    names = [pair.name for members in by_shape.values() for pair in members]
    found = as_lists(dict(zip(names, values, strict=True)))
    return {pair.name: found[pair.name] for pair in pairs}


def _core(pairs: Sequence[LoraPair]) -> Tensor:
    """Small matrices with the singular values of the changes of layers of one shape; frames are not needed for them."""
    left = torch.stack([pair.left_matrix().detach().float() for pair in pairs])
    right = torch.stack([pair.right_matrix().detach().float() for pair in pairs])
    triangles = [torch.linalg.qr(tall, mode="r").R for tall in (left, right.mT)]
    return pairs[0].scaling * (triangles[0] @ triangles[1].mT)


def as_lists(values: Mapping[str, Tensor]) -> dict[str, list[float]]:
    """Read vectors of any lengths in one transfer from their device.

    Args:
        values: by name.

    Returns:
        The same numbers by the same names.
    """
    if not values:
        return {}
    device = next(iter(values.values())).device
    numbers = iter(torch.cat([vector.to(device) for vector in values.values()]).tolist())
    return {name: [next(numbers) for _ in range(len(vector))] for name, vector in values.items()}
