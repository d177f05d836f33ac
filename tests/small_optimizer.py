"""Riemannion after a few steps on the small pairs."""

from __future__ import annotations

from typing import Any

from dreamrie.riemannion import Riemannion
from tests.strategies import Pair, Quadratic, make_pairs, run


def stepped(steps: int = 2, **options: Any) -> tuple[Riemannion, list[Pair]]:
    pairs = make_pairs()
    optimizer = Riemannion(pairs, **{"lr": 0.02, **options})
    run(optimizer, Quadratic(pairs), steps)
    return optimizer, pairs
