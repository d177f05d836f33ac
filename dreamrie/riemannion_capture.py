"""Work on fixed tensors as CUDA graphs, with calls between them that no graph can hold."""

from __future__ import annotations

import gc
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor

from dreamrie.riemannion_small import HostCall, way_to_call


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
        self._open: Any = None
        if not recorded:
            self._parts.append(action)
            return
        torch.cuda.synchronize()
        # An old graph that is thrown away during a capture would spoil it.
        gc.collect()
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            usual = way_to_call.set(self._between_graphs)
            try:
                self._begin()
                action()
                self._end()
            finally:
                way_to_call.reset(usual)
                self._give_up()
        torch.cuda.current_stream().wait_stream(stream)

    def run(self) -> None:
        """Hand it out."""
        for part in self._parts:
            part()

    def _begin(self) -> None:
        graph = torch.cuda.CUDAGraph()
        # Other threads may use the GPU meanwhile.
        graph.capture_begin(pool=self._pool, capture_error_mode="thread_local")
        self._open = graph

    def _end(self) -> None:
        graph, self._open = self._open, None
        graph.capture_end()
        self._parts.append(graph.replay)

    def _give_up(self) -> None:
        """End a capture that something has interrupted; what it was is told by that exception."""
        if self._open is not None:
            with suppress(RuntimeError):
                self._open.capture_end()

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
