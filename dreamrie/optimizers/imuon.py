"""Intrinsic Muon on fixed-rank matrices (arXiv:2605.09238), in the quotient geometry of the factors.

The Riemannian gradients g_B S_A^-1 and S_B^-1 g_A, S_A = A A^T, S_B = B^T B, turn with the factors as the factors
themselves; so do their momenta m_B, m_A, and the joint momentum M = m_B A + B m_A does not depend on the factors. With
A^T = Q_A R_A and B = Q_B R_B, at scaling 1 (see factors.py),

    B <- B - lr  msign(M Q_A) R_A^-T,      A <- A - lr  R_B^-1 msign(Q_B^T M)

Each half moves X by lr in spectral norm. Momenta of the plain factor gradients would not be invariant.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from dreamrie.optimizer_table import SPECTRAL_MOMENTUM
from dreamrie.optimizers.factors import (
    Answer,
    Side,
    divide,
    divide_transposed,
    move_by,
    running,
    tall_msign,
)
from dreamrie.optimizers.lora_muon import shapes
from dreamrie.optimizers.pair_optimizer import Move, PairOptimizer, Rule
from dreamrie.riemannion_checks import LoraPairLike
from dreamrie.riemannion_layers import Layer, State


def imuon(
    pairs: Sequence[LoraPairLike],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = SPECTRAL_MOMENTUM,
) -> PairOptimizer:
    """Intrinsic Muon; lr is the spectral norm of each half of a step of X."""
    return PairOptimizer(IMUON, pairs, lr, momentum, weight_decay)


def intrinsic(gradient: Tensor, triangle: Tensor) -> Tensor:
    """Gradient of one factor in the quotient metric: times the inverse Gram matrix of the other factor."""
    return divide_transposed(divide(gradient, triangle), triangle)


def joint(own: Side, m_own: Tensor, other: Side, m_other: Tensor) -> Tensor:
    """Return M Q of the other factor's frame, M = m_own other^T + own m_other^T."""
    return m_own @ other.triangle.mT + own.factor @ (m_other.mT @ other.frame)


def directions(left: Side, right: Side, momentum: float) -> Answer:
    """Both halves, from the factors before the step."""
    m_left = running(left, intrinsic(left.gradient, right.triangle), momentum)
    m_right = running(right, intrinsic(right.gradient, left.triangle), momentum)
    return Answer(
        divide_transposed(tall_msign(joint(left, m_left, right, m_right)), right.triangle),
        divide_transposed(tall_msign(joint(right, m_right, left, m_left)), left.triangle),
        {"momentum": m_left},
        {"momentum": m_right},
    )


def _move(layers: list[Layer], state: State) -> Move:
    return move_by(directions, layers, state)


IMUON = Rule("imuon", _move, shapes)
