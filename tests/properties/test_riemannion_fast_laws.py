"""Laws of the fast step: it is the exact one up to rounding, for every layer by itself (docs/performance.md).

Each law takes `dreamrie.riemannion_fast` first; `tests/mutants/fast_step.py` runs it on broken ones. The oracle is
`fused_step` in fp64 on the same numbers.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dreamrie.riemannion_fast as real
from dreamrie.riemannion_step import FusedState, StepOptions, StepResult, Work, fused_step
from tests.margins import within
from tests.properties.one_step import momentum_of, point_of
from tests.strategies import F32, F64, noise

SHAPES = ((24, 16, 4), (20, 33, 4), (40, 18, 8))


def spread(seed: int, rows: int, rank: int, condition: float) -> Tensor:
    """A batch of 3 matrices whose singular values fall to 1 / condition of the first."""
    fall = torch.logspace(0, -float(torch.tensor(condition).log10()), rank, dtype=F64)
    mix = torch.linalg.qr(noise(seed + 1, 3, rank, rank)).Q
    return (noise(seed, 3, rows, rank) * fall) @ mix


def work(
    shape: tuple[int, int, int], condition: float, options: StepOptions, seed: int = 0
) -> Work:
    """Points, momenta and gradients of 3 layers in fp32."""
    out, in_, rank = shape
    u, v = (torch.linalg.qr(noise(seed + k, 3, n, rank)).Q for k, n in ((1, out), (2, in_)))
    s = 0.02 + 0.1 * noise(seed + 3, 3, rank).abs().sort(dim=-1, descending=True).values
    left = spread(seed + 4, out, rank, condition)
    for _ in range(2):
        left = left - u @ (u.mT @ left)
    numbers = (u, s, v, left, spread(seed + 5, in_, rank, condition))
    gradient_v, gradient_t_u = (
        spread(seed + k, n, rank, condition) for k, n in ((6, out), (7, in_))
    )
    state = FusedState(*(part.to(F32) for part in numbers))
    return Work(state, gradient_v.to(F32), gradient_t_u.to(F32), options)


def in_fp64(given: Work) -> Work:
    state = FusedState(*(part.to(F64) for part in given.state))
    return given._replace(
        state=state, gradient_v=given.gradient_v.to(F64), gradient_t_u=given.gradient_t_u.to(F64)
    )


def _row(given: Work, row: int) -> Work:
    """One layer of three."""
    here = slice(row, row + 1)
    state = FusedState(*(part[here] for part in given.state))
    return Work(state, given.gradient_v[here], given.gradient_t_u[here], given.options)


def compare(name: str, given: Work, got: StepResult, wanted: StepResult, bar: float) -> None:
    """Points, measured in steps, and momenta of all layers."""
    for row in range(len(given.state.s)):
        before, after = point_of(given.state, row), point_of(wanted.state, row)
        gap = (point_of(got.state, row) - after).norm() / (after - before).norm()
        within(f"fast {name} X", gap, bar)
        momentum = momentum_of(wanted.state, row)
        gap = (momentum_of(got.state, row) - momentum).norm() / momentum.norm()
        within(f"fast {name} M", gap, bar)


def law_fast_step_equals_the_exact_one(fast: Any) -> None:
    """X and M of a step in fp32, against fp64: better than QR in fp32, whatever the condition of the gradients."""
    for options in (
        StepOptions(1e-2),
        StepOptions(1e-2, momentum=0.0, weight_decay=0.5),
        StepOptions(1e-2, inner_iters=2, exact_norm=True),
    ):
        for condition in (1.0, 1e2, 1e4):
            for shape in SHAPES:
                given = work(shape, condition, options)
                got = fast.fast_steps([given])[0]
                assert bool(got.ok.all() & got.moved.all())
                compare("exact", given, got, fused_step(*in_fp64(given)), 2e-6)


def law_fast_step_masks_null_directions(fast: Any) -> None:
    """Directions of the momentum below 1e-6 of the first stay out of the step, as in the exact step in fp32."""
    given = work(SHAPES[0], 1.0, StepOptions(1e-2, momentum=0.0))
    sizes = torch.tensor([1.0, 0.5, 0.2, 1e-9])
    state, right = given.state, given.gradient_t_u
    for _ in range(2):
        right = right - state.v @ (state.v.mT @ right)
    given = given._replace(gradient_v=given.gradient_v * sizes, gradient_t_u=right * sizes)
    compare("masked", given, fast.fast_steps([given])[0], fused_step(*given), 2e-5)


def law_fast_frames_stay_orthonormal(fast: Any) -> None:
    """u^T u = v^T v = I and u^T m_left = 0 over 200 steps with gradients of rank one."""
    given = work(SHAPES[0], 1.0, StepOptions(1e-2))
    state = given.state
    for t in range(200):
        left, right = noise(100 + t, 3, 24, 1).to(F32), noise(400 + t, 3, 1, 16).to(F32)
        options = StepOptions(1e-2, momentum=0.0 if t % 2 else 0.9)
        gradients = left @ (right @ state.v), right.mT @ (left.mT @ state.u)
        state = fast.fast_steps([Work(state, *gradients, options)])[0].state
        for part in (state.u, state.v):
            wide = part.to(F64)
            defect = (wide.mT @ wide - torch.eye(4, dtype=F64)).abs().max()
            within("fast orthonormal", defect, 5e-6)
        normal = (state.u.mT @ state.m_left).abs().max() / state.m_left.abs().max()
        within("fast normal", normal, 5e-6)


def law_fast_layers_do_not_see_each_other(fast: Any) -> None:
    """A layer's bytes are the same alone, with others of its shape, and with other shapes."""
    options = StepOptions(1e-2)
    several = [work(shape, 1e2, options, seed=50 * k) for k, shape in enumerate(SHAPES)]
    together = fast.fast_steps(several)
    for given, result in zip(several, together, strict=True):
        for row in range(3):
            alone = fast.fast_steps([_row(given, row)])[0].state
            for mine, theirs in zip(alone, result.state, strict=True):
                assert torch.equal(mine[0], theirs[row])


def law_fast_doubtful_layers_take_the_exact_step(fast: Any) -> None:
    """A point whose last singular value vanishes beside the first is stepped by QR and SVD, to the byte."""
    given = work(SHAPES[0], 1.0, StepOptions(1e-9))
    s = given.state.s.clone()
    s[1] = torch.tensor([1.0, 1e-1, 1e-2, 1e-8])
    given = Work(given.state._replace(s=s), *given[1:])
    got = fast.fast_steps([given])[0].state
    exact = fused_step(*_row(given, 1))
    assert all(torch.equal(a[1], b[0]) for a, b in zip(got, exact.state, strict=True))


def law_fast_non_finite_layers_are_left_alone(fast: Any) -> None:
    """NaN, Inf or an overflowing sum in one layer: its state to the bit, the others to the bit as without it."""
    for bad in (float("nan"), float("inf"), 1e30):
        given = work(SHAPES[0], 1.0, StepOptions(1e-2, weight_decay=0.1))
        clean = fast.fast_steps([given])[0]
        poisoned = given.gradient_v.clone()
        poisoned[1, 3, 2] = bad
        result = fast.fast_steps([given._replace(gradient_v=poisoned)])[0]
        assert result.ok.tolist() == [True, False, True]
        for before, after, other in zip(given.state, result.state, clean.state, strict=True):
            assert torch.equal(before[1], after[1])
            assert torch.equal(after[::2], other[::2])


LAWS = (
    law_fast_step_equals_the_exact_one,
    law_fast_step_masks_null_directions,
    law_fast_frames_stay_orthonormal,
    law_fast_layers_do_not_see_each_other,
    law_fast_doubtful_layers_take_the_exact_step,
    law_fast_non_finite_layers_are_left_alone,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_of_the_fast_step(law: Any) -> None:
    """The law holds for the library."""
    law(real)


@pytest.mark.parametrize(
    ("shape", "dtype"), [((24, 16, 4), F64), ((24, 7, 4), F32)], ids=["fp64", "2r above a side"]
)
def test_other_batches_take_the_exact_step(shape: tuple[int, int, int], dtype: Any) -> None:
    """fp64 states and layers without room for 2r columns are stepped by QR, to the byte."""
    given = work(shape, 1.0, StepOptions(1e-2))
    given = in_fp64(given) if dtype == F64 else given
    got, wanted = real.fast_steps([given])[0], fused_step(*given)
    assert all(torch.equal(a, b) for a, b in zip(got.state, wanted.state, strict=True))
