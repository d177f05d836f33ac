"""How a training goes, read from the files of its run folder while they are being written.

A file may be missing, cut in the middle of its last line, or damaged: what can be read is shown, the rest is left out.
"""

from __future__ import annotations

import json
import math
import re
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from app.running import STOPPED
from dreamrie.checkpoint import list_checkpoints
from dreamrie.errors import DreamrieError
from dreamrie.run_folder import ADAPTER

Status = Literal["waiting", "running", "stopping", "stopped", "finished", "failed"]
MOST_POINTS = 400
# Of a file that grows with every step, no more than this is read: its end.
_MOST_BYTES = 64 << 20
# Steps over which the speed is averaged.
_PACE_STEPS = 20
_SHEET = re.compile(r"step-(\d{6,9})\.png")
_SEVERAL = 256
_DAMAGED = (OSError, ValueError, KeyError, TypeError, IndexError, AttributeError, RecursionError)


@dataclass(frozen=True)
class TrainingState:
    """All that the page shows of a training.

    Attributes:
        name: of its folder. title, prompt, subject: as it was started.
        status: "waiting", "running", "stopping", "stopped", "finished" or "failed".
        doing: what it does now, in words.
        step: steps done. max_steps: of so many.
        eta_s: seconds that the rest of the steps will take; None: not known.
        can_resume: it can go on from a checkpoint; otherwise it can only begin again.
        losses: steps and losses, at most `MOST_POINTS`.
        scorings: by scored step, as metrics.jsonl has them, intervals as (mean, low, high).
        best_step: chosen by the scores; None: none yet. reason: why that one.
        message: how it goes, in words. is_alarm: something has to be done about it.
        sheets: samples by step, in order.
        spectrum: steps, and for each the singular values of the change, mean over layers, largest first.
        error: why it ended early, in plain words.
    """

    name: str
    title: str
    prompt: str
    subject: str
    status: Status
    doing: str
    step: int
    max_steps: int
    eta_s: float | None
    can_resume: bool
    losses: list[tuple[int, float]]
    scorings: list[dict[str, Any]]
    best_step: int | None
    reason: str
    message: str
    is_alarm: bool
    sheets: list[tuple[int, Path]]
    spectrum: tuple[list[int], list[list[float]]]
    error: str


@dataclass(frozen=True)
class RunFacts:
    """What the files of a run say.

    Attributes:
        step, losses, scorings, best_step, reason, message, is_alarm, sheets, spectrum: see `TrainingState`.
        seconds_per_step: of the last steps; None: too few.
        checkpoint: step of the newest one; None: there is none.
        has_adapter: the adapter of the end is there, or of a stop.
    """

    step: int = 0
    losses: list[tuple[int, float]] = field(default_factory=list)
    scorings: list[dict[str, Any]] = field(default_factory=list)
    best_step: int | None = None
    reason: str = ""
    message: str = ""
    is_alarm: bool = False
    sheets: list[tuple[int, Path]] = field(default_factory=list)
    spectrum: tuple[list[int], list[list[float]]] = field(default_factory=lambda: ([], []))
    seconds_per_step: float | None = None
    checkpoint: int | None = None
    has_adapter: bool = False


class RunReader:
    """Reads run folders, and reads again only what has changed."""

    def __init__(self) -> None:
        self._known: OrderedDict[tuple[str, Path], tuple[object, Any]] = OrderedDict()

    def read(self, folder: Path, max_steps: int) -> RunFacts:
        """Everything that a run has written so far.

        Args:
            folder: of the run.
            max_steps: length of the run.

        Returns:
            What can be read of it.
        """
        step, losses, scorings, pace = self._fresh(
            "metrics", folder / "metrics.jsonl", _read_metrics
        )
        best, reason = _read_best(folder / "best" / "best.json")
        message, is_alarm = self._fresh(
            f"verdict {max_steps}",
            folder / "scores.jsonl",
            lambda path: _read_verdict(path, max_steps),
        )
        checkpoints = [int(path.name.partition("-")[2]) for path in list_checkpoints(folder)]
        return RunFacts(
            step=step,
            losses=losses,
            scorings=scorings,
            # A run that was set back to a checkpoint may have chosen a step that it has yet to score again.
            best_step=best if best in {row["step"] for row in scorings} else None,
            reason=reason,
            message=message,
            is_alarm=is_alarm,
            sheets=_sheets(folder / "samples"),
            spectrum=self._fresh("spectrum", folder / "spectrum.jsonl", _read_spectrum),
            seconds_per_step=pace,
            checkpoint=checkpoints[-1] if checkpoints else None,
            has_adapter=(folder / ADAPTER).is_file(),
        )

    def _fresh(self, what: str, path: Path, read: Any) -> Any:
        """The outcome of `read`, anew only if the file is another one than last time."""
        try:
            about = path.stat()
            sign: object = (about.st_ino, about.st_size, about.st_mtime_ns)
        except OSError:
            sign = None
        key = (what, path)
        # Two threads may both read; they find the same.
        found = self._known.get(key)
        if found is None or found[0] != sign:
            found = (sign, read(path))
            self._known[key] = found
            while len(self._known) > _SEVERAL:
                self._known.popitem(last=False)
        return found[1]


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a file of JSON objects.

    Args:
        path: of the file; need not exist.

    Yields:
        Those that can be read; the last one counts when its line end is there.
    """
    try:
        with path.open("rb") as stream:
            size = stream.seek(0, 2)
            stream.seek(max(0, size - _MOST_BYTES))
            content = stream.read(_MOST_BYTES)
    except OSError:
        return
    for line in content[: content.rfind(b"\n") + 1].splitlines():
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(row, dict):
            yield row


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_step(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _read_metrics(
    path: Path,
) -> tuple[int, list[tuple[int, float]], list[dict[str, Any]], float | None]:
    """Last step, thinned losses, scorings, seconds per step."""
    step, losses, speeds = 0, [], []
    scorings: dict[int, dict[str, Any]] = {}
    for row in read_lines(path):
        if not _is_step(row.get("step")):
            continue
        if isinstance(row.get("scores"), dict):
            found = {str(name): _interval(value) for name, value in row["scores"].items()}
            # Validation may record scores of its own under the same step.
            scorings[row["step"]] = {**scorings.get(row["step"], {}), **found, "step": row["step"]}
        elif "loss" in row:
            step = row["step"]
            if _is_number(row["loss"]):
                losses.append((step, float(row["loss"])))
            if _is_number(row.get("steps_per_s")) and row["steps_per_s"] > 0:
                speeds.append(float(row["steps_per_s"]))
    recent = speeds[-_PACE_STEPS:]
    pace = sum(1 / speed for speed in recent) / len(recent) if len(recent) > 2 else None
    scored = [scorings[key] for key in sorted(scorings) if "image" in scorings[key]]
    return step, _thinned(losses), scored, pace


def _interval(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def _thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Evenly, and the last one always."""
    stride = -(-len(points) // (MOST_POINTS - 1)) or 1
    kept = points[::stride]
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _read_best(path: Path) -> tuple[int | None, str]:
    try:
        row = json.loads(path.read_text("utf-8"))
        step, reason = row["step"], row["reason"]
    except _DAMAGED:
        return None, ""
    return (step, str(reason)) if _is_step(step) else (None, "")


def _read_verdict(path: Path, max_steps: int) -> tuple[str, bool]:
    """How it goes, judged anew from the scores."""
    if not path.is_file():
        return "", False
    from eval.training import choose, judge, read_curve

    try:
        curve = read_curve(path)
        opinion = judge(curve, choose(curve), max_steps)
    except (*_DAMAGED, DreamrieError):
        return "", False
    return opinion.message, opinion.is_alarm


def _sheets(folder: Path) -> list[tuple[int, Path]]:
    """Sheets of samples; single pictures have a second number in their name."""
    if not folder.is_dir():
        return []
    found = [(_SHEET.fullmatch(path.name), path) for path in folder.iterdir()]
    return sorted((int(match[1]), path) for match, path in found if match)


def _read_spectrum(path: Path) -> tuple[list[int], list[list[float]]]:
    """Mean over layers of the k-th singular value; of layers with fewer values the missing ones are zero."""
    rows: dict[int, list[float]] = {}
    for row in read_lines(path):
        layers = row.get("change")
        if not _is_step(row.get("step")) or not isinstance(layers, dict) or not layers:
            continue
        values = list(layers.values())
        if not all(isinstance(each, list) and all(map(_is_number, each)) for each in values):
            continue
        longest = max(map(len, values))
        rows[row["step"]] = [
            sum(each[k] for each in values if k < len(each)) / len(values) for k in range(longest)
        ]
    # The page draws one line for each place, so all rows are of one length.
    length = min(map(len, rows.values()), default=0)
    steps = sorted(rows)
    return steps, [rows[step][:length] for step in steps]


def whole(value: object) -> int:
    """A number of a record that may be damaged; 0 if it is none."""
    return value if isinstance(value, int) and not isinstance(value, bool) else 0


def how_it_ended(
    record: dict[str, Any], facts: RunFacts, max_steps: int
) -> Literal["stopped", "finished", "failed"]:
    """Tell from the exit code; without one, because no server was there, from what the run left.

    Args:
        record: of the app.
        facts: of the run.
        max_steps: length of the run.

    Returns:
        The status.
    """
    code = record.get("exit")
    if code == 0 or (code is None and facts.has_adapter and facts.checkpoint == max_steps > 0):
        return "finished"
    if not record:
        return "failed"
    return "stopped" if code is None or code in STOPPED else "failed"


def phase_of(log: str, facts: RunFacts, record: dict[str, Any], max_steps: int) -> str:
    """What a running training does: the log tells until its first step, then the records do.

    Args:
        log: of the process.
        facts: of the run.
        record: of the app.
        max_steps: length of the run.

    Returns:
        Words.
    """
    if record.get("resumed") and "Going on from step" not in log:
        return "loading the model, to go on"
    if facts.step == 0 and not facts.scorings:
        if "Samples before training" in log or "step 0 unchanged" in log:
            return "looking at the base model: samples and scores before training"
        if "LOI: gradient of" in log:
            return "finding the start (LOI)"
        return (
            "drawing pictures of the class" if "class pictures in" in log else "loading the model"
        )
    settings = record.get("settings")
    every = whole(settings.get("score_steps")) if isinstance(settings, dict) else 0
    is_due = every > 0 and facts.step > 0 and (facts.step % every == 0 or facts.step == max_steps)
    if is_due and facts.step not in {row["step"] for row in facts.scorings}:
        return f"scoring step {facts.step}"
    return f"step {facts.step} of {max_steps}"
