"""Tables and promises in words."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

import numpy as np

from benchmarks.convergence.gains import (
    MEASURES,
    Place,
    Series,
    Unit,
    collect,
    common_units,
    draws,
    gains,
    interval,
    places_of,
)
from benchmarks.convergence.records import AT_A_MARK, Records
from benchmarks.convergence.targets import EQUAL, Row, plateau, transfer

RIVAL = "adamw"
STEPS_TARGET, WIDTH_TARGET = 1 / 3, 4.0
Grid = dict[Place, Series]


def _three(
    values: tuple[float, float, float] | None, form: str = "{:+.3f} [{:+.3f} {:+.3f}]"
) -> str:
    return "" if values is None else form.format(*values)


def _aligned(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table with columns of equal width."""
    widths = [max(len(line[k]) for line in (head, *rows)) for k in range(len(head))]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join(
        "| " + " | ".join(f"{cell:<{w}}" for cell, w in zip(line, widths, strict=True)) + " |"
        for line in lines
    )


def table(found: Sequence[Row]) -> str:
    """A line for each method."""
    lines = []
    for one in found:
        reached = "never" if np.isinf(one.steps) else f"{one.steps:.0f}"
        flat = (
            f"{one.flat.decades:.2f}{'+' if one.flat.is_open else ''}"
            + " [{:.2f} {:.2f}]".format(*one.flat_interval)
            + (" tuning" if one.is_tuning else "")
        )
        lines.append(
            [
                one.name,
                f"{one.lr:g}{'*' if one.at_edge else ''}",
                str(one.rates),
                str(one.trainings),
                _three(one.gain),
                _three(one.against),
                reached,
                flat,
            ]
        )
    head = (
        "method",
        "lr",
        "of",
        "trainings",
        "gain [95 % interval]",
        "minus adamw",
        "steps to adamw's best",
        "plateau, decades",
    )
    notes = (
        "*: the end of its grid, so the best value may lie beyond; + likewise for the plateau; "
        "tuning: measured on the tuning concepts, the others on the test concepts"
    )
    return _aligned(head, lines) + "\n" + notes


def grid_table(tuning: Grid, by_rank: Mapping[int, Grid], where: str) -> str:
    """Every method and rank: its learning rate of the tuning concepts, and what these concepts say of it.

    Args:
        tuning: by method and rank, on the tuning concepts.
        by_rank: what is shown.
        where: on which concepts that is.
    """
    lines = []
    for rank, methods in by_rank.items():
        for place, one in methods.items():
            if place not in tuning:
                continue
            lr, flat = tuning[place].lrs[tuning[place].best], plateau(one.lrs, one.finals)
            gain = None  # a rate between those of the grid need not have been trained here
            if lr in one.lrs:
                own = one.values[one.lrs.index(lr), :, -1]
                gain = (float(own.mean()), *interval(draws(one.units) @ own))
            lines.append(
                [
                    str(rank),
                    place[0],
                    f"{lr:g}",
                    _three(gain),
                    f"{one.lrs[one.best]:g}",
                    f"{one.finals[one.best]:+.3f}",
                    f"{flat.low:.2g} to {flat.high:.2g}",
                    f"{flat.decades:.2f}{'+' if flat.is_open else ''}",
                    str(len(one.units)),
                ]
            )
    head = ("rank", "method", "lr of tuning", "gain", "best lr", "its gain", "plateau", "decades")
    return f"on the {where}:\n" + _aligned((*head, "trainings"), lines) if lines else ""


def targets(found: Sequence[Row]) -> str:
    """The promises on steps and width, for every method but adamw."""
    lines = []
    for one in found:
        if one.name == RIVAL:
            continue
        form = "{:.2f} [{:.2f} {:.2f}]"
        lines += [
            f"{one.name}:",
            f"  steps to the best of adamw, over adamw's own: {_three(one.speed, form)}; target at most "
            f"{STEPS_TARGET:.2f}: {_said(one.speed[0] <= STEPS_TARGET)}",
        ]
        if one.widths is not None:
            lines.append(
                f"  width of the plateau, over adamw's: {_three(one.widths, form)}; target at least "
                f"{WIDTH_TARGET:g}: {_said(one.widths[0] >= WIDTH_TARGET)}"
            )
    return "\n".join(lines)


def transfers(by_rank: Mapping[int, Grid], where: str) -> str:
    """The promise of one learning rate for all ranks, for every method with several ranks.

    Args:
        by_rank: every method by rank.
        where: on which concepts.
    """
    lines = []
    for name in dict.fromkeys(name for methods in by_rank.values() for name, _ in methods):
        own = {rank: by_rank[rank][name, rank] for rank in ranks_of(by_rank, name)}
        if len(own) < 2:
            continue
        best = transfer(own)
        if best is None:
            continue
        lines.append(
            f"  {name}: lr {best.lr:g} keeps {best.share:.1%} of the best gain at its worst of ranks "
            f"{', '.join(map(str, sorted(own)))}; target at least {EQUAL:.0%}: {_said(best.share >= EQUAL)}"
        )
    return "\n".join([f"one learning rate for all ranks, on the {where}:", *lines] if lines else [])


def _said(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def pairs_table(curves: Records) -> str:
    """Every two methods of a rank that have all seeds: paired differences at the end, with intervals.

    Args:
        curves: finished trainings at one learning rate for each method and rank.
    """
    lines = []
    for rank in sorted({place[1] for place in places_of(curves)}):
        there = [place for place in places_of(curves) if place[1] == rank]
        counts = {place: len(common_units(curves, [place])) for place in there}
        whole = [place for place in there if counts[place] == max(counts.values())]
        for pair in itertools.combinations(whole, 2):
            said = []
            for measure in MEASURES:
                both = collect(curves, pair, measure)
                ends = [both[place].values[0, :, -1] for place in pair]
                change = ends[1] - ends[0]
                drawn = draws(both[pair[0]].units) @ change
                said.append(_three((float(change.mean()), *interval(drawn))))
            lines.append([str(rank), pair[1][0], pair[0][0], str(counts[pair[0]]), *said])
    return _aligned(("rank", "method", "minus", "trainings", *MEASURES), lines)


def means_table(records: Records) -> str:
    """Means over the trainings of each method, rank, rate and changed setting, with standard errors.

    Where the same trainings were made with the defaults, too, the gain's paired difference to those.
    """
    kept: dict[tuple[str, int, float, str], dict[Unit, list[float]]] = {}
    for cell, scores in records.cells.items():
        for name, one in scores.items():
            image, margin, loss, _ = one[-AT_A_MARK - 1 :]
            if image is None or margin is None or loss is None:
                continue
            base = records.base[name]
            numbers = [gains(one, base)[-1], image / base[3], margin / base[1], 1 - loss / base[4]]
            key = (cell.method, cell.rank, cell.lr, cell.setting)
            kept.setdefault(key, {})[name, cell.seed] = numbers
    lines = []
    for (method, rank, lr, setting), values in sorted(kept.items()):
        every = [one[0] for one in values.values()]
        mean = np.mean(list(values.values()), axis=0)
        usual = kept.get((method, rank, lr, ""), {}) if setting else {}
        paired = [values[unit][0] - usual[unit][0] for unit in values if unit in usual]
        lines.append(
            [
                method,
                str(rank),
                f"{lr:g}",
                setting or "defaults",
                str(len(values)),
                f"{mean[0]:+.3f} ± {_error(every):.3f}",
                f"{np.mean(paired):+.3f} ± {_error(paired):.3f} ({len(paired)})" if paired else "",
            ]
            + [f"{value:.3f}" for value in mean[1:]]
        )
    head = ("method", "rank", "lr", "setting", "trainings", "gain", "minus defaults (trainings)")
    return _aligned((*head, "likeness", "prompts kept", "loss gone"), lines)


def _error(values: Sequence[float]) -> float:
    """Standard error of a mean."""
    return float(np.std(values)) / max(1, len(values) - 1) ** 0.5


def ranks_of(by_rank: Mapping[int, Grid], name: str) -> list[int]:
    """Ranks that a method was trained at."""
    return [rank for rank, methods in by_rank.items() if (name, rank) in methods]
