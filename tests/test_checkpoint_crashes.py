"""C3 to C5, C10: kill -9, a full disk, a read-only one, at every write: a sound checkpoint is always there."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dreamrie.checkpoint import (
    check_space,
    find_checkpoint,
    list_checkpoints,
    read_checkpoint,
    remove_old_checkpoints,
    write_checkpoint,
)
from dreamrie.errors import CheckpointError
from tests.small_states import same, state_of


def in_a_fork(work: Callable[[], object]) -> int:
    """Exit status of work done in a child that shares nothing afterwards."""
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def kill_before(number: int) -> None:
    """In a child: from now on the `number`-th write, sync, rename or removal is met by kill -9."""
    counted = 0

    def counting(real: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            nonlocal counted
            counted += 1
            if counted == number:
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*arguments, **named)

        return call

    for module, name in (
        *((os, "fsync"), (os, "replace"), (os, "rename")),
        *((shutil, "rmtree"), (Path, "open")),
    ):
        setattr(module, name, counting(getattr(module, name)))


def save_and_prune(folder: Path) -> None:
    write_checkpoint(folder, 40, state_of(40))
    remove_old_checkpoints(folder, 40, 1)


def law_a_crash_at_any_moment_leaves_a_sound_checkpoint(impl: Any) -> None:
    """C3, C5: killed before the i-th operation, for every i, with limit 1: one complete checkpoint is there."""
    for number in range(1, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(folder, 20, state_of(20))

            def work(folder: Path = folder, number: int = number) -> None:
                kill_before(number)
                impl.save_and_prune(folder)

            status = in_a_fork(work)
            found = find_checkpoint(folder, "latest")
            assert found.step in (20, 40)
            assert same(found.state, state_of(found.step))
            names = [path.name for path in list_checkpoints(folder)]
            assert all(read_checkpoint(folder / one).step for one in names)
            if status == 0:
                assert names == ["checkpoint-40"]
                assert (
                    number > 8
                )  # three files, the folder, the rename, the folder above, the removal
                return
    raise AssertionError("it never came to an end")


def rewrite(folder: Path) -> None:
    write_checkpoint(folder, 20, state_of(21))


def law_a_crash_while_replacing_leaves_one_of_the_two(impl: Any) -> None:
    """A step that is written again, with nothing beside it: killed before the i-th operation, old or new is found."""
    seen = set()
    for number in range(1, 100):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            write_checkpoint(folder, 20, state_of(20))

            def work(folder: Path = folder, number: int = number) -> None:
                kill_before(number)
                impl.rewrite(folder)

            status = in_a_fork(work)
            found = find_checkpoint(folder, "latest").state
            seen.add(next(n for n in (20, 21) if same(found, state_of(n))))
            if status == 0:
                assert seen == {20, 21}
                return
    raise AssertionError("it never came to an end")


def test_a_crash_while_replacing_leaves_one_of_the_two() -> None:
    law_a_crash_while_replacing_leaves_one_of_the_two(sys.modules[__name__])


def test_a_crash_at_any_moment_leaves_a_sound_checkpoint() -> None:
    law_a_crash_at_any_moment_leaves_a_sound_checkpoint(sys.modules[__name__])


def test_a_disk_that_is_full_at_any_write_leaves_the_old_one_and_no_litter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """C4: ENOSPC at each file and sync, EROFS at the folder: the message has path, need and free bytes."""
    write_checkpoint(tmp_path, 20, state_of(20))
    real = os.fsync
    for number in range(1, 6):
        left = number

        def full(descriptor: int) -> None:
            nonlocal left
            left -= 1
            if left == 0:
                raise OSError(28, "No space left on device")
            real(descriptor)

        monkeypatch.setattr("dreamrie.files.os.fsync", full)
        with pytest.raises(CheckpointError, match="No space left on device") as caught:
            write_checkpoint(tmp_path, 40, state_of(40))
        message = str(caught.value)
        assert f"{tmp_path / 'checkpoint-40'}, which needs " in message
        assert re.search(r"needs [\d,]+ bytes; [\d,]+ are free", message)
        monkeypatch.undo()
        if (
            number < 5
        ):  # the fifth sync is that of the folder above: the checkpoint is there already
            assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]
        assert same(read_checkpoint(tmp_path / "checkpoint-20").state, state_of(20))

    def read_only(*_: object, **__: object) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr("dreamrie.files.tempfile.mkdtemp", read_only)
    with pytest.raises(CheckpointError, match="Read-only file system"):
        write_checkpoint(tmp_path, 60, state_of(60))


def test_a_file_size_limit_of_the_system_is_met_for_real(tmp_path: Path) -> None:
    """RLIMIT_FSIZE in a child: the write itself fails half-way."""
    write_checkpoint(tmp_path, 20, state_of(20))

    def work() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600))
        with pytest.raises(CheckpointError, match="File too large"):
            write_checkpoint(tmp_path, 40, state_of(40))

    assert in_a_fork(work) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-20"]
    assert find_checkpoint(tmp_path, "latest").step == 20


def test_too_little_room_is_refused_before_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = state_of(1)
    write_checkpoint(tmp_path, 0, state)
    size = sum(file.stat().st_size for file in (tmp_path / "checkpoint-0").iterdir())
    usage = shutil.disk_usage(tmp_path)
    for free, fits in ((2 * size - 1, False), (2 * size, True)):
        monkeypatch.setattr(
            "dreamrie.checkpoint.shutil.disk_usage", lambda _, free=free: usage._replace(free=free)
        )
        if fits:
            check_space(tmp_path, state)
        else:
            with pytest.raises(CheckpointError, match=f"2 need {2 * size:,} bytes, {free:,} are"):
                check_space(tmp_path, state)


def test_an_output_folder_with_a_difficult_name(tmp_path: Path) -> None:
    """C10: blanks, other scripts, 255 bytes, a link."""
    real = tmp_path / "real"
    real.mkdir()
    (tmp_path / "link").symlink_to(real)
    for name in ("with blank", "ümläut 狗", "n" * 255, "link"):
        folder = tmp_path / name
        folder.mkdir(exist_ok=True)
        write_checkpoint(folder, 20, state_of(20))
        write_checkpoint(folder, 40, state_of(40))
        remove_old_checkpoints(folder, 40, 1)
        assert find_checkpoint(folder, "latest").step == 40
        assert [path.name for path in folder.iterdir()] == ["checkpoint-40"]
