"""The two examples on scikit-learn's digits, in small: they end near the known answers."""

from __future__ import annotations

import pytest
import torch

from examples import convolutions_with_tensorion as convolutions
from examples import subspace_of_digits as subspace
from tests.strategies import F64


def test_subspaces_of_digits_are_found(capsys: pytest.CaptureFixture[str]) -> None:
    """All three gaps, against PCA and the covariance matrix, after 160 steps. Measured: 1e-6, 6e-6, 8e-5."""
    subspace.main(["--steps", "160", "--seed", "3"])
    lines = [line for line in capsys.readouterr().out.splitlines() if " gap at step " in line]
    assert [line.split()[0] for line in lines] == ["grassmann", "stiefel", "spd"]
    for line, start, end in zip(lines, (0.4, 0.7, 20), (6e-6, 3e-5, 4e-4), strict=True):
        gaps = [float(word) for word in line.split("  (")[0].replace(":", "").split()[5::2]]
        assert gaps[0] > start
        assert 0 <= gaps[-1] < end


def test_the_gap_of_the_known_answers_is_zero() -> None:
    """PCA's components and the data's covariance: the optimum that is compared with is one."""
    problem, pca = subspace.plane(0)
    components = torch.tensor(pca.components_).mT
    assert abs(float(problem.gap(components @ torch.diag(torch.arange(1.0, 9, dtype=F64))))) < 1e-12
    assert abs(float(subspace.axes(0)[0].gap(components))) < 1e-12
    turned = components.roll(1, dims=1)
    assert float(subspace.axes(0)[0].gap(turned)) > 0.01
    best = subspace.covariance(subspace.load_pixels(4))
    assert abs(float(subspace.gaussian().gap(best))) < 1e-12
    assert float(subspace.gaussian().gap(1.1 * best)) > 0.01


def test_both_methods_share_starts_batches_and_rates() -> None:
    """One lr for all; each number is in one optimizer; equal seeds give equal nets."""
    first, again = convolutions.build_net(4), convolutions.build_net(4)
    for one, other in zip(first.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    for method in convolutions.METHODS:
        groups = [
            group
            for optimizer in convolutions.build_optimizers(method, first, 0.02)
            for group in optimizer.param_groups
        ]
        assert {group["lr"] for group in groups} == {0.02}
        moved = [id(parameter) for group in groups for parameter in group["params"]]
        assert sorted(moved) == sorted(id(parameter) for parameter in first.parameters())
    tensorion = convolutions.build_optimizers("tensorion", first, 0.02)[0]
    shapes = [tuple(kernel.shape) for kernel in tensorion.param_groups[0]["params"]]
    assert shapes == [(16, 1, 3, 3), (32, 16, 3, 3), (32, 32, 3, 3)]


@pytest.mark.parametrize("method", convolutions.METHODS)
def test_a_net_learns_to_read(method: str) -> None:
    """40 steps at lr 0.01, chance is 10 %. Measured: 89 and 87 %."""
    training, validation, test = convolutions.load_parts()
    assert [len(part.digits) for part in (training, validation, test)] == [800, 400, 597]
    net = convolutions.train(method, 0.01, 1, 40, training)
    assert convolutions.accuracy(net, test) > 75


def test_the_table_names_every_rate_and_what_was_chosen(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """lr 0 learns nothing and is not chosen; equal scores go to the lower rate."""
    monkeypatch.setattr(convolutions, "LRS", (0.0, 0.02))
    convolutions.main(["--steps", "6", "--seeds", "2"])
    out = capsys.readouterr().out
    assert "6 steps of 64 pictures; validation accuracy in %, 3 seeds" in out
    for method in convolutions.METHODS:
        assert f"{method} at lr 0.02: test accuracy" in out
    monkeypatch.setattr(convolutions, "LRS", (0.02, 0.01))
    monkeypatch.setattr(convolutions, "accuracy", lambda net, pictures: 50.0)
    assert convolutions.choose("adamw", (0, 1), 1, convolutions.load_parts())[0] == 0.01
