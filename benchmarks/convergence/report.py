"""Tables, targets and figures from the JSON files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.convergence import plots
from benchmarks.convergence.gains import (
    MEASURES,
    Measure,
    Place,
    Series,
    Unit,
    collect,
    draws,
    gains,
    interval,
    places_of,
)
from benchmarks.convergence.plan import Cell
from benchmarks.convergence.records import AT_A_MARK, Records
from benchmarks.convergence.targets import EQUAL, Row, plateau, row, transfer

RIVAL = "adamw"
STEPS_TARGET, WIDTH_TARGET = 1 / 3, 4.0
WORDS: dict[Measure, str] = {
    "score": "gain of the combined score over the base model",
    "loss": "part of the base model's held-out loss that is gone",
}
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
        own = {rank: by_rank[rank][name, rank] for rank in _ranks(by_rank, name)}
        if len(own) < 2:
            continue
        best = transfer(own)
        lines.append(
            f"  {name}: lr {best.lr:g} keeps {best.share:.1%} of the best gain at its worst of ranks "
            f"{', '.join(map(str, sorted(own)))}; target at least {EQUAL:.0%}: {_said(best.share >= EQUAL)}"
        )
    return "\n".join([f"one learning rate for all ranks, on the {where}:", *lines] if lines else [])


def _said(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def plane(records: Records, found: Grid) -> dict[str, list[tuple[float, float]]]:
    """Mean likeness and prompts kept at the end, as shares, by method and learning rate; the base model last."""
    units = next(iter(found.values())).units
    points = {
        place[0]: [_shares(records, Cell(*place, lr, 0), units) for lr in one.lrs]
        for place, one in found.items()
    }
    base = [records.base[concept] for concept, _ in units]
    points["base model"] = [(float(np.mean([row[0] / row[3] for row in base])), 1.0)]
    return points


def _shares(records: Records, cell: Cell, units: Sequence[Unit]) -> tuple[float, float]:
    """Of the trainings of a cell over its seeds that drew pictures at the end."""
    pairs = []
    for concept, seed in units:
        scores, base = records.cells[cell._replace(seed=seed)][concept], records.base[concept]
        image, margin = scores[-AT_A_MARK - 1 : -AT_A_MARK + 1]
        if image is not None and margin is not None:
            pairs.append((image / base[3], margin / base[1]))
    return tuple(np.mean(pairs, axis=0).tolist()) if pairs else (float("nan"), float("nan"))


def means_table(records: Records) -> str:
    """Means over the trainings of each method, rank, rate and changed setting, and the gain's standard error."""
    kept: dict[tuple[str, int, float, str], list[list[float]]] = {}
    for cell, scores in records.cells.items():
        for name, one in scores.items():
            image, margin, loss, _ = one[-AT_A_MARK - 1 :]
            if image is None or margin is None or loss is None:
                continue
            base = records.base[name]
            numbers = [gains(one, base)[-1], image / base[3], margin / base[1], 1 - loss / base[4]]
            key = (cell.method, cell.rank, cell.lr, cell.setting or "defaults")
            kept.setdefault(key, []).append(numbers)
    lines = []
    for (method, rank, lr, setting), values in sorted(kept.items()):
        mean = np.mean(values, axis=0)
        error = np.std(values, axis=0)[0] / max(1, len(values) - 1) ** 0.5
        lines.append(
            [
                method,
                str(rank),
                f"{lr:g}",
                setting,
                str(len(values)),
                f"{mean[0]:+.3f}",
                f"{error:.3f}",
            ]
            + [f"{value:.3f}" for value in mean[1:]]
        )
    head = ("method", "rank", "lr", "setting", "trainings", "gain", "its standard error")
    return _aligned((*head, "likeness", "prompts kept", "loss gone"), lines)


def at_rate(records: Records, rates: Mapping[Place, float]) -> Records:
    """The trainings at one learning rate for each method and rank."""
    kept = {
        cell: scores
        for cell, scores in records.cells.items()
        if rates.get((cell.method, cell.rank)) == cell.lr
    }
    return Records(records.facts, records.base, kept)


def best_of(tuning: Grid) -> dict[Place, float]:
    """Best learning rate of each method and rank."""
    return {place: one.lrs[one.best] for place, one in tuning.items()}


def main_rows(
    tuning: Grid,
    test: Grid,
    every: Records,
    rank: int,
    measure: Measure = "score",
    rates: Mapping[Place, float] | None = None,
) -> list[Row]:
    """Rows of the table: every method at a rank, and AdamW at twice the rank.

    Args:
        tuning: by method and rank, on the tuning concepts.
        test: those of the rank, on the test concepts.
        every: finished trainings at the learning rates of `tuning`, scored on the way; others are left out.
        rank: of the table.
        measure: of gains, the one of `tuning` and `test`.
        rates: learning rates of the rows; default those that are best in `tuning`.

    Raises:
        SystemExit: a method was trained at other learning rates alone.
    """
    rates = best_of(tuning) if rates is None else rates
    curves = at_rate(every, rates)
    lost = [
        place for place in places_of(every) if place in rates and place not in places_of(curves)
    ]
    if lost:
        raise SystemExit(
            f"the curves of {lost[0][0]} at rank {lost[0][1]} were not trained at {rates[lost[0]]:g}, which is the "
            "best learning rate of the tuning file now: `run curves` again"
        )
    steps, rival = [0, *curves.marks], (RIVAL, rank)
    places = [one for one in places_of(curves) if one[1] == rank or one == (RIVAL, 2 * rank)]
    found = []
    for place in sorted(places, key=lambda one: one != rival):
        both = collect(curves, [rival, place], measure)
        if rival not in both or place not in both:
            continue
        name = place[0] if place[1] == rank else f"{place[0]}, rank {place[1]}"
        grids = (test[place], test[rival]) if place in test and rival in test else None
        lr, pair = rates[place], (both[place], both[rival])
        found.append(row(name, tuning[place], lr, grids, pair, steps))
    return found


def grids_of(records: Records, measure: Measure) -> dict[int, Grid]:
    """Every method by rank, on the trainings that all methods of the rank have."""
    found: dict[int, Grid] = {}
    for rank in sorted({place[1] for place in places_of(records)}):
        there = [place for place in places_of(records) if place[1] == rank]
        found[rank] = collect(records, there, measure)
    return found


def _names(by_rank: Mapping[int, Grid]) -> set[str]:
    """Methods that were trained at any rank."""
    return {name for methods in by_rank.values() for name, _ in methods}


def _ranks(by_rank: Mapping[int, Grid], name: str) -> list[int]:
    """Ranks that a method was trained at."""
    return [rank for rank, methods in by_rank.items() if (name, rank) in methods]


def _plane(records: Records, shown: Grid, tuning: Grid, folder: Path) -> None:
    """Draw the image/text plane on the units that all of its methods have."""
    both = collect(records, list(shown))
    chosen = {
        place[0]: one.lrs.index(tuning[place].lrs[tuning[place].best])
        for place, one in both.items()
        if place in tuning and tuning[place].lrs[tuning[place].best] in one.lrs
    }
    plots.plot_plane(plane(records, both), chosen, folder / "convergence-plane.png")


def _shown(files: Mapping[str, Records], rank: int) -> str | None:
    """Part whose learning rates are drawn: the test concepts, else the tuning concepts; None without either."""
    ranks = {part: {one[1] for one in places_of(files[part])} for part in ("test", "tuning")}
    return next((part for part, found in ranks.items() if rank in found), None)


def _draw_rates(
    figures: plots.Figures,
    files: Mapping[str, Records],
    measure: Measure,
    tuned: Mapping[int, Grid],
    test: Mapping[int, Grid],
    rank: int,
) -> None:
    """Best learning rate against the rank, of methods with several ranks, and gain against the learning rate."""
    over, where = (test, "test") if len(test) > 1 else (tuned, "tuning")
    several = {name for name in _names(over) if len(_ranks(over, name)) > 1} or _names(over)
    figures.ranks(
        {
            r: {place[0]: one for place, one in found.items() if place[0] in several}
            for r, found in over.items()
        },
        f"{WORDS[measure]} ({where} concepts)",
    )
    part = _shown(files, rank)
    if part is not None:
        grid = {"test": test, "tuning": tuned}[part][rank]
        named = {place[0]: one for place, one in grid.items()}
        figures.rates(named, f"{WORDS[measure]} ({part} concepts)")


def draw_and_print(files: Mapping[str, Records], rank: int, folder: Path) -> None:
    """Print tables and targets, draw the figures.

    Args:
        files: finished trainings by part: tuning, test, curves, sweeps; any may be empty.
        rank: of the first table, and of the figures but the one over ranks.
        folder: gets convergence-steps.png, -rates.png, -ranks.png and -plane.png.
    """
    folder.mkdir(parents=True, exist_ok=True)
    if files["sweeps"].cells:
        print(
            "one setting changed, on the tuning concepts:\n" + means_table(files["sweeps"]) + "\n"
        )
    if files["curves"].cells:
        print(
            "at the end of the curves, on the test concepts:\n"
            + means_table(files["curves"])
            + "\n"
        )
    figures = plots.Figures(folder)
    tunings: dict[Measure, Grid] = {
        measure: {
            place: one
            for place in places_of(files["tuning"])
            for one in collect(files["tuning"], [place], measure).values()
        }
        for measure in MEASURES
    }
    for measure, tuning in tunings.items():
        test = grids_of(files["test"], measure)
        print(f"=== {WORDS[measure]} ===")
        for choice in MEASURES if files["curves"].cells else ():
            rates = best_of(tunings[choice])
            rows = main_rows(tuning, test.get(rank, {}), files["curves"], rank, measure, rates)
            steps = [0, *files["curves"].marks]
            print(f"rank {rank}, after {steps[-1]} steps, learning rates that are best by {choice}")
            print(table(rows) + "\n")
            print(targets(rows) + "\n")
            # The loss of two trainings tells learning rates apart, their pictures hardly do.
            if choice == "loss":
                figures.steps(rows, steps, WORDS[measure])
        tuned: dict[int, Grid] = {}
        for place, one in tuning.items():
            tuned.setdefault(place[1], {})[place] = one
        for grids, where in (
            (dict(sorted(tuned.items())), "tuning concepts"),
            (test, "test concepts"),
        ):
            for said in (transfers(grids, where), grid_table(tuning, grids, where)):
                print(said + "\n" if said else "", end="\n" if said else "")
        _draw_rates(figures, files, measure, tuned, test, rank)
    shown = _shown(files, rank)
    if shown is not None:
        _plane(files[shown], grids_of(files[shown], "score")[rank], tunings["loss"], folder)
    figures.save()
