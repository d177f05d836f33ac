"""What the JSON files say: which rows there are, and the figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.convergence import plots
from benchmarks.convergence.gains import (
    MEASURES,
    Measure,
    Place,
    Unit,
    collect,
    places_of,
)
from benchmarks.convergence.plan import Cell
from benchmarks.convergence.records import AT_A_MARK, Records
from benchmarks.convergence.tables import (
    RIVAL,
    Grid,
    grid_table,
    means_table,
    pairs_table,
    ranks_of,
    table,
    targets,
    transfers,
)
from benchmarks.convergence.targets import Row, row

WORDS: dict[Measure, str] = {
    "score": "gain of the combined score over the base model",
    "loss": "part of the base model's held-out loss that is gone",
}


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


def at_rate(records: Records, rates: Mapping[Place, float]) -> Records:
    """The trainings at one learning rate for each method and rank, with no setting changed."""
    kept = {
        cell: scores
        for cell, scores in records.cells.items()
        if rates.get((cell.method, cell.rank)) == cell.lr and not cell.setting
    }
    return Records(records.facts, records.base, kept)


def best_of(tuning: Grid) -> dict[Place, float]:
    """Best learning rate of each method and rank."""
    return {place: one.lrs[one.best] for place, one in tuning.items()}


def trained(
    curves: Records, tunings: Mapping[Measure, Grid], choice: Measure
) -> tuple[dict[Place, float], list[str]]:
    """Learning rates that a measure chooses, and who was not trained at that of the score.

    Two trainings choose badly by score, so `run curves --choices loss` leaves those out; that of the loss must be
    there.

    Args:
        curves: finished trainings.
        tunings: on the tuning concepts, by measure.
        choice: measure that chooses.

    Returns:
        Learning rate by method and rank, and the methods left out with the rate that they lack.
    """
    rates, usual, lacking = best_of(tunings[choice]), best_of(tunings["loss"]), []
    there = {cell[:3] for cell in curves.cells if not cell.setting}
    for place, lr in list(rates.items()):
        if (*place, lr) not in there and (*place, usual[place]) in there:
            del rates[place]
            lacking.append(f"{place[0]}, rank {place[1]} ({lr:g})")
    return rates, lacking


def main_rows(
    tuning: Grid,
    test: Grid,
    every: Records,
    rank: int,
    measure: Measure = "score",
    rates: Mapping[Place, float] | None = None,
) -> list[Row]:
    """Rows of the table: every method at a rank, and those that were trained at twice the rank.

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
    places = [one for one in places_of(curves) if one[1] in {rank, 2 * rank}]
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
    """Every method by rank, on the trainings that all methods of the rank have.

    With one learning rate alone there is no best one and no plateau, so such a method is left out.
    """
    found: dict[int, Grid] = {}
    several = [
        place
        for place in places_of(records)
        if len(collect(records, [place], measure)[place].lrs) > 1
    ]
    for rank in sorted({rank for _, rank in several}):
        found[rank] = collect(records, [place for place in several if place[1] == rank], measure)
    return found


def _names(by_rank: Mapping[int, Grid]) -> set[str]:
    """Methods that were trained at any rank."""
    return {name for methods in by_rank.values() for name, _ in methods}


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
    several = {name for name in _names(over) if len(ranks_of(over, name)) > 1} or _names(over)
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

    Curves are drawn of the methods with all seeds; the tables have those with fewer, too.

    Args:
        files: finished trainings by part: tuning, test, curves, sweeps, short; any may be empty.
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
    if files["short"].cells:
        print(f"trainings of {files['short'].facts['steps']} steps, on the tuning concepts:")
        print(means_table(files["short"]) + "\n")
    figures = plots.Figures(folder)
    tunings: dict[Measure, Grid] = {
        measure: {
            place: one
            for place in places_of(files["tuning"])
            for one in collect(files["tuning"], [place], measure).values()
        }
        for measure in MEASURES
    }
    if files["curves"].cells:
        chosen = at_rate(files["curves"], best_of(tunings["loss"]))
        print("two by two, learning rates that are best by loss, on the test concepts:")
        print(pairs_table(chosen) + "\n")
    for measure, tuning in tunings.items():
        test = grids_of(files["test"], measure)
        print(f"=== {WORDS[measure]} ===")
        for choice in MEASURES if files["curves"].cells else ():
            rates, lacking = trained(files["curves"], tunings, choice)
            rows = main_rows(tuning, test.get(rank, {}), files["curves"], rank, measure, rates)
            steps = [0, *files["curves"].marks]
            print(f"rank {rank}, after {steps[-1]} steps, learning rates that are best by {choice}")
            print(table(rows))
            if lacking:
                print(f"not trained at that learning rate: {', '.join(lacking)}")
            print()
            print(targets(rows) + "\n")
            # The loss of two trainings tells learning rates apart, their pictures hardly do.
            if choice == "loss":
                most = max((one.trainings for one in rows), default=0)
                whole = [one for one in rows if one.trainings == most]
                figures.steps(whole, steps, WORDS[measure])
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
