"""Examples, errors and state of intrinsic Muon; its laws are in properties/test_manifolds_laws.py."""

from __future__ import annotations

import io
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.manifolds import (
    MANIFOLDS,
    SPD,
    Grassmann,
    IntrinsicMuon,
    Stiefel,
    direction,
    nuclear_norm,
    random_frame,
    spectral_norm,
)
from dreamrie.manifolds.intrinsic import Manifold
from tests.reference.manifolds import CASES, loss_of
from tests.strategies import F32, F64, noise


def _steps(
    optimizer: IntrinsicMuon, parameters: list[nn.Parameter], first: int, count: int
) -> None:
    for step in range(first, first + count):
        for index, parameter in enumerate(parameters):
            seed = 100 + 10 * step + index
            parameter.grad = noise(seed, *parameter.shape, dtype=parameter.dtype)
        optimizer.step()


def test_a_step_on_spd_worked_by_hand() -> None:
    """At X = diag(4, 1) and df = diag(1, -3): xi = diag(4, -1), X+ = diag(4 / e, e) for lr = 1."""
    x = nn.Parameter(torch.diag(torch.tensor([4.0, 1.0], dtype=F64)))
    gradient = torch.diag(torch.tensor([1.0, -3.0], dtype=F64))
    xi = direction(SPD(), x.detach(), SPD().gradient(x.detach(), gradient))
    assert torch.allclose(xi, torch.diag(torch.tensor([4.0, -1.0], dtype=F64)), atol=1e-14)
    x.grad = gradient
    IntrinsicMuon([x], "spd", lr=1.0).step()
    wanted = torch.diag(torch.tensor([4 / math.e, math.e], dtype=F64))
    assert torch.allclose(x.detach(), wanted, atol=1e-14)


def test_a_step_of_a_line_worked_by_hand() -> None:
    """The line of e1 in the plane turns towards e2 by arctan(lr), and keeps the length of its vector."""
    for manifold, length in (("grassmann", 3.0), ("stiefel", 1.0)):
        y = nn.Parameter(torch.tensor([[length], [0.0]], dtype=F64))
        y.grad = torch.tensor([[7.0], [-0.2]], dtype=F64)
        if manifold == "stiefel":
            y.grad[0] = 0.0
        IntrinsicMuon([y], manifold, lr=0.75).step()
        wanted = length * torch.tensor([[0.8], [0.6]], dtype=F64)
        assert torch.allclose(y.detach(), wanted, atol=1e-14)


def test_norms_worked_by_hand() -> None:
    """diag(4, 1) with xi = diag(8, 3): H = diag(2, 3), so the norms are 3 and 5."""
    x, xi = (torch.diag(torch.tensor(v, dtype=F64)) for v in ([4.0, 1.0], [8.0, 3.0]))
    assert math.isclose(float(spectral_norm(SPD(), x, xi)), 3.0, rel_tol=1e-14)
    assert math.isclose(float(nuclear_norm(SPD(), x, xi)), 5.0, rel_tol=1e-14)
    assert math.isclose(float(SPD().inner(x, xi, xi)), 13.0, rel_tol=1e-14)


@pytest.mark.parametrize("name", sorted(MANIFOLDS))
def test_batches_equal_single_calls(name: str) -> None:
    """Leading dimensions are a loop; each method of the protocol is called."""
    manifold = MANIFOLDS[name]
    case = next(case for case in CASES if case.name == name)
    points = torch.stack([case.point(), 2 * case.point() if name != "stiefel" else -case.point()])
    euclidean = torch.stack([case.euclidean(), case.euclidean(1)])

    def everything(x: Tensor, df: Tensor) -> list[Tensor]:
        gradient = manifold.gradient(x, df)
        xi = direction(manifold, x, gradient)
        y = manifold.retract(x, xi, -0.3)
        norms = [spectral_norm(manifold, x, gradient), nuclear_norm(manifold, x, gradient)]
        products = [manifold.inner(x, gradient, xi), *norms]
        return [gradient, xi, y, manifold.transport(x, xi, y), manifold.project(x, df), *products]

    manifold.check_point(points)
    together = everything(points, euclidean)
    for row in range(2):
        alone = everything(points[row], euclidean[row])
        for a, b in zip(together, alone, strict=True):
            assert torch.allclose(a[row], b, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("name", sorted(MANIFOLDS))
def test_a_hundred_steps_in_fp32_stay_on_the_manifold(name: str) -> None:
    """The optimum of `loss_of` is found. Measured: a gap of 4e-5 to 3e-4 of the best value."""
    case = next(case for case in CASES if case.name == name)
    parameter = nn.Parameter(case.point().to(F32))
    start = parameter.detach().double()
    optimizer = IntrinsicMuon([parameter], name, lr=0.1)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=100)
    for _ in range(100):
        optimizer.zero_grad()
        loss_of(case, parameter.double()).backward()
        optimizer.step()
        schedule.step()
    end = parameter.detach().double()
    # Measured: 1e-7 on Stiefel; on Grassmann Y^T Y, which means nothing there, drifts by 3e-5.
    drift = float(case.point_defect(end, start) / start.norm() ** 2)
    assert drift < (2e-4 if name == "grassmann" else 6e-7)
    c = torch.linspace(3, 1, case.n, dtype=F64)
    weights = torch.linspace(2, 1, case.p, dtype=F64) if name == "stiefel" else 1.0
    best = c.log().sum() + case.n if name == "spd" else -(c[: case.p] * weights).sum()
    gap = float((loss_of(case, end) - best) / best.abs())
    assert -1e-6 < gap < 1.5e-3


@pytest.mark.parametrize("name", sorted(MANIFOLDS))
def test_a_restored_optimizer_goes_on_to_the_bit(name: str) -> None:
    """State through torch.save, with nothing but tensors and plain values in it."""
    case = next(case for case in CASES if case.name == name)
    parameter = nn.Parameter(case.point())
    optimizer = IntrinsicMuon([parameter], name, lr=0.05, momentum=0.8)
    _steps(optimizer, [parameter], 0, 2)
    file = io.BytesIO()
    torch.save(optimizer.state_dict(), file)
    copy = nn.Parameter(parameter.detach().clone())
    restored = IntrinsicMuon([copy], name)
    file.seek(0)
    restored.load_state_dict(torch.load(file, weights_only=True))
    _steps(optimizer, [parameter], 2, 2)
    _steps(restored, [copy], 2, 2)
    assert torch.equal(parameter, copy)


def test_groups_on_different_manifolds_and_a_missing_gradient() -> None:
    """Each group has its manifold; what has no gradient is left alone."""
    frame = nn.Parameter(random_frame(5, 2, generator=torch.Generator().manual_seed(1), dtype=F64))
    idle = nn.Parameter(torch.eye(3, dtype=F64))
    spd = nn.Parameter(torch.eye(3, dtype=F64))
    groups = [{"params": frame}, {"params": [idle, spd], "manifold": "spd", "lr": 0.5}]
    optimizer = IntrinsicMuon(groups, "stiefel", lr=0.1)
    frame.grad, spd.grad = noise(1, 5, 2), noise(2, 3, 3)

    def closure() -> Any:
        return 1.5

    assert optimizer.step(closure) == 1.5
    assert torch.equal(idle, torch.eye(3, dtype=F64))
    assert idle not in optimizer.state
    spread = torch.linalg.eigvalsh(spd.detach()).log().abs()
    assert torch.allclose(spread, torch.full((3,), 0.5, dtype=F64), atol=1e-13)
    Stiefel().check_point(frame.detach(), 1e-13)


def test_a_gradient_that_is_not_finite_stops_everything() -> None:
    """No parameter is written, not even one before it."""
    one, two = (nn.Parameter(torch.eye(3, dtype=F64)) for _ in range(2))
    one.grad, two.grad = noise(1, 3, 3), torch.full((3, 3), float("inf"), dtype=F64)
    optimizer = IntrinsicMuon([one, two], "spd")
    with pytest.raises(NumericalError, match=r"parameter 1, group 0, shape \(3, 3\), is not fin"):
        optimizer.step()
    assert torch.equal(one, torch.eye(3, dtype=F64))
    assert not optimizer.state


def test_a_step_that_leaves_the_cone_stops_everything() -> None:
    """exp(-100) is lost beside exp(100) in fp32: said, and nothing written."""
    x = nn.Parameter(torch.eye(2))
    x.grad = torch.diag(torch.tensor([1.0, -1.0]))
    with pytest.raises(NumericalError, match=r"not finite|not positive definite"):
        IntrinsicMuon([x], "spd", lr=100.0).step()
    assert torch.equal(x, torch.eye(2))


def test_state_of_another_manifold_is_refused() -> None:
    x, y = nn.Parameter(torch.eye(3)), nn.Parameter(torch.eye(3))
    state = IntrinsicMuon([x], "spd").state_dict()
    with pytest.raises(ConfigError, match=r"of the manifolds \['spd'\], this optimizer has"):
        IntrinsicMuon([y], "stiefel").load_state_dict(state)


@pytest.mark.parametrize(
    ("manifold", "point", "message"),
    [
        (SPD(), torch.eye(3)[:2], r"shape \(2, 3\); \(\*, n, n\) is needed"),
        (SPD(), torch.tensor([[2.0, 1.0], [0.0, 2.0]]), "not symmetric, defect 5.0e-01"),
        (SPD(), torch.diag(torch.tensor([1.0, -1.0])), "not positive definite"),
        (SPD(), torch.zeros(2, 2), "not symmetric|not positive definite"),
        (Stiefel(), 2 * torch.eye(3, 2), "not orthonormal, defect 3.0e"),
        (Stiefel(), torch.eye(2, 3), r"\(\*, n, p\) with n >= p is needed"),
        (Stiefel(), torch.eye(3, 2).half(), "float32 or float64 is needed"),
        (Grassmann(), torch.ones(3, 2), "dependent, the smallest singular value is"),
        (Grassmann(), torch.full((3, 1), float("nan")), "3 of 3 numbers are not finite"),
    ],
)
def test_what_is_no_point_is_refused(manifold: Manifold, point: Tensor, message: str) -> None:
    with pytest.raises(NumericalError, match=message):
        manifold.check_point(point)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"manifold": "sphere"}, "'sphere' is unknown; use one of grassmann, spd, stiefel"),
        ({"lr": -1.0}, "lr must be at least 0"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\)"),
        ({"manifold": "stiefel"}, "parameter 0 of the group is not a point. Stiefel: the columns"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        IntrinsicMuon([nn.Parameter(2 * torch.eye(3))], **({"manifold": "spd"} | options))


def test_nothing_to_train_is_refused() -> None:
    with pytest.raises(ConfigError, match="no parameters were given"):
        IntrinsicMuon([], "spd")
    with pytest.raises(NumericalError, match=r"4 orthonormal columns of 3 rows; 1\.\.3"):
        random_frame(3, 4)
