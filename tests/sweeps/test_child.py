"""One training of a sweep: killed it goes on, without its worker it stops in order; no step is lost."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamrie.errors import ConfigError
from dreamrie.run_folder import lock_folder
from dreamrie.sweeps import child
from dreamrie.sweeps.record import Record, last_error, read_record, write_record
from tests.sweeps import fake

WHOLE = list(range(1, fake.STEPS + 1))


def prepared(folder: Path, how: str) -> tuple[Path, Path]:
    """Run folder with its settings, and where the training is imported from."""
    program = fake.put_program(folder / "program")
    run = folder / how
    run.mkdir()
    lines = {"output_dir": run, "max_train_steps": fake.STEPS, "instance_prompt": f"a sks {how}"}
    text = "".join(f"{name}: {value}\n" for name, value in lines.items())
    (run / "settings.yaml").write_text(text, "utf-8")
    return run, program


def until(condition: Callable[[], bool], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def law_a_killed_training_goes_on(impl: Any, folder: Path) -> None:
    """kill -9 in the middle, and the same again: the bytes of one that was not killed, from the last checkpoint on."""
    alone, program = prepared(folder, "alone")
    assert fake.Started(alone, program).code() == 0
    assert fake.trace(alone) == WHOLE
    assert read_record(alone) == Record(1, 0)
    run, program = prepared(folder, "killed")
    assert fake.Started(run, program).code() == -signal.SIGKILL
    assert fake.trace(run) == WHOLE[:6]
    assert read_record(run) == Record(1, None)
    assert fake.Started(run, program).code() == 0
    assert fake.trace(run) == [*WHOLE[:6], *WHOLE[fake.EVERY :]]
    assert read_record(run) == Record(2, 0)
    assert fake.adapter(run) == fake.adapter(alone)


def law_a_training_without_its_worker_stops(impl: Any, folder: Path) -> None:
    """Its worker is killed, another one starts it at once: it stops in order, then goes on; no step is done twice."""
    run, program = prepared(folder, "patient")
    first = fake.Started(run, program)
    until(lambda: len(fake.trace(run)) == 3)
    first.let_go()
    second = fake.Started(run, program)
    assert first.code() == 130
    assert second.code() == 0
    assert fake.trace(run) == WHOLE
    assert read_record(run) == Record(2, 0)


# ------------------------------------------------------------------------------------------------------ tests


def test_a_killed_training_goes_on(tmp_path: Path) -> None:
    law_a_killed_training_goes_on(child, tmp_path)


def test_a_training_without_its_worker_stops(tmp_path: Path) -> None:
    law_a_training_without_its_worker_stops(child, tmp_path)


@pytest.mark.parametrize(("how", "code"), [("refused", 2), ("broken", 1)])
def test_a_failure_is_noted_with_its_words(tmp_path: Path, how: str, code: int) -> None:
    run, program = prepared(tmp_path, how)
    assert fake.Started(run, program).code() == code
    assert read_record(run) == Record(1, code)
    if how == "refused":
        assert last_error(run) == "no such picture"


def test_it_goes_on_only_from_what_is_there(tmp_path: Path) -> None:
    settings = ["--config", str(tmp_path / "settings.yaml")]
    assert child.words_of(tmp_path) == settings
    (tmp_path / "checkpoint-4").mkdir()
    assert child.words_of(tmp_path) == [*settings, "--resume_from_checkpoint", "latest"]


def test_a_folder_in_use_is_waited_for_and_given_up(tmp_path: Path) -> None:
    assert child.wait_until_free(tmp_path, 0.0)
    with lock_folder(tmp_path):
        assert not child.wait_until_free(tmp_path, 0.0)
    # A child that loads, or writes down its end, holds no lock of the run.
    with child.alone(tmp_path):
        assert not child.wait_until_free(tmp_path, 0.0)
        with pytest.raises(ConfigError, match="another run"), child.alone(tmp_path, 0.0):
            raise AssertionError("two children at once")
    assert child.wait_until_free(tmp_path, 0.0)


def test_the_end_of_a_pipe_is_seen_and_not_what_is_written(tmp_path: Path) -> None:
    reading, writing = os.pipe()
    ended: list[int] = []
    thread = child.end_with(reading, lambda: ended.append(1))
    os.write(writing, b"x")
    thread.join(0.05)
    assert not ended
    os.close(writing)
    thread.join(20)
    os.close(reading)
    assert ended == [1]


def test_a_record_that_cannot_be_read_is_that_of_no_start(tmp_path: Path) -> None:
    assert read_record(tmp_path) == Record()
    write_record(tmp_path, Record(2, None, "killed"))
    assert read_record(tmp_path) == Record(2, None, "killed")
    for content in ("", "[]", '{"starts": 1}', '{"starts": "x", "exit": 0, "error": ""}'):
        (tmp_path / "sweep.json").write_text(content, "utf-8")
        assert read_record(tmp_path) == Record()


def test_an_error_is_the_last_one_that_was_told(tmp_path: Path) -> None:
    assert last_error(tmp_path) == ""
    (tmp_path / "log.txt").write_text("error: one\n  where: x\nerror: two\nbye\n", "utf-8")
    assert last_error(tmp_path) == "two"
