"""Riemannion, and RiemannSGD and RiemannAdam: Algorithm 6 of arXiv:2507.12142 as corrected in docs/method.md 4.1.

With the core blocks of docs/method.md 4.3, M the exponential average of the Riemannian gradient,

    C = (1 - lr wd) X - lr (w_right u m_right^T + w_left m_left v^T),     X <- SVD_r(C)

where w = 1 for RiemannSGD and, for RiemannAdam, one over the root of the averaged squared norm of each raw gradient
block, both averages corrected for their start if `bias_correction`. The momentum is stored without the weights.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dreamrie.fixed_rank import remove_component
from dreamrie.optimizers.pair_optimizer import Move, PairOptimizer, Rule, Shapes
from dreamrie.riemannion import Riemannion
from dreamrie.riemannion_checks import LoraPairLike
from dreamrie.riemannion_groups import learning_rate
from dreamrie.riemannion_layers import Batch, Factor, Layer, State, anchor_of, read, scaling_of
from dreamrie.riemannion_maps import kept_numbers
from dreamrie.riemannion_step import StepOptions, balanced_factors, fused_step

BETA2, EPS = 0.999, 1e-8


def riemannion(pairs: Sequence[LoraPairLike], **settings: Any) -> Riemannion:
    """Muon on the fixed-rank manifold; see there."""
    return Riemannion(pairs, **settings)


def riemann_sgd(
    pairs: Sequence[LoraPairLike], lr: float, weight_decay: float = 0.0, momentum: float = 0.9
) -> PairOptimizer:
    """Gradient descent on the manifold; lr multiplies the averaged Riemannian gradient."""
    return PairOptimizer(RIEMANN_SGD, pairs, lr, momentum, weight_decay)


def riemann_adam(
    pairs: Sequence[LoraPairLike],
    lr: float,
    weight_decay: float = 0.0,
    momentum: float = 0.9,
    bias_correction: bool = True,
) -> PairOptimizer:
    """RiemannAdam; lr is about the Frobenius norm of each block of a step.

    Without `bias_correction` the first step is 1 / sqrt(1 - 0.999) = 31.6 times as long, a hidden decaying schedule.
    """
    return PairOptimizer(
        RIEMANN_ADAM, pairs, lr, momentum, weight_decay, bias_correction=bias_correction
    )


def _descend(layers: list[Layer], state: State) -> Move:
    """One step of RiemannSGD."""
    batch = read(layers, state)
    one = torch.ones((len(layers), 1, 1), dtype=batch.state.s.dtype, device=batch.state.s.device)
    return _moved(batch, one, one, {}, {})


def _descend_scaled(layers: list[Layer], state: State) -> Move:
    """One step of RiemannAdam."""
    batch = read(layers, state)
    group, beta = batch.layers[0].group, batch.layers[0].group["momentum"]
    steps = kept_numbers(batch, state, 0, "steps") + 1
    corrected = group["bias_correction"]
    first = 1 - beta**steps if corrected else torch.ones_like(steps)
    second = 1 - BETA2**steps if corrected else torch.ones_like(steps)
    raw = (remove_component(batch.state.u, batch.gradient_v), batch.gradient_t_u)
    kept, weights = [], []
    for side, block in enumerate(raw):
        average = second_moment(kept_numbers(batch, state, side, "second_moment"), block)
        kept.append(average)
        weights.append((1 / ((average / second).sqrt() + EPS) / first)[..., None, None])
    left, right = ({"second_moment": average} for average in kept)
    return _moved(batch, weights[0], weights[1], left | {"steps": steps}, right)


def second_moment(average: Tensor, block: Tensor) -> Tensor:
    """Line 12 as corrected: the decay on the old value, the square of the raw block; (layers,)."""
    return BETA2 * average + (1 - BETA2) * block.square().sum(dim=(-2, -1))


def weighted_core(
    r_left: Tensor, r_right: Tensor, rank: int, w_left: Tensor, w_right: Tensor
) -> Tensor:
    """Core of w_right u m_right^T + w_left m_left v^T from the triangles of qr([u, m_left]) and qr([v, m_right])."""
    first, second = slice(0, rank), slice(rank, 2 * rank)
    straight = r_left[..., first] @ r_right[..., second].mT
    return w_right * straight + w_left * (r_left[..., second] @ r_right[..., first].mT)


def _moved(
    batch: Batch, w_left: Tensor, w_right: Tensor, left: dict[str, Tensor], right: dict[str, Tensor]
) -> Move:
    """Step along the weighted momentum, retract and transport as Riemannion does."""
    layers, group = batch.layers, batch.layers[0].group
    beta = group["momentum"]
    options = StepOptions(
        learning_rate(group),
        beta,
        group["weight_decay"],
        group["sigma_floor"],
    )
    anchored = group["weight_decay"] and layers[0].anchor_rank
    result = fused_step(
        batch.state,
        (1 - beta) * batch.gradient_v,
        (1 - beta) * batch.gradient_t_u,
        options,
        anchor_of(layers) if anchored else None,
        lambda r_left, r_right, rank: weighted_core(r_left, r_right, rank, w_left, w_right),
    )
    new, scaling = result.state, scaling_of(layers)
    return Move(
        layers,
        result.ok,
        result.moved,
        balanced_factors(new.u, new.s, scaling),
        balanced_factors(new.v, new.s, scaling),
        {"basis": new.u, "momentum": new.m_left, "singular_values": new.s, **left},
        {"basis": new.v, "momentum": new.m_right, **right},
        result.floor_hits + batch.lifted,
    )


def _shapes(layer: Layer, factor: Factor) -> Shapes:
    """The state of Riemannion."""
    own = {"basis": (factor.rows, layer.rank), "momentum": (factor.rows, layer.rank)}
    return own if factor.is_right else own | {"singular_values": (layer.rank,)}


def _adam_shapes(layer: Layer, factor: Factor) -> Shapes:
    """The same with the second moments."""
    own = dict(_shapes(layer, factor)) | {"second_moment": ()}
    return own if factor.is_right else own | {"steps": ()}


RIEMANN_SGD = Rule("riemann_sgd", _descend, _shapes, tangent=True)
RIEMANN_ADAM = Rule("riemann_adam", _descend_scaled, _adam_shapes, tangent=True)
