"""The work of the optimizer divided over two and four gloo processes: the same bytes as on one."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from dreamrie import riemannion as real
from dreamrie import riemannion_sharing
from dreamrie.riemannion_layers import Batch
from dreamrie.riemannion_sharing import _unit
from dreamrie.riemannion_step import FusedState
from dreamrie.team import Team
from tests.distributed.gloo import on_processes
from tests.strategies import F32, F64, Layer, make_pairs, noise

# Four shapes, batches of 19, 6, 2 and 1 layers. Rank 4 divides at every layer, rank 3 at every sixteenth: 19 = 16 + 3.
SHAPES = (
    *[Layer(20, 12, 4, 0.5, anchored=True)] * 4,
    *[Layer(12, 20, 4, 2.0, anchored=True)] * 2,
    *[Layer(9, 11, 3, 1.0)] * 19,
    *[Layer(8, 8, 4, 1.0)] * 2,
    Layer(24, 8, 2, 0.7),
)
STEPS = 3
BAD_LAYER, BAD_STEP = 1, 2


def path(impl: Any, dtype: torch.dtype, shared: bool, resumed: bool = False) -> list[bytes]:
    """All factors and all state after some steps with decay; one layer meets a NaN, and one never has a gradient."""
    pairs = make_pairs(SHAPES, dtype=dtype)
    options = {"lr": 0.05, "weight_decay": 0.2}
    optimizer = impl.Riemannion(pairs, **options)
    if shared:
        optimizer.share_work(Team.here())
    for step in range(STEPS):
        if resumed and step == 1:
            saved, optimizer = optimizer.state_dict(), impl.Riemannion(pairs, **options)
            optimizer.load_state_dict(saved)
            optimizer.share_work(Team.here())
        for number, pair in enumerate(pairs[:-1]):
            gradient = noise(100 * step + number, *pair.change.shape)
            if number == BAD_LAYER and step == BAD_STEP:
                gradient[0, 0] = torch.nan
            pair.set_gradient(gradient)
        optimizer.step()
    assert optimizer.skipped_steps == 1
    state: list[Tensor] = [
        entry[name]
        for _, entry in sorted(optimizer.state_dict()["state"].items())
        for name in sorted(entry)
    ]
    factors = [factor.detach() for pair in pairs for factor in (pair.left, pair.right)]
    assert len(state) == 5 * (len(pairs) - 1)
    return [tensor.contiguous().numpy().tobytes() for tensor in [*state, *factors]]


def law_sh1_shared_steps_are_the_steps(impl: Any) -> None:
    """On two and on four processes, every process holds every byte of factors and state that one process alone has."""
    for count, dtype in ((2, F32), (4, F64)):
        alone = path(impl, dtype, False)
        for found in on_processes(count, path, impl, dtype, True):
            different = [i for i, (a, b) in enumerate(zip(found, alone, strict=True)) if a != b]
            assert different == []


def test_sh1() -> None:
    law_sh1_shared_steps_are_the_steps(real)


def test_a_shared_optimizer_saves_and_goes_on() -> None:
    """`state_dict` is whole on every process: a new optimizer goes on from it, on as many processes, to the byte."""
    alone = path(real, F32, False)
    assert on_processes(2, path, real, F32, True, True) == [alone, alone]


def counted(impl: Any) -> list[int]:
    """Rows that this process steps, batch by batch."""
    counts: list[int] = []
    take = riemannion_sharing._rows

    def counting(whole: Batch, start: int, stop: int) -> Batch:
        counts.append(stop - start)
        return take(whole, start, stop)

    riemannion_sharing._rows = counting
    path(impl, F32, True)
    return counts[: len(counts) // STEPS]


def test_each_process_steps_its_share() -> None:
    """28 layers on two processes, the dearest left-over first; no layer twice."""
    first, second = on_processes(2, counted, real)
    # Six of (20, 12), two of (8, 8); of the 19 the second takes the 3 that are left after a unit of 16.
    assert sorted(first) == [1, 3, 16]
    assert sorted(second) == [1, 3, 3]


def batch(out: int, in_: int, rank: int, dtype: torch.dtype) -> Batch:
    shapes = ((2, out, rank), (2, rank), (2, in_, rank), (2, out, rank), (2, in_, rank))
    state = FusedState(*(torch.zeros(shape, dtype=dtype) for shape in shapes))
    return Batch([], state, state.u, state.v, torch.zeros(2, dtype=torch.long))


def test_shares_begin_where_a_matrix_would_begin_anyway() -> None:
    """Every matrix of every unit begins at a multiple of 64 bytes; the usual sizes can be divided anywhere."""
    for out, in_, rank, dtype, wanted in (
        (320, 1024, 4, F32, 1),
        (320, 1024, 16, F32, 1),
        (10, 6, 2, F32, 4),
        (9, 11, 3, F32, 16),
        (9, 11, 3, F64, 8),
    ):
        unit = _unit(batch(out, in_, rank, dtype))
        assert unit == wanted
        width = torch.finfo(dtype).bits // 8
        for rows in (rank, 2 * rank, 3 * rank, out, in_):
            for columns in (rank, 2 * rank, 3 * rank, out, in_):
                assert unit * rows * columns * width % 64 == 0
