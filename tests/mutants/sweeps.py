"""Wrong sweeps: what is finished is done again, what is killed is lost, begun anew or done by two at once."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from dreamrie.sweeps import child, running
from dreamrie.sweeps.record import Record, read_record, write_record
from tests.mutants import Mutant, instead, replaced
from tests.mutants.app_processes import in_folder
from tests.sweeps import test_child as of_child
from tests.sweeps import test_running as of_running

_run_sweep, _train_all = running.run_sweep, running._train_all


def from_the_start(folder: Path) -> list[str]:
    return ["--config", str(folder / "settings.yaml")]


@contextlib.contextmanager
def ended_when_begun(folder: Path) -> Iterator[None]:
    write_record(folder, Record(read_record(folder).starts + 1, 0))
    yield


@contextlib.contextmanager
def never_counted(folder: Path) -> Iterator[None]:
    yield
    write_record(folder, Record(1, 0))


def with_restarts(change: int) -> Any:
    """A sweep that allows more or fewer restarts than it was told to."""

    def run_sweep(sweep: Any, folder: Path, slots: Any, restarts: int, tell: Any) -> None:
        _run_sweep(sweep, folder, slots, max(0, restarts + change), tell)

    return SimpleNamespace(run_sweep=run_sweep)


class _Misread:
    """An engine whose answers are taken for something else."""

    def __init__(self, engine: Any, answer: Any) -> None:
        self.give, self._engine, self._answer = engine.give, engine, answer

    def wait(self) -> tuple[int, int | None]:
        slot, code = self._engine.wait()
        return slot, self._answer(code)


def failures_are_tried_again(engine: Any, *rest: Any) -> None:
    _train_all(_Misread(engine, lambda code: -9 if code == 2 else code), *rest)


def a_failure_ends_it(engine: Any, command: Any, slots: Any, waiting: Any, *rest: Any) -> None:
    def answer(code: int | None) -> int | None:
        if code == 2:
            waiting.clear()
        return code

    _train_all(_Misread(engine, answer), command, slots, waiting, *rest)


GOES_ON = in_folder(of_child.law_a_killed_training_goes_on)
STOPS = in_folder(of_child.law_a_training_without_its_worker_stops)
ONCE = in_folder(of_running.law_nothing_is_trained_twice)
GIVEN_UP = in_folder(of_running.law_a_training_is_given_up_after_so_many_kills)

MUTANTS = [
    Mutant(
        "a killed training of a sweep begins again",
        GOES_ON,
        lambda: replaced(child, words_of=from_the_start),
        "what was done before its last checkpoint is done twice",
    ),
    Mutant(
        "a training that was begun counts as ended",
        GOES_ON,
        lambda: replaced(child, recorded=ended_when_begun),
        "one that was killed is never gone on with",
    ),
    Mutant(
        "starts of a training are not counted",
        GOES_ON,
        lambda: replaced(child, recorded=never_counted),
        "nobody sees what was done twice",
    ),
    Mutant(
        "a training outlives its worker",
        STOPS,
        lambda: replaced(child, end_with=lambda pipe, end: None),
        "the next one waits for it, and its device is taken",
    ),
    Mutant(
        "a training does not wait for the one that stops",
        STOPS,
        lambda: replaced(child, alone=lambda folder: contextlib.nullcontext()),
        "it is refused its folder, and counts as failed",
    ),
    Mutant(
        "what a sweep has finished is done again",
        ONCE,
        lambda: replaced(running, is_finished=lambda run: False),
        "hours are spent on what is there",
    ),
    Mutant(
        "a killed training is left alone",
        ONCE,
        lambda: instead(with_restarts(-2)),
        "one kill and the table has a hole",
    ),
    Mutant(
        "a failing training of a sweep is tried again",
        ONCE,
        lambda: replaced(running, _train_all=failures_are_tried_again),
        "it fails as it did, and takes a device for that",
    ),
    Mutant(
        "a failing training ends its sweep",
        ONCE,
        lambda: replaced(running, _train_all=a_failure_ends_it),
        "one folder of broken pictures, and nothing else is trained",
    ),
    Mutant(
        "one restart more than allowed",
        GIVEN_UP,
        lambda: instead(with_restarts(1)),
        "what is killed for want of memory is killed again",
    ),
]
