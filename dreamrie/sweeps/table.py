"""What came out of a sweep: a row for each training, and means for each setting, read from the run folders."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreamrie.config import parse_yaml
from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic
from dreamrie.run_folder import ADAPTER_FILES
from dreamrie.sweeps.parts import value_text
from dreamrie.sweeps.plan import SEED, Run, Sweep
from dreamrie.sweeps.record import last_error, read_record

TABLE_JSON, TABLE_CSV = "table.json", "table.csv"
FINISHED, FAILED, STOPPED, BEGUN, WAITING = "finished", "failed", "stopped", "begun", "waiting"
"""Ended at its last step; ended by an error; stopped in order; runs, or was cut off; not begun."""

_STOPPED_CODE = 130


@dataclass(frozen=True)
class Row:
    """One training.

    Attributes:
        name: of the run.
        concept: its name, or "".
        varied: settings of the grid.
        status: one of the five above.
        step: the last recorded one, of `steps`.
        steps: length of the training.
        loss: mean over the last tenth of the recorded steps; None: none was recorded.
        scores: of the last scoring, by name.
        best_step: of the adapter in best/; None: there is none.
        seconds: spent in steps.
        starts: of its process; more than one if it was killed, stopped or failed before.
        error: why it failed, in one line.
    """

    name: str
    concept: str
    varied: Mapping[str, Any]
    status: str
    step: int
    steps: int
    loss: float | None
    scores: Mapping[str, float]
    best_step: int | None
    seconds: float
    starts: int
    error: str


@dataclass(frozen=True)
class Mean:
    """Finished trainings that share their settings, over concepts and seeds.

    Attributes:
        varied: the settings, the seed aside.
        runs: how many have finished, of `planned`.
        planned: how many there are.
        values: mean and standard deviation of loss, scores and seconds; no deviation of a single one.
    """

    varied: Mapping[str, Any]
    runs: int
    planned: int
    values: Mapping[str, tuple[float, float | None]]


def is_finished(run: Run) -> bool:
    """Whether a training has come to its end, at its present length.

    Args:
        run: whose folder has been checked.

    Returns:
        True if its command ended well, and its adapter is there.
    """
    if read_record(run.folder).exit != 0:
        return False
    try:
        place = run.folder / "config.yaml"
        recorded = parse_yaml(place.read_text("utf-8"), str(place)).get("max_train_steps")
    except (OSError, ValueError, ConfigError):
        return False
    return recorded == run.steps and any((run.folder / name).is_file() for name in ADAPTER_FILES)


def read_rows(sweep: Sweep) -> list[Row]:
    """How every training stands now.

    Args:
        sweep: of the folders.

    Returns:
        A row for each, in the order of the sweep.
    """
    return [_read_row(run) for run in sweep.runs]


def _read_row(run: Run) -> Row:
    """What the run folder says."""
    record = read_record(run.folder)
    losses, seconds, step = [], 0.0, 0
    scores: dict[str, float] = {}
    for line in _lines(run.folder / "metrics.jsonl"):
        if "scores" in line:
            scores = _numbers(line["scores"])
        elif line.get("steps_per_s"):
            step, seconds = int(line["step"]), seconds + 1 / line["steps_per_s"]
            losses.append(line["loss"])
    status, error = _status(run)
    return Row(
        run.name,
        run.concept,
        run.varied,
        status,
        step,
        run.steps,
        _final_loss(losses),
        scores,
        _best_step(run.folder),
        round(seconds, 2),
        record.starts,
        error,
    )


def _status(run: Run) -> tuple[str, str]:
    """One of the five, and the error."""
    record = read_record(run.folder)
    if record.error:
        return FAILED, record.error
    if is_finished(run):
        return FINISHED, ""
    if record.exit == _STOPPED_CODE:
        return STOPPED, ""
    if record.exit:
        return FAILED, last_error(run.folder) or f"it ended with exit code {record.exit}"
    return (BEGUN if record.starts else WAITING), ""


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    """Records of a run, as far as they are whole."""
    try:
        content = path.read_bytes()
    except OSError:
        return
    for line in content.splitlines():
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def _numbers(scores: Mapping[str, Any]) -> dict[str, float]:
    """Scores as numbers; of a mean with its interval the mean."""
    found = {name: value[0] if isinstance(value, list) else value for name, value in scores.items()}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def _final_loss(losses: Sequence[float | None]) -> float | None:
    """Mean over the last tenth; single steps are too noisy to compare trainings by."""
    last = losses[-math.ceil(len(losses) / 10) :] if losses else []
    finite = [loss for loss in last if loss is not None]
    return statistics.fmean(finite) if finite else None


def _best_step(folder: Path) -> int | None:
    """Of the adapter that the scores prefer."""
    try:
        return int(json.loads((folder / "best" / "best.json").read_text("utf-8"))["step"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def means_of(rows: Sequence[Row], varied: Sequence[str]) -> list[Mean]:
    """Average what differs in concept and seed alone.

    Args:
        rows: all of a sweep.
        varied: names of the settings of the grid.

    Returns:
        One for each combination of the other settings, in the order of the rows; none if there is nothing to average.
    """
    kept = [name for name in varied if name != SEED]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        key = json.dumps([row.varied[name] for name in kept])
        groups.setdefault(key, []).append(row)
    if all(len(group) == 1 for group in groups.values()):
        return []
    found = []
    for group in groups.values():
        done = [row for row in group if row.status == FINISHED]
        columns = {"loss": [row.loss for row in done]}
        for name in score_names(rows):
            columns[name] = [row.scores.get(name) for row in done]
        columns["seconds"] = [row.seconds for row in done]
        values = {name: spread for name, column in columns.items() if (spread := _spread(column))}
        settings = {name: group[0].varied[name] for name in kept}
        found.append(Mean(settings, len(done), len(group), values))
    return found


def _spread(column: Sequence[float | None]) -> tuple[float, float | None] | None:
    """Mean and standard deviation of what is there."""
    values = [value for value in column if value is not None]
    if not values:
        return None
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else None


def score_names(rows: Sequence[Row]) -> list[str]:
    """Scores that some training has, in the order in which they appear.

    Args:
        rows: of a sweep.

    Returns:
        Each name once.
    """
    return list(dict.fromkeys(name for row in rows for name in row.scores))


def write_tables(rows: Sequence[Row], varied: Sequence[str], output_dir: Path) -> None:
    """Write `table.json` and `table.csv`, each whole or not at all.

    Args:
        rows: all of a sweep.
        varied: names of the settings of the grid.
        output_dir: of the sweep; it exists.

    Raises:
        ConfigError: a file cannot be written.
    """
    content = {
        "runs": [_plain(row) for row in rows],
        "means": [
            {
                "settings": dict(mean.varied),
                "finished": mean.runs,
                "runs": mean.planned,
                **{
                    name: {"mean": value, "standard_deviation": deviation}
                    for name, (value, deviation) in mean.values.items()
                },
            }
            for mean in means_of(rows, varied)
        ],
    }
    text = json.dumps(content, indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    try:
        write_atomic(output_dir / TABLE_JSON, text.encode())
        write_atomic(output_dir / TABLE_CSV, _csv(rows, varied).encode())
    except OSError as error:
        raise ConfigError(f"the table cannot be written into {output_dir}: {error}") from error


def _plain(row: Row) -> dict[str, Any]:
    """A row as JSON."""
    return {
        "name": row.name,
        "concept": row.concept,
        "settings": dict(row.varied),
        "status": row.status,
        "step": row.step,
        "steps": row.steps,
        "loss": row.loss,
        "scores": dict(row.scores),
        "best_step": row.best_step,
        "seconds": row.seconds,
        "starts": row.starts,
        "error": row.error,
    }


def _csv(rows: Sequence[Row], varied: Sequence[str]) -> str:
    """All rows for a spreadsheet; what is not known is empty."""
    scores = score_names(rows)
    stream = io.StringIO()
    writer = csv.writer(stream, lineterminator="\n")
    facts = ("name", "concept", *varied, "status", "step", "steps", "loss", *scores)
    writer.writerow([*facts, "best_step", "seconds", "starts", "error"])
    for row in rows:
        values = [value_text(row.varied[name]) for name in varied]
        cells = [row.name, row.concept, *values, row.status, row.step, row.steps, row.loss]
        cells += [row.scores.get(name) for name in scores]
        writer.writerow([*cells, row.best_step, row.seconds, row.starts, row.error])
    return stream.getvalue()
