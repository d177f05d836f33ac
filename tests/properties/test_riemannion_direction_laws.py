"""Laws of the direction of one fused step: its spectrum, its masks, and the move along it (O6, O14).

Each law takes the module of the step first; `tests/mutants/optimizer_*.py` run it on broken ones. Numbers without a
letter are those of docs/method.md 10.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given

import dreamrie.riemannion_step as real
from dreamrie.fixed_rank import Tangent
from dreamrie.riemannion_step import FusedState, StepOptions
from tests.margins import within
from tests.properties.dense_geometry import TAME
from tests.properties.one_step import direction_of, point_of, smallest_share, take
from tests.reference import dense as reference
from tests.strategies import F64, Example, examples, frame, noise


def law_o6_direction_has_the_closed_form_spectrum(step: Any, example: Example) -> None:
    """Singular values (sqrt(4 - 3c^2) +- c) / 2, norm in [1, 2/sqrt(3)], <M, D> = |M|_*, |D|_F <= sqrt(2r)."""
    momentum = example.tangent(3)
    m = example.ambient(momentum)
    if smallest_share(m) < 1e-3:
        return
    d = direction_of(step, example.point.u, example.point.v, momentum)
    spectrum = torch.linalg.svdvals(d)
    within("O6 lower bound", 1 - spectrum[0], 1e-12)
    within("O6 upper bound", spectrum[0] - 2 / math.sqrt(3), 1e-12)
    within("O6 Frobenius", d.norm() - math.sqrt(2 * example.rank), 1e-12)
    within("9 <M, D>", (m * d).sum() - torch.linalg.svdvals(m).sum(), 1e-12)
    within("9 <M, D>", torch.linalg.svdvals(m).sum() - (m * d).sum(), 1e-12)
    if 2 * example.rank > min(example.out, example.in_):
        return
    u, _, v = example.point
    sign = reference.msign(m)
    normal = sign - reference.projection(u, v, sign)
    c = torch.linalg.svdvals(normal)[: example.rank]
    root = (4 - 3 * c**2).sqrt()
    wanted = torch.cat([(root + c) / 2, (root - c) / 2]).sort(descending=True).values
    within("O6 spectrum", (spectrum[: 2 * example.rank] - wanted).abs().max(), 1e-12)


def law_o6_first_order_move(step: Any, example: Example) -> None:
    """X(lr) = X - lr D + O(lr^2): lr doubled doubles the first-order move."""
    gradient = example.matrix(4)
    u, _, v = example.point
    projected = reference.projection(u, v, gradient)
    if smallest_share(projected) < 1e-2:
        return
    d = reference.projection(u, v, reference.msign(projected))
    for lr in (1e-5, 2e-5):
        result = take(step, example.state(), gradient.unsqueeze(0), StepOptions(lr))
        move = (example.x - point_of(result.state)) / lr
        within("O6 first order / lr", (move - d).norm() / (lr * (1 + d.norm() ** 2)), 10.0)


def law_o14_null_directions_are_masked(step: Any) -> None:
    """A rank-3 momentum at r = 4 gives the dense msign; zero momentum moves nothing, to the bit."""
    example = Example(12, 9, 4, seed=11)
    u, _, v = example.point
    for k in (1, 2, 3):
        thin = noise(100 + k, 12, k) @ noise(200 + k, k, 9)
        for lr in (0.05, 0.2):
            wanted = reference.DenseRiemannion(example.x, 4, lr).step(thin)
            result = take(step, example.state(), thin.unsqueeze(0), StepOptions(lr))
            within("O14 masked", (point_of(result.state) - wanted).norm() / wanted.norm(), 1e-12)
    right = noise(300, 9, 3) @ noise(301, 3, 4)
    core_only = Tangent(torch.zeros_like(u), right - v @ (v.mT @ right))
    d = direction_of(step, u, v, core_only)
    within("O14 rank 3", (d - reference.msign(example.ambient(core_only))).norm(), 1e-12)
    still = take(step, example.state(), torch.zeros(1, 12, 9, dtype=F64), StepOptions(0.1))
    assert bool(still.ok)
    assert not bool(still.moved)
    assert all(torch.equal(a, b) for a, b in zip(still.state, example.state(), strict=True))


def law_9_bounds_hold_with_masks(step: Any) -> None:
    """Null directions in the momentum: the norm stays in [1, 2/sqrt(3)], and <M, D> = |M|_*."""
    example = Example(12, 9, 4, seed=11)
    u, _, v = example.point
    for k in (1, 2, 3):
        thin = example.normal_free(noise(100 + k, 12, k) @ noise(200 + k, k, 9))
        thin = thin / thin.norm()
        left = thin @ v
        momentum = Tangent(left - u @ (u.mT @ left), thin.mT @ u)
        m = example.ambient(momentum)
        nuclear = torch.linalg.svdvals(m)
        assert int((nuclear > 1e-10).sum()) == 2 * k < 2 * example.rank
        d = direction_of(step, u, v, momentum)
        size = torch.linalg.matrix_norm(d, 2)
        within("9 masked lower bound", 1 - size, 1e-12)
        within("9 masked upper bound", size - 2 / math.sqrt(3), 1e-12)
        within("9 masked <M, D>", ((m * d).sum() - nuclear.sum()).abs(), 1e-12)


def law_22_small_points_bend_the_step(step: Any) -> None:
    """Cosine between intended and taken step at an optimal start, over |alpha| / lr (docs/method.md 5.4)."""
    table = {100: 1.000, 10: 0.998, 2: 0.959, 1: 0.906, 0.5: 0.840, 1e-3: 0.707}
    q_left, q_right = frame(21, 12, 4), frame(22, 10, 4)
    gradient = (q_left * torch.tensor([4.0, 3.0, 2.0, 1.0], dtype=F64)) @ q_right.mT
    for ratio, wanted in table.items():
        lr = 1e-3
        u, v = q_left[:, :2], q_right[:, 2:]
        s = torch.full((2,), ratio * lr, dtype=F64)
        nil = torch.zeros(12, 2, dtype=F64), torch.zeros(10, 2, dtype=F64)
        state = FusedState(*(part.unsqueeze(0) for part in (u, s, v, *nil)))
        result = take(step, state, gradient.unsqueeze(0), StepOptions(lr, sigma_floor=1e-300))
        move = point_of(result.state) - (u * s) @ v.mT
        direction = -reference.projection(u, v, reference.msign(gradient))
        # At an optimal start the lower-right block vanishes: all 2r singular values are one.
        left = gradient @ v
        projected = Tangent(left - u @ (u.mT @ left), gradient.mT @ u)
        taken = direction_of(step, u, v, projected)
        within("O6 optimal start", (torch.linalg.svdvals(taken)[:4] - 1).abs().max(), 1e-12)
        within("O6 optimal start D", (taken + direction).norm(), 1e-12)
        cosine = (move * direction).sum() / (move.norm() * direction.norm())
        within("22 cosine", (cosine - wanted).abs(), 5e-3)


EXAMPLE_LAWS = (
    law_o6_direction_has_the_closed_form_spectrum,
    law_o6_first_order_move,
)


FIXED_LAWS = (
    law_o14_null_directions_are_masked,
    law_9_bounds_hold_with_masks,
    law_22_small_points_bend_the_step,
)


@pytest.mark.parametrize("law", EXAMPLE_LAWS, ids=lambda law: law.__name__)
def test_law_of_the_step(law: Any) -> None:
    """The law holds for the library on every point that Hypothesis draws."""

    @given(examples(TAME, max_size=24))
    def holds(example: Example) -> None:
        law(real, example)

    holds()


@pytest.mark.parametrize("law", FIXED_LAWS, ids=lambda law: law.__name__)
def test_fixed_law_of_the_step(law: Any) -> None:
    """The law holds for the library."""
    law(real)
