"""W4: one job at a time, fair turns, own jobs only, every job ends once, whatever happens in it."""

from __future__ import annotations

import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pytest

from app import jobs
from app.jobs import BusyError, Cancelled, Progress
from app.storage import Owner
from app.words import BROKEN
from dreamrie.errors import ConfigError
from tests.app.fake_work import (
    ANNA,
    BORIS,
    CLARA,
    LONG_S,
    Gate,
    Note,
    Raise,
    Stubborn,
    held,
    until_ended,
)
from tests.mutants.summary import FIGURE


@contextmanager
def device(impl: Any, **options: Any) -> Iterator[Any]:
    """A device that is closed whatever happens."""
    made = impl.Device(**options)
    try:
        yield made
    finally:
        made.close(5.0)


# ----------------------------------------------------------------------------------------------------- laws


def law_one_job_at_a_time(impl: Any) -> None:
    """Between the start of a job and its end no other one runs."""
    running: list[int] = []
    most: list[int] = []
    with device(impl) as d:
        made = [d.submit(owner, Stubborn(running, most)) for owner in (ANNA, BORIS, CLARA) * 4]
        until_ended(*made)
    assert len(most) == 12
    assert max(most) == 1
    spans = sorted((job.started, job.ended) for job in made)
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))


def order_of(impl: Any, submitted: str, holder: Owner = CLARA) -> str:
    """Names of owners in the order of submission; returns them in the order of their turns, numbered within each."""
    turns: list[str] = []
    people = {"a": ANNA, "b": BORIS, "c": CLARA}
    counts = dict.fromkeys(people, 0)
    with device(impl) as d:
        gate, made = held(d, holder), []
        for letter in submitted:
            counts[letter] += 1
            made.append(d.submit(people[letter], Note(turns, f"{letter}{counts[letter]}")))
        expected = {job.work.word: job.ahead() for job in made}
        gate.opened.set()
        until_ended(*made)
    # What runs at that moment, the gate, counts as one before everybody.
    assert expected == {word: place + 1 for place, word in enumerate(turns)}
    return " ".join(turns)


def law_the_first_comes_first_within_an_owner(impl: Any) -> None:
    """Jobs of one owner run in the order of their submission."""
    assert order_of(impl, "aaaa") == "a1 a2 a3 a4"
    by_owner = order_of(impl, "abbaabab").split()
    for letter in "ab":
        own = [word for word in by_owner if word[0] == letter]
        assert own == sorted(own)


def law_owners_take_turns(impl: Any) -> None:
    """Whoever has many jobs does not make another wait for all of them, and `ahead` tells the turns beforehand."""
    assert order_of(impl, "a" * 9 + "b") == "a1 b1 a2 a3 a4 a5 a6 a7 a8 a9"
    assert order_of(impl, "aaabbc") == "a1 b1 c1 a2 b2 a3"
    assert order_of(impl, "aabbb", holder=ANNA) == "b1 a1 b2 a2 b3"


def law_nobody_touches_anothers_job(impl: Any) -> None:
    """Another owner can neither see nor cancel a job, waiting or running; its owner can do both."""
    with device(impl) as d:
        gate = held(d, ANNA)
        waiting = d.submit(ANNA, Note([], "mine"))
        running = d.running()
        assert [job.id for job in d.jobs(ANNA)] == [waiting.id, running.id]
        assert d.jobs(BORIS) == []
        assert not d.cancel(BORIS, waiting.id)
        assert not d.cancel(BORIS, running.id)
        assert not d.cancel(ANNA, "no such job")
        assert (waiting.status, running.status) == ("waiting", "running")
        assert not running._cancelled.is_set()
        assert d.cancel(ANNA, waiting.id)
        assert waiting.status == "cancelled"
        gate.opened.set()
        until_ended(running)
        assert running.status == "done"
        assert d.jobs(BORIS) == []
        assert not d.cancel(ANNA, running.id)


@dataclass
class Slow:
    """Stops when it is cancelled, in one of the ways in which work may."""

    way: str
    name: str = "slow work"

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> str:
        assert cancelled.wait(LONG_S)
        if self.way == "raises":
            raise Cancelled("stopped")
        if self.way == "breaks":
            raise RuntimeError("broke while stopping")
        return "half"


def law_every_job_ends_once(impl: Any) -> None:
    """Each ends in one of done, failed, cancelled, and in none of them twice; what was cancelled is not called done."""
    ends: list[str] = []
    original = impl.Device._end

    def counted(self: Any, job: Any, status: str) -> None:
        ends.append(job.id)
        original(self, job, status)

    with pytest.MonkeyPatch.context() as patch, device(impl) as d:
        patch.setattr(impl.Device, "_end", counted)
        made = [d.submit(ANNA, Slow(way)) for way in ("returns", "raises", "breaks")]
        for job in made:
            while job.status == "waiting":
                assert job.wait(LONG_S)
            assert d.cancel(ANNA, job.id)
            until_ended(job)
        made += [d.submit(ANNA, Note([], "x")), d.submit(BORIS, Raise(ValueError("no")))]
        until_ended(*made)
        gate = held(d, ANNA)
        dropped = d.submit(ANNA, Note([], "y"))
        assert d.cancel(ANNA, dropped.id)
        assert not d.cancel(ANNA, dropped.id)
        gate.opened.set()
    statuses = [job.status for job in [*made, dropped]]
    assert statuses == ["cancelled"] * 3 + ["done", "failed", "cancelled"]
    assert sorted(ends) == sorted({*ends})
    assert {job.id for job in [*made, dropped]} <= {*ends}


FAILURES = [
    (ConfigError("rank 99 is too high in /home/anna/data/x.yaml"), "rank 99 is too high in x.yaml"),
    (ValueError("secret of /home/anna"), BROKEN),
    (MemoryError(), BROKEN),
    (SystemExit(3), BROKEN),
    (KeyboardInterrupt(), BROKEN),
    (GeneratorExit(), BROKEN),
]


def law_a_failure_is_told_plainly_and_the_next_job_runs(impl: Any) -> None:
    """Whatever work raises, its job fails in plain words without a path, and the queue goes on."""
    with device(impl) as d:
        for error, words in FAILURES:
            failed = d.submit(ANNA, Raise(error))
            after = d.submit(ANNA, Note([], "next"))
            for job in (failed, after):
                deadline = time.monotonic() + 3
                while not job.has_ended and time.monotonic() < deadline:
                    job.wait(0.05)
            assert (failed.status, failed.error, failed.result) == ("failed", words, None)
            assert (after.status, after.result, after.error) == ("done", "next", "")


def law_a_full_queue_refuses(impl: Any) -> None:
    """Above the limits, of all and of one owner, submitting raises in words, and what waits is not disturbed."""
    with device(impl, max_waiting=5, max_per_owner=3) as d:
        gate = held(d)
        made = [d.submit(ANNA, Note([], str(n))) for n in range(3)]
        with pytest.raises(BusyError, match="3 of your jobs"):
            d.submit(ANNA, Note([], "too many"))
        made += [d.submit(BORIS, Note([], str(n))) for n in range(2)]
        with pytest.raises(BusyError, match="5 jobs are waiting"):
            d.submit(CLARA, Note([], "too many"))
        assert d.cancel(ANNA, made.pop(0).id)
        made.append(d.submit(CLARA, Note([], "fits")))
        gate.opened.set()
        until_ended(*made)
        assert all(job.status == "done" for job in made)


def law_close_ends_all(impl: Any) -> None:
    """After `close` nothing waits, nothing runs, the thread is gone, and nothing is taken."""
    d = impl.Device()
    held(d, lingers_s=0.2)
    made = [d.submit(owner, Note([], "never")) for owner in (ANNA, BORIS)]
    running = d.running()
    d.close(5.0)
    d.close(5.0)
    assert [job.status for job in [running, *made]] == ["cancelled"] * 3
    assert d.running() is None
    assert not d._thread.is_alive()
    with pytest.raises(BusyError, match="closing"):
        d.submit(ANNA, Note([], "late"))


@dataclass
class Fake:
    """A drawing without pictures: what comes back is what was asked for."""

    prompt: str
    seed: int
    name: str = "a picture"

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> dict[str, Any]:
        report(Progress(0, 1, self.prompt))
        return {"prompt": self.prompt, "seed": self.seed, "pixels": bytes(20_000)}


def crowd(impl: Any, d: Any) -> int:
    """8 threads with 20 jobs each; returns how many came back right."""
    right: list[int] = []

    def person(number: int) -> None:
        owner = Owner(id=f"{number:032x}")
        made = []
        for k in range(20):
            prompt = f"person {number} picture {k}"
            made.append((prompt, d.submit(owner, Fake(prompt, 1000 * number + k))))
        for k, (prompt, job) in enumerate(made):
            until_ended(job)
            result = job.result or {}
            if (result.get("prompt"), result.get("seed")) == (prompt, 1000 * number + k):
                right.append(1)

    threads = [threading.Thread(target=person, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    return len(right)


def law_everybody_gets_their_own_result(impl: Any) -> None:
    """8 threads with 20 jobs each: none lost, none mixed up."""
    with device(impl, max_waiting=200) as d:
        assert crowd(impl, d) == 160


def law_old_results_are_forgotten(impl: Any) -> None:
    """An ended job is listed for ten minutes, and at most 200 are kept."""
    now = [1000.0]
    with device(impl, clock=lambda: now[0]) as d:
        job = d.submit(ANNA, Note([], "kept"))
        until_ended(job)
        now[0] += 599
        assert d.jobs(ANNA) == [job]
        now[0] += 2
        assert d.jobs(ANNA) == []
        for _ in range(210):
            until_ended(d.submit(ANNA, Note([], "many")))
        assert len(d.jobs(ANNA)) == impl.KEEP == 200


def law_news_are_told_once(impl: Any) -> None:
    """`wait` is True after a change, and then not again until the next one; of an ended job it always is."""
    with device(impl) as d:
        gate = held(d)
        first, job = d.submit(ANNA, Gate()), d.submit(ANNA, Note([], "x"))
        job.wait(0)
        assert not job.wait(0.01)
        d.cancel(ANNA, first.id)
        assert job.wait(0.01), "its place in the queue has changed"
        assert not job.wait(0.01)
        gate.opened.set()
        until_ended(job)
        assert job.wait(0)
        assert job.wait(0)


LAWS = [
    law_one_job_at_a_time,
    law_the_first_comes_first_within_an_owner,
    law_owners_take_turns,
    law_nobody_touches_anothers_job,
    law_every_job_ends_once,
    law_a_failure_is_told_plainly_and_the_next_job_runs,
    law_a_full_queue_refuses,
    law_close_ends_all,
    law_everybody_gets_their_own_result,
    law_old_results_are_forgotten,
    law_news_are_told_once,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_queue_keeps_its_laws(law: Callable[[Any], None]) -> None:
    """Each law on the real module."""
    law(jobs)


# ---------------------------------------------------------------------------------------------------- tests


def test_memory_stays_flat(record_property: Callable[[str, object], None]) -> None:
    """Rounds of the crowd keep no more than the last results: what is held does not grow with them."""
    now = [0.0]
    held_mb = []
    with device(jobs, max_waiting=200, clock=lambda: now[0]) as d:
        tracemalloc.start()
        try:
            for _ in range(4):
                assert crowd(jobs, d) == 160
                now[0] += jobs.KEEP_S + 1
                assert d.jobs(ANNA) == []
                held_mb.append(tracemalloc.get_traced_memory()[0] / 1e6)
        finally:
            tracemalloc.stop()
    record_property(
        FIGURE,
        "queue, 8 threads with 20 jobs of 20 kB: held after rounds 1 to 4: "
        + ", ".join(f"{mb:.2f}" for mb in held_mb)
        + " MB",
    )
    # One round's results are 3.2 MB; measured growth over three rounds is below 0.02 MB.
    assert held_mb[-1] - held_mb[0] < 0.2


def test_progress_is_seen_while_the_job_runs_and_not_after_it() -> None:
    """A report is there at once; one that comes after the end changes nothing."""
    said: list[Callable[[Progress], None]] = []

    @dataclass
    class Talks:
        name: str = "talk"

        def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> None:
            said.append(report)
            report(Progress(3, 10, "step 3 of 10"))
            assert cancelled.wait(LONG_S)

    with device(jobs) as d:
        job = d.submit(ANNA, Talks())
        while job.progress is None:
            assert job.wait(LONG_S)
        assert (job.progress, job.status, job.ahead()) == (
            Progress(3, 10, "step 3 of 10"),
            "running",
            0,
        )
        d.cancel(ANNA, job.id)
        until_ended(job)
        said[0](Progress(4, 10, "too late"))
        assert job.progress.done == 3


def test_close_does_not_wait_for_ever() -> None:
    """Work that does not stop is called cancelled after the timeout, and its late end is not a second one."""
    gate = threading.Event()

    @dataclass
    class Deaf:
        name: str = "deaf work"

        def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> str:
            gate.wait(LONG_S)
            return "late"

    d = jobs.Device()
    job = d.submit(ANNA, Deaf())
    while job.status == "waiting":
        assert job.wait(LONG_S)
    d.close(0.05)
    assert (job.status, d.running()) == ("cancelled", None)
    gate.set()
    d._thread.join(LONG_S)
    assert (job.status, job.result) == ("cancelled", None)


def test_a_failure_is_logged_with_its_traceback(caplog: pytest.LogCaptureFixture) -> None:
    """The words in the browser say nothing; the log says all."""
    with device(jobs) as d:
        until_ended(d.submit(ANNA, Raise(ValueError("the details"))))
    assert "ValueError: the details" in caplog.text
    assert "Traceback" in caplog.text
