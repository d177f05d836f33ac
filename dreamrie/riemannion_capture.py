"""Work on fixed tensors as CUDA graphs, with calls between them that no graph can hold."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from dreamrie import riemannion_small
from dreamrie.riemannion_small import HostCall


class Program:
    """Something that is done again and again on the same tensors: recorded, or called where there are no graphs.

    Functions that wait for the GPU cannot be in a graph. There the graph ends, and another begins behind them.

    Args:
        action: done by `run`; it has been done before, and may be done any number of times.
        pool: memory shared with other graphs.
        recorded: as CUDA graphs.
    """

    def __init__(self, action: Callable[[], None], pool: Any, recorded: bool) -> None:
        self._pool = pool
        self._parts: list[Callable[[], object]] = []
        if not recorded:
            self._parts.append(action)
            return
        torch.cuda.synchronize()
        stream, usual = torch.cuda.Stream(), riemannion_small.asking_the_host
        with torch.cuda.stream(stream):
            riemannion_small.asking_the_host = self._between_graphs
            self._begin()
            try:
                action()
            finally:
                riemannion_small.asking_the_host = usual
                self._end()
        torch.cuda.current_stream().wait_stream(stream)

    def run(self) -> None:
        """Hand it out."""
        for part in self._parts:
            part()

    def _begin(self) -> None:
        self._graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        self._graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")

    def _end(self) -> None:
        self._graph.capture_end()
        self._parts.append(self._graph.replay)

    def _between_graphs(self, call: HostCall, matrix: Tensor) -> tuple[Tensor, ...]:
        """End a graph, call, and begin the next; the results stay where the next expects them."""
        self._end()
        # A capture computes nothing, and the function wants real numbers.
        self._parts[-1]()
        kept = tuple(torch.empty_like(part).copy_(part) for part in call(matrix))

        def again() -> None:
            for own, part in zip(kept, call(matrix), strict=True):
                own.copy_(part)

        self._parts.append(again)
        self._begin()
        return kept
