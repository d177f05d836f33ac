"""Laws of one fused step: the point it reaches, batches, guards, decay, recovery (O5, O11, O13, O18).

Each law takes the module of the step first; `tests/mutants/optimizer_*.py` run it on broken ones. Numbers without a
letter are those of docs/method.md 10.
"""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import dreamrie.riemannion_step as real
from dreamrie.fixed_rank import Factors
from dreamrie.riemannion_step import FusedState, StepOptions
from tests.margins import within
from tests.properties.dense_geometry import TAME
from tests.properties.one_step import momentum_of, point_of, smallest_share, take
from tests.reference import dense as reference
from tests.strategies import F64, Example, examples, frame, noise

# ------------------------------------------------------------------------------------------------- one step


def law_o5_step_equals_dense(step: Any, example: Example) -> None:
    """X and M after a step equal the dense reference, for both decays, repeated msign and the exact norm."""
    anchor = Example(example.out, example.in_, example.rank, seed=example.seed + 50).point
    anchors = Factors(anchor.u * anchor.s, anchor.v)
    start = example.tangent(1)
    for decay, anchored, inner, exact in (
        (0.0, False, 1, False),
        (0.7, False, 1, False),
        (0.7, True, 1, False),
        (0.0, False, 3, False),
        (0.3, True, 2, True),
    ):
        lr = 0.05
        slow = reference.DenseRiemannion(
            example.x,
            example.rank,
            lr,
            0.9,
            decay,
            anchors.left @ anchors.right.mT if anchored else None,
            inner_iters=inner,
            exact_norm=exact,
        )
        slow.M = example.ambient(start)
        gradient = example.matrix(2)
        u, _, v = example.point
        if smallest_share(0.9 * slow.M + reference.projection(u, v, gradient)) < 1e-2:
            return
        wanted = slow.step(gradient)
        options = StepOptions(lr, 0.9, decay, exact_norm=exact, inner_iters=inner)
        batch = Factors(*(part.unsqueeze(0) for part in anchors)) if anchored else None
        result = take(step, example.state(start), gradient.unsqueeze(0), options, batch)
        assert bool(result.ok.all())
        assert bool(result.moved.all())
        assert float((wanted - example.x).norm()) > 1e-3
        within("O5 one step X", (point_of(result.state) - wanted).norm() / wanted.norm(), 1e-12)
        within("O5 one step M", (momentum_of(result.state) - slow.M).norm(), 1e-12)


def law_o13_first_step_descends(step: Any) -> None:
    """A short step lowers a quadratic on each of 1,000 problems."""
    for out, in_, rank in ((7, 5, 2), (5, 9, 3), (6, 6, 1), (8, 4, 4)):
        n = 250
        u, v = torch.linalg.qr(noise(1, n, out, rank)).Q, torch.linalg.qr(noise(2, n, in_, rank)).Q
        s = 0.5 + noise(3, n, rank).abs().sort(dim=-1, descending=True).values
        state = FusedState(u, s, v, torch.zeros_like(u), torch.zeros_like(v))
        target = noise(4, n, out, in_)
        x = (u * s.unsqueeze(-2)) @ v.mT
        new = take(step, state, x - target, StepOptions(1e-3)).state
        after = (new.u * new.s.unsqueeze(-2)) @ new.v.mT
        change = ((after - target) ** 2).sum((-2, -1)) - ((x - target) ** 2).sum((-2, -1))
        assert bool((change < 0).all()), f"{int((change >= 0).sum())} of {n} problems went up"


# ------------------------------------------------------------------------------------------------- batches and guards


def stacked(rows: int = 5, dtype: torch.dtype = F64) -> tuple[FusedState, Tensor]:
    """A batch of different layers of one shape, with momentum, and its gradients."""
    several = [Example(11, 8, 3, seed=10 * k) for k in range(rows)]
    states = [example.state(example.tangent(5)) for example in several]
    state = FusedState(*(torch.cat(parts).to(dtype) for parts in zip(*states, strict=True)))
    return state, torch.stack([example.matrix(6) for example in several]).to(dtype)


def law_4_batched_equals_one_by_one(step: Any) -> None:
    """Layers of a batch do not see each other; a transposed layer takes the transposed step."""
    state, gradients = stacked()
    options = StepOptions(0.05, weight_decay=0.1)
    together = take(step, state, gradients, options)
    for row in range(len(gradients)):
        one = FusedState(*(part[row : row + 1] for part in state))
        alone = take(step, one, gradients[row : row + 1], options)
        within("4 batched", (point_of(together.state, row) - point_of(alone.state)).norm(), 1e-12)
        within(
            "4 batched M",
            (momentum_of(together.state, row) - momentum_of(alone.state)).norm(),
            1e-12,
        )
        m = momentum_of(one)
        u, s, v = (part[0] for part in one[:3])
        turned = FusedState(
            *(part.unsqueeze(0) for part in (v, s, u, m.mT @ u - v @ (v.mT @ m.mT @ u), m @ v))
        )
        other = take(step, turned, gradients[row : row + 1].mT, options)
        within("O3 one step", (point_of(other.state).mT - point_of(alone.state)).norm(), 1e-12)


def law_11_non_finite_layers_are_left_alone(step: Any) -> None:
    """NaN, Inf or an overflowing sum in one layer: its state to the bit, the others as without it."""
    for dtype, bad in ((F64, float("nan")), (F64, float("inf")), (torch.float32, 1e30)):
        state, gradients = stacked(dtype=dtype)
        options = StepOptions(0.05, weight_decay=0.1)
        clean = take(step, state, gradients, options)
        poisoned = gradients.clone()
        poisoned[2, 3, 4] = bad
        result = take(step, state, poisoned, options)
        assert result.ok.tolist() == [True, True, False, True, True]
        for before, after in zip(state, result.state, strict=True):
            assert torch.equal(before[2], after[2])
        for row in (0, 1, 3, 4):
            gap = point_of(result.state, row) - point_of(clean.state, row)
            within(f"11 neighbours {dtype}", gap.norm(), 1e-12 if dtype == F64 else 1e-6)


def law_2_frames_stay_orthonormal(step: Any) -> None:
    """u^T u = v^T v = I and u^T m_left = 0 over 3,000 fp32 steps with rank-one gradients."""
    example = Example(30, 20, 4, seed=5)
    state = FusedState(*(part.float() for part in example.state()))
    # Many problems at once cost no more than one; a rank-one gradient has null columns in m_left.
    state = FusedState(*(torch.cat([part] * 2) for part in state))
    generator = torch.Generator().manual_seed(0)
    for t in range(3000):
        left = torch.randn(2, 30, 1, generator=generator)
        right = torch.randn(2, 1, 20, generator=generator)
        beta = 0.0 if t % 2 else 0.9
        state = take(step, state, left @ right, StepOptions(0.02, beta)).state
        if t % 500 == 499:
            for part in (state.u, state.v):
                wide = part.to(F64)
                defect = (wide.mT @ wide - torch.eye(4, dtype=F64)).abs().max()
                within("2 orthonormal fp32", defect, 5e-6)
            normal = (state.u.mT @ state.m_left).abs().max() / state.m_left.abs().max()
            within("2 normal fp32", normal, 5e-6)


def law_2_frames_stay_orthonormal_in_fp64(step: Any) -> None:
    """u^T u = v^T v = I and u^T m_left = 0 after each of 60 noisy fp64 steps with momentum and decay."""
    example = Example(13, 9, 3, seed=5)
    state = example.state()
    for t in range(60):
        gradient = noise(4000 + t, 1, example.out, example.in_)
        state = take(step, state, gradient, StepOptions(0.05, weight_decay=0.1)).state
        for part in (state.u, state.v):
            defect = (part.mT @ part - torch.eye(example.rank, dtype=F64)).abs().max()
            within("2 orthonormal fp64", defect, 1e-12)
        normal = (state.u.mT @ state.m_left).abs().max() / state.m_left.abs().max()
        within("2 normal fp64", normal, 1e-12)
    assert float((point_of(state) - example.x).norm()) > 0.1


def law_floor_keeps_rank(step: Any) -> None:
    """A step that would make a singular value vanish leaves it at the floor, counted."""
    example = Example(8, 6, 2, "equal", seed=9)
    u, s, v = example.point
    gradient = (u * s) @ v.mT  # pulls X to zero along every direction of the core
    result = take(step, example.state(), gradient.unsqueeze(0), StepOptions(0.5, sigma_floor=1e-3))
    within("floor", (result.state.s - 1e-3).abs().max(), 1e-12)
    assert result.floor_hits.tolist() == [2]


# ------------------------------------------------------------------------------------------------- decay


def law_o18_decay_acts_on_the_point(step: Any, example: Example) -> None:
    """Without gradient X <- (1 - lr wd) X whatever the signs of the frames; at the anchor nothing moves."""
    u, s, v = example.point
    nothing = torch.zeros(1, example.out, example.in_, dtype=F64)
    options = StepOptions(0.1, weight_decay=0.5)
    flip = torch.where(torch.arange(example.rank) % 2 == 0, -1.0, 1.0).to(F64)
    for signs in (torch.ones_like(flip), flip):
        state = example.state()._replace(u=(u * signs).unsqueeze(0), v=(v * signs).unsqueeze(0))
        moved = point_of(take(step, state, nothing, options).state)
        within("O18 decay", (moved - 0.95 * example.x).norm() / example.x.norm(), 1e-12)
        anchor = Factors((u * s).unsqueeze(0), v.unsqueeze(0))
        fixed = point_of(take(step, state, nothing, options, anchor).state)
        within("16 fixed point", (fixed - example.x).norm() / example.x.norm(), 1e-12)


def law_16_anchored_decay_shrinks_the_change(step: Any) -> None:
    """A decay-only run shrinks X - X0 by (1 - lr wd) per step, 2,000 steps, to 1 %."""
    example = Example(9, 7, 2, "equal", seed=13)
    u, s, v = example.point
    anchor = Factors((u * s).unsqueeze(0), v.unsqueeze(0))
    start = example.state()
    kick = take(step, start, example.matrix(7).unsqueeze(0), StepOptions(1e-2, momentum=0.0))
    state = kick.state._replace(
        m_left=torch.zeros_like(kick.state.m_left), m_right=torch.zeros_like(kick.state.m_right)
    )
    first = float((point_of(state) - example.x).norm())
    assert first > 1e-3
    nothing = torch.zeros(1, 9, 7, dtype=F64)
    for t in range(1, 2001):
        state = take(step, state, nothing, StepOptions(0.1, weight_decay=0.1), anchor).state
        if t in (1, 100, 1000, 2000):
            left = float((point_of(state) - example.x).norm())
            within("16 shrinks", abs(left / (first * 0.99**t) - 1), 1e-2)


# ------------------------------------------------------------------------------------------------- recovery


def law_12_recovered_products_equal_the_gradient(step: Any) -> None:
    """Dividing columns of the factor gradients gives G v and G^T u for every scaling and tiny s."""
    for dtype, bar in ((F64, 1e-11), (torch.float32, 2e-6), (torch.bfloat16, 2e-2)):
        for c in (1.0, 0.625, 7 / math.sqrt(8)):
            g, u, v = noise(1, 12, 9), frame(2, 12, 4), frame(3, 9, 4)
            s = torch.tensor([1.0, 1e-3, 1e-6, 1e-10], dtype=F64)
            left = step.balanced_factors(u, s, c).to(dtype).requires_grad_()
            right = step.balanced_factors(v, s, c).mT.to(dtype).requires_grad_()
            within("12 product", (c * (left @ right).detach().to(F64) - (u * s) @ v.mT).norm(), bar)
            (c * (left @ right) * g.to(dtype)).sum().backward()
            assert left.grad is not None
            assert right.grad is not None
            recovered = (
                (step.recover(left.grad.to(F64), s, c), g @ v),
                (step.recover(right.grad.mT.to(F64), s, c), g.mT @ u),
            )
            for got, wanted in recovered:
                columns = (got - wanted).abs().amax(dim=0) / wanted.abs().amax(dim=0)
                within(f"12 recovery {dtype}", columns.max(), bar)


EXAMPLE_LAWS = (
    law_o5_step_equals_dense,
    law_o18_decay_acts_on_the_point,
)


FIXED_LAWS = (
    law_4_batched_equals_one_by_one,
    law_11_non_finite_layers_are_left_alone,
    law_2_frames_stay_orthonormal,
    law_2_frames_stay_orthonormal_in_fp64,
    law_floor_keeps_rank,
    law_16_anchored_decay_shrinks_the_change,
    law_12_recovered_products_equal_the_gradient,
    law_o13_first_step_descends,
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
