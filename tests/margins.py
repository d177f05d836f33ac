"""Bars, and how close the laws come to them.

`within` is the assertion of every numerical law. It keeps the largest value that passed; with DREAMRIE_MARGINS=1 the
summary of a test run lists them, so a bar that is too loose or about to break is seen.
"""

from __future__ import annotations

from torch import Tensor

WORST: dict[str, tuple[float, float]] = {}


def within(law: str, value: float | Tensor, bar: float) -> None:
    """Assert value <= bar (NaN fails) and keep the largest passed value per law."""
    value = float(value)
    assert value <= bar, f"{law}: {value:.3e} exceeds the bar {bar:.1e}"
    if value >= WORST.get(law, (-1.0, bar))[0]:
        WORST[law] = (value, bar)
