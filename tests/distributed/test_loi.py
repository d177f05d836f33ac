"""Locally optimal initialization on two processes is that of one with all batches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dreamrie.loi as real
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.lora import attach_lora
from dreamrie.team import ALONE, Team
from tests.distributed.gloo import on_processes
from tests.reference import nets
from tests.strategies import F64

ESTIMATORS = ("mean_gradient", "sketch", "backprop_rsvd")


def starts(impl: Any, shared: bool, count: int = 3) -> list[tuple[list[Tensor], list[float], int]]:
    """Starts, energies and number of batches, by each estimator."""
    found = []
    for estimator in ESTIMATORS:
        model = nets.net()
        pairs = attach_lora(model, 2, nets.TARGETS)
        for pair in pairs:
            pair.left.data, pair.right.data = pair.left.data.double(), pair.right.data.double()
        team = Team.here() if shared else ALONE
        more = {"team": team} if shared else {}
        report = impl.locally_optimal_init(
            model, pairs, nets.squares, nets.batches(count), estimator=estimator, **more
        )
        factors = [half.detach() for pair in pairs for half in (pair.left, pair.right)]
        found.append((factors, [layer.energy for layer in report.layers], report.batches))
    return found


def law_lo1_two_processes_see_all_batches(impl: Any) -> None:
    """Three batches on two processes: starts, energies and the count are those of one process with all three."""
    alone, first = starts(impl, False), starts(impl, False, count=1)
    both = on_processes(2, starts, impl, True)
    for number in range(len(ESTIMATORS)):
        wanted, energies, _ = alone[number]
        assert max(distances(wanted, first[number][0])) > 1e-2, "one batch would be enough"
        for found in both:
            assert found[number][2] == 3
            assert found[number][1] == pytest.approx(energies, rel=1e-9)
            assert max(distances(found[number][0], wanted)) < 1e-9  # measured 3e-13
        assert all(
            torch.equal(a, b) for a, b in zip(both[0][number][0], both[1][number][0], strict=True)
        )


def distances(found: list[Tensor], wanted: list[Tensor]) -> list[float]:
    assert found[0].dtype == F64
    return [float((a - b).norm() / b.norm()) for a, b in zip(found, wanted, strict=True)]


def test_lo1() -> None:
    law_lo1_two_processes_see_all_batches(real)


def test_a_process_without_a_batch_helps_along() -> None:
    """One batch on two processes: both get its start."""
    alone = starts(real, False, count=1)
    for found in on_processes(2, starts, real, True, 1):
        for (factors, _, count), (wanted, _, _) in zip(found, alone, strict=True):
            assert count == 1
            assert max(distances(factors, wanted)) < 1e-9


def bad_batch() -> str:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    data = nets.batches(4)
    data[3][0][:] = torch.nan
    try:
        real.locally_optimal_init(model, pairs, nets.squares, data, team=Team.here())
    except NumericalError as error:
        return str(error)
    except RuntimeError:
        return "lost the other process"
    return "nothing"


def test_a_bad_batch_is_named_by_its_number_in_the_whole() -> None:
    """The fourth batch of all is the second of the second process; the other one is not left waiting."""
    first, second = on_processes(2, bad_batch)
    assert "batch 4" in second
    assert first == "lost the other process"


def no_batches() -> str:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    with pytest.raises(ConfigError) as caught:
        real.locally_optimal_init(model, pairs, nets.squares, [], team=Team.here())
    return str(caught.value)


def test_without_batches_all_processes_say_so() -> None:
    assert all("no batch" in said for said in on_processes(2, no_batches))
