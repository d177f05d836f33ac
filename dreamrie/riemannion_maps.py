"""Riemannion with another spectral map than msign: the core of the direction, and NAMO's numbers per layer."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamrie.core_maps import CORE_MAPS, NAMO_BETA2, noise_adaptive
from dreamrie.fixed_rank import cross_core, remove_component
from dreamrie.riemannion_layers import Batch, State
from dreamrie.riemannion_step import Direction, zero_normal_block


def mapped_direction(group: dict[str, Any], batch: Batch, state: State) -> Direction | None:
    """What a group's core map puts in the place of steps 5 to 7.

    Args:
        group: with core_map, exact_norm and momentum.
        batch: layers of one shape, of this group.
        state: of the optimizer; not written.

    Returns:
        The core of the direction; None for msign, which the step knows itself.
    """
    name = group["core_map"]
    if name == "msign":
        return None
    kept = noise_numbers(group, batch, state)

    def direction(r_left: Tensor, r_right: Tensor, rank: int) -> Tensor:
        core = cross_core(r_left, r_right, rank)
        moved = zero_normal_block(CORE_MAPS[name](core, rank), rank)
        if group["exact_norm"]:
            size = torch.linalg.matrix_norm(moved, 2)[..., None, None]
            moved = moved / torch.where(size > 0, size, 1.0)
        if kept:
            norm = torch.linalg.vector_norm(core, dim=(-2, -1))
            factor = noise_adaptive(norm, kept["second_moment"], kept["steps"], group["momentum"])
            moved = factor[..., None, None] * moved
        return moved

    return direction


def noise_numbers(group: dict[str, Any], batch: Batch, state: State) -> dict[str, Tensor]:
    """What NAMO keeps of each layer, this step included; nothing for other maps.

    Args:
        group: with core_map.
        batch: layers of one shape, of this group.
        state: of the optimizer; not written.

    Returns:
        `second_moment`, the average of the squared norm of the Riemannian gradient, and `steps`; (layers,) each.
    """
    if group["core_map"] != "namo":
        return {}
    moment, steps = (kept_numbers(batch, state, 0, key) for key in ("second_moment", "steps"))
    normal = remove_component(batch.state.u, batch.gradient_v)
    square = normal.square().sum(dim=(-2, -1)) + batch.gradient_t_u.square().sum(dim=(-2, -1))
    return {
        "second_moment": NAMO_BETA2 * moment + (1 - NAMO_BETA2) * square,
        "steps": steps + 1,
    }


def kept_numbers(batch: Batch, state: State, side: int, key: str) -> Tensor:
    """Stack a number of each layer's state.

    Args:
        batch: layers of one shape.
        state: of the optimizer; not written.
        side: 0: kept with the tall factor, 1: with the short one.
        key: its name.

    Returns:
        (layers,), zero where there is none yet.
    """
    zero = torch.zeros((), dtype=batch.state.s.dtype, device=batch.state.s.device)
    entries = [state.get(layer.factors[side].parameter, {}) for layer in batch.layers]
    return torch.stack([entry.get(key, zero) for entry in entries])
