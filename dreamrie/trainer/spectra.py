"""Singular values of what was trained, from the thin factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import torch

from dreamrie.fixed_rank import point_from_factors
from dreamrie.lora import LoraPair


def change_spectra(pairs: Sequence[LoraPair]) -> dict[str, list[float]]:
    """Singular values of each layer's whole change, largest first; anchor included.

    Layers of one shape are stacked: one small SVD per shape, no (out, in) matrix.
    """
    by_shape: dict[tuple[Any, ...], list[LoraPair]] = defaultdict(list)
    for pair in pairs:
        left, right = pair.left_matrix(), pair.right_matrix()
        by_shape[(*left.shape, right.shape[1], pair.scaling)].append(pair)
    found: dict[str, list[float]] = {}
    with torch.no_grad():
        for (*_, scaling), members in by_shape.items():
            left = torch.stack([pair.left_matrix().detach().float() for pair in members])
            right = torch.stack([pair.right_matrix().detach().float() for pair in members])
            values = point_from_factors(left, right.mT, scaling).s.tolist()
            found |= {pair.name: s for pair, s in zip(members, values, strict=True)}
    return {pair.name: found[pair.name] for pair in pairs}
