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


def transfer(by_rank: Mapping[int, Series]) -> Transfer:
    """The learning rate that loses least at its worst rank.

    Args:
        by_rank: gains of one method; only learning rates that all ranks share count.

    Returns:
        That learning rate and what it keeps; a share of 0 where a rank gained nothing.
    """
    shared = set.intersection(*(set(one.lrs) for one in by_rank.values()))
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
        lr: chosen on the tuning concepts. rates: how many there were. at_edge: it is the first or last of them.
        gain: at the end, with interval. against: paired difference to AdamW, with interval; None for AdamW itself.
        flat: plateau, and interval of its width in decades. widths: width over AdamW's, with interval.
        steps: to AdamW's best gain. speed: those over AdamW's own, with interval.
        curve: mean gain at step 0 and every mark, with interval: (3, 1 + marks).
    """

    method: str
    lr: float
    rates: int
    at_edge: bool
    gain: tuple[float, float, float]
    against: tuple[float, float, float] | None
    flat: Plateau
    flat_interval: tuple[float, float]
    widths: tuple[float, float, float] | None
    steps: float
    speed: tuple[float, float, float] | None
    curve: Array


def _ratio(top: float, bottom: float) -> float:
    """A ratio that is infinite over nothing."""
    return top / bottom if bottom > 0 else math.inf


def rows(
    tuning: Mapping[str, Series], test: Mapping[str, Series], steps: Sequence[int]
) -> list[Row]:
    """Every method against AdamW.

    Args:
        tuning: gains on the tuning concepts, by method; they decide the learning rate.
        test: gains on the test concepts.
        steps: 0 and the marks.

    Returns:
        In the order of `test`; without "adamw" nothing is compared.
    """
    weights = draws(next(iter(test.values())).units)
    rival = test.get("adamw")
    own = None if rival is None else rival.values[tuning["adamw"].best]
    return [
        _row(name, tuning[name].best, test[name], (rival, own), weights, steps) for name in test
    ]


def _row(
    name: str,
    best: int,
    series: Series,
    rival: tuple[Series | None, Array | None],
    weights: Array,
    steps: Sequence[int],
) -> Row:
    values = series.values[best]
    mean, drawn = values.mean(0), weights @ values
    curve = np.array([mean, *np.array([interval(column) for column in drawn.T]).T])
    flat = plateau(series.lrs, series.finals)
    finals = weights @ series.values[:, :, -1].T
    widths = [plateau(series.lrs, one).decades for one in finals]
    against = wider = speed = None
    reached = math.nan
    all_rates, own = rival
    if all_rates is not None and own is not None:
        drawn_own = weights @ own
        reached = steps_to(float(own.mean(0).max()), steps, mean)
        speed = (
            _speed(mean, own.mean(0), steps),
            *interval([_speed(a, b, steps) for a, b in zip(drawn, drawn_own, strict=True)]),
        )
        other = weights @ all_rates.values[:, :, -1].T
        other_widths = [plateau(all_rates.lrs, one).decades for one in other]
        wider = (
            _ratio(flat.decades, plateau(all_rates.lrs, all_rates.finals).decades),
            *interval([_ratio(a, b) for a, b in zip(widths, other_widths, strict=True)]),
        )
        if name != "adamw":
            change = drawn[:, -1] - drawn_own[:, -1]
            against = (float(mean[-1] - own.mean(0)[-1]), *interval(change))
    return Row(
        name,
        series.lrs[best],
        len(series.lrs),
        best in {0, len(series.lrs) - 1},
        (float(mean[-1]), *interval(drawn[:, -1])),
        against,
        flat,
        interval(widths),
        wider,
        reached,
        speed,
        curve,
    )


def _speed(mine: Array, rival: Array, steps: Sequence[int]) -> float:
    """Steps to the best of the rival's curve, over the rival's own."""
    level = float(rival.max())
    return _ratio(steps_to(level, steps, mine), steps_to(level, steps, rival))
