"""One device for everybody: a queue that is fair between owners, progress, and a way to stop.

One thread runs one job at a time. Owners take turns: while another one waits, nobody gets two turns in a row, and
whoever comes later stands behind those who wait. Within an owner the first comes first.
"""

from __future__ import annotations

import itertools
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from uuid import uuid4

from app.storage import Owner
from app.words import plain
from dreamrie.errors import DreamrieError

logger = logging.getLogger(__name__)

Status = Literal["waiting", "running", "done", "failed", "cancelled"]
ENDED: frozenset[Status] = frozenset({"done", "failed", "cancelled"})
# How long an ended job can be looked up, and how many at most: results must not pile up in memory.
KEEP_S, KEEP = 600.0, 200


class BusyError(DreamrieError):
    """The queue is full, or the app is closing."""


class Cancelled(DreamrieError):  # noqa: N818  it is no error, but the way out of work that was cancelled
    """Work stops here, because it was asked to."""


@dataclass(frozen=True)
class Progress:
    """How far a job is.

    Attributes:
        done: parts that are done. total: of so many.
        text: in words.
    """

    done: int
    total: int
    text: str


class Work(Protocol):
    """What a job does.

    Attributes:
        name: in words, for others in the queue: "a picture", "a training".
    """

    name: str

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> Any:
        """Do it.

        Args:
            report: may be called at any time.
            cancelled: when it is set, stop soon, by returning or by raising `Cancelled`.

        Returns:
            The result of the job.
        """
        ...


class Job:
    """One piece of work in the queue; made by `Device.submit`, changed by the device alone.

    Attributes:
        id: of 32 hex digits. owner: whose it is. work: what it does.
        status: "waiting", "running", "done", "failed" or "cancelled".
        progress: last report; None before the first.
        result: of the work; None before the end.
        error: why it failed, in plain words; "" unless it did.
        submitted, started, ended: times in seconds of the device's clock; None: not yet.
    """

    def __init__(
        self, device: Device, owner: Owner, work: Work, number: int, submitted: float
    ) -> None:
        self.id = uuid4().hex
        self.owner, self.work = owner, work
        self.status: Status = "waiting"
        self.progress: Progress | None = None
        self.result: Any = None
        self.error = ""
        self.submitted = submitted
        self.started: float | None = None
        self.ended: float | None = None
        self._device, self._number = device, number
        self._cancelled = threading.Event()
        self._version = self._seen = 0

    @property
    def has_ended(self) -> bool:
        """Whether nothing about it will change any more."""
        return self.status in ENDED

    @property
    def is_stopping(self) -> bool:
        """Whether it was cancelled and has yet to end."""
        return self._cancelled.is_set() and not self.has_ended

    def ahead(self) -> int:
        """Jobs that will run before this one, what runs now included, if nobody else comes; 0 once it runs."""
        return self._device._ahead(self)

    def wait(self, timeout: float) -> bool:
        """Wait until something about it changes.

        Args:
            timeout: seconds at most.

        Returns:
            True when it has ended, or has changed since the last call.
        """
        return self._device._wait(self, timeout)


class Device:
    """Runs jobs one after the other.

    Args:
        max_waiting: jobs that wait, of all owners.
        max_per_owner: of one owner.
        secrets: folders that no message may name, see `app.words.without_paths`.
        clock: seconds, for the times of jobs.
    """

    def __init__(
        self,
        *,
        max_waiting: int = 64,
        max_per_owner: int = 24,
        secrets: Sequence[Path] = (),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._max_waiting, self._max_per_owner = max_waiting, max_per_owner
        self._secrets, self._clock = tuple(secrets), clock
        self._changed = threading.Condition()
        # The owners with waiting jobs in the order of their turns; the one whose job runs is not among them.
        self._turns: deque[Owner] = deque()
        self._waiting: dict[Owner, deque[Job]] = {}
        self._running: Job | None = None
        self._ended: deque[Job] = deque()
        self._is_closing = False
        self._numbers = itertools.count()
        self._thread = threading.Thread(target=self._run_all, name="device", daemon=True)
        self._thread.start()

    # ------------------------------------------------------------------------------ asked by anyone

    def submit(self, owner: Owner, work: Work) -> Job:
        """Put work at the end of its owner's queue.

        Args:
            owner: whose it is.
            work: what to do.

        Returns:
            The job.

        Raises:
            BusyError: too many jobs wait already, or the app is closing.
        """
        with self._changed:
            self._forget()
            if self._is_closing:
                raise BusyError("the app is closing; nothing new can be started now")
            own = self._waiting.get(owner, ())
            if len(own) >= self._max_per_owner:
                raise BusyError(
                    f"{len(own)} of your jobs are waiting already, and that is the most one person may have; "
                    "let some of them finish, or cancel some"
                )
            count = sum(map(len, self._waiting.values()))
            if count >= self._max_waiting:
                raise BusyError(
                    f"{count} jobs are waiting already, which is all that this machine takes; "
                    "please try again in a few minutes"
                )
            job = Job(self, owner, work, next(self._numbers), self._clock())
            self._waiting.setdefault(owner, deque()).append(job)
            if owner not in self._turns and not self._is_turn_of(owner):
                self._turns.append(owner)
            self._note()
            return job

    def cancel(self, owner: Owner, job_id: str) -> bool:
        """Stop an own job: at once if it waits, soon if it runs.

        Args:
            owner: who asks.
            job_id: of the job.

        Returns:
            Whether there is such a job of this owner that had not ended.
        """
        with self._changed:
            running = self._running
            if running is not None and (running.id, running.owner) == (job_id, owner):
                running._cancelled.set()
                return True
            for job in self._waiting.get(owner, ()):
                if job.id == job_id:
                    self._take_out(job)
                    self._end(job, "cancelled")
                    return True
        return False

    def jobs(self, owner: Owner) -> list[Job]:
        """Own jobs, newest first; those that ended more than ten minutes ago are forgotten.

        Args:
            owner: who asks.

        Returns:
            The jobs.
        """
        with self._changed:
            self._forget()
            running = [] if self._running is None else [self._running]
            found = [*self._ended, *running, *self._waiting.get(owner, ())]
            own = [job for job in found if job.owner == owner]
            return sorted(own, key=lambda job: job._number, reverse=True)

    def running(self) -> Job | None:
        """The job that has the device now."""
        with self._changed:
            return self._running

    def close(self, timeout: float = 180.0) -> None:
        """Cancel everything, wait until what runs has stopped, end the thread; may be called twice.

        Args:
            timeout: seconds that running work gets to stop.
        """
        with self._changed:
            self._is_closing = True
            for job in [job for jobs in self._waiting.values() for job in jobs]:
                self._take_out(job)
                self._end(job, "cancelled")
            if self._running is not None:
                self._running._cancelled.set()
            self._note()
        self._thread.join(timeout)
        with self._changed:
            if self._running is not None:
                logger.error("%s did not stop in %g s", self._running.work.name, timeout)
                self._end(self._running, "cancelled")

    # ------------------------------------------------------------------------------ asked by jobs

    def _wait(self, job: Job, timeout: float) -> bool:
        def is_news() -> bool:
            return job.has_ended or job._version != job._seen

        with self._changed:
            news = self._changed.wait_for(is_news, max(timeout, 0.0))
            job._seen = job._version
            return news

    def _ahead(self, job: Job) -> int:
        """Play the turns until it is this job's."""
        with self._changed:
            if job.status != "waiting":
                return 0
            left = {owner: len(jobs) for owner, jobs in self._waiting.items()}
            place = self._waiting[job.owner].index(job)
            turns, count = deque(self._turns), 0
            if self._running is not None:
                count = 1
                if left.get(self._running.owner):
                    turns.append(self._running.owner)
            while True:
                owner = turns.popleft()
                if owner == job.owner:
                    if place == 0:
                        return count
                    place -= 1
                count += 1
                left[owner] -= 1
                if left[owner]:
                    turns.append(owner)

    def _report(self, job: Job, progress: Progress) -> None:
        with self._changed:
            # Work may leave a thread behind that still reports.
            if job.status == "running":
                job.progress = progress
                self._note(job)

    # ------------------------------------------------------------------------------ the one thread

    def _run_all(self) -> None:
        while (job := self._next()) is not None:
            status, result, error = self._outcome(job)
            with self._changed:
                # `close` may have lost patience and ended it.
                if not job.has_ended:
                    job.result, job.error = result, error
                    self._end(job, status)
                if self._waiting.get(job.owner):
                    self._turns.append(job.owner)
            # Else the last result would be kept alive until the next job comes.
            del job, result

    def _next(self) -> Job | None:
        """Wait for work and begin it; None when the app closes."""
        with self._changed:
            self._changed.wait_for(lambda: self._turns or self._is_closing)
            if self._is_closing:
                return None
            owner = self._turns.popleft()
            job = self._waiting[owner].popleft()
            if not self._waiting[owner]:
                del self._waiting[owner]
            job.status, job.started = "running", self._clock()
            self._running = job
            self._note()
            return job

    def _outcome(self, job: Job) -> tuple[Status, Any, str]:
        """Do the work; whatever it raises, the next job is to run."""
        try:
            result = job.work.run(lambda progress: self._report(job, progress), job._cancelled)
        except BaseException as error:  # also SystemExit and MemoryError: this thread must go on
            if job._cancelled.is_set():
                if not isinstance(error, DreamrieError):
                    logger.warning("%s failed while it was cancelled", job.work.name, exc_info=True)
                return "cancelled", None, ""
            logger.error("%s failed", job.work.name, exc_info=True)
            return "failed", None, plain(error, self._secrets)
        return ("cancelled" if job._cancelled.is_set() else "done"), result, ""

    # ------------------------------------------------------------------------------ with the lock held

    def _is_turn_of(self, owner: Owner) -> bool:
        return self._running is not None and self._running.owner == owner

    def _take_out(self, job: Job) -> None:
        jobs = self._waiting[job.owner]
        jobs.remove(job)
        if not jobs:
            del self._waiting[job.owner]
            if job.owner in self._turns:
                self._turns.remove(job.owner)

    def _end(self, job: Job, status: Status) -> None:
        job.status, job.ended = status, self._clock()
        if self._running is job:
            self._running = None
        self._ended.append(job)
        self._forget()
        self._note(job)

    def _forget(self) -> None:
        """Let go of what ended long ago."""
        limit = self._clock() - KEEP_S
        while self._ended and (len(self._ended) > KEEP or (self._ended[0].ended or 0.0) < limit):
            self._ended.popleft()

    def _note(self, only: Job | None = None) -> None:
        """Wake those who wait for news: of one job, and of everyone's place in the queue."""
        changed = [job for jobs in self._waiting.values() for job in jobs]
        if self._running is not None:
            changed.append(self._running)
        if only is not None:
            changed = [only] if only.status == "running" else [only, *changed]
        for job in changed:
            job._version += 1
        self._changed.notify_all()
