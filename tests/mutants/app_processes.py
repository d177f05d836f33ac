"""Wrong processes of the app: some outlive their server, some are killed by mistake, some are read wrong."""

from __future__ import annotations

import dataclasses
import functools
import json
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from app import drawing, running, training, training_work, watching, worker
from app.drawing import DIED, DrawingError, DrawingProcess, _Process
from app.training import Trainings
from app.training_work import TrainingWork
from app.watching import RunReader
from tests.app import test_drawing as of_drawing
from tests.app import test_reading_runs as of_reading
from tests.app import test_running as of_running
from tests.app import test_training as of_training
from tests.mutants import Law, Mutant, instead, replaced


def in_folder(law: Callable[[Any, Path], None]) -> Law:
    """Turn `law(impl, folder)` into `law(impl)` with a folder of its own."""

    @functools.wraps(law)
    def with_folder(impl: Any) -> None:
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
            law(impl, Path(folder))

    return with_folder


@contextmanager
def behind(module: Any, owner: Any, **wrong: Any) -> Iterator[Any]:
    """Yield a module while something behind it is wrong."""
    with replaced(owner, **wrong):
        yield module


def mutant(
    name: str,
    law: Callable[[Any, Path], None],
    broken: Callable[[], AbstractContextManager[Any]],
    why: str,
    *raises: type[BaseException],
) -> Mutant:
    """A mutant whose law wants a folder."""
    return Mutant(name, in_folder(law), broken, why, raises)


# ----------------------------------------------------------------------------------------------- drawing

_ready, _send, _follow = DrawingProcess._ready, _Process.send, DrawingProcess._follow
_on_png = worker.write_png


def never_again(self: Any, cancelled: Any = None) -> Any:
    if self._facts is not None and self.pid is None:
        raise DrawingError(DIED)
    return _ready(self, cancelled)


def does_not_tell(self: Any, message: Any) -> None:
    if "cancel" not in message:
        _send(self, message)


def is_patient(self: Any, *arguments: Any) -> None:
    self._obey_s = 1e9
    _follow(self, *arguments)


def settings_of_the_last(path: Path, image: Any, settings: Any) -> None:
    _on_png(path, image, {**settings, "seed": 0})


# ----------------------------------------------------------------------------------------------- running

_write_record = running.write_record


def number_is_kept(folder: Path, changes: Any) -> None:
    _write_record(folder, {k: v for k, v in changes.items() if (k, v) != ("pid", None)})


def lock_is_not_inherited() -> Any:
    def start(*arguments: Any, **options: Any) -> Any:
        return subprocess.Popen(*arguments, **{**options, "pass_fds": ()})

    return SimpleNamespace(Popen=start, DEVNULL=subprocess.DEVNULL)


# ----------------------------------------------------------------------------------------------- reading

_read, _fresh, _thinned = RunReader.read, RunReader._fresh, watching._thinned


def last_line_without_its_end(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            yield row


def half_a_line_is_an_error(path: Path) -> Iterator[dict[str, Any]]:
    for line in path.read_bytes().splitlines() if path.exists() else []:
        yield json.loads(line)


def mean_of_those_there(path: Path) -> Any:
    rows = {row["step"]: list(row["change"].values()) for row in watching.read_lines(path)}
    found = []
    for layers in rows.values():
        places = [[each[k] for each in layers if k < len(each)] for k in range(4)]
        found.append([sum(place) / len(place) for place in places])
    return list(rows), found


def first_reading_wins(path: Path) -> Any:
    rows: dict[int, list[list[float]]] = {}
    for row in watching.read_lines(path):
        rows.setdefault(row["step"], list(row["change"].values()))
    return list(rows), [
        [sum(each[k] for each in layers if k < len(each)) / len(layers) for k in range(4)]
        for layers in rows.values()
    ]


def an_adapter_is_an_end(record: Any, facts: Any, max_steps: int) -> str:
    return "finished" if facts.has_adapter else "stopped"


def without_a_code_it_failed(record: Any, facts: Any, max_steps: int) -> str:
    code = record.get("exit")
    return "finished" if code == 0 else "stopped" if code in running.STOPPED else "failed"


def choice_as_it_is(self: Any, folder: Path, max_steps: int) -> Any:
    best, reason = watching._read_best(folder / "best" / "best.json")
    return dataclasses.replace(_read(self, folder, max_steps), best_step=best, reason=reason)


def remembered_for_ever(self: Any, what: str, path: Path, read: Any) -> Any:
    if (what, path) not in self._known:
        self._known[what, path] = (None, read(path))
    return self._known[what, path][1]


# ---------------------------------------------------------------------------------------------- training


def from_the_start(folder: Path) -> list[str]:
    return ["--config", str(folder / "config.yaml")]


def stop_by_name(self: Any, owner: Any, name: str) -> None:
    for (_, known), job in list(self._jobs.items()):
        if known == name:
            self._device.cancel(job.owner, job.id)


def never_by_force(self: Any, *arguments: Any) -> Any:
    self._kill_after_s = 1e9
    return _until_its_end(self, *arguments)


_until_its_end = TrainingWork._until_its_end


def by_force_at_once(self: Any, process: Any, cancelled: Any) -> Any:
    cancelled.wait()
    process.kill()
    return process.wait()


MUTANTS = [
    mutant(
        "a drawing process that died is not started again",
        of_drawing.law_a_killed_process_costs_one_order,
        lambda: behind(drawing, DrawingProcess, _ready=never_again),
        "one picture too large ends drawing for everybody",
        DrawingError,
    ),
    mutant(
        "a cancelled order is not told to the process",
        of_drawing.law_a_cancelled_order_stops_soon,
        lambda: behind(drawing, _Process, send=does_not_tell),
        "it goes on until it is killed, and the model has to be loaded again",
    ),
    mutant(
        "an order that does not obey is waited for",
        of_drawing.law_an_order_that_does_not_obey_is_ended,
        lambda: behind(drawing, DrawingProcess, _follow=is_patient),
        "the device belongs to nobody for as long as it likes",
    ),
    mutant(
        "a path of the drawing process is shown",
        of_drawing.law_what_cannot_be_drawn_is_told_plainly,
        lambda: replaced(drawing, without_paths=lambda text, secrets: text),
        "where files lie is the server's business",
    ),
    Mutant(
        "a drawing process outlives its server",
        of_drawing.law_the_process_dies_with_its_server,
        lambda: instead(("--immortal",)),
        "each crash of the server leaves a model in memory",
    ),
    Mutant(
        "a drawing process only looks at its input",
        of_drawing.law_the_process_dies_with_its_server,
        lambda: instead(("--only-input",)),
        "another child of the server may hold the pipe open",
    ),
    mutant(
        "pictures of different steps share a batch",
        of_drawing.law_each_picture_gets_its_own_settings,
        lambda: replaced(worker, _COMMON=("width", "height", "adapters")),
        "all but the first are drawn with settings that nobody asked for",
    ),
    mutant(
        "a picture carries other settings",
        of_drawing.law_each_picture_gets_its_own_settings,
        lambda: replaced(worker, write_png=settings_of_the_last),
        "it cannot be drawn again",
    ),
    mutant(
        "a number is trusted without the lock",
        of_running.law_a_recycled_number_is_never_signalled,
        lambda: replaced(running, is_alive=lambda folder: True),
        "after a reboot it may be the number of anything",
    ),
    mutant(
        "the number of an earlier training is kept",
        of_running.law_the_number_is_that_of_the_holder,
        lambda: replaced(running, write_record=number_is_kept),
        "a server killed at that moment leaves a held lock beside a number of another process",
    ),
    mutant(
        "a training does not inherit its lock",
        of_running.law_the_lock_lives_as_long_as_the_process,
        lambda: replaced(running, subprocess=lock_is_not_inherited()),
        "it looks dead, and is started a second time in the same folder",
    ),
    mutant(
        "the lock of a training is not taken",
        of_running.law_the_lock_lives_as_long_as_the_process,
        lambda: replaced(running, _take=lambda descriptor: None),
        "two trainings in one folder",
    ),
    mutant(
        "the last line counts without its end",
        of_reading.law_half_a_line_is_no_line,
        lambda: replaced(watching, read_lines=last_line_without_its_end),
        "a record that is cut back to its whole lines takes it away again",
    ),
    mutant(
        "half a line is an error",
        of_reading.law_half_a_line_is_no_line,
        lambda: replaced(watching, read_lines=half_a_line_is_an_error),
        "the page breaks each time it looks while a line is being written",
        ValueError,
    ),
    mutant(
        "whatever stands for a number is one",
        of_reading.law_damage_is_left_out,
        lambda: replaced(watching, _is_number=lambda value: True),
        "a step that was skipped has no loss",
        *(TypeError, ValueError),
    ),
    mutant(
        "only the last losses are kept",
        of_reading.law_losses_are_thinned_evenly,
        lambda: replaced(watching, _thinned=lambda points: points[-watching.MOST_POINTS :]),
        "the curve has no beginning",
    ),
    mutant(
        "the latest loss falls between two points",
        of_reading.law_losses_are_thinned_evenly,
        lambda: replaced(watching, _thinned=lambda points: points[:: len(points) // 400 + 1]),
        "the curve lags behind the training",
    ),
    mutant(
        "a spectrum is the mean of the layers that have a value",
        of_reading.law_the_spectrum_is_the_mean_over_layers,
        lambda: replaced(watching, _read_spectrum=mean_of_those_there),
        "small values seem large where few layers have them",
    ),
    mutant(
        "a spectrum that was taken again counts as the first time",
        of_reading.law_the_spectrum_is_the_mean_over_layers,
        lambda: replaced(watching, _read_spectrum=first_reading_wins),
        "after going on from a checkpoint it is that of the steps that were thrown away",
    ),
    mutant(
        "a training with an adapter has finished",
        of_reading.law_the_end_is_told_from_what_is_there,
        lambda: replaced(watching, how_it_ended=an_adapter_is_an_end),
        "one that was stopped leaves an adapter too, and could not go on",
    ),
    mutant(
        "a training that nobody saw end has failed",
        of_reading.law_the_end_is_told_from_what_is_there,
        lambda: replaced(watching, how_it_ended=without_a_code_it_failed),
        "after a restart of the server all that finished meanwhile seems lost",
    ),
    mutant(
        "a choice counts without its scores",
        of_reading.law_a_choice_counts_with_its_scores,
        lambda: behind(watching, RunReader, read=choice_as_it_is),
        "the chart of the scores has no such step",
    ),
    mutant(
        "a run is read once",
        of_reading.law_what_was_written_since_is_read,
        lambda: behind(watching, RunReader, _fresh=remembered_for_ever),
        "the page stands still",
    ),
    mutant(
        "resuming begins again",
        of_training.law_a_stopped_training_goes_on_where_it_stopped,
        lambda: behind(training, training_work, _arguments=from_the_start),
        "what was learned until the stop is thrown away",
    ),
    mutant(
        "a training is stopped by force",
        of_training.law_a_stopped_training_goes_on_where_it_stopped,
        lambda: behind(training, TrainingWork, _until_its_end=by_force_at_once),
        "it commits no checkpoint, and the steps since the last one are lost",
    ),
    mutant(
        "an exit code is told instead of words",
        of_training.law_a_killed_training_can_be_resumed,
        lambda: replaced(training, why_it_failed=lambda folder, code, secrets: f"exit {code}"),
        "-9 says nothing to most people",
    ),
    mutant(
        "a training of an earlier server is not taken over",
        of_training.law_a_training_survives_its_server,
        lambda: behind(training, Trainings, _adopt=lambda self: None),
        "pictures are drawn beside it, on the same device",
    ),
    mutant(
        "a training is stopped by its name alone",
        of_training.law_nobody_reaches_anothers_training,
        lambda: behind(training, Trainings, stop=stop_by_name),
        "two people may name theirs alike",
    ),
    mutant(
        "a training that does not stop is waited for",
        of_training.law_a_deaf_training_is_killed,
        lambda: behind(training, TrainingWork, _until_its_end=never_by_force),
        "the device belongs to it for ever",
    ),
]
