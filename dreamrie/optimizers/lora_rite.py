"""LoRA-RITE (arXiv:2410.20625): adaptive, and blind to the choice of factors.

For the factor A, with B = U R and its gradient g, at scaling 1 (see factors.py); B is moved alike:

    h   = R^-T g                                      the gradient without the size of B
    P   = U^T U_before                                from the frame of the last step to this one
    V   = P V P^T + h h^T                             second moment, r x r
    rho = rho + max |eigenvalues of V_before - those of P V_before P^T|       what the projection lost
    M   = beta P M + (1 - beta) (V + rho I)^-1/2 h
    A  <- A - lr R^-1 M

Where R is singular, as at B = 0, its pseudo-inverse stands for the inverse. V is a sum, so steps shrink like one over
the root of their number; the paper has no bias correction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from dreamrie.optimizers.factors import Answer, Side, move_by
from dreamrie.optimizers.pair_optimizer import Move, PairOptimizer, Rule, Shapes
from dreamrie.riemannion_checks import LoraPairLike
from dreamrie.riemannion_layers import Factor, Layer, State


def lora_rite(
    pairs: Sequence[LoraPairLike], lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> PairOptimizer:
    """LoRA-RITE; lr is the largest spectral norm of each half of a step of X."""
    return PairOptimizer(LORA_RITE, pairs, lr, momentum, weight_decay)


def inverse_root(matrix: Tensor) -> Tensor:
    """Return matrix^-1/2 of symmetric positive semidefinite matrices on their range."""
    values, vectors = torch.linalg.eigh(matrix)
    floor = matrix.shape[-1] * torch.finfo(matrix.dtype).eps * values[..., -1:]
    keep = values > floor
    roots = torch.where(keep, values, 1.0).rsqrt() * keep
    return (vectors * roots.unsqueeze(-2)) @ vectors.mT


def carried(own: Side, passage: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return V, rho and M (rows, r) of the last step in the present frame of the other factor."""
    moment = passage @ own.state["second_moment"] @ passage.mT
    before, after = (torch.linalg.eigvalsh(v) for v in (own.state["second_moment"], moment))
    lost = own.state["lost"] + (before - after).abs().amax(dim=-1)
    return moment, lost, own.state["momentum"] @ passage.mT


def one_side(own: Side, other: Side, momentum: float) -> tuple[Tensor, dict[str, Tensor]]:
    """Direction and state of one factor, (rows, r); rows are those of the transposed formulas above."""
    inverse = torch.linalg.pinv(other.triangle)
    bare = own.gradient @ inverse
    gram = bare.mT @ bare
    good = torch.isfinite(gram).all(dim=-1, keepdim=True).all(dim=-2, keepdim=True)
    moment, average = torch.where(good, gram, 0.0), torch.zeros_like(bare)
    lost = torch.zeros_like(gram[..., 0, 0])
    if own.state:
        before, lost, average = carried(own, other.frame.mT @ other.state["frame"])
        moment = before + moment
    identity = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    scaled = bare @ inverse_root(moment + lost[..., None, None] * identity)
    average = momentum * average + (1 - momentum) * scaled
    kept = {"frame": own.frame, "momentum": average, "second_moment": moment, "lost": lost}
    return torch.where(good, average @ inverse.mT, torch.nan), kept


def directions(left: Side, right: Side, momentum: float) -> Answer:
    """Both factors, from those before the step."""
    (d_left, left_state), (d_right, right_state) = (
        one_side(left, right, momentum),
        one_side(right, left, momentum),
    )
    return Answer(d_left, d_right, left_state, right_state)


def shapes(layer: Layer, factor: Factor) -> Shapes:
    """Frame of the factor, momentum, second moment and lost mass."""
    tall, square = (factor.rows, layer.rank), (layer.rank, layer.rank)
    return {"frame": tall, "momentum": tall, "second_moment": square, "lost": ()}


def _move(layers: list[Layer], state: State) -> Move:
    return move_by(directions, layers, state)


LORA_RITE = Rule("lora_rite", _move, shapes, needs_rank=False)
