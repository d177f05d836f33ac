"""Train many concepts, or one with many settings, side by side; one table at the end.

python -m dreamrie sweep --config examples/sweep.yaml --output_dir runs/sweep
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from dreamrie.commands.table import COLUMNS, printable, table, wrapped
from dreamrie.errors import ConfigError
from dreamrie.sweeps.parts import value_text
from dreamrie.sweeps.plan import Run, Sweep, check_folders, read_sweep
from dreamrie.sweeps.running import RESTARTS, find_slots, run_sweep
from dreamrie.sweeps.table import (
    FAILED,
    FINISHED,
    TABLE_CSV,
    TABLE_JSON,
    Mean,
    Row,
    is_finished,
    means_of,
    read_rows,
    score_names,
    write_tables,
)

HELP = (
    "train many concepts or settings, one on each device; killed ones go on; one table at the end"
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument(
        "--config",
        type=Path,
        required=True,
        metavar="FILE.yaml",
        help="task, base, concepts and grid; see examples/sweep.yaml",
    )
    parser.add_argument(
        "--output_dir",
        type=Path,
        required=True,
        metavar="FOLDER",
        help="gets a folder for each training, and the table; the same command goes on with what is there",
    )
    parser.add_argument(
        "--workers",
        type=int,
        metavar="N",
        help="trainings at a time (one for each GPU; without a GPU 1, which share the threads)",
    )
    parser.add_argument(
        "--restarts",
        type=int,
        default=RESTARTS,
        metavar="N",
        help=f"how often a training that was killed is started again ({RESTARTS})",
    )
    what = parser.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="check everything, list the trainings, and stop"
    )
    what.add_argument("--table", action="store_true", help="only the table of what is there now")


def run(options: argparse.Namespace) -> int:
    """Train what is not finished, and write the table.

    Args:
        options: the flags.

    Returns:
        0 every training has finished, 1 some have not.

    Raises:
        ConfigError: an entry, a folder or a flag cannot work; nothing was trained.
        KeyboardInterrupt: Ctrl-C; what ran has stopped with a checkpoint, and the table was written.
    """
    if options.restarts < 0:
        raise ConfigError(f"--restarts {options.restarts} is no number of restarts; give 0 or more")
    sweep = read_sweep(options.config, options.output_dir)
    if options.table:
        _report(sweep, options.output_dir)
        return 0
    slots = find_slots(options.workers)
    check_folders(sweep)
    if options.dry_run:
        _say(f"{len(sweep.runs)} trainings in {options.output_dir}")
        _say(*table(["training", "steps", "status"], [_planned(run) for run in sweep.runs]))
        _say(f"at a time: {len(slots)} ({'; '.join(slot.name for slot in slots)})")
        return 0
    count = sum(map(is_finished, sweep.runs))
    if count:
        _say(f"finished before: {count} of {len(sweep.runs)}")

    def tell(what: str, run: Run) -> None:
        rows = read_rows(sweep)
        if what == "ended":
            write_tables(rows, sweep.varied, options.output_dir)
            row = next(row for row in rows if row.name == run.name)
            what = row.status + (f", loss {row.loss:.4f}" if row.loss is not None else "")
            what += f", started {row.starts} times" if row.starts > 1 else ""
        done = sum(row.status in {FINISHED, FAILED} for row in rows)
        _say(f"[{done}/{len(rows)}] {run.name}: {what}")

    try:
        run_sweep(sweep, options.output_dir, slots, options.restarts, tell)
    except KeyboardInterrupt:
        _report(sweep, options.output_dir)
        raise
    rows = _report(sweep, options.output_dir)
    return 0 if all(row.status == FINISHED for row in rows) else 1


def _planned(run: Run) -> tuple[str, str, str]:
    """A line of the list."""
    return run.name, str(run.steps), "finished" if is_finished(run) else "to do"


def _report(sweep: Sweep, output_dir: Path) -> list[Row]:
    """Print the table and write it."""
    rows = read_rows(sweep)
    _say("", *run_lines(rows, sweep.varied))
    means = means_of(rows, sweep.varied)
    if means:
        over = "concepts and seeds" if "seed" in sweep.varied else "concepts"
        _say("", f"mean over {over}, +- standard deviation", "", *mean_lines(means))
    if output_dir.is_dir():
        write_tables(rows, sweep.varied, output_dir)
        _say("", f"{output_dir / TABLE_JSON} and {TABLE_CSV} hold all of it")
    return rows


def run_lines(rows: Sequence[Row], varied: Sequence[str]) -> list[str]:
    """The table of the trainings.

    Args:
        rows: all of a sweep.
        varied: names of the settings of the grid.

    Returns:
        Lines; errors in words below the table.
    """
    heads = ["concept" if rows[0].concept else "run", *varied, "steps", "loss"]
    cells = []
    for row in rows:
        loss = "-" if row.loss is None else f"{row.loss:.4f}"
        values = [printable(value_text(row.varied[name])) for name in varied]
        cells.append([printable(row.concept or row.name), *values, f"{row.step}/{row.steps}", loss])
    names = score_names(rows)
    ends = [[f"{row.seconds:.0f}", str(row.starts), row.status] for row in rows]
    tail = ["seconds", "starts", "status"]
    for count in range(len(names), -1, -1):
        shown = names[:count]
        lines = table(
            [*heads, *shown, *tail],
            [
                [*cell, *(_number(row.scores.get(name)) for name in shown), *end]
                for row, cell, end in zip(rows, cells, ends, strict=True)
            ],
        )
        if max(map(len, lines)) <= COLUMNS:
            break
    if len(shown) < len(names):
        lines += wrapped(f"too wide for this table: {', '.join(names[len(shown) :])}")
    for row in rows:
        if row.error:
            lines += ["", *wrapped(f"{row.name}: {row.error}")]
    return lines


def mean_lines(means: Sequence[Mean]) -> list[str]:
    """The table of the settings.

    Args:
        means: at least one.

    Returns:
        Lines.
    """
    varied = list(means[0].varied)
    names = list(dict.fromkeys(name for mean in means for name in mean.values))
    rows = [
        [
            *(printable(value_text(mean.varied[name])) for name in varied),
            f"{mean.runs} of {mean.planned}",
            *(_with_spread(mean.values.get(name)) for name in names),
        ]
        for mean in means
    ]
    return table([*varied, "finished", *names], rows)


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def _with_spread(value: tuple[float, float | None] | None) -> str:
    """Mean and deviation, as far as there are any."""
    if value is None:
        return "-"
    mean, deviation = value
    return f"{mean:.4g}" if deviation is None else f"{mean:.4g} +- {deviation:.2g}"


def _say(*lines: str) -> None:
    """Lines at once, also into a pipe."""
    sys.stdout.write("\n".join(lines) + "\n")
    sys.stdout.flush()
