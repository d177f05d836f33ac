"""Examples and errors of the geometry; its laws are in properties/test_fixed_rank_*_laws.py."""

from __future__ import annotations

import math

import pytest
import torch

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import (
    Point,
    Tangent,
    check_point,
    dense,
    inner_product,
    masked_msign,
    msign,
    norm,
    point_from_factors,
    project,
    project_dense,
    random_point,
    retract,
    transport,
    working_dtype,
)
from tests.strategies import F64, Example, noise

EXAMPLE = Example(9, 6, 3, seed=1)


def test_a_projection_worked_by_hand() -> None:
    """At X = e1 e1^T the projection drops the entries outside the first row and column."""
    point = Point(torch.eye(3, 1, dtype=F64), torch.ones(1, dtype=F64), torch.eye(2, 1, dtype=F64))
    z = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]], dtype=F64)
    tangent = project_dense(point, z)
    assert torch.equal(tangent.d_left, torch.tensor([[0.0], [3.0], [5.0]], dtype=F64))
    assert torch.equal(tangent.d_right, torch.tensor([[1.0], [2.0]], dtype=F64))
    assert float(inner_product(tangent, tangent)) == 39.0
    assert float(norm(tangent)) == math.sqrt(39.0)


def test_random_points_are_points() -> None:
    """Shapes, batch, dtype; equal generators give equal bytes, others do not."""
    first = random_point(
        7, 5, 3, batch=(2, 4), generator=torch.Generator().manual_seed(3), dtype=F64
    )
    again = random_point(
        7, 5, 3, batch=(2, 4), generator=torch.Generator().manual_seed(3), dtype=F64
    )
    other = random_point(
        7, 5, 3, batch=(2, 4), generator=torch.Generator().manual_seed(4), dtype=F64
    )
    assert (first.u.shape, first.s.shape, first.v.shape) == ((2, 4, 7, 3), (2, 4, 3), (2, 4, 5, 3))
    check_point(first, 1e-13)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert not torch.equal(first.u, other.u)
    with pytest.raises(NumericalError, match=r"rank 6 is not in 1\.\.5"):
        random_point(7, 5, 6)


def test_batches_equal_single_calls() -> None:
    """Leading dimensions are a loop."""
    several = [Example(8, 6, 2, seed=10 * k) for k in range(3)]
    points = Point(*(torch.stack(parts) for parts in zip(*(e.point for e in several), strict=True)))
    tangents = Tangent(
        *(torch.stack(parts) for parts in zip(*(e.tangent() for e in several), strict=True))
    )
    z = torch.stack([e.matrix() for e in several])
    together = (
        dense(retract(points, tangents, 0.3)),
        norm(project_dense(points, z)),
        norm(transport(points, tangents, Point(*(part.flip(0) for part in points)))),
        dense(point_from_factors(z, noise(1, 3, 9, 6), 0.5)),
    )
    for row, example in enumerate(several):
        target = several[2 - row].point
        alone = (
            dense(retract(example.point, example.tangent(), 0.3)),
            norm(project_dense(example.point, example.matrix())),
            norm(transport(example.point, example.tangent(), target)),
            dense(point_from_factors(z[row], noise(1, 3, 9, 6)[row], 0.5)),
        )
        for batch, one in zip(together, alone, strict=True):
            assert float((batch[row] - one).abs().max()) < 1e-13


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_low_precision_runs_in_fp32(dtype: torch.dtype) -> None:
    """torch has no QR for half precision: such inputs come back as fp32."""
    left, right = noise(1, 6, 2).to(dtype), noise(2, 5, 2).to(dtype)
    point = point_from_factors(left, right)
    assert point.u.dtype == point.s.dtype == point.v.dtype == working_dtype(dtype) == torch.float32
    assert float((dense(point) - left.float() @ right.float().mT).abs().max()) < 1e-5


def test_rank_above_the_matrix_is_refused() -> None:
    """r > min(out, in) is impossible, and said."""
    with pytest.raises(NumericalError, match="rank 4 in a 6 x 3 matrix"):
        point_from_factors(noise(1, 6, 4), noise(2, 3, 4))


def test_a_step_off_the_manifold_is_refused() -> None:
    """X - X has rank 0."""
    u, s, v = EXAMPLE.point
    with pytest.raises(NumericalError, match="leaves the manifold"):
        retract(EXAMPLE.point, Tangent(torch.zeros_like(u), v * s), -1.0)


def test_every_function_names_non_finite_input() -> None:
    """NaN and Inf do not pass through silently."""
    u, s, v = EXAMPLE.point
    tangent = EXAMPLE.tangent()
    bad = torch.full_like(u, math.inf)
    calls = (
        ("left", lambda: point_from_factors(bad, v)),
        ("z_times_v", lambda: project(EXAMPLE.point, bad, v)),
        ("d_left", lambda: retract(EXAMPLE.point, Tangent(bad, tangent.d_right))),
        ("d_left", lambda: msign(EXAMPLE.point, Tangent(bad, tangent.d_right))),
        (
            "z_times_v|zt_times_u",
            lambda: transport(EXAMPLE.point, Tangent(bad, tangent.d_right), EXAMPLE.point),
        ),
        ("s holds", lambda: retract(Point(u, s * math.nan, v), tangent)),
    )
    for words, call in calls:
        with pytest.raises(NumericalError, match=words):
            call()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"s": EXAMPLE.s.flip(0)}, "descending"),
        ({"s": EXAMPLE.s * 0}, "positive"),
        ({"s": EXAMPLE.s[:2]}, "do not fit"),
        ({"u": EXAMPLE.point.u * 1.01}, "columns of u are not orthonormal"),
        ({"v": EXAMPLE.point.v * math.nan}, "v holds"),
    ],
)
def test_check_point_says_what_is_wrong(change: dict[str, torch.Tensor], words: str) -> None:
    """The check returns a reason, not a bool."""
    check_point(EXAMPLE.point)
    with pytest.raises(NumericalError, match=words):
        check_point(EXAMPLE.point._replace(**change))


def test_msign_of_extreme_scales() -> None:
    """The orthogonal factor ignores scale, up to the ends of the exponent range; zero stays zero."""
    core = noise(1, 4, 4, dtype=torch.float32)
    wanted = masked_msign(core)
    for scale in (1e-30, 1e-9, 1e9, 1e30):
        assert float((masked_msign(core * scale) - wanted).abs().max()) < 1e-5
    assert torch.equal(masked_msign(torch.zeros(4, 3)), torch.zeros(4, 3))
