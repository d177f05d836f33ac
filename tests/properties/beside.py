"""A path of an optimizer beside slow references, compared after every step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch.optim import Optimizer

from tests.margins import within
from tests.strategies import Quadratic, moved, run


def follow(
    label: str,
    optimizer: Optimizer,
    problem: Quadratic,
    slow: Sequence[Any],
    bar: float,
    steps: int = 8,
) -> None:
    """Noisy steps equal those of references that live on matrices; the anchor's part of a change stays as it is."""
    pairs, path = problem.pairs, []
    fixed = [pair.change - pair.x for pair in pairs]
    for t in range(steps):
        wanted = [
            method.step(problem.gradient(index, method.X + fixed[index], t))
            for index, method in enumerate(slow)
        ]
        path += run(optimizer, problem, 1, start=t)
        for found, x in zip(path[-1], wanted, strict=True):
            within(label, (found - x).norm() / x.norm(), bar)
    assert moved(path) > 0.01
