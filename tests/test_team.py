"""Sums, shares and exchanged results of several gloo processes; the pure parts without any."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie import team as real
from dreamrie.team import ALONE, Team, share_rows
from tests.distributed.gloo import on_processes
from tests.strategies import noise


def tensors(rank: int) -> list[Tensor]:
    """Several dtypes, one of them large, one of them not contiguous."""
    return [
        noise(rank, 3, 5),
        noise(10 + rank, 7),
        noise(20 + rank, 4, dtype=torch.float32),
        noise(30 + rank, 6, 2).mT,
        torch.full((2, 3), rank, dtype=torch.int64),
    ]


def summed(impl: Any) -> tuple[list[Tensor], int, list[Tensor], tuple[list[int], list[int]]]:
    """What one process gets."""
    team = impl.Team.here()
    sums, copies = tensors(team.rank), tensors(team.rank)
    team.add_(sums)
    team.copy_first_(copies)
    shares = list(team.share(range(10, 17))), [team.number(index) for index in range(2)]
    return sums, team.total(3 + team.rank), copies, shares


def law_tm1_all_get_the_sum_and_the_first(impl: Any) -> None:
    """Sums are over all processes, copies are those of the first, and shares are every item once; equal everywhere."""
    results = on_processes(3, summed, impl)
    for sums, total, copies, _ in results:
        assert total == 3 + 4 + 5
        for found, parts in zip(sums, zip(*map(tensors, range(3)), strict=True), strict=True):
            assert found.shape == parts[0].shape
            wanted = torch.stack([part.double() for part in parts]).sum(0)
            assert (found.double() - wanted).abs().max() < 1e-6
        assert all(torch.equal(a, b) for a, b in zip(copies, tensors(0), strict=True))
        assert all(torch.equal(a, b) for a, b in zip(sums, results[0][0], strict=True))
    assert [shares for *_, shares in results] == [
        ([10, 13, 16], [0, 3]),
        ([11, 14], [1, 4]),
        ([12, 15], [2, 5]),
    ]


def test_tm1() -> None:
    law_tm1_all_get_the_sum_and_the_first(real)


WHOLES = [
    noise(1, 5, 3, dtype=torch.float32),
    noise(2, 5),
    torch.tensor([True, False, True, True, False]),
    noise(3, 4, 2, 2),
    torch.arange(4),
]
ROWS = [[2, 2, 2, 0, 0], [0, 0, 0, 3, 3], [3, 3, 3, 1, 1]]


def exchanged(impl: Any) -> list[Tensor]:
    """Each process knows its own rows only."""
    team = impl.Team.here()
    starts = [sum(rows[i] for rows in ROWS[: team.rank]) for i in range(len(WHOLES))]
    own = [
        whole[start : start + ROWS[team.rank][i]]
        for i, (whole, start) in enumerate(zip(WHOLES, starts, strict=True))
    ]
    return team.exchange(own, [torch.zeros_like(whole) for whole in WHOLES], ROWS)


def law_tm2_rows_come_together(impl: Any) -> None:
    """Rows of any dtype that are spread unevenly are put together in order, to the byte, on every process."""
    for found in on_processes(3, exchanged, impl):
        for one, whole in zip(found, WHOLES, strict=True):
            assert one.dtype == whole.dtype
            assert torch.equal(one, whole)


def test_tm2() -> None:
    law_tm2_rows_come_together(real)


def law_tm3_work_is_divided_evenly(impl: Any) -> None:
    """Every piece goes to one process; loads differ by at most one of the dearest pieces that were left over."""
    for size in (1, 2, 3, 4, 7):
        for counts, costs in (
            ([36, 30, 30, 12, 10, 10], [16.0, 4.0, 1.0, 12.0, 3.0, 6.0]),
            ([1, 1, 1, 1, 1], [5.0, 4.0, 3.0, 3.0, 3.0]),
            ([2], [1.0]),
        ):
            rows = impl.share_rows(counts, costs, size)
            assert [sum(row[i] for row in rows) for i in range(len(counts))] == counts
            loads = [sum(n * cost for n, cost in zip(row, costs, strict=True)) for row in rows]
            assert max(loads) - min(loads) <= max(costs)
            assert rows == impl.share_rows(list(counts), list(costs), size)


def test_tm3() -> None:
    law_tm3_work_is_divided_evenly(real)


def test_the_dearest_piece_goes_first() -> None:
    """Five pieces on two processes: 5 + 3 beside 4 + 3 + 3; in the order given it would be 3 + 3 + 3 beside 5 + 4."""
    assert share_rows([1, 1, 1, 1, 1], [3.0, 5.0, 3.0, 4.0, 3.0], 2) == [
        [0, 1, 1, 0, 0],
        [1, 0, 0, 1, 1],
    ]


def test_a_process_alone_talks_to_nobody() -> None:
    """Without a process group everything is as it was."""
    assert Team.here() == ALONE == Team(0, 1)
    before = tensors(1)
    after = tensors(1)
    ALONE.add_(after)
    ALONE.copy_first_(after)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert (ALONE.total(5), ALONE.number(4), list(ALONE.share("abc"))) == (5, 4, ["a", "b", "c"])


def test_a_process_that_fails_is_reported() -> None:
    """The helper of these tests: an error in one process is an error of the test, at once."""

    def broken() -> None:
        if Team.here().rank == 1:
            raise ValueError("the second process")

    with pytest.raises(AssertionError, match="the second process"):
        on_processes(2, broken)
