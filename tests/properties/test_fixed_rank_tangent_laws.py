"""M1-M4, M8, M9: tangent vectors of fixed-rank matrices (docs/method.md 10).

Each law takes the implementation first, so that the mutants of `tests/mutants/geometry.py` run the same code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given

import dreamrie.fixed_rank as real
from dreamrie.fixed_rank import Tangent
from tests.margins import within
from tests.properties.dense_geometry import ALL, ambient, in_dtype
from tests.reference import dense as reference
from tests.strategies import Example, examples, noise

# ------------------------------------------------------------------------------------------------- tangent space


def law_m1_projection_is_idempotent(impl: Any, example: Example) -> None:
    """P(P(Z)) = P(Z), and the projection does something."""
    once = impl.project_dense(example.point, example.matrix())
    z = ambient(example.point, once)
    twice = impl.project_dense(example.point, z)
    assert float(z.norm()) > 1e-3
    within("M1 fp64", (ambient(example.point, twice) - z).norm(), 1e-12)


def law_m2_projection_is_self_adjoint(impl: Any, example: Example) -> None:
    """<P(Y), Z> = <Y, P(Z)>."""
    y, z = example.matrix(1), example.matrix(2)
    left = (ambient(example.point, impl.project_dense(example.point, y)) * z).sum()
    right = (y * ambient(example.point, impl.project_dense(example.point, z))).sum()
    within("M2 fp64", (left - right).abs(), 1e-12)


def law_m3_projection_is_the_closest_tangent(impl: Any, example: Example) -> None:
    """The residual is orthogonal to tangent vectors, and no displacement of 200 comes closer."""
    z = example.matrix(3)
    projected = ambient(example.point, impl.project_dense(example.point, z))
    residual = z - projected
    scale = 1e-3
    best = float(residual.norm())
    for salt in range(200 if example.seed % 10 == 0 else 10):
        other = example.ambient(example.tangent(salt))
        within("M3 orthogonal", (residual * other).sum().abs(), 1e-12)
        assert float((residual - scale * other).norm()) >= best - 1e-15


def law_m4_projection_is_factored_and_normal(impl: Any, example: Example) -> None:
    """u^T d_left = 0, and all three ways in give the dense projection."""
    u, _, v = example.point
    z = example.matrix(4)
    expected = reference.projection(u, v, z)
    left, right = noise(example.seed + 5, example.out, 5), noise(example.seed + 6, example.in_, 5)
    low = left @ right.mT
    ways = (
        (impl.project(example.point, z @ v, z.mT @ u), expected, 1.0),
        (impl.project_dense(example.point, z), expected, 1.0),
        (
            impl.project_low_rank(example.point, left, right),
            reference.projection(u, v, low),
            float(low.norm()),
        ),
    )
    for tangent, wanted, size in ways:
        within("M4 normal", (u.mT @ tangent.d_left).abs().max() / size, 1e-12)
        within("M4 dense", (ambient(example.point, tangent) - wanted).norm() / size, 1e-12)
        within(
            "M4 dense_tangent",
            (impl.dense_tangent(example.point, tangent) - wanted).norm() / size,
            1e-12,
        )


def law_m1_m4_in_fp32(impl: Any, example: Example) -> None:
    """M1 to M4 within the fp32 budget."""
    point, z = in_dtype(example.point, torch.float32), example.matrix(7)
    tangent = impl.project_dense(point, z.float())
    assert tangent.d_left.dtype == torch.float32
    expected = reference.projection(example.point.u, example.point.v, z)
    within("M4 fp32 normal", (point.u.mT @ tangent.d_left).abs().max(), 1e-6)
    within("M4 fp32 dense", (ambient(point, tangent) - expected).norm(), 1e-6)
    again = impl.project_dense(point, ambient(point, tangent).float())
    within("M1 fp32", (ambient(point, again) - ambient(point, tangent)).norm(), 2e-6)
    y = example.matrix(8)
    other = ambient(point, impl.project_dense(point, y.float()))
    within("M2 fp32", ((other * z).sum() - (y * ambient(point, tangent)).sum()).abs(), 2e-6)
    direction = example.ambient(example.tangent(9))
    within("M3 fp32", ((z - ambient(point, tangent)) * direction).sum().abs(), 1e-6)


# --------------------------------------------------------------------------------- transport and inner products


def law_m8_transport_is_a_projection(impl: Any, example: Example) -> None:
    """Linear, lands in the new tangent space, never lengthens, identity in place, equals dense."""
    new = Example(
        example.out,
        example.in_,
        example.rank,
        example.spectrum,
        example.condition,
        example.seed + 77,
    ).point
    a, b = example.tangent(13), example.tangent(14)
    both = Tangent(2 * a.d_left - 3 * b.d_left, 2 * a.d_right - 3 * b.d_right)
    moved_a, moved_b, moved = (impl.transport(example.point, t, new) for t in (a, b, both))
    linear = ambient(new, moved) - 2 * ambient(new, moved_a) + 3 * ambient(new, moved_b)
    within("M8 linear", linear.norm(), 1e-12)
    within("M8 lands", (new.u.mT @ moved_a.d_left).abs().max(), 1e-12)
    assert float(ambient(new, moved_a).norm()) <= 1 + 1e-12
    wanted = reference.projection(new.u, new.v, example.ambient(a))
    within("M8 dense", (ambient(new, moved_a) - wanted).norm(), 1e-12)
    here = impl.transport(example.point, a, example.point)
    within("M8 in place", (ambient(example.point, here) - example.ambient(a)).norm(), 1e-12)


def law_m9_inner_products_equal_dense(impl: Any, example: Example) -> None:
    """<xi, eta> and |xi| in coordinates equal those of the matrices."""
    a, b = example.tangent(15), example.tangent(16)
    dense_a, dense_b = example.ambient(a), example.ambient(b)
    within("M9 inner", (impl.inner_product(a, b) - (dense_a * dense_b).sum()).abs(), 1e-12)
    within("M9 norm", (impl.norm(a) - dense_a.norm()).abs(), 1e-12)


# ------------------------------------------------------------------------------------------------- msign


def law_msign_equals_dense(impl: Any, example: Example) -> None:
    """The orthogonal factor of a tangent vector in low-rank form equals the dense one, null spaces included."""
    u, _, v = example.point
    thin = noise(example.seed + 20, example.out, 1) @ noise(example.seed + 21, 1, example.in_)
    thin = example.normal_free(thin / thin.norm())
    left = thin @ v - u @ (u.mT @ thin @ v)
    for tangent in (example.tangent(20), Tangent(left, thin.mT @ u)):
        dense = example.ambient(tangent)
        spectrum = torch.linalg.svdvals(dense)
        factor_left, factor_right = impl.msign(example.point, tangent)
        nonzero = spectrum[spectrum > 1e-10 * spectrum[0]]
        # Directions of small singular values are ill-conditioned in any algorithm.
        if float(nonzero[-1]) > 1e-3 * float(spectrum[0]):
            orthogonal = factor_left @ factor_right.mT
            within("law 1 msign", (orthogonal - reference.msign(dense)).norm(), 1e-12)


EXAMPLE_LAWS = (
    (law_m1_projection_is_idempotent, ALL),
    (law_m2_projection_is_self_adjoint, ALL),
    (law_m3_projection_is_the_closest_tangent, ALL),
    (law_m4_projection_is_factored_and_normal, ALL),
    (law_m1_m4_in_fp32, ALL),
    (law_m8_transport_is_a_projection, ALL),
    (law_m9_inner_products_equal_dense, ALL),
    (law_msign_equals_dense, ALL),
)


@pytest.mark.parametrize(
    ("law", "spectra"), EXAMPLE_LAWS, ids=lambda item: getattr(item, "__name__", "")
)
def test_law_of_the_geometry(law: Any, spectra: tuple[str, ...]) -> None:
    """The law holds for the library on every point that Hypothesis draws."""

    @given(examples(spectra))
    def holds(example: Example) -> None:
        law(real, example)

    holds()
