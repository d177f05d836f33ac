"""One fused step from dense gradients, and what it did as dense matrices."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamrie.fixed_rank import Factors, Tangent
from dreamrie.riemannion_step import FusedState, StepOptions
from tests.properties.dense_geometry import TAME
from tests.strategies import F64, POINTS

STEP_POINTS = tuple(p for p in POINTS if p.spectrum in TAME)


def point_of(state: FusedState, row: int = 0) -> Tensor:
    u, s, v = (part[row].to(F64) for part in state[:3])
    return (u * s) @ v.mT


def momentum_of(state: FusedState, row: int = 0) -> Tensor:
    u, _, v, left, right = (part[row].to(F64) for part in state)
    return left @ v.mT + u @ right.mT


def take(
    step: Any,
    state: FusedState,
    gradients: Tensor,
    options: StepOptions,
    anchor: Factors | None = None,
) -> Any:
    """One step of a batch from dense gradients (batch, out, in)."""
    return step.fused_step(state, gradients @ state.v, gradients.mT @ state.u, options, anchor)


def direction_of(step: Any, u: Tensor, v: Tensor, momentum: Tangent) -> Tensor:
    """D = P(msign(M)) as the step makes it, from the step's own core."""
    rank = u.shape[-1]
    q_left, r_left = torch.linalg.qr(torch.cat([u, momentum.d_left], dim=-1))
    q_right, r_right = torch.linalg.qr(torch.cat([v, momentum.d_right], dim=-1))
    core = step.cross_core(r_left, r_right, rank)
    return q_left @ step.tangent_direction(core, rank, StepOptions(1.0)) @ q_right.mT


def smallest_share(z: Tensor) -> float:
    """Smallest nonzero singular value over the largest; orthogonalization amplifies errors by its inverse."""
    spectrum = torch.linalg.svdvals(z)
    nonzero = spectrum[spectrum > 1e-10 * spectrum[0]]
    return float(nonzero[-1] / spectrum[0])
