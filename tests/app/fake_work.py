"""Work for the queue that does nothing but what a test needs: wait at a gate, note its turn, raise."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from app.jobs import Job, Progress
from app.storage import Owner

ANNA, BORIS, CLARA = (Owner(id=digit * 32) for digit in "abc")
# No test waits so long unless something hangs.
LONG_S = 20.0


@dataclass
class Gate:
    """Holds the device until it is opened, or the job is cancelled."""

    name: str = "a gate"
    lingers_s: float = 0.0
    opened: threading.Event = field(default_factory=threading.Event)
    entered: threading.Event = field(default_factory=threading.Event)

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> str:
        self.entered.set()
        while not (self.opened.wait(0.005) or cancelled.is_set()):
            pass
        threading.Event().wait(self.lingers_s)
        return "through"


@dataclass
class Note:
    """Appends its word to a list when it is its turn, and returns it."""

    turns: list[str]
    word: str
    name: str = "a note"

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> str:
        self.turns.append(self.word)
        report(Progress(1, 1, self.word))
        return self.word


@dataclass
class Raise:
    """Fails in the given way."""

    error: BaseException
    name: str = "a failure"

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> Any:
        raise self.error


@dataclass
class Stubborn:
    """Does not look at its cancellation, and notes how many of its kind run at one time."""

    running: list[int]
    most: list[int]
    name: str = "stubborn work"

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> None:
        self.running.append(1)
        self.most.append(len(self.running))
        threading.Event().wait(0.002)
        self.running.pop()


def held(device: Any, owner: Owner = CLARA, lingers_s: float = 0.0) -> Gate:
    """A gate that has the device, so that what is submitted now waits; it stops so much later than it is told to."""
    gate = Gate(lingers_s=lingers_s)
    device.submit(owner, gate)
    assert gate.entered.wait(LONG_S)
    return gate


def until_ended(*jobs: Job) -> None:
    """Wait until all of them have ended."""
    for job in jobs:
        while not job.has_ended:
            assert job.wait(LONG_S), f"{job.work.name} hangs: {job.status}"
