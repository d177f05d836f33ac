"""Command line: `run` trains, `plots` draws and prints."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.convergence.gains import MEASURES, best_rates
from benchmarks.convergence.methods import CENTRES, DEFAULT, GRID
from benchmarks.convergence.plan import (
    CONCEPTS,
    PARTS,
    RANKS,
    SHORT_STEPS,
    STEPS,
    SWEEPS,
    TEST,
    TUNING,
    Budget,
    Cell,
    best_cells,
    plan,
    sweep_plan,
)
from benchmarks.convergence.pool import Task, best_device, run
from benchmarks.convergence.records import Records, read_records

ROOT = Path(__file__).resolve().parent.parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FILES = {name: RESULTS / f"convergence-{name}.json" for name in PARTS}
GRIDS = ("tuning", "test", "short")
# Options that only some parts read, with what they are when they are not given.
READ_BY: dict[str, tuple[tuple[str, ...], Any]] = {
    "grid": (GRIDS, GRID),
    "centre": (GRIDS, []),
    "settings": (("sweeps",), list(SWEEPS)),
    "choices": (("curves",), list(MEASURES)),
}


def _centre(text: str) -> tuple[str, float]:
    """METHOD=VALUE."""
    name, _, value = text.partition("=")
    return name, float(value)


def make_parser() -> argparse.ArgumentParser:
    """Both commands."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.convergence")
    commands = parser.add_subparsers(dest="command", required=True)
    trains = commands.add_parser("run", help="train and score what is missing")
    trains.add_argument(
        "part",
        choices=PARTS,
        help="tuning: every learning rate on the tuning concepts; test: the same on the test concepts; curves: the "
        "learning rates that are best in the tuning file, see --choices, on the test concepts, scored on the "
        "way; sweeps: at that of the loss, one setting after the other varied on the tuning concepts; short: as "
        "tuning, a third of the steps",
    )
    trains.add_argument("--output", type=Path, help="JSON; default below benchmarks/results")
    trains.add_argument(
        "--methods",
        nargs="+",
        default=list(DEFAULT),
        help="OPTIMIZER[@MOMENTUM][:MAP][+INIT][/LAYER]",
    )
    trains.add_argument("--ranks", nargs="+", type=int, default=list(RANKS), help="main one first")
    trains.add_argument("--seeds", nargs="+", type=int, default=[0])
    trains.add_argument("--concepts", nargs="+", default=None, choices=CONCEPTS)
    trains.add_argument("--grid", type=int, help=f"learning rates, an odd number; default {GRID}")
    trains.add_argument(
        "--centre",
        nargs="+",
        type=_centre,
        metavar="METHOD=LR",
        help=f"middle of a grid; defaults: {', '.join(f'{k} {v:g}' for k, v in CENTRES.items())}",
    )
    trains.add_argument(
        "--settings",
        nargs="+",
        choices=SWEEPS,
        help="of sweeps, for riemannion",
    )
    trains.add_argument(
        "--choices",
        nargs="+",
        choices=MEASURES,
        help="of curves: by what its learning rates are best",
    )
    usual = Budget()
    trains.add_argument(
        "--steps", type=int, help=f"default {STEPS}; of short {SHORT_STEPS}, a schedule of its own"
    )
    trains.add_argument("--batch", type=int, default=usual.batch, help="pictures of a step")
    trains.add_argument("--pictures", type=int, default=usual.pictures, help="of each scoring")
    trains.add_argument(
        "--stack", type=int, default=len(CONCEPTS), help="trainings side by side in a worker"
    )
    trains.add_argument("--workers", type=int, default=1)
    trains.add_argument("--device", default=best_device())
    trains.add_argument("--graphs", choices=("on", "off"), default="on", help="record CUDA graphs")
    trains.add_argument("--limit-minutes", type=float, help="stop then; the same command goes on")
    draws = commands.add_parser("plots", help="draw and print what the JSON files hold")
    for name, path in FILES.items():
        draws.add_argument(f"--{name}", type=Path, default=path, help=f"default {path.name}")
    draws.add_argument("--docs", type=Path, default=ROOT / "docs", help="folder of the figures")
    draws.add_argument("--rank", type=int, default=RANKS[0], help="of the first figures and table")
    return parser


def read_options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The command line with its defaults; an option that the part would not read is refused."""
    parser = make_parser()
    options = parser.parse_args(argv)
    if options.command == "run":
        for name, (parts, usual) in READ_BY.items():
            if getattr(options, name) is None:
                setattr(options, name, usual)
            elif options.part not in parts:
                parser.error(
                    f"run {options.part} does not read --{name}; that is of {', '.join(parts)}"
                )
    return options


def cells_of(options: argparse.Namespace, tuned: Records) -> list[Cell]:
    """The plan that the options ask for.

    Args:
        options: of `run`.
        tuned: what the tuning file holds; curves and sweeps are trained at its best learning rates.
    """
    centres = dict(options.centre)
    unknown = sorted(set(centres) - set(options.methods))
    if unknown or options.grid % 2 == 0:
        raise SystemExit(
            f"--centre names no method of --methods: {', '.join(unknown)}"
            if unknown
            else f"--grid must be odd, got {options.grid}"
        )
    if options.part in {"curves", "sweeps"}:
        places = [(m, r) for r in options.ranks for m in options.methods]
        choices = ["loss"] if options.part == "sweeps" else options.choices
        best = [best_rates(tuned, places, measure) for measure in choices]
        if options.part == "sweeps":
            return sweep_plan(options.settings, best[0], options.seeds)
        return best_cells(best, options.seeds)
    return plan(options.methods, options.ranks, options.seeds, centres, options.grid)


def budget_of(options: argparse.Namespace) -> Budget:
    """What every training of a part gets.

    Args:
        options: of `run`.
    """
    usual = SHORT_STEPS if options.part == "short" else STEPS
    steps = usual if options.steps is None else options.steps
    return Budget(steps, options.batch, options.pictures, options.part == "curves")


def train(options: argparse.Namespace) -> None:
    """Do what is missing."""
    started = time.time()
    is_test = options.part in {"test", "curves"}
    task = Task(
        cells_of(options, read_records([FILES["tuning"]])),
        tuple(options.concepts or (TEST if is_test else TUNING)),
        budget_of(options),
        options.stack,
        options.workers,
        options.device,
        options.graphs == "on",
        options.limit_minutes,
    )
    path = options.output or FILES[options.part]
    records = read_records([path])
    before = sum(map(len, records.cells.values()))
    done = run(task, records, path)
    count, minutes = sum(map(len, records.cells.values())) - before, (time.time() - started) / 60
    print(f"{count} trainings in {minutes:.1f} minutes, {count / max(minutes, 1e-9):.0f} a minute")
    print("all done" if done else "not all done: the same command goes on from here")


def main(argv: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        argv: see `--help`.
    """
    options = read_options(argv)
    if options.command == "run":
        train(options)
        return
    # Figures need matplotlib, training does not.
    from benchmarks.convergence.report import draw_and_print

    found = {name: read_records([getattr(options, name)]) for name in FILES}
    draw_and_print(found, options.rank, options.docs)


if __name__ == "__main__":
    main()
