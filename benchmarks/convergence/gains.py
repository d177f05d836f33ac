"""From the scores of single trainings to gains: the combined score, its zero point, and means with intervals.

The combined score of a training is the harmonic mean of two shares, each at most 1: image similarity as a share of the
real pictures' similarity to each other, and prompt margin as a share of the base model's. Its zero point is the base
model's combined score: what is called a gain is the difference to it, and 95 % of the best means 95 % of the best gain.
A training that draws blank pictures gains nothing: what is left then is the base model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from benchmarks.convergence.plan import Cell
from benchmarks.convergence.records import AT_A_MARK, Records, Scores

DRAWS = 1000
Array = NDArray[np.float64]
Unit = tuple[str, int]
"""Concept and seed."""
Place = tuple[str, int]
"""Method and rank."""
Measure = Literal["score", "loss"]
MEASURES: tuple[Measure, ...] = ("score", "loss")


def combined(image: float, margin: float, ceiling: float, base_margin: float) -> float:
    """Harmonic mean of both shares.

    Args:
        image: image similarity.
        margin: prompt margin.
        ceiling: image similarity of the real pictures to each other, > 0.
        base_margin: prompt margin of the base model, > 0.

    Returns:
        In [0, 1].
    """
    likeness = min(1.0, max(0.0, image / ceiling))
    kept = min(1.0, max(0.0, margin / base_margin))
    return 2 * likeness * kept / (likeness + kept) if likeness + kept else 0.0


def gains(scores: Scores, base: Sequence[int], measure: Measure = "score") -> list[float]:
    """Gain of one training at step 0 and at every mark.

    Args:
        scores: see `records.Scores`.
        base: see `records.BASE`.
        measure: "score": of the combined score; "loss": the part of the base model's held-out loss that is gone.

    Returns:
        One more than there are marks; the first is 0. A loss that is not finite counts as the base model's.
    """
    image, margin, _, ceiling, first_loss = base
    zero = combined(image, margin, ceiling, margin)
    found = [0.0]
    for place in range(0, len(scores) - 1, AT_A_MARK):
        seen, kept, loss = scores[place : place + AT_A_MARK]
        if measure == "loss":
            found.append(0.0 if loss is None else 1 - loss / first_loss)
            continue
        broken = seen is None or kept is None
        found.append(0.0 if broken else combined(seen or 0, kept or 0, ceiling, margin) - zero)
    return found


@dataclass(frozen=True)
class Series:
    """One method at one rank over its learning rates.

    Attributes:
        lrs: ascending. units: concept and seed, the same for every learning rate.
        values: gains, (learning rates, units, 1 + marks).
    """

    lrs: list[float]
    units: list[Unit]
    values: Array

    @property
    def finals(self) -> Array:
        """Mean gain at the end for each learning rate."""
        found: Array = self.values[:, :, -1].mean(1)
        return found

    @property
    def best(self) -> int:
        """Place of the learning rate with the highest gain at the end."""
        return int(self.finals.argmax())


def complete_cells(records: Records, place: Place) -> list[Cell]:
    """Cells with every concept that the base model was scored on, without those with a changed setting."""
    return [
        cell
        for cell, scores in records.cells.items()
        if (cell.method, cell.rank) == place
        and not cell.setting
        and scores.keys() >= records.base.keys()
    ]


def common_units(records: Records, places: Sequence[Place]) -> list[Unit]:
    """Concepts and seeds that all of these have for every learning rate; incomplete cells count for nothing.

    Args:
        records: finished trainings.
        places: methods with their ranks.

    Returns:
        Every concept for every seed that is complete; a seed that was cut short is left out.
    """
    by_rate: dict[tuple[Place, float], set[int]] = {}
    for place in places:
        for cell in complete_cells(records, place):
            by_rate.setdefault((place, cell.lr), set()).add(cell.seed)
    seeds = set.intersection(*by_rate.values()) if by_rate else set()
    return sorted((concept, seed) for concept in records.base for seed in seeds)


def places_of(records: Records) -> list[Place]:
    """Methods and ranks that have a complete cell, adamw first, then by name and rank."""
    found = {
        (cell.method, cell.rank)
        for cell, scores in records.cells.items()
        if not cell.setting and scores.keys() >= records.base.keys()
    }
    return sorted(found, key=lambda place: (place[0] != "adamw", *place))


def series(
    records: Records, place: Place, units: Sequence[Unit], measure: Measure = "score"
) -> Series:
    """Collect the gains of a method at a rank."""
    method, rank = place
    lrs = sorted({cell.lr for cell in complete_cells(records, place)})
    values = [
        [
            gains(
                records.cells[Cell(method, rank, lr, seed)][concept], records.base[concept], measure
            )
            for concept, seed in units
        ]
        for lr in lrs
    ]
    return Series(lrs, list(units), np.array(values))


def collect(
    records: Records, places: Sequence[Place], measure: Measure = "score"
) -> dict[Place, Series]:
    """Those of the places that were trained, on the units that all of them have."""
    known = places_of(records)
    there = [place for place in places if place in known]
    units = common_units(records, there)
    return {place: series(records, place, units, measure) for place in there} if units else {}


def best_rates(
    records: Records, places: Sequence[Place], measure: Measure = "score"
) -> dict[Place, float]:
    """The learning rate with the highest mean gain at the end.

    Args:
        records: trainings over a grid of learning rates.
        places: methods with their ranks.
        measure: whose gain.

    Returns:
        By place, in the order given.

    Raises:
        SystemExit: one was not trained.
    """
    found = {}
    for place in places:
        one = collect(records, [place], measure).get(place)
        if one is None:
            raise SystemExit(
                f"{place[0]} at rank {place[1]} has no learning rate yet: the tuning file has no complete training "
                f"of it; first `run tuning --methods {place[0]} --ranks {place[1]}`"
            )
        found[place] = one.lrs[one.best]
    return found


def draws(units: Sequence[Unit], count: int = DRAWS, seed: int = 0) -> Array:
    """Weights of resampled means: concepts and seeds are both drawn with replacement, all seeds of a concept together.

    Args:
        units: concept and seed of each value; every concept has every seed.
        count: of draws.
        seed: of the draws, so that every number of a table is paired.

    Returns:
        (count, units), rows of sum 1.
    """
    random = np.random.default_rng(seed)
    parts = []
    for place in (0, 1):
        names = sorted({unit[place] for unit in units}, key=str)
        counts = random.multinomial(len(names), [1 / len(names)] * len(names), size=count)
        parts.append(counts[:, [names.index(unit[place]) for unit in units]])
    weights: Array = (parts[0] * parts[1]).astype(np.float64)
    return weights / weights.sum(1, keepdims=True)


def interval(values: Sequence[float] | Array) -> tuple[float, float]:
    """Middle 95 % of some draws, which may be infinite."""
    ordered = sorted(float(value) for value in values)
    last = len(ordered) - 1
    return ordered[math.floor(0.025 * last)], ordered[math.ceil(0.975 * last)]
