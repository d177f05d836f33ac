"""M5-M7, M10-M12: retraction onto the fixed-rank matrices, and their points (docs/method.md 10).

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
from tests.properties.dense_geometry import TAME, ambient, in_dtype, matrix, orthonormality
from tests.reference import dense as reference
from tests.strategies import F64, Example, examples, frame, noise

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
    within("M6 R(0)", (matrix(still) - example.x).norm(), 1e-12)
    for step in (0.3, -0.7):
        new = impl.retract(example.point, tangent, step)
        moved = example.x + step * example.ambient(tangent)
        spectrum = torch.linalg.svdvals(moved)
        assert new.s.shape == (example.rank,)
        assert bool((new.s > 0).all())
        assert bool((new.s.diff() <= 0).all())
        within("M6 orthonormal", max(orthonormality(new.u), orthonormality(new.v)), 1e-12)
        within("M6 spectrum", (new.s - spectrum[: example.rank]).abs().max(), 1e-12)
        if (
            example.rank < len(spectrum)
            and float(spectrum[example.rank - 1] - spectrum[example.rank]) > 1e-2
        ):
            wanted = reference.truncate(moved, example.rank)
            within("M6 dense", (matrix(new) - wanted).norm(), 1e-12)
        elif example.rank == len(spectrum):
            within("M6 dense", (matrix(new) - moved).norm(), 1e-12)


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


# ------------------------------------------------------------------------------------------------- factors


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
    (law_m5_retraction_is_of_second_order, TAME),
    (law_m5_in_fp32, TAME),
    (law_m6_retraction_is_the_truncated_svd, ("spread", "equal", "repeated", "conditioned")),
    (law_m7_gradient_predicts_the_change, TAME),
    (law_m12_only_the_matrix_matters, TAME),
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
