"""The three promises as numbers: steps to the best of AdamW, width of the plateau, one learning rate for all ranks."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from benchmarks.convergence.gains import Array, Series, draws, interval

NEAR, EQUAL = 0.95, 0.97


def steps_to(level: float, steps: Sequence[int], values: Sequence[float] | Array) -> float:
    """First step at which a curve reaches a level, on straight lines between the scored steps.

    Args:
        level: gain to reach.
        steps: ascending, the first is 0.
        values: gain at each.

    Returns:
        Optimizer steps; infinite where it never does.
    """
    if values[0] >= level:
        return float(steps[0])
    for place in range(1, len(steps)):
        low, high = float(values[place - 1]), float(values[place])
        if high >= level:
            part = (level - low) / (high - low)
            return steps[place - 1] + part * (steps[place] - steps[place - 1])
    return math.inf


class Plateau(NamedTuple):
    """Learning rates around the best one whose gain is at least 95 % of its gain.

    Attributes:
        low, high: ends. is_open: one of them is the end of the grid, so the plateau may be wider.
    """

    low: float
    high: float
    is_open: bool

    @property
    def decades(self) -> float:
        """Width on a logarithmic axis."""
        return math.log10(self.high / self.low)


def plateau(lrs: Sequence[float], values: Sequence[float] | Array) -> Plateau:
    """The plateau of a method, on straight lines over the logarithm of the learning rate.

    Args:
        lrs: ascending.
        values: gain at each.

    Returns:
        The part around the best value that nowhere falls below; a single point where nothing was gained.
    """
    best = int(np.argmax(np.asarray(values)))
    level = NEAR * float(values[best])
    if level <= 0:
        return Plateau(lrs[best], lrs[best], False)
    ends, is_open = [], False
    for direction in (-1, 1):
        place = best
        while 0 <= place + direction < len(lrs) and values[place + direction] >= level:
            place += direction
        beyond = place + direction
        if not 0 <= beyond < len(lrs):
            ends.append(lrs[place])
            is_open = True
            continue
        part = (float(values[place]) - level) / (float(values[place]) - float(values[beyond]))
        ends.append(lrs[place] * (lrs[beyond] / lrs[place]) ** part)
    return Plateau(ends[0], ends[1], is_open)


class Transfer(NamedTuple):
    """One learning rate for all ranks.

    Attributes:
        lr: the one whose worst rank is best. share: its gain at that rank, of the best gain there.
    """

    lr: float
    share: float


def transfer(by_rank: Mapping[int, Series]) -> Transfer | None:
    """The learning rate that loses least at its worst rank.

    Args:
        by_rank: gains of one method; only learning rates that all ranks share count.

    Returns:
        That learning rate and what it keeps; a share of 0 where a rank gained nothing. None: the ranks share no rate.
    """
    shared = set.intersection(*(set(one.lrs) for one in by_rank.values()))
    if not shared:
        return None
    kept: dict[float, float] = {}
    for lr in sorted(shared):
        shares = []
        for one in by_rank.values():
            best = float(one.finals.max())
            shares.append(float(one.finals[one.lrs.index(lr)]) / best if best > 0 else 0.0)
        kept[lr] = min(shares)
    lr = max(kept, key=lambda rate: kept[rate])
    return Transfer(lr, kept[lr])


@dataclass(frozen=True)
class Row:
    """One method at one rank, measured on the test concepts.

    Attributes:
        name: of the method, with its rank where that is not the one of the table.
        lr: chosen on the tuning concepts. rates: how many there were. at_edge: it is the first or last of them.
        gain: at the end, with interval. trainings: how many.
        against: paired difference to AdamW, with interval; None for AdamW itself.
        flat: plateau, and interval of its width in decades; is_tuning: measured on the tuning concepts.
        widths: width over AdamW's on the test concepts, with interval.
        steps: to AdamW's best gain. speed: those over AdamW's own, with interval.
        curve: mean gain at step 0 and every mark, with interval: (3, 1 + marks).
    """

    name: str
    lr: float
    rates: int
    at_edge: bool
    gain: tuple[float, float, float]
    trainings: int
    against: tuple[float, float, float] | None
    flat: Plateau
    flat_interval: tuple[float, float]
    is_tuning: bool
    widths: tuple[float, float, float] | None
    steps: float
    speed: tuple[float, float, float]
    curve: Array


def _ratio(top: float, bottom: float) -> float:
    """A ratio that is infinite over nothing."""
    return top / bottom if bottom > 0 else math.inf


def row(
    name: str,
    tuning: Series,
    lr: float,
    grids: tuple[Series, Series] | None,
    curves: tuple[Series, Series],
    steps: Sequence[int],
) -> Row:
    """A method against AdamW.

    Args:
        name: of the row.
        tuning: gains of the method on the tuning concepts.
        lr: one of its learning rates.
        grids: gains of the method and of AdamW over their learning rates, on the same units of the test concepts.
        curves: gains of both at their own learning rate alone, on the same units of the test concepts.
        steps: 0 and the marks of the curves.

    Returns:
        Everything with intervals.
    """
    mine, rival = curves
    weights, values, own = draws(mine.units), mine.values[0], rival.values[0]
    mean, drawn, drawn_own = values.mean(0), weights @ values, weights @ own
    change = drawn[:, -1] - drawn_own[:, -1]
    speeds = [_speed(a, b, steps) for a, b in zip(drawn, drawn_own, strict=True)]
    over = grids[0] if grids else tuning
    return Row(
        name,
        lr,
        len(tuning.lrs),
        lr in {tuning.lrs[0], tuning.lrs[-1]},
        (float(mean[-1]), *interval(drawn[:, -1])),
        len(mine.units),
        None if name == "adamw" else (float((values - own).mean(0)[-1]), *interval(change)),
        plateau(over.lrs, over.finals),
        interval(_widths(over)),
        grids is None,
        _wider(*grids) if grids else None,
        steps_to(float(own.mean(0).max()), steps, mean),
        (_speed(mean, own.mean(0), steps), *interval(speeds)),
        np.array([mean, *np.array([interval(column) for column in drawn.T]).T]),
    )


def _widths(one: Series) -> list[float]:
    """Widths of the plateau in decades, of resampled means."""
    drawn = draws(one.units) @ one.values[:, :, -1].T
    return [plateau(one.lrs, finals).decades for finals in drawn]


def _wider(mine: Series, rival: Series) -> tuple[float, float, float]:
    """Width of a plateau over that of another on the same units, with interval."""
    ratios = [_ratio(a, b) for a, b in zip(_widths(mine), _widths(rival), strict=True)]
    flats = [plateau(one.lrs, one.finals).decades for one in (mine, rival)]
    return (_ratio(flats[0], flats[1]), *interval(ratios))


def _speed(mine: Array, rival: Array, steps: Sequence[int]) -> float:
    """Steps to the best of the rival's curve, over the rival's own."""
    level = float(rival.max())
    return _ratio(steps_to(level, steps, mine), steps_to(level, steps, rival))
