"""Processes that train one model together: sums that all of them get, and shares of work whose results all of them get.

A `Team` is two numbers, told to whoever needs them; nothing here looks for other processes on its own. A team of one
does nothing. The transport is torch's default process group, which accelerate or torchrun has made.

Every process must call the same methods in the same order. What a method returns is the same on all of them to the
byte: a sum is formed once and handed round, a result is computed by one process and copied.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

# Numbers that are summed in one transfer; a larger tensor travels alone, without a copy.
_BUCKET = 1 << 22


@dataclass(frozen=True)
class Team:
    """The processes of one training, seen from one of them.

    Attributes:
        rank: number of this process, from 0.
        size: number of processes; 1 does everything alone.
    """

    rank: int = 0
    size: int = 1

    @classmethod
    def here(cls) -> Team:
        """All processes of torch's default group; this process alone if there is none."""
        if not (dist.is_available() and dist.is_initialized()):
            return cls()
        return cls(dist.get_rank(), dist.get_world_size())

    def share(self, items: Iterable[T]) -> Iterator[T]:
        """The items of this process: every size-th, from number `rank` on.

        Args:
            items: the same on every process.

        Returns:
            An iterator over the share.
        """
        return islice(items, self.rank, None, self.size)

    def number(self, index: int) -> int:
        """Where in the whole the item `index` of this process's share stands, both from 0."""
        return index * self.size + self.rank

    def add_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over the processes.

        Args:
            tensors: their shapes and dtypes are the same on every process.
        """
        if self.size == 1:
            return
        for bucket in _buckets(tensors):
            if len(bucket) == 1 and bucket[0].is_contiguous():
                dist.all_reduce(bucket[0])
                continue
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            dist.all_reduce(flat)
            parts = flat.split([tensor.numel() for tensor in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view(tensor.shape))

    def total(self, number: int, device: torch.device | str = "cpu") -> int:
        """Sum of a whole number over the processes.

        Args:
            number: of this process.
            device: that the processes talk through: the GPU under NCCL.

        Returns:
            The sum.
        """
        if self.size == 1:
            return number
        count = torch.tensor(number, device=device)
        dist.all_reduce(count)
        return int(count)

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by that of process 0.

        Args:
            tensors: their shapes and dtypes are the same on every process.
        """
        if self.size > 1:
            for tensor in tensors:
                sent = tensor.contiguous()
                dist.broadcast(sent, src=0)
                tensor.copy_(sent)

    def exchange(
        self, own: Sequence[Tensor], wholes: Sequence[Tensor], rows: Sequence[Sequence[int]]
    ) -> list[Tensor]:
        """Put together tensors of which each process has computed some rows.

        Args:
            own: the rows of this process: blocks that follow each other in the order of the processes.
            wholes: shape, dtype and device of each result; its numbers do not matter.
            rows: `rows[process][number]`, how many rows of a tensor a process has; they add up to those of the whole.

        Returns:
            The whole tensors, the same bytes on every process. One transfer for all of them.
        """
        # Wide numbers first: then each piece begins where its dtype may be read.
        order = sorted(range(len(wholes)), key=lambda i: -wholes[i].element_size())
        row_bytes = [whole[0].numel() * whole.element_size() for whole in wholes]
        lengths = [
            sum(n * b for n, b in zip(own_rows, row_bytes, strict=True)) for own_rows in rows
        ]
        device = wholes[0].device
        sent = torch.zeros(max(lengths), dtype=torch.uint8, device=device)
        pieces = [own[i].to(device).contiguous().reshape(-1).view(torch.uint8) for i in order]
        sent[: lengths[self.rank]] = torch.cat(pieces)
        received = [torch.empty_like(sent) for _ in range(self.size)]
        dist.all_gather(received, sent)
        parts: list[list[Tensor]] = [[] for _ in wholes]
        for process, buffer in enumerate(received):
            sizes = [rows[process][i] * row_bytes[i] for i in order]
            starts = accumulate(sizes, initial=0)
            for i, start, size in zip(order, starts, sizes, strict=False):
                piece = buffer[start : start + size].view(wholes[i].dtype)
                parts[i].append(piece.view(rows[process][i], *wholes[i].shape[1:]))
        return [torch.cat(p).to(w.device) for p, w in zip(parts, wholes, strict=True)]


ALONE = Team()


def is_spread(tensor: Tensor) -> bool:
    """Whether this process holds a part of a tensor only, as after torch's `fully_shard`."""
    return hasattr(tensor, "placements")


def share_rows(counts: Sequence[int], costs: Sequence[float], size: int) -> list[list[int]]:
    """Divide batches of equal pieces of work over processes.

    Every process gets the same number of pieces of each batch, rounded down; what is left over goes, dearest first,
    one by one to the process that has least to do so far.

    Args:
        counts: pieces in each batch.
        costs: of one piece of each batch, in any unit.
        size: number of processes.

    Returns:
        `rows[process][batch]`, pieces of a process. The same for the same arguments on every machine.
    """
    rows = [[count // size for count in counts] for _ in range(size)]
    loads = [0.0] * size
    for batch in sorted(range(len(counts)), key=lambda number: (-costs[number], number)):
        for _ in range(counts[batch] % size):
            least = min(range(size), key=lambda process: (loads[process], process))
            rows[least][batch] += 1
            loads[least] += costs[batch]
    return rows


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Neighbours of one dtype and device, as many as fit into one transfer."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        fits = sum(other.numel() for other in bucket) + tensor.numel() <= _BUCKET
        alike = not bucket or (bucket[0].dtype, bucket[0].device) == (tensor.dtype, tensor.device)
        if bucket and not (fits and alike):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
