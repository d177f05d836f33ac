"""Laws of intrinsic Muon on SPD, Stiefel and Grassmann, against tests/reference/manifolds.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from dreamrie import manifolds
from tests.margins import within
from tests.reference.manifolds import CASES, TINY, Case, loss_of, slope_of
from tests.strategies import F64, frame, noise


def law_m1_gradients_and_directions_are_tangent(impl: Any) -> None:
    """The defining equation of tangency holds, from a Euclidean gradient without any symmetry."""
    for case in CASES:
        manifold, x = impl.MANIFOLDS[case.name], case.point()
        euclidean = case.euclidean()
        assert case.defect(x, euclidean) > 0.3
        gradient = manifold.gradient(x, euclidean)
        for vector in (gradient, impl.direction(manifold, x, gradient)):
            assert vector.norm() > 0.3
            # Measured: 8e-15.
            within("M1 tangency", case.defect(x, vector) / vector.norm(), 4e-14)


def law_m2_the_gradient_represents_the_derivative(impl: Any) -> None:
    """<grad f, xi>_x = <df, xi> for every tangent xi, with the metric written out."""
    for case in CASES:
        manifold, x = impl.MANIFOLDS[case.name], case.point()
        euclidean = case.euclidean()
        gradient = manifold.gradient(x, euclidean)
        for salt in range(5):
            xi = case.tangent(x, salt)
            wanted = (euclidean * xi).sum()
            assert abs(wanted) > 1e-3
            scale = euclidean.norm() * xi.norm()
            # Measured: 3e-14, at a condition of 100.
            within("M2 metric", (case.inner(x, gradient, xi) - wanted).abs() / scale, 1.5e-13)
            within("M2 inner", (manifold.inner(x, gradient, xi) - wanted).abs() / scale, 1.5e-13)


def law_m3_no_tangent_vector_of_norm_one_gains_more(impl: Any) -> None:
    """xi has intrinsic spectral norm 1 and the product |grad f|_*; rivals, near and far, have less.

    The ball is convex and the product linear, so a vector that no neighbour beats is beaten by none.
    """
    for case in CASES:
        manifold, x = impl.MANIFOLDS[case.name], case.point()
        gradient = case.gradient(x, case.euclidean())
        xi = impl.direction(manifold, x, gradient)
        gain = case.inner(x, gradient, xi)
        # Measured: 2e-14 and 4e-14.
        within("M3 norm", (case.size(x, xi) - 1).abs(), 1e-13)
        dual = case.singular_values(x, gradient).sum()
        within("M3 dual norm", (gain - dual).abs() / dual, 2e-13)
        for salt in range(25):
            other = case.tangent(x, salt)
            other = other / case.size(x, other)
            for share in (1.0, 0.1, 0.001):
                rival = case.made_tangent(x, (1 - share) * xi + share * other)
                rival = rival / case.size(x, rival)
                within("M3 rival", (case.inner(x, gradient, rival) - gain) / gain, 1e-13)


def _sphere(dims: int) -> Tensor:
    """A grid on the unit sphere of up to three dimensions, (points, dims)."""
    angle = torch.linspace(0, 2 * math.pi, 721, dtype=F64)
    if dims == 2:
        return torch.stack([angle.cos(), angle.sin()], dim=-1)
    height = torch.linspace(0, math.pi, 181, dtype=F64)
    turn, rise = torch.meshgrid(angle[::4], height, indexing="ij")
    grid = torch.stack([rise.sin() * turn.cos(), rise.sin() * turn.sin(), rise.cos()], dim=-1)
    return grid.reshape(-1, 3)


def law_m4_a_tiny_ball_searched_completely_has_no_better_vector(impl: Any) -> None:
    """In two and three dimensions: a grid over all directions nearly attains the gain of xi, and does not exceed it."""
    for case in TINY:
        manifold, x = impl.MANIFOLDS[case.name], case.point()
        dims = 3 if case.p * case.n != 3 and case.name != "grassmann" else 2
        spanning = torch.stack([case.tangent(x, salt).flatten() for salt in range(dims + 1)])
        values, basis = torch.linalg.svd(spanning, full_matrices=False)[1:]
        assert values[dims - 1] > 1e-2
        assert values[dims] < 1e-12
        gradient = case.gradient(x, case.euclidean())
        vectors = (_sphere(dims) @ basis[:dims]).reshape(-1, case.n, case.p)
        rivals = vectors / case.size(x, vectors)[:, None, None]
        # The product is linear: its matrix is read off the basis.
        row = torch.stack(
            [case.inner(x, gradient, b.reshape(case.n, case.p)) for b in basis[:dims]]
        )
        best = ((rivals.flatten(1) @ basis[:dims].mT) @ row).amax()
        gain = case.inner(x, gradient, impl.direction(manifold, x, gradient))
        within("M4 beaten", (best - gain) / gain, 1e-13)
        # The grid is that coarse. Measured: 0.014.
        within("M4 attained", (gain - best) / gain, 0.03)


def law_m5_the_retraction_stays_on_the_manifold_and_is_first_order(impl: Any) -> None:
    """R(0) = x; (R(t xi) - R(-t xi)) / 2t = xi + O(t^2); a step of length 3 still ends on the manifold."""
    for case in CASES:
        manifold, x = impl.MANIFOLDS[case.name], case.point()
        xi = case.tangent(x)
        xi = xi / case.size(x, xi)
        within("M5 zero", (manifold.retract(x, xi, 0.0) - x).norm() / x.norm(), 2e-14)
        t = 1e-4
        slope = (manifold.retract(x, xi, t) - manifold.retract(x, xi, -t)) / (2 * t)
        # Measured: 4e-9, which is t^2.
        within("M5 first order", (slope - xi).norm() / xi.norm(), 5e-8)
        far = manifold.retract(x, xi, 3.0)
        assert (far - x).norm() > 0.04 * x.norm()
        within("M5 on the manifold", case.point_defect(far, x) / far.norm(), 2e-14)
        within("M5 as defined", (far - case.retract(x, 3.0 * xi)).norm() / far.norm(), 2e-12)


def law_m6_a_step_has_the_size_that_lr_names(impl: Any) -> None:
    """SPD: eigenvalues of X^{-1} X+ are exp(+-lr). Grassmann: all principal angles are arctan(lr)."""
    for lr in (0.1, 0.7):
        for case in CASES:
            manifold, x = impl.MANIFOLDS[case.name], case.point()
            xi = impl.direction(manifold, x, manifold.gradient(x, case.euclidean()))
            y = manifold.retract(x, xi, -lr)
            if case.name == "spd":
                moved = torch.linalg.eigvals(torch.linalg.solve(x, y)).real.log().abs()
                within("M6 logarithm", (moved - lr).abs().amax(), 1e-12)
            elif case.name == "grassmann":
                one, two = (torch.linalg.qr(matrix).Q for matrix in (x, y))
                angles = torch.linalg.svdvals(one.mT @ two).clamp(max=1).acos()
                within("M6 angle", (angles - math.atan(lr)).abs().amax(), 1e-12)
            elif case.n == case.p:
                turn = torch.linalg.eigvals(x.mT @ y).angle().abs()
                within("M6 turn", (turn - math.atan(lr)).abs().amax(), 1e-12)


def law_m7_the_slope_along_a_step_is_the_dual_norm(impl: Any) -> None:
    """(f(x) - f(x+)) / lr tends to |grad f|_*: descent, as fast as the ball allows."""
    for case in CASES:
        x = case.point()
        gradient = case.gradient(x, slope_of(case, x))
        dual = float(case.singular_values(x, gradient).sum())
        parameter = nn.Parameter(x.clone())
        lr = 1e-5
        optimizer = impl.IntrinsicMuon([parameter], case.name, lr=lr)
        parameter.grad = slope_of(case, x)
        optimizer.step()
        with torch.no_grad():
            slope = float(loss_of(case, x) - loss_of(case, parameter)) / lr
        # Measured: 3e-5, of order lr.
        within("M7 slope", abs(slope - dual) / dual, 2e-4)


def law_m8_transport_arrives_in_the_tangent_space(impl: Any) -> None:
    """Carried vectors are tangent and as the reference says; on SPD lengths stay, elsewhere none grows."""
    for case in CASES:
        manifold, x = impl.MANIFOLDS[case.name], case.point()
        y = case.retract(x, 0.8 * case.tangent(x, 1) / case.size(x, case.tangent(x, 1)))
        xi = case.tangent(x)
        carried = manifold.transport(x, xi, y)
        assert (carried - xi).norm() > 0.05 * xi.norm()
        within("M8 tangency", case.defect(y, carried) / xi.norm(), 4e-14)
        within("M8 reference", (carried - case.transport(x, xi, y)).norm() / xi.norm(), 2e-13)
        ratio = (case.inner(y, carried, carried) / case.inner(x, xi, xi)).sqrt()
        within("M8 length", (ratio - 1).abs() if case.name == "spd" else ratio - 1, 1e-12)


def _path(impl: Any, case: Case, start: Tensor, loss: Callable[[Tensor], Tensor]) -> Tensor:
    """Six steps with momentum."""
    parameter = nn.Parameter(start.clone())
    optimizer = impl.IntrinsicMuon([parameter], case.name, lr=0.1, momentum=0.8)
    for _ in range(6):
        optimizer.zero_grad()
        loss(parameter).backward()
        optimizer.step()
    return parameter.detach()


def law_m9_paths_follow_a_change_of_coordinates(impl: Any) -> None:
    """SPD: X -> A X A^T; Grassmann: Y -> Q Y M; Stiefel: X -> Q X P. A, M invertible, Q, P orthogonal."""
    for case in CASES:
        x = case.point()
        left = frame(50, case.n, case.n)
        right = frame(51, case.p, case.p)
        if case.name == "grassmann":
            right = right + 0.3 * noise(52, case.p, case.p)
        if case.name == "spd":
            left = left + 0.3 * noise(53, case.n, case.n)
            right = left.mT
        back_left, back_right = torch.linalg.inv(left), torch.linalg.inv(right)
        plain = _path(impl, case, x, lambda m, case=case: loss_of(case, m))
        assert (plain - x).norm() > 0.1 * x.norm()
        turned = _path(
            impl,
            case,
            left @ x @ right,
            lambda m, case=case, a=back_left, b=back_right: loss_of(case, a @ m @ b),
        )
        wanted = left @ plain @ right
        # Measured: 4e-13.
        within("M9 coordinates", (turned - wanted).norm() / wanted.norm(), 2e-12)


def law_m10_the_momentum_is_a_raw_heavy_ball(impl: Any) -> None:
    """Four steps: M <- mu M + grad f, x <- R(-lr direction(M)), M carried to x; against the reference, written out."""
    lr, mu = 0.15, 0.8
    for case in CASES:
        x = case.point()
        parameter = nn.Parameter(x.clone())
        optimizer = impl.IntrinsicMuon([parameter], case.name, lr=lr, momentum=mu)
        momentum = torch.zeros_like(x)
        for step in range(4):
            # Sizes that differ from step to step tell a sum of gradients from a sum of their signs.
            euclidean = case.euclidean(step) * (1 + step) ** 2
            parameter.grad = euclidean.clone()
            optimizer.step()
            momentum = mu * momentum + case.gradient(x, euclidean)
            new = case.retract(x, -lr * case.direction(x, momentum))
            momentum, x = case.transport(x, momentum, new), new
            # Measured: 2e-13.
            within("M10 path", (parameter.detach() - x).norm() / x.norm(), 1e-12)
            stored = optimizer.state[parameter]["momentum"]
            within("M10 momentum", (stored - momentum).norm() / momentum.norm(), 1e-12)


def law_m11_rounding_has_no_say(impl: Any) -> None:
    """A block that is zero up to rounding gives zero: the normal part of a square Stiefel matrix, a rank-1 gradient."""
    case = Case("stiefel", 4, 4, seed=4)
    x = case.point()
    manifold = impl.MANIFOLDS["stiefel"]
    turn, normal = manifold.blocks(x, impl.direction(manifold, x, case.tangent(x)))
    assert torch.linalg.matrix_norm(turn, 2) > 0.99
    within("M11 square", normal.norm(), 1e-14)
    thin = Case("grassmann", 6, 3, seed=5)
    y = thin.point()
    one = thin.made_tangent(y, noise(60, 6, 1) @ noise(61, 1, 3))
    xi = impl.direction(impl.MANIFOLDS["grassmann"], y, one)
    values = thin.singular_values(y, xi).sort().values
    within("M11 rank", (values - torch.tensor([0.0, 0.0, 1.0], dtype=F64)).abs().amax(), 1e-7)
    still = impl.direction(impl.MANIFOLDS["grassmann"], y, torch.zeros_like(y))
    assert torch.equal(still, torch.zeros_like(y))


def test_m1() -> None:
    law_m1_gradients_and_directions_are_tangent(manifolds)


def test_m2() -> None:
    law_m2_the_gradient_represents_the_derivative(manifolds)


def test_m3() -> None:
    law_m3_no_tangent_vector_of_norm_one_gains_more(manifolds)


def test_m4() -> None:
    law_m4_a_tiny_ball_searched_completely_has_no_better_vector(manifolds)


def test_m5() -> None:
    law_m5_the_retraction_stays_on_the_manifold_and_is_first_order(manifolds)


def test_m6() -> None:
    law_m6_a_step_has_the_size_that_lr_names(manifolds)


def test_m7() -> None:
    law_m7_the_slope_along_a_step_is_the_dual_norm(manifolds)


def test_m8() -> None:
    law_m8_transport_arrives_in_the_tangent_space(manifolds)


def test_m9() -> None:
    law_m9_paths_follow_a_change_of_coordinates(manifolds)


def test_m10() -> None:
    law_m10_the_momentum_is_a_raw_heavy_ball(manifolds)


def test_m11() -> None:
    law_m11_rounding_has_no_say(manifolds)
