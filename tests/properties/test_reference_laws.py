"""Laws about the references themselves: corrected Alg. 6, and core maps (laws 6, 20, 21 of docs/method.md 10).

A reference that is wrong makes every comparison with it worthless, so its misprinted forms are mutants too.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dreamrie.fixed_rank as fixed_rank
from tests.margins import within
from tests.reference import alg6, dense
from tests.strategies import F64, POINTS, Example, noise

TARGET = noise(1, 10, 7)
WEIGHTS = noise(2, 10, 7)


def slope(w: Tensor) -> Tensor:
    """Gradient of 1/2 |w - T|^2."""
    return w - TARGET


def law_21_factored_equals_dense(impl: Any) -> None:
    """RiemannAdam in factors equals RiemannAdam on matrices, with and without bias correction."""
    for correct in (True, False):
        quick = impl.RiemannAdam(WEIGHTS, 2, slope, 0.02, alpha=0.3, bias_correction=correct)
        slow = alg6.DenseRiemannAdam(WEIGHTS, 2, slope, 0.02, 0.3, correct)
        first = slow.X
        for _ in range(20):
            got, wanted = quick.step(), slow.step()
            within("21 Alg. 6", (got - wanted).norm() / wanted.norm(), 1e-11)
        assert float((slow.X - first).norm()) > 0.1


def law_21_descends(impl: Any) -> None:
    """The loss of a quadratic falls."""
    optimizer = impl.RiemannAdam(WEIGHTS, 2, slope, 0.05)
    before = float(slope(optimizer.weights()).norm())
    for _ in range(30):
        optimizer.step()
    assert float(slope(optimizer.weights()).norm()) < 0.95 * before


def law_13_start_is_optimal_and_changes_nothing(impl: Any) -> None:
    """|X_0|_2 = |alpha|; W' + X_0 = W; the first Riemannian gradient has the energy of 2r singular values."""
    for alpha in (0.1, -0.25):
        optimizer = impl.RiemannAdam(WEIGHTS, 2, slope, 0.02, alpha=alpha)
        within("13 alpha", abs(float(torch.linalg.matrix_norm(optimizer.X, 2)) - abs(alpha)), 1e-12)
        within("15 step 0", (optimizer.weights() - WEIGHTS).norm(), 1e-12)
        optimum = (torch.linalg.svdvals(slope(WEIGHTS))[:4] ** 2).sum()
        left, right = optimizer.tangent()
        within("13 energy", abs(float((left.norm() ** 2 + right.norm() ** 2) / optimum) - 1), 1e-10)


def law_6_blocks_break_transposition(impl: Any) -> None:
    """A second moment per block is not transposition equivariant; this is why layers keep their side there."""
    straight = impl.RiemannAdam(WEIGHTS, 2, slope, 0.05)
    turned = impl.RiemannAdam(WEIGHTS.mT, 2, lambda w: w - TARGET.mT, 0.05)
    turned.A_L, turned.S, turned.B_R = straight.B_R, straight.S, straight.A_L
    turned.X0 = turned.X
    for _ in range(10):
        a, b = straight.step(), turned.step()
    assert float((a - b.mT).norm() / a.norm()) > 1e-3


def newton_schulz(z: Tensor) -> Tensor:
    x = z / z.norm()
    for _ in range(5):
        x = 3.4445 * x + (-4.7750 * (x @ x.mT) + 2.0315 * (x @ x.mT) @ (x @ x.mT)) @ x
    return x


def soft_clip(z: Tensor) -> Tensor:
    u, s, vt = torch.linalg.svd(z, full_matrices=False)
    return (u * (s / (1 + (s / 0.2) ** 2).sqrt())) @ vt


def law_20_odd_spectral_maps_act_on_the_core(impl: Any) -> None:
    """f(M) = Q_left f(K) Q_right^T for Newton-Schulz and soft clipping."""
    for example in POINTS:
        tangent = example.tangent()
        u, _, v = example.point
        q_left, r_left = torch.linalg.qr(torch.cat([u, tangent.d_left], dim=-1))
        q_right, r_right = torch.linalg.qr(torch.cat([v, tangent.d_right], dim=-1))
        core = impl.cross_core(r_left, r_right, example.rank)
        for f in (newton_schulz, soft_clip):
            within(
                "20 core map",
                (q_left @ f(core) @ q_right.mT - f(example.ambient(tangent))).norm(),
                1e-11,
            )


REFERENCE_LAWS = (
    law_21_factored_equals_dense,
    law_21_descends,
    law_13_start_is_optimal_and_changes_nothing,
    law_6_blocks_break_transposition,
)


@pytest.mark.parametrize("law", REFERENCE_LAWS, ids=lambda law: law.__name__)
def test_law_of_the_reference(law: Any) -> None:
    """The law holds for the corrected algorithm."""
    law(alg6)


def test_law_20_core_maps() -> None:
    """The law holds for the library's core."""
    law_20_odd_spectral_maps_act_on_the_core(fixed_rank)


def test_dense_reference_by_itself() -> None:
    """The dense reference keeps the optimality conditions that need no second implementation."""
    example = Example(9, 7, 3, seed=4)
    u, _, v = dense.svd_r(example.x, 3)
    z = noise(5, 9, 7)
    p = dense.projection(u, v, z)
    within("reference tangent", (dense.projection(u, v, p) - p).norm(), 1e-12)
    sign = dense.msign(z)
    within("reference msign", (sign.mT @ sign - torch.eye(7, dtype=F64)).norm(), 1e-12)
    within("reference nuclear", abs(float((sign * z).sum() - torch.linalg.svdvals(z).sum())), 1e-11)
    kept = dense.truncate(z, 3)
    tail = torch.linalg.svdvals(z)[3:].norm()
    within("reference truncation", abs(float((z - kept).norm() - tail)), 1e-12)
