"""Many small tensors as one: layers of one shape are stacked and given back without a Python loop of copies.

A stack of the state need not be made again at each step. What a step returns is one tensor for all layers, the state
keeps its rows as views, and `stack_rows` finds the tensor behind the views. The views of one tensor keep all of it in
memory; they are replaced together at each step, or written together by a CUDA graph, so that this is no more than the
state itself unless a layer is frozen in the middle of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dreamrie.riemannion_layers import Batch, Layer, State
    from dreamrie.riemannion_step import FusedState, StepResult


# Devices where copies of dense tensors share a kernel and copies into parts of them do not.
_COPY_WHOLE = ("cuda",)


@lru_cache(maxsize=256)
def column_of(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a column, (n, 1), kept from call to call; not to be written."""
    return torch.tensor(values, dtype=dtype, device=device).unsqueeze(-1)


def stack_rows(rows: Sequence[Tensor]) -> Tensor:
    """Stack tensors of one shape, (*,) each, to (rows, *).

    Args:
        rows: at least one.

    Returns:
        The tensor whose rows they are, if they are all of its rows in order; a new one otherwise. Not to be written.
    """
    base = rows[0]._base
    if base is not None and base.ndim == rows[0].ndim + 1:
        # A step writes tall matrices row after row, or column after column.
        for whole in (base, base.mT) if base.ndim == 3 else (base,):
            if _are_rows_of(rows, base, whole):
                return whole
    return torch.stack(list(rows))


def _are_rows_of(rows: Sequence[Tensor], base: Tensor, whole: Tensor) -> bool:
    """Tell whether views of a tensor are all rows, in order, of the tensor or of its transpose."""
    start, width, strides = whole.storage_offset(), whole.stride(0), whole.stride()[1:]
    offsets = [row.storage_offset() for row in rows if row._base is base]
    return (
        whole.shape == (len(rows), *rows[0].shape)
        and offsets == [start + width * number for number in range(len(rows))]
        and all(row.stride() == strides for row in rows)
    )


def stack_columns(
    tensors: Sequence[Tensor], are_right: Sequence[bool], start: int, stop: int
) -> Tensor:
    """Stack columns start:stop of matrices of one shape, (k, columns, rows) where they are right factors.

    Args:
        tensors: (n, R) for left factors, (R, n) for right ones; all of one kind.
        are_right: for each, whether it is a right factor.
        start: first column.
        stop: column after the last.

    Returns:
        (layers, n, stop - start), in the memory order of the tensors.
    """
    stacked = torch.stack(list(tensors)).detach()
    return stacked[:, start:stop].mT if are_right[0] else stacked[..., start:stop]


def can_stack(tensors: Sequence[Tensor], are_right: Sequence[bool]) -> bool:
    """Tell whether `stack_columns` takes these: plain matrices of one kind."""
    return all(tensor.ndim == 2 for tensor in tensors) and len(set(are_right)) == 1


def equal_rows(a: Tensor, b: Tensor) -> Tensor:
    """Tell for each matrix whether two stacks (layers, n, r) hold the same numbers; NaN differs from itself."""
    if a.device.type == "cpu" and torch.equal(a, b):
        # One pass without a table of answers, in all steps but those after a change from outside.
        return torch.ones(len(a), dtype=torch.bool)
    return (a == b).all(dim=-1).all(dim=-1)


def keep_rows(
    layers: Sequence[Layer],
    rows: Sequence[int],
    new: FusedState,
    numbers: Mapping[str, Tensor],
    state: State,
) -> None:
    """Put rows of a step into the state, as views.

    Args:
        layers: of one shape.
        rows: which of them.
        new: of all of them.
        numbers: further tensors, one row for each layer, kept with the tall factor.
        state: of the optimizer.
    """
    stacks = {"basis": new.u, "momentum": new.m_left, "singular_values": new.s, **numbers}
    tall = {key: stack.unbind() for key, stack in stacks.items()}
    short = {"basis": new.v.unbind(), "momentum": new.m_right.unbind()}
    for row in rows:
        for factor, parts in zip(layers[row].factors, (tall, short), strict=True):
            state[factor.parameter].update({key: part[row] for key, part in parts.items()})


def on_host(batches: Sequence[Batch], results: Sequence[StepResult]) -> list[list[list[int]]]:
    """Read what happened to the layers, in one transfer.

    Args:
        batches: what was stepped.
        results: one for each.

    Returns:
        For each batch and layer: whether it was finite, whether it moved, how many singular values were lifted.
    """
    reports = [
        torch.stack([result.ok.long(), result.moved.long(), result.floor_hits + batch.lifted]).T
        for batch, result in zip(batches, results, strict=True)
    ]
    if not reports:
        return []
    rows = iter(torch.cat([report.to(reports[0].device) for report in reports]).tolist())
    return [[next(rows) for _ in report] for report in reports]


def write_factors_(
    layers: Sequence[Layer], rows: Sequence[int], tall: Tensor, short: Tensor
) -> None:
    """Write the trained columns of some layers in one call; all others keep their bytes.

    Args:
        layers: of one shape.
        rows: which of them.
        tall: (layers, rows, r), for the tall factors.
        short: the same for the short ones.
    """
    for side, stack in enumerate((tall, short)):
        factors = [layers[row].factors[side] for row in rows]
        parameters = [factor.parameter.detach() for factor in factors]
        kinds = [factor.is_right for factor in factors]
        parts, rank = stack.unbind(), stack.shape[-1]
        columns = [
            parts[row].mT if right else parts[row] for row, right in zip(rows, kinds, strict=True)
        ]
        if stack.device.type in _COPY_WHOLE and rows and can_stack(parameters, kinds):
            # The anchor is written as it is.
            whole = torch.stack(parameters)
            trained = whole[:, :rank] if kinds[0] else whole[..., :rank]
            if len(rows) == len(parts):
                trained.copy_(stack.mT if kinds[0] else stack)
            else:
                trained.copy_(torch.stack(columns))
            torch._foreach_copy_(parameters, list(whole.unbind()))
        elif rows:
            targets = [factor.trained(rank) for factor in factors]
            shaped = zip(columns, targets, strict=True)
            torch._foreach_copy_(targets, [c.reshape(t.shape) for c, t in shaped])
