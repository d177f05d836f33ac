"""Wrong queues: unfair, leaky, forgetful, or brought down by one job."""

from __future__ import annotations

import contextlib
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from app import jobs, words
from app.jobs import Device, Job
from tests.app import test_jobs as laws
from tests.app import test_words as of_words
from tests.mutants import Mutant, replaced

_next, _end, _outcome, _submit = Device._next, Device._end, Device._outcome, Device.submit


@contextmanager
def in_jobs(owner: Any = Device, **wrong: Any) -> Iterator[Any]:
    """Yield the module of the queue with wrong methods of its device."""
    with replaced(owner, **wrong):
        yield jobs


def two_threads(self: Any, **options: Any) -> None:
    def run_all() -> None:
        # Both take from queues that are made for one; what they trip over is not what the law looks at.
        with contextlib.suppress(KeyError, IndexError):
            Device._run_all(self)

    self._run_all = run_all
    _init(self, **options)
    threading.Thread(target=run_all, daemon=True).start()


_init = Device.__init__


def newest_first(self: Any) -> Job | None:
    with self._changed:
        self._changed.wait_for(lambda: self._turns or self._is_closing)
        for waiting in self._waiting.values():
            waiting.rotate(1)
    return _next(self)


def no_turns(self: Any) -> Job | None:
    """The owner of the oldest job first, as in one queue for all."""
    with self._changed:
        self._changed.wait_for(lambda: self._turns or self._is_closing)
        oldest = sorted(self._waiting, key=lambda owner: self._waiting[owner][0]._number)
        self._turns = deque(oldest)
    return _next(self)


def cancel_by_id_alone(self: Any, owner: Any, job_id: str) -> bool:
    with self._changed:
        found = [job for jobs_ in self._waiting.values() for job in jobs_]
        if self._running is not None:
            found.append(self._running)
        return any(_cancel(self, job.owner, job_id) for job in found if job.id == job_id)


_cancel = Device.cancel


def jobs_of_all(self: Any, owner: Any) -> list[Job]:
    with self._changed:
        owners = {job.owner for job in [*self._ended, *([self._running] if self._running else [])]}
    return [job for each in owners | set(self._waiting) for job in _jobs(self, each)]


_jobs = Device.jobs


def ends_twice(self: Any, job: Any, status: Any) -> None:
    _end(self, job, status)
    if status == "cancelled" and job.started is None:
        self._end(job, "failed")


def called_done(self: Any, job: Any) -> Any:
    status, result, error = _outcome(self, job)
    return ("done" if status == "cancelled" else status), result, error


def only_exceptions(self: Any, job: Any) -> Any:
    """SystemExit and its like end the thread, without a word."""
    try:
        return "done", job.work.run(lambda progress: None, job._cancelled), ""
    except Exception as error:
        return "failed", None, words.plain(error)
    except BaseException:
        self._changed.acquire()  # what a dead thread leaves: nothing runs any more
        self._is_closing = True
        self._changed.release()
        return "running", None, ""


def message_as_it_is(self: Any, job: Any) -> Any:
    try:
        return "done", job.work.run(lambda progress: None, job._cancelled), ""
    except BaseException as error:
        return "failed", None, str(error)


def no_limit_of_one_owner(self: Any, owner: Any, work: Any) -> Job:
    self._max_per_owner = 10**9
    return _submit(self, owner, work)


def no_limit_of_all(self: Any, owner: Any, work: Any) -> Job:
    self._max_waiting = 10**9
    return _submit(self, owner, work)


def close_leaves_what_waits(self: Any, timeout: float = 180.0) -> None:
    with self._changed:
        self._is_closing = True
        if self._running is not None:
            self._running._cancelled.set()
        self._changed.notify_all()
    self._thread.join(timeout)


def close_does_not_wait(self: Any, timeout: float = 180.0) -> None:
    _close(self, 0.0 if timeout else timeout)


_close = Device.close


class Shared:
    """One place for the result of whatever ended last."""

    last: Any = None


def last_result(self: Any, job: Any) -> Any:
    status, result, error = _outcome(self, job)
    before, Shared.last = Shared.last, result
    return status, before, error


def never_forgets(self: Any) -> None:
    """Everything is kept."""


def no_news_of_others(self: Any, only: Any = None) -> None:
    if only is not None:
        only._version += 1
    self._changed.notify_all()


def always_news(self: Any, job: Any, timeout: float) -> bool:
    _wait(self, job, min(timeout, 0.01))
    return True


_wait = Device._wait


def in_words(**wrong: Any) -> Any:
    """The module of words with wrong functions."""
    return replaced(words, **wrong)


MUTANTS = [
    Mutant(
        "two threads take jobs",
        laws.law_one_job_at_a_time,
        lambda: in_jobs(__init__=two_threads),
        "a device holds one model; two jobs at once run out of its memory",
    ),
    Mutant(
        "the newest job of an owner first",
        laws.law_the_first_comes_first_within_an_owner,
        lambda: in_jobs(_next=newest_first),
        "whoever sends many waits longest for the first",
    ),
    Mutant(
        "one queue for all owners",
        laws.law_owners_take_turns,
        lambda: in_jobs(_next=no_turns),
        "20 jobs of one user make everybody wait for all of them",
    ),
    Mutant(
        "jobs are cancelled by id alone",
        laws.law_nobody_touches_anothers_job,
        lambda: in_jobs(cancel=cancel_by_id_alone),
        "an id that leaks is enough to stop another's training",
    ),
    Mutant(
        "jobs of all owners are listed",
        laws.law_nobody_touches_anothers_job,
        lambda: in_jobs(jobs=jobs_of_all),
        "prompts and results of others are seen",
    ),
    Mutant(
        "a cancelled job ends twice",
        laws.law_every_job_ends_once,
        lambda: in_jobs(_end=ends_twice),
        "whoever waits for it sees two outcomes",
    ),
    Mutant(
        "a cancelled job is called done",
        laws.law_every_job_ends_once,
        lambda: in_jobs(_outcome=called_done),
        "half a result is taken for a whole one",
    ),
    Mutant(
        "SystemExit ends the queue",
        laws.law_a_failure_is_told_plainly_and_the_next_job_runs,
        lambda: in_jobs(_outcome=only_exceptions),
        "a library that exits takes the device away from everybody",
    ),
    Mutant(
        "the message of any error is shown",
        laws.law_a_failure_is_told_plainly_and_the_next_job_runs,
        lambda: in_jobs(_outcome=message_as_it_is),
        "messages of libraries hold paths and worse",
    ),
    Mutant(
        "one owner may fill the queue",
        laws.law_a_full_queue_refuses,
        lambda: in_jobs(submit=no_limit_of_one_owner),
        "nobody else gets in",
    ),
    Mutant(
        "the queue has no end",
        laws.law_a_full_queue_refuses,
        lambda: in_jobs(submit=no_limit_of_all),
        "memory",
    ),
    Mutant(
        "close leaves what waits",
        laws.law_close_ends_all,
        lambda: in_jobs(close=close_leaves_what_waits),
        "pages wait for ever for a job that nobody will run",
    ),
    Mutant(
        "close does not wait for what runs",
        laws.law_close_ends_all,
        lambda: in_jobs(close=close_does_not_wait),
        "the server is gone before a training has written its checkpoint",
    ),
    Mutant(
        "a job gets the result of the one before",
        laws.law_everybody_gets_their_own_result,
        lambda: in_jobs(_outcome=last_result),
        "pictures go to the wrong person",
    ),
    Mutant(
        "ended jobs are kept for ever",
        laws.law_old_results_are_forgotten,
        lambda: in_jobs(_forget=never_forgets),
        "memory grows with every picture",
    ),
    Mutant(
        "a place in the queue changes without news",
        laws.law_news_are_told_once,
        lambda: in_jobs(_note=no_news_of_others),
        "the page shows an old number of jobs before it",
    ),
    Mutant(
        "news without a change",
        laws.law_news_are_told_once,
        lambda: in_jobs(_wait=always_news),
        "the page redraws itself all the time",
    ),
    Mutant(
        "only known folders are taken out",
        of_words.law_no_absolute_path_is_told,
        lambda: in_words(_BARE=of_words.NOTHING, _QUOTED=of_words.NOTHING),
        "an error of the system names other places as well",
    ),
    Mutant(
        "paths in quotes end at a blank",
        of_words.law_no_absolute_path_is_told,
        lambda: in_words(_QUOTED=of_words.NOTHING),
        "half of the path stays",
    ),
    Mutant(
        "known folders are not taken out",
        of_words.law_no_absolute_path_is_told,
        lambda: in_words(_spellings=lambda folder: set()),
        "a folder with blanks is only recognized by its name",
    ),
    Mutant(
        "every slash begins a path",
        of_words.law_other_words_stay,
        lambda: in_words(_BARE=of_words.EVERY_SLASH),
        "owner/name and addresses are spoiled",
    ),
]
