"""What the dry runs of all tasks share: a start from two short ones, what is due how often, what stands for all."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest

from dreamrie.config import make_config
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.trainer import loop
from dreamrie.trainer import rehearsal as parts

SETTINGS = {"instance_data_dir": "x", "instance_prompt": "a sks x", "loi_batches": 11}


def started(processes: int, **values: Any) -> tuple[float, list[int]]:
    """Seconds of a start of which each process has a share: 10 s, and 2 s for a unit of work of each batch."""
    work, counts = [1.0, 4.0, 2.5], list[int]()

    def start(config: Any, _: Any) -> tuple[str, str]:
        counts.append(config.adapter.loi_batches)
        return f"optimizer {len(counts)}", ""

    def timed(action: Any) -> float:
        action()
        return 10.0 + 2.0 * sum(work[: counts[-1] // processes])

    team = SimpleNamespace(here=lambda: SimpleNamespace(size=processes))
    with mock.patch.multiple(parts, start_adapter=start, timed=timed, Team=team):
        task: Any = None
        seconds, optimizer = parts.start_seconds(
            make_config({**SETTINGS, **values}), task, work, 30.0
        )
    assert optimizer == f"optimizer {len(counts)}"
    return seconds, counts


def test_a_start_is_multiplied_out_by_the_work_of_its_batches() -> None:
    """The work of all is 30 units, on two processes 15 for each; a start without batches takes no time."""
    assert started(1) == (pytest.approx(10 + 2 * 30), [1, 3])
    assert started(2) == (pytest.approx(10 + 2 * 15), [2, 6])
    assert started(1, init="orthonormal", loi_batches=None) == (0.0, [1])


@pytest.mark.parametrize(("steps", "every"), [(1, 1), (7, 3), (6, 3), (2, 100), (5, 5)])
def test_what_is_due_is_counted_as_the_loop_does_it(steps: int, every: int) -> None:
    """From the beginning, and from each checkpoint."""
    for done in range(steps + 1):
        first = done + 1 if done else 0
        due = [loop._is_due(every, step, step == steps) for step in range(first, steps + 1)]
        assert parts.times(steps, every, done) == sum(due)


def test_a_try_that_fails_ends_all_processes() -> None:
    """One process says what it was; one of several must end, or the others would wait for it."""

    def tried() -> parts.Estimate:
        raise NumericalError("the loss is not finite\n  where: step 1")

    said = "not estimated, because a short try failed: the loss is not finite"
    assert parts.told(tried) == f"# time and memory: {said}"
    team = SimpleNamespace(here=lambda: SimpleNamespace(size=2))
    with mock.patch.object(parts, "Team", team), pytest.raises(ConfigError, match=said):
        parts.told(tried)


def test_an_estimate_says_what_it_has_not_seen() -> None:
    found = parts.Estimate(1.0, 2.0, 3.0, 2**30, True, one_in=11)
    assert found.describe()[1] == (
        "memory: about 1.00 GiB on the GPU at its peak, by the largest of one batch in 11"
    )


def test_some_stand_for_all() -> None:
    """The middles of equal parts; of few some come twice."""
    assert parts.evenly(list(range(100)), 4) == [12, 37, 62, 87]
    assert parts.evenly([5, 6], 4) == [5, 5, 6, 6]
    assert parts.evenly([5, 6, 7], 1) == [6]
