"""LoRA-Muon (arXiv:2606.12921): Muon in the metric that makes the product forget its factors.

With the momenta m_B, m_A of the factor gradients, S_A = A A^T, S_B = B^T B, at scaling 1 (see factors.py):

    B <- B - lr / 2  msign(m_B S_A^-1/2) S_A^-1/2,      A <- A - lr / 2  S_B^-1/2 msign(S_B^-1/2 m_A)

Any W with W W^T = S^-1 gives the same step, and the inverse triangle of a QR is one that squares no singular values.
Each half moves X by lr / 2 in spectral norm; without momentum by lr / 2 msign(G v) v^T and lr / 2 u msign(u^T G).
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
from dreamrie.optimizers.pair_optimizer import Move, PairOptimizer, Rule, Shapes
from dreamrie.riemannion_checks import LoraPairLike
from dreamrie.riemannion_layers import Factor, Layer, State


def lora_muon(
    pairs: Sequence[LoraPairLike],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = SPECTRAL_MOMENTUM,
) -> PairOptimizer:
    """LoRA-Muon; lr is twice the spectral norm of each half of a step of X."""
    return PairOptimizer(LORA_MUON, pairs, lr, momentum, weight_decay)


def half(momentum: Tensor, triangle: Tensor) -> Tensor:
    """Direction of one factor from its momentum and the triangle of the other factor."""
    return divide_transposed(tall_msign(divide(momentum, triangle)), triangle) / 2


def directions(left: Side, right: Side, momentum: float) -> Answer:
    """Both halves, from the factors before the step."""
    m_left = running(left, left.gradient, momentum)
    m_right = running(right, right.gradient, momentum)
    return Answer(
        half(m_left, right.triangle),
        half(m_right, left.triangle),
        {"momentum": m_left},
        {"momentum": m_right},
    )


def shapes(layer: Layer, factor: Factor) -> Shapes:
    """One momentum of the size of the trained columns."""
    return {"momentum": (factor.rows, layer.rank)}


def _move(layers: list[Layer], state: State) -> Move:
    return move_by(directions, layers, state)


LORA_MUON = Rule("lora_muon", _move, shapes)
