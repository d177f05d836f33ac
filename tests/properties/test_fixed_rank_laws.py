"""M1-M12: the geometry of fixed-rank matrices (docs/method.md 10).

Each law takes the implementation first, so that the mutants of `tests/mutants/geometry.py` run the same code.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from torch import Tensor

import dreamrie.fixed_rank as real
from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import Point, Tangent
from tests.margins import within
from tests.reference import dense as reference
from tests.strategies import F64, Example, examples, frame, noise

TAME = ("spread", "equal", "repeated")
ALL = (*TAME, "conditioned", "tiny")


def in_dtype(parts: Any, dtype: torch.dtype) -> Any:
    return type(parts)(*(part.to(dtype) for part in parts))


def ambient(point: Point, tangent: Tangent) -> Tensor:
    return (
        tangent.d_left.to(F64) @ point.v.to(F64).mT + point.u.to(F64) @ tangent.d_right.to(F64).mT
    )


def matrix(point: Point) -> Tensor:
    u, s, v = in_dtype(point, F64)
    return (u * s) @ v.mT


def orthonormality(frame_: Tensor) -> float:
    wide = frame_.to(F64)
    return float((wide.mT @ wide - torch.eye(wide.shape[-1], dtype=F64)).abs().max())


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
    within("M4 fp32 dense", (ambient(point, tangent) - expected).norm(), 2e-6)
    again = impl.project_dense(point, ambient(point, tangent).float())
    within("M1 fp32", (ambient(point, again) - ambient(point, tangent)).norm(), 2e-6)
    y = example.matrix(8)
    other = ambient(point, impl.project_dense(point, y.float()))
    within("M2 fp32", ((other * z).sum() - (y * ambient(point, tangent)).sum()).abs(), 2e-6)
    direction = example.ambient(example.tangent(9))
    within("M3 fp32", ((z - ambient(point, tangent)) * direction).sum().abs(), 1e-6)


# ------------------------------------------------------------------------------------------------- retraction


def _slope(steps: Tensor, errors: Tensor) -> float:
    x, y = steps.log(), errors.log()
    x, y = x - x.mean(), y - y.mean()
    return float((x * y).sum() / (x * x).sum())


def law_m5_retraction_is_of_second_order(impl: Any, example: Example) -> None:
    """|R(t xi) - (X + t xi)| has slope 2 in t; at r = min(out, in) it vanishes."""
    tangent, x = example.tangent(8), example.x
    xi = example.ambient(tangent)
    smallest = float(example.s[-1])
    steps = smallest * torch.logspace(-4, -1, 7, dtype=F64)
    errors = torch.stack(
        [
            (matrix(impl.retract(example.point, tangent, float(t))) - x - t * xi).norm()
            for t in steps
        ]
    )
    if example.rank == min(example.out, example.in_):
        within("M5 full rank", errors.max(), 1e-12)
        return
    u, v = example.point.u, example.point.v
    normal_left = tangent.d_left
    normal_right = tangent.d_right - v @ (v.mT @ tangent.d_right)
    assert u.shape[0] > example.rank
    if float((normal_left / example.s @ normal_right.mT).norm()) < 1e-3 / smallest:
        return  # no second-order term to see
    within("M5 slope", abs(_slope(steps, errors) - 2), 0.05)


def law_m5_in_fp32(impl: Any, example: Example) -> None:
    """Slope 2 within 0.15 in fp32."""
    if example.rank == min(example.out, example.in_) or example.rank < 2:
        return
    point, tangent = (
        in_dtype(example.point, torch.float32),
        in_dtype(example.tangent(8), torch.float32),
    )
    x, xi = matrix(point), ambient(point, tangent)
    steps = float(example.s[-1]) * torch.logspace(-1.5, -0.5, 5, dtype=F64)
    errors = torch.stack(
        [(matrix(impl.retract(point, tangent, float(t))) - x - t * xi).norm() for t in steps]
    )
    if float(errors[0]) < 1e-5:
        return  # below what fp32 can see
    within("M5 fp32 slope", abs(_slope(steps, errors) - 2), 0.15)


def law_m6_retraction_is_the_truncated_svd(impl: Any, example: Example) -> None:
    """R(0) = X; s is sorted and positive; R equals the dense truncated SVD."""
    tangent = example.tangent(9)
    still = impl.retract(example.point, tangent, 0.0)
    within("M6 R(0)", (matrix(still) - example.x).norm(), 1e-11)
    for step in (0.3, -0.7):
        new = impl.retract(example.point, tangent, step)
        moved = example.x + step * example.ambient(tangent)
        spectrum = torch.linalg.svdvals(moved)
        assert new.s.shape == (example.rank,)
        assert bool((new.s > 0).all())
        assert bool((new.s.diff() <= 0).all())
        within("M6 orthonormal", max(orthonormality(new.u), orthonormality(new.v)), 1e-12)
        within("M6 spectrum", (new.s - spectrum[: example.rank]).abs().max(), 1e-11)
        if (
            example.rank < len(spectrum)
            and float(spectrum[example.rank - 1] - spectrum[example.rank]) > 1e-2
        ):
            wanted = reference.truncate(moved, example.rank)
            within("M6 dense", (matrix(new) - wanted).norm(), 1e-11)
        elif example.rank == len(spectrum):
            within("M6 dense", (matrix(new) - moved).norm(), 1e-11)


def law_m7_gradient_predicts_the_change(impl: Any, example: Example) -> None:
    """f(R(t xi)) - f(X) - t <P(G), xi> falls with t^2, for three costs."""
    target, weight = noise(example.seed + 11, example.out, example.in_), example.matrix(12)
    costs = (
        lambda x: 0.5 * ((x - target) ** 2).sum(),
        lambda x: torch.log(torch.cosh(x - target)).sum(),
        lambda x: ((x * weight).sum() - 1) ** 2 + 0.1 * (x**4).sum(),
    )
    for cost in costs:
        x = example.x.clone().requires_grad_()
        value = cost(x)
        (gradient,) = torch.autograd.grad(value, x)
        value = value.detach()
        riemannian = impl.project_dense(example.point, gradient)
        xi = Tangent(*(part / (1e-12 + float(impl.norm(riemannian))) for part in riemannian))
        predicted = float(impl.inner_product(riemannian, xi))
        steps = float(example.s[-1]) * torch.tensor([1e-4, 1e-3], dtype=F64)
        errors = [
            abs(
                float(cost(matrix(impl.retract(example.point, xi, float(t)))))
                - float(value)
                - float(t) * predicted
            )
            for t in steps
        ]
        # Below t^2 / 3 the second-order terms nearly cancel and the third order shows; a wrong gradient gives order t.
        if errors[1] > float(steps[1]) ** 2 / 3:
            slope = float(torch.tensor(errors[1] / errors[0]).log10())
            within("M7 slope", abs(slope - 2), 0.05)


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


# ------------------------------------------------------------------------------------------------- robustness


def law_m10_frames_stay_orthonormal(impl: Any) -> None:
    """2,000 fp32 steps along rank-one gradients, whose d_left has null columns."""
    point = in_dtype(Example(40, 30, 4, seed=3).point, torch.float32)
    for t in range(2000):
        z_left, z_right = (
            noise(2 * t, 40, 1, dtype=torch.float32),
            noise(2 * t + 1, 30, 1, dtype=torch.float32),
        )
        z_left, z_right = z_left / z_left.norm(), z_right / z_right.norm()
        tangent = impl.project_low_rank(point, z_left, z_right)
        point = impl.retract(point, tangent, 0.05)
        if t % 100 == 99:
            within("M10 fp32", max(orthonormality(point.u), orthonormality(point.v)), 1e-5)


def law_m11_degenerate_input_is_survived_or_named(impl: Any) -> None:
    """d_left = 0, d_right = 0, a tiny normal part, tiny s, NaN: orthonormal, or NumericalError; never NaN."""
    for dtype in (torch.float32, F64):
        for example in (
            Example(9, 7, 3, seed=1),
            Example(6, 8, 6, seed=2),
            Example(5, 4, 1, seed=3),
        ):
            a = example.tangent()
            nil_left, nil_right = torch.zeros_like(a.d_left), torch.zeros_like(a.d_right)
            for tangent in (
                Tangent(nil_left, a.d_right),
                Tangent(a.d_left, nil_right),
                Tangent(nil_left, nil_right),
                Tangent(1e-8 * a.d_left, a.d_right),
            ):
                for s in (
                    example.s,
                    example.s * 1e-12,
                    torch.cat([example.s[:-1], example.s[-1:] * 1e-12]),
                ):
                    point = in_dtype(Point(example.point.u, s, example.point.v), dtype)
                    try:
                        new = impl.retract(point, in_dtype(tangent, dtype), 0.1)
                    except NumericalError:
                        continue
                    within("M11", max(orthonormality(new.u), orthonormality(new.v)), 1e-5)
                    assert all(bool(torch.isfinite(part).all()) for part in new)
            for spot in range(2):
                poisoned = [a.d_left.clone(), a.d_right.clone()]
                poisoned[spot][0, 0] = float("nan")
                with pytest.raises(NumericalError, match="non-finite"):
                    impl.retract(example.point, Tangent(*poisoned), 0.1)


def law_m12_only_the_matrix_matters(impl: Any, example: Example) -> None:
    """Joint sign flips, and rotations inside repeated s, change no matrix; equal inputs give equal bytes."""
    u, s, v = example.point
    tangent = example.tangent(17)
    turn = torch.diag(torch.where(torch.arange(example.rank) % 2 == 0, -1.0, 1.0)).to(F64)
    if example.spectrum == "equal" and example.rank > 1:
        turn = frame(example.seed + 18, example.rank, example.rank)
    turned = Point(u @ turn, s, v @ turn)
    same = Tangent(tangent.d_left @ turn, tangent.d_right @ turn)
    z = example.matrix(19)
    first, second = impl.retract(example.point, tangent, 0.3), impl.retract(turned, same, 0.3)
    spectrum = torch.linalg.svdvals(example.x + 0.3 * example.ambient(tangent))
    gap = (
        float(spectrum[example.rank - 1] - spectrum[example.rank])
        if len(spectrum) > example.rank
        else 1.0
    )
    if gap > 1e-3:
        within("M12 retract", (matrix(first) - matrix(second)).norm(), 1e-10)
    within(
        "M12 project",
        (
            ambient(example.point, impl.project_dense(example.point, z))
            - ambient(turned, impl.project_dense(turned, z))
        ).norm(),
        1e-10,
    )
    again = impl.retract(example.point, tangent, 0.3)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


# ------------------------------------------------------------------------------------------------- msign, factors


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


def law_point_depends_on_the_product(impl: Any, example: Example) -> None:
    """Factors (B C, C^-1 A) of one product give one point, with matching signs of u and v."""
    left, right = (
        noise(example.seed + 21, example.out, example.rank),
        noise(example.seed + 22, example.in_, example.rank),
    )
    mix = frame(example.seed + 23, example.rank, example.rank) * torch.logspace(
        0, 2, example.rank, dtype=F64
    )
    other_left, other_right = left @ mix, right @ torch.linalg.inv(mix).mT
    product = 0.625 * left @ right.mT
    size = float(product.norm())
    for a, b in ((left, right), (other_left, other_right)):
        point = impl.point_from_factors(a, b, 0.625)
        within("gauge entry", (matrix(point) - product).norm() / size, 1e-12)
        within("gauge frames", max(orthonormality(point.u), orthonormality(point.v)), 1e-12)
        assert bool((point.s.diff() <= 0).all())
        within("gauge dense", (impl.dense(point) - product).norm() / size, 1e-12)


EXAMPLE_LAWS = (
    (law_m1_projection_is_idempotent, ALL),
    (law_m2_projection_is_self_adjoint, ALL),
    (law_m3_projection_is_the_closest_tangent, ALL),
    (law_m4_projection_is_factored_and_normal, ALL),
    (law_m1_m4_in_fp32, ALL),
    (law_m5_retraction_is_of_second_order, TAME),
    (law_m5_in_fp32, TAME),
    (law_m6_retraction_is_the_truncated_svd, ("spread", "equal", "repeated", "conditioned")),
    (law_m7_gradient_predicts_the_change, TAME),
    (law_m8_transport_is_a_projection, ALL),
    (law_m9_inner_products_equal_dense, ALL),
    (law_m12_only_the_matrix_matters, TAME),
    (law_msign_equals_dense, ALL),
    (law_point_depends_on_the_product, TAME),
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


@pytest.mark.parametrize(
    "law",
    [law_m10_frames_stay_orthonormal, law_m11_degenerate_input_is_survived_or_named],
    ids=lambda law: law.__name__,
)
def test_robustness_of_the_geometry(law: Any) -> None:
    """The law holds for the library."""
    law(real)
