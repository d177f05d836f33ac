"""Scorings with known means: noise that all steps share, and a little of their own."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from eval.training.curve import Curve, StepScores, Yardstick

PROMPTS = tuple(f"prompt {number // 2}" for number in range(16))
CEILING = 0.8


def small_curve(
    image: Mapping[int, float],
    text: Mapping[int, float] | None = None,
    *,
    own_noise: float = 0.002,
    drift: Mapping[int, float] | None = None,
    nearest: Mapping[int, float] | None = None,
    blank: tuple[int, ...] = (),
) -> Curve:
    """A curve whose means are exactly those given.

    Pictures differ by 0.1 (standard deviation), the same at every step, and by `own_noise` of the step's own.
    """
    generator = torch.Generator().manual_seed(3)

    def noise(size: float) -> torch.Tensor:
        values = torch.randn(len(PROMPTS), generator=generator, dtype=torch.float64) * size
        return values - values.mean()

    shared = noise(0.1)
    rows = []
    for step, mean in image.items():
        rows.append(
            StepScores(
                step,
                mean + shared + noise(own_noise),
                None if text is None else text[step] + shared / 4 + noise(own_noise),
                None if text is None else text[step] / 2 + shared / 8 + noise(own_noise),
                torch.full((len(PROMPTS),), (nearest or {}).get(step, 0.5), dtype=torch.float64),
                None
                if step == 0
                else torch.full((4,), (drift or {}).get(step, 0.05), dtype=torch.float64),
                ("3 (prompt 1)",) if step in blank else (),
            )
        )
    nearest_real = torch.tensor([0.7, 0.85, 0.8], dtype=torch.float64)
    return Curve(Yardstick(PROMPTS, CEILING, nearest_real), rows)
