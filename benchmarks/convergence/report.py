"""Tables, targets and figures from the JSON."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from benchmarks.convergence import plots
from benchmarks.convergence.gains import Series, Unit, common_units, gains, methods_at, series
from benchmarks.convergence.plan import TEST, TUNING, Cell
from benchmarks.convergence.records import Records
from benchmarks.convergence.targets import EQUAL, Row, rows, transfer

STEPS_TARGET, WIDTH_TARGET = 1 / 3, 4.0


def _three(
    values: tuple[float, float, float] | None, form: str = "{:+.3f} [{:+.3f} {:+.3f}]"
) -> str:
    return "" if values is None else form.format(*values)


def table(found: Sequence[Row]) -> str:
    """A line for each method."""
    width = max(len(row.method) for row in found)
    lines = [
        f"{'method':<{width}}  {'lr':>8}  of  {'gain [95 % interval]':<22}  {'minus adamw':<22}  "
        f"{'plateau, decades':<20}  {'to the best of adamw':<20}"
    ]
    for row in found:
        edge = "*" if row.at_edge else " "
        flat = (
            f"{row.flat.decades:.2f}{'+' if row.flat.is_open else ' '}"
            + " [{:.2f} {:.2f}]".format(*row.flat_interval)
        )
        steps = (
            "never"
            if np.isinf(row.steps)
            else ""
            if np.isnan(row.steps)
            else f"{row.steps:.0f} steps"
        )
        lines.append(
            f"{row.method:<{width}}  {row.lr:>7g}{edge}  {row.rates:2d}  {_three(row.gain):<22}  "
            f"{_three(row.against):<22}  {flat:<20}  {steps:<20}"
        )
    lines.append(
        "* the end of its grid, so the best value may lie beyond; + likewise for the plateau"
    )
    return "\n".join(lines)


def targets(found: Sequence[Row], by_rank: Mapping[int, Mapping[str, Series]]) -> str:
    """The three promises, for every method but adamw."""
    lines = []
    for row in found:
        if row.method == "adamw" or row.speed is None or row.widths is None:
            continue
        form = "{:.2f} [{:.2f} {:.2f}]"
        lines += [
            f"{row.method}:",
            f"  steps to the best of adamw, over adamw's own: {_three(row.speed, form)}; target at most "
            f"{STEPS_TARGET:.2f}: {_said(row.speed[0] <= STEPS_TARGET)}",
            f"  width of the plateau, over adamw's: {_three(row.widths, form)}; target at least {WIDTH_TARGET:g}: "
            f"{_said(row.widths[0] >= WIDTH_TARGET)}",
        ]
    names = list(dict.fromkeys(name for methods in by_rank.values() for name in methods))
    lines.append("one learning rate for all ranks:")
    for name in names:
        own = {rank: methods[name] for rank, methods in by_rank.items() if name in methods}
        if len(own) < 2:
            continue
        one = transfer(own)
        lines.append(
            f"  {name}: lr {one.lr:g} keeps {one.share:.1%} of the best gain at its worst of ranks "
            f"{', '.join(map(str, sorted(own)))}; target at least {EQUAL:.0%}: {_said(one.share >= EQUAL)}"
        )
    return "\n".join(lines)


def _said(reached: bool) -> str:
    return "reached" if reached else "MISSED"


def plane(
    records: Records, found: Mapping[str, Series], rank: int
) -> dict[str, list[tuple[float, float]]]:
    """Mean likeness and prompts kept at the end, as shares, by method and learning rate; the base model last."""
    units = next(iter(found.values())).units
    points = {
        name: [_shares(records, Cell(name, rank, lr, 0), units) for lr in one.lrs]
        for name, one in found.items()
    }
    base = [records.base[concept] for concept, _ in units]
    points["base model"] = [(float(np.mean([row[0] / row[3] for row in base])), 1.0)]
    return points


def _shares(records: Records, cell: Cell, units: Sequence[Unit]) -> tuple[float, float]:
    """Of the trainings of a cell over its seeds that drew pictures at the end."""
    pairs = []
    for concept, seed in units:
        scores, base = records.cells[cell._replace(seed=seed)][concept], records.base[concept]
        if scores[-3] is not None and scores[-2] is not None:
            pairs.append((scores[-3] / base[3], scores[-2] / base[1]))
    return tuple(np.mean(pairs, axis=0).tolist()) if pairs else (float("nan"), float("nan"))


def sweep_table(records: Records) -> str:
    """Gains of the cells with a changed setting, on the concepts that they have."""
    kept: dict[tuple[str, int, float, str], list[float]] = {}
    for cell, scores in records.cells.items():
        if cell.setting:
            key = (cell.method, cell.rank, cell.lr, cell.setting)
            kept.setdefault(key, []).extend(
                gains(one, records.base[name])[-1] for name, one in scores.items()
            )
    lines = [f"{'method':<16} rank  lr        {'setting':<16} trainings  gain  standard error"]
    for (method, rank, lr, setting), values in sorted(kept.items()):
        error = float(np.std(values) / max(1, len(values) - 1) ** 0.5)
        lines.append(
            f"{method:<16} {rank:4d}  {lr:<8g}  {setting:<16} {len(values):9d}  {np.mean(values):+.3f}  {error:.3f}"
        )
    return "\n".join(lines)


def collect(records: Records, rank: int) -> dict[str, Series]:
    """Every method at a rank, on the trainings that all of them have."""
    names = methods_at(records, rank)
    units = common_units(records, rank, names)
    return {name: series(records, name, rank, units) for name in names} if units else {}


def _has(methods: Mapping[str, Series], concepts: Sequence[str]) -> bool:
    """Whether there are trainings on any of these concepts."""
    return any(concept in concepts for one in methods.values() for concept, _ in one.units)


def draw_and_print(records: Records, rank: int, folder: Path) -> None:
    """Print tables and targets, draw the figures.

    Args:
        records: finished trainings.
        rank: of the table, and of the figures but the one over ranks.
        folder: gets convergence-steps.png, -rates.png, -ranks.png and -plane.png.

    Raises:
        SystemExit: there is not enough to compare.
    """
    if any(cell.setting for cell in records.cells):
        print(sweep_table(records) + "\n")
    every = {cell.rank for cell in records.cells if not cell.setting}
    by_rank = {one: collect(records, one) for one in sorted(every)}
    test = {
        one: {name: s.only(TEST) for name, s in methods.items()}
        for one, methods in by_rank.items()
        if _has(methods, TUNING) and _has(methods, TEST)
    }
    if rank not in test:
        if not every:
            return
        raise SystemExit(
            f"rank {rank}: no concept and seed that every learning rate of every method has"
        )
    steps = [0, *records.marks]
    found = {}
    for one in test:
        tuning = {name: s.only(TUNING) for name, s in by_rank[one].items()}
        found[one] = rows(tuning, test[one], steps)
        units = next(iter(test[one].values())).units
        seeds = ", ".join(map(str, sorted({seed for _, seed in units})))
        print(
            f"rank {one}: gain over the base model after {steps[-1]} steps, on "
            f"{len({concept for concept, _ in units})} test concepts and seeds {seeds}; learning rate chosen on "
            f"{len(next(iter(tuning.values())).units)} trainings of tuning concepts"
        )
        print(table(found[one]) + "\n")
    print(targets(found[rank], test))
    folder.mkdir(parents=True, exist_ok=True)
    plots.plot_steps(found[rank], steps, folder / "convergence-steps.png")
    plots.plot_rates(test[rank], folder / "convergence-rates.png")
    plots.plot_ranks(test, folder / "convergence-ranks.png")
    places = {row.method: test[rank][row.method].lrs.index(row.lr) for row in found[rank]}
    plots.plot_plane(plane(records, test[rank], rank), places, folder / "convergence-plane.png")
