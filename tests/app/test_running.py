"""W5: a training is told by its lock; a signal reaches the process that holds it, and no other one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from app import running
from app.running import TrainingError, is_alive, read_record, write_record
from tests.app.fake_training import left_behind
from tests.app.test_drawing import is_gone, waits_until

SLEEPS = "import signal, time\nsignal.signal(signal.SIGTERM, signal.SIG_DFL)\ntime.sleep(60)\n"


@contextmanager
def innocent() -> Iterator[int]:
    """A process that has nothing to do with trainings."""
    with subprocess.Popen([sys.executable, "-c", SLEEPS]) as process:
        try:
            yield process.pid
        finally:
            process.kill()


@contextmanager
def launched(impl: Any, folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock of a folder."""
    checkout = folder / "checkout"
    checkout.mkdir(exist_ok=True)
    (checkout / "train_dreambooth.py").write_text(SLEEPS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl, "CHECKOUT", checkout)
        process = impl.launch(folder, [])
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def law_a_recycled_number_is_never_signalled(impl: Any, folder: Path) -> None:
    """Whatever the record says, a process that does not hold the lock gets no signal."""
    with innocent() as pid:
        for record in ({"pid": pid}, {"pid": pid, "exit": None, "launched": True}):
            impl.write_record(folder, record)
            assert not impl.send(folder, signal.SIGKILL)
            (folder / impl.LOCK).touch()
            assert not impl.send(folder, signal.SIGKILL)
        with launched(impl, folder) as process:
            process.kill()
            process.wait()
            impl.write_record(folder, {"pid": pid})
            assert not impl.send(folder, signal.SIGKILL)
        assert not waits_until(lambda: is_gone(pid), 0.1)


def law_the_number_is_that_of_the_holder(impl: Any, folder: Path) -> None:
    """While one server has just taken the lock, the number of an earlier training is not in the record."""
    seen = []
    real = subprocess.Popen

    def looking(*arguments: Any, **options: Any) -> Any:
        seen.append(impl.read_record(folder).get("pid"))
        return real(*arguments, **options)

    impl.write_record(folder, {"pid": 12345})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(impl.subprocess, "Popen", looking)
        with launched(impl, folder) as process:
            assert impl.read_record(folder)["pid"] == process.pid
    assert seen == [None]


def law_the_lock_lives_as_long_as_the_process(impl: Any, folder: Path) -> None:
    """Held from the start to the end, however it ends; looking at it does not take it away; nobody starts a second."""
    assert not impl.is_alive(folder)
    with launched(impl, folder) as process:
        for _ in range(50):
            assert impl.is_alive(folder)
        with pytest.raises(impl.TrainingError, match="runs already"), launched(impl, folder):
            pass
        assert impl.read_record(folder)["pid"] == process.pid
        assert impl.send(folder, signal.SIGTERM)
        process.wait(10)
        assert not impl.is_alive(folder)
        assert not impl.send(folder, signal.SIGTERM)
    with launched(impl, folder) as process:
        process.kill()
        process.wait()
        assert not impl.is_alive(folder)


LAWS = [
    law_a_recycled_number_is_never_signalled,
    law_the_number_is_that_of_the_holder,
    law_the_lock_lives_as_long_as_the_process,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_processes_keep_their_laws(law: Any, tmp_path: Path) -> None:
    """Each law on real processes."""
    law(running, tmp_path)


def test_the_lock_outlives_a_server_that_is_killed(tmp_path: Path) -> None:
    """The process goes on, is found by the lock, and can be signalled; then the lock is free."""
    checkout = tmp_path / "checkout"
    checkout.mkdir()
    (checkout / "train_dreambooth.py").write_text(SLEEPS)
    run = tmp_path / "run"
    run.mkdir()
    pid = left_behind(tmp_path, run, "--nothing")
    assert not is_gone(pid)
    assert is_alive(run)
    assert running.send(run, signal.SIGKILL)
    assert waits_until(lambda: not is_alive(run), 5)
    assert is_gone(pid)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"[]", b"null", b"\xff", b'{"a":' * 5000, b'"' + b"x" * 200_000 + b'"']
)
def test_a_damaged_record_is_none(content: bytes, tmp_path: Path) -> None:
    """What cannot be read says nothing."""
    (tmp_path / running.RECORD).write_bytes(content)
    assert read_record(tmp_path) == {}
    assert not running.send(tmp_path, signal.SIGKILL)


@pytest.mark.parametrize("pid", [None, 0, 1, -1, True, "7", 2.0, 10**12])
def test_only_a_number_of_a_process_is_signalled(pid: Any, tmp_path: Path) -> None:
    """0 and -1 mean groups of processes, 1 is the system's own."""
    (tmp_path / running.RECORD).write_text(json.dumps({"pid": pid}))
    with launched(running, tmp_path) as process:
        write_record(tmp_path, {"pid": pid})
        assert not running.send(tmp_path, signal.SIGKILL)
        assert process.poll() is None


def test_a_record_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    """Without the path, and nothing is started."""
    gone = tmp_path / "gone"
    with pytest.raises(TrainingError, match="No such file") as caught:
        write_record(gone, {"pid": 1})
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(TrainingError, match="cannot be started"):
        running.launch(gone, [])
    assert os.listdir(tmp_path) == []
