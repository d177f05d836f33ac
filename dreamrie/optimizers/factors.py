"""What the methods that move the factors share: reading them, triangles, decay, and the way back.

With c the scaling of a layer, a method sees sqrt(c) times both factors and the gradients divided by it, so that its
formulas hold at c = 1 and the path of X does not depend on how c and the factors share its size. Left is (m, r) and
right (n, r), both with one column per rank: X = left right^T.

A method answers with directions D_left, D_right. Without an anchor the product decays exactly (the split decay of
arXiv:2606.12921): F <- sigma F - lr D / sigma with sigma = sqrt(1 - lr weight_decay). With an anchor X0 the decay is
the tangent vector weight_decay P(X - X0), shared by both factors: it pulls the model back to its base.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from dreamrie.fixed_rank import masked_msign, working_dtype
from dreamrie.optimizers.pair_optimizer import Move
from dreamrie.riemannion_groups import learning_rate
from dreamrie.riemannion_layers import (
    Layer,
    State,
    anchor_of,
    scaling_of,
    stack_gradients,
    stack_trained,
)


class Side(NamedTuple):
    """One factor of every layer of a batch, at c = 1, with what the state holds of it."""

    factor: Tensor
    """(layers, rows, r)."""
    gradient: Tensor
    frame: Tensor
    """Q of factor = Q T."""
    triangle: Tensor
    """T, (layers, r, r) upper triangular."""
    state: dict[str, Tensor]
    """Values by name; empty while no layer of the batch has any, zeros for layers that have none."""


class Answer(NamedTuple):
    """What a method makes of a batch: a direction and the new state of either side."""

    left: Tensor
    right: Tensor
    left_state: dict[str, Tensor]
    right_state: dict[str, Tensor]


Method = Callable[[Side, Side, float], Answer]


def move_by(method: Method, layers: list[Layer], state: State) -> Move:
    """Make the move of a method.

    Args:
        method: takes the left side, the right side and the momentum.
        layers: of one shape, left factor first, with finite gradients.
        state: of the optimizer; not written.

    Returns:
        The move; a layer whose step or state is not finite is not ok.
    """
    group = layers[0].group
    sides = _sides(layers, state)
    answer = method(*sides, group["momentum"])
    left, right = _decayed(layers, sides, answer)
    root = scaling_of(layers).sqrt().unsqueeze(-1)
    left, right = left / root, right / root
    written = [left, right, *answer.left_state.values(), *answer.right_state.values()]
    ok = torch.stack([torch.isfinite(part).reshape(len(layers), -1).all(dim=1) for part in written])
    ok = ok.all(dim=0)
    nothing = torch.zeros(len(layers), dtype=torch.long, device=ok.device)
    return Move(layers, ok, ok, left, right, answer.left_state, answer.right_state, nothing)


def _sides(layers: list[Layer], state: State) -> tuple[Side, Side]:
    """Read factors, gradients and state."""
    dtype = working_dtype(layers[0].tall.parameter.dtype)
    root = scaling_of(layers).sqrt().unsqueeze(-1)
    found = []
    factors, gradients = stack_trained(layers), stack_gradients(layers)
    for number, (factor, gradient) in enumerate(zip(factors, gradients, strict=True)):
        scaled = factor.to(dtype) * root
        entries = [state.get(layer.factors[number].parameter, {}) for layer in layers]
        like = next((entry for entry in entries if entry), {})
        values = {
            key: torch.stack([entry.get(key, torch.zeros_like(value)) for entry in entries])
            for key, value in like.items()
        }
        # A factor that is not finite makes the step not finite, but must not stop a batched SVD.
        sound = torch.where(torch.isfinite(scaled), scaled, 0.0)
        frame, triangle = torch.linalg.qr(sound)
        found.append(Side(scaled, gradient.to(dtype) / root, frame, triangle, values))
    return found[0], found[1]


def _decayed(
    layers: list[Layer], sides: tuple[Side, Side], answer: Answer
) -> tuple[Tensor, Tensor]:
    """Return the new factors at c = 1."""
    group = layers[0].group
    lr, decay = learning_rate(group), group["weight_decay"]
    left, right = sides
    if not decay:
        return left.factor - lr * answer.left, right.factor - lr * answer.right
    if not layers[0].anchor_rank:
        sigma = (1 - lr * decay) ** 0.5
        return (
            sigma * left.factor - lr / sigma * answer.left,
            sigma * right.factor - lr / sigma * answer.right,
        )
    pull_left, pull_right = anchored_pull(left, right, *anchor_of(layers))
    return (
        left.factor - lr * (answer.left + decay * pull_left),
        right.factor - lr * (answer.right + decay * pull_right),
    )


def anchored_pull(
    left: Side, right: Side, anchor_left: Tensor, anchor_right: Tensor
) -> tuple[Tensor, Tensor]:
    """Split the tangent vector P(X - X0) into pulls of the factors: pull_left right^T + left pull_right^T.

    With D = X - X0 and pseudo-inverses: D right^+T - left K / 2 and D^T left^+T - right K^T / 2, K = left^+ D right^+T.
    """
    by_right = anchor_left @ divide_transposed(anchor_right.mT @ right.frame, right.triangle)
    by_left = anchor_right @ divide_transposed(anchor_left.mT @ left.frame, left.triangle)
    pull_left, pull_right = left.factor - by_right, right.factor - by_left
    core = divide_transposed((left.frame.mT @ pull_left).mT, left.triangle).mT
    return pull_left - left.factor @ core / 2, pull_right - right.factor @ core.mT / 2


def divide(block: Tensor, triangle: Tensor) -> Tensor:
    """Return block T^-1 for an upper triangular T; not finite where T is singular."""
    return torch.linalg.solve_triangular(triangle, block, upper=True, left=False)


def divide_transposed(block: Tensor, triangle: Tensor) -> Tensor:
    """Return block T^-T for an upper triangular T; not finite where T is singular."""
    return torch.linalg.solve_triangular(triangle.mT, block, upper=False, left=False)


def tall_msign(block: Tensor) -> Tensor:
    """Orthogonalize tall matrices, null directions masked; NaN for a layer that is not finite."""
    good = torch.isfinite(block.square().sum(dim=(-2, -1), keepdim=True))
    frame, triangle = torch.linalg.qr(torch.where(good, block, 0.0))
    return torch.where(good, frame @ masked_msign(triangle), torch.nan)


def running(side: Side, new: Tensor, momentum: float) -> Tensor:
    """Add to the raw momentum of a side."""
    return momentum * side.state["momentum"] + new if side.state else new
