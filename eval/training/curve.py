"""Scores of one run at several steps, on the same prompts and seeds every time, and what noise can explain.

Every number below is paired: step a and step b are compared picture by picture, and intervals are drawn over prompts
with the same draws for every step, so what all steps have in common (hard prompts, lucky seeds) cancels.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from dreamrie.errors import ConfigError
from eval.metrics import bootstrap_weights, percentile_interval

DRAWS = 2000


@dataclass(frozen=True)
class StepScores:
    """Single values of one scoring, in the order of the run's pictures.

    Attributes:
        step: optimizer step; 0 is the base model.
        image: (n,) image similarity of each picture.
        text: (n,) text similarity; None without an encoder that reads texts.
        margin: (n,) `metrics.prompt_margin`, over the prompts of the run; None without texts.
        nearest: (n,) cosine to the nearest training picture.
        drift: (m,) prior drift of the unrelated prompts; None at step 0.
        blank: names of pictures that are black or of one color; with any, the step takes part in nothing.
    """

    step: int
    image: Tensor
    text: Tensor | None
    margin: Tensor | None
    nearest: Tensor
    drift: Tensor | None = None
    blank: tuple[str, ...] = ()


@dataclass(frozen=True)
class Yardstick:
    """What the scores of a run are measured against.

    Attributes:
        prompts: prompt of each picture (n,), over which intervals are drawn.
        ceiling: mean image similarity of the real pictures to each other.
        nearest_real: (m,) cosine of each real picture to the nearest other one.
    """

    prompts: tuple[str, ...]
    ceiling: float
    nearest_real: Tensor


class Curve:
    """The scorings of a run so far.

    Args:
        yardstick: see there.
        rows: scorings, in order of their steps.

    Raises:
        ConfigError: a scoring has another number of pictures than there are prompts, or steps do not increase.
    """

    def __init__(self, yardstick: Yardstick, rows: Sequence[StepScores]) -> None:
        for row in rows:
            if len(row.image) != len(yardstick.prompts):
                raise ConfigError(
                    f"step {row.step}: {len(row.image)} scores for {len(yardstick.prompts)} pictures."
                )
        steps = [row.step for row in rows]
        if steps != sorted(set(steps)):
            raise ConfigError(f"steps must increase, got {steps}.")
        self.yardstick = yardstick
        self.rows = [row for row in rows if not row.blank]
        self.broken = [row for row in rows if row.blank]
        count = len(yardstick.prompts)
        plain = torch.full((1, count), 1 / count, dtype=torch.float64)
        self._draws = torch.cat([plain, bootstrap_weights(yardstick.prompts, DRAWS)])

    @property
    def base(self) -> StepScores | None:
        """The scoring before training, if there is one."""
        return self.rows[0] if self.rows and self.rows[0].step == 0 else None

    @property
    def trained(self) -> list[StepScores]:
        """The scorings after at least one step, without those with blank pictures."""
        return [row for row in self.rows if row.step > 0]

    def means(self, values: Tensor) -> Tensor:
        """Means of single values, (1 + draws,): first over all pictures, then over each draw of prompts."""
        return self._draws @ values.double()

    def likeness(self, row: StepScores) -> Tensor:
        """Mean image similarity, (1 + draws,), at most the ceiling: beyond it lie copies."""
        return self.image(row).clamp(max=self.yardstick.ceiling)

    @property
    def judges_prompts(self) -> bool:
        """Whether the base model was scored and follows the prompts beyond noise: a share of nothing says nothing."""
        base = self.base
        return (
            base is not None
            and base.margin is not None
            and percentile_interval(self.means(base.margin)[1:])[0] > 0
        )

    def prompts_kept(self, row: StepScores) -> Tensor:
        """How well prompts are followed, as a share of the base model's margin, (1 + draws,); else all ones."""
        base = self.base
        if not self.judges_prompts or row.margin is None or base is None or base.margin is None:
            return torch.ones(1 + DRAWS, dtype=torch.float64)
        return self.means(row.margin) / self.means(base.margin)

    def copies(self, row: StepScores) -> float:
        """Share of pictures nearer to a training picture than any training picture is to another."""
        return float((row.nearest > self.yardstick.nearest_real.max()).double().mean())

    def difference(
        self, later: StepScores, earlier: StepScores, of: Callable[[StepScores], Tensor]
    ) -> tuple[float, float, float]:
        """Mean of a paired difference and its 95 % interval over prompts.

        Args:
            later: one scoring.
            earlier: another one.
            of: gives (1 + draws,) for a scoring, such as `likeness`.

        Returns:
            Mean, lower and upper end of `of(later) - of(earlier)`.
        """
        values = of(later) - of(earlier)
        return float(values[0]), *percentile_interval(values[1:])

    def image(self, row: StepScores) -> Tensor:
        """Mean image similarity, (1 + draws,)."""
        return self.means(row.image)

    def text(self, row: StepScores) -> Tensor:
        """Mean text similarity, (1 + draws,); zero without texts."""
        return self.means(row.image * 0 if row.text is None else row.text)
