"""The step of Riemannion on several processes: each steps its share of the layers, and all get all results.

Points, momenta and gradients are the same everywhere, so any process can step any layer. Each batch of one shape is
divided by rows, see `dreamrie.team.share_rows`; what comes out of `fused_step` is exchanged in one transfer, and
every process writes it as if it had computed it. The processes hold equal bytes afterwards even if their devices
round differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from dreamrie.riemannion_layers import Batch
from dreamrie.riemannion_step import FusedState, StepResult
from dreamrie.team import Team, share_rows

# Bytes: what torch aligns its tensors to, and the widest vector of a CPU.
_ALIGNMENT = 64
_FIELDS = len(FusedState._fields) + len(StepResult._fields) - 1


def shared_steps(
    team: Team, batches: Sequence[Batch], step: Callable[[Batch], StepResult]
) -> list[StepResult]:
    """Step batches together with the other processes of a team.

    Args:
        team: of more than one process; each calls this with the same batches.
        batches: at least one.
        step: steps a batch; a row must not depend on the rows beside it.

    Returns:
        One result for each batch, all rows of it; the same bytes on every process.
    """
    units = [_unit(batch) for batch in batches]
    pieces = [math.ceil(len(b.layers) / unit) for b, unit in zip(batches, units, strict=True)]
    costs = [_cost(batch) * unit for batch, unit in zip(batches, units, strict=True)]
    shares = share_rows(pieces, costs, team.size)
    rows: list[list[int]] = [[] for _ in shares]
    own: list[Tensor] = []
    for number, (batch, unit) in enumerate(zip(batches, units, strict=True)):
        bounds = [
            min(unit * done, len(batch.layers))
            for done in accumulate((share[number] for share in shares), initial=0)
        ]
        for process, (start, stop) in enumerate(pairwise(bounds)):
            rows[process] += [stop - start] * _FIELDS
        start, stop = bounds[team.rank : team.rank + 2]
        empty = [whole[:0] for whole in _like_result(batch)]
        own += _fields(step(_rows(batch, start, stop))) if stop > start else empty
    wholes = [whole for batch in batches for whole in _like_result(batch)]
    found = _as_laid_out(*_exchange(team, own, wholes, rows))
    parts = [found[i : i + _FIELDS] for i in range(0, len(found), _FIELDS)]
    state = len(FusedState._fields)
    return [StepResult(FusedState(*part[:state]), *part[state:]) for part in parts]


def _exchange(
    team: Team, own: list[Tensor], wholes: list[Tensor], rows: list[list[int]]
) -> tuple[list[Tensor], list[bool]]:
    """All rows of all tensors, and for each whether its matrices lie in memory column after column."""
    standing = [part.ndim == 3 and part.stride(-1) > part.stride(-2) for part in own]
    flags = torch.tensor([standing], device=wholes[0].device)
    *found, said = team.exchange(
        [*own, flags], [*wholes, flags.expand(team.size, -1)], [[*counts, 1] for counts in rows]
    )
    return found, said.any(dim=0).tolist()


def _as_laid_out(tensors: list[Tensor], standing: list[bool]) -> list[Tensor]:
    """The same tensors as the step lays them out: BLAS sums in another order where a matrix is turned."""
    pairs = zip(tensors, standing, strict=True)
    return [tensor.mT.contiguous().mT if turned else tensor for tensor, turned in pairs]


def _unit(batch: Batch) -> int:
    """Layers that a share is a multiple of: then every matrix lies in memory as it does in the whole batch.

    BLAS sums in an order that depends on where a matrix begins within 64 bytes. All matrices of a step have sides that
    are multiples of the greatest common divisor of rank and rows.
    """
    points = batch.state
    side = math.gcd(points.s.shape[-1], points.u.shape[-2], points.v.shape[-2])
    return _ALIGNMENT // math.gcd(_ALIGNMENT, points.s.element_size() * side**2)


def _cost(batch: Batch) -> float:
    """Floating-point operations of one layer, roughly: tall products and QRs, and two SVDs (docs/method.md 4.3)."""
    rank, rows = batch.state.s.shape[-1], batch.state.u.shape[-2] + batch.state.v.shape[-2]
    return float(24 * rows * rank**2 + 352 * rank**3)


def _rows(batch: Batch, start: int, stop: int) -> Batch:
    """Some layers of a batch."""
    return Batch(
        batch.layers[start:stop],
        FusedState(*(part[start:stop] for part in batch.state)),
        batch.gradient_v[start:stop],
        batch.gradient_t_u[start:stop],
        batch.lifted[start:stop],
    )


def _fields(result: StepResult) -> list[Tensor]:
    """The tensors of a result, one row for each layer."""
    return [*result.state, result.ok, result.moved, result.floor_hits]


def _like_result(batch: Batch) -> list[Tensor]:
    """Tensors of the shapes and dtypes that `_fields` has for a whole batch."""
    flags = batch.lifted != 0
    return [*batch.state, flags, flags, batch.lifted]
