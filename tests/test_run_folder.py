"""The output folder: whether it can be used, and that no two runs use it at once."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path

import pytest

from dreamrie.errors import CheckpointError, ConfigError
from dreamrie.run_folder import (
    check_not_in_use,
    check_output_dir,
    folder_for_older_run,
    lock_folder,
    write_atomic,
)
from dreamrie.runlog import RunLog


def hold(folder: str, ready: object) -> None:
    """Hold the lock of a folder until killed."""
    with lock_folder(Path(folder)):
        ready.set()  # type: ignore[attr-defined]
        signal.pause()


def test_a_second_run_in_one_folder_is_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """Another process has it; killed with -9, it has it no more, though its lock file is still there."""
    context = multiprocessing.get_context("spawn")
    ready = context.Event()
    other = context.Process(target=hold, args=(str(tmp_path), ready))
    other.start()
    try:
        assert ready.wait(60)
        for use in (check_not_in_use, lambda folder: RunLog(folder, 3, quiet=True)):
            with pytest.raises(ConfigError, match="another run is writing into") as caught:
                use(tmp_path)
            assert "wait for it" in str(caught.value)
        assert [path.name for path in tmp_path.iterdir()] == [".lock"]
    finally:
        assert other.pid is not None
        os.kill(other.pid, signal.SIGKILL)
        other.join()
    assert (tmp_path / ".lock").exists()
    check_not_in_use(tmp_path)
    with RunLog(tmp_path, 3, quiet=True):
        assert (tmp_path / "metrics.jsonl").exists()


def test_a_closed_run_frees_its_folder(tmp_path: Path) -> None:
    with RunLog(tmp_path, 3, quiet=True), pytest.raises(ConfigError, match="another run"):
        RunLog(tmp_path, 3, quiet=True)
    RunLog(tmp_path, 3, quiet=True).close()


def test_checkpoints_of_an_older_run_move_with_it(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """They would be taken for those of the new run; the message says how to go on with the old one."""
    caplog.set_level("INFO", "dreamrie")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "checkpoint-20").mkdir()
    (tmp_path / "checkpoint-20" / "state.json").write_text("old")
    (tmp_path / "mine.txt").write_text("mine")
    RunLog(tmp_path, 3, quiet=True).close()
    older = tmp_path / "previous-1"
    assert (older / "checkpoint-20" / "state.json").read_text() == "old"
    assert not (tmp_path / "checkpoint-20").exists()
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert f"--output_dir {older} --resume_from_checkpoint latest" in caplog.text
    assert folder_for_older_run(tmp_path / "new") is None


@pytest.mark.parametrize("name", ["checkpoint-12", "metrics.jsonl", "run.json"])
def test_any_trace_of_a_run_is_moved_aside(tmp_path: Path, name: str) -> None:
    """Without its manifest and adapter too: checkpoints of two runs must never lie side by side."""
    path = tmp_path / name
    path.mkdir() if name.startswith("check") else path.write_text("old")
    RunLog(tmp_path, 3, quiet=True).close()
    assert (tmp_path / "previous-1" / name).exists()
    assert not (tmp_path / "checkpoint-12").exists()
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def test_a_folder_that_cannot_be_locked_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / ".lock").mkdir()
    with pytest.raises(ConfigError, match="the output folder cannot be locked"):
        check_not_in_use(tmp_path)
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    with pytest.raises(ConfigError, match="a link that leads nowhere"):
        check_output_dir(tmp_path / "link")
    with pytest.raises(ConfigError, match="cannot be used"):
        check_not_in_use(tmp_path / ("n" * 300))


def test_what_a_killed_run_left_half_written_is_swept(tmp_path: Path) -> None:
    (tmp_path / ".checkpoint-30.x1").mkdir()
    (tmp_path / ".checkpoint-30.x1" / "state.json").write_text("half")
    (tmp_path / ".keep").write_text("mine")
    (tmp_path / "best").mkdir()
    halves = [tmp_path / ".run.json.x1", tmp_path / "best" / ".best.json.x2"]
    for half in halves:
        half.write_text("half")
    RunLog(tmp_path, 3, quiet=True).close()
    assert not (tmp_path / ".checkpoint-30.x1").exists()
    assert not [half for half in halves if half.exists()]
    assert (tmp_path / ".keep").read_text() == "mine"


def test_a_failed_write_says_where_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: the message names the file, which is intact; nothing lies beside it."""
    target = tmp_path / "file.bin"
    write_atomic(target, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamrie.files.os.replace", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write_atomic(target, b"new")
    assert str(target) in str(caught.value)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_output_folders_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for bad in (file, file / "below" / "it", tmp_path / "loop" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError, match="output folder cannot be used") as caught:
            check_output_dir(bad)
        assert "--output_dir" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3
        with pytest.raises(ConfigError):
            RunLog(bad, 3)
    assert file.read_text() == "mine"
    for good in (tmp_path, tmp_path / "new", tmp_path / "new" / "er" / "ümläut and blank"):
        check_output_dir(good)
        assert good == tmp_path or not good.exists()  # looking creates nothing
