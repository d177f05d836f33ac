"""One training of a sweep, in a process of its own: the ordinary command, which ends with the worker that began it.

    python -m dreamrie.sweeps.child FOLDER MODULE [WORDS ...]

runs `python -m MODULE WORDS... --config FOLDER/settings.yaml`, from the newest checkpoint if there is one. Its standard
input is a pipe that only its worker holds: when that is gone, however it went, the training stops as after Ctrl-C, with
a checkpoint.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from dreamrie.errors import ConfigError
from dreamrie.run_folder import check_not_in_use, lock_folder
from dreamrie.sweeps.record import LOG, SETTINGS, Record, read_record, write_record

PATIENCE_S = 120.0
"""How long a training may take to stop whose worker was killed, before the next one is refused its folder."""

_LOOK_S = 0.2


def words_of(folder: Path) -> list[str]:
    """Flags of the training: from the newest checkpoint if there is one.

    Args:
        folder: of the run.

    Returns:
        Its settings file, and whether it goes on.
    """
    words = ["--config", str(folder / SETTINGS)]
    if any(folder.glob("checkpoint-*")):
        words += ["--resume_from_checkpoint", "latest"]
    return words


def wait_until_free(folder: Path, patience_s: float = PATIENCE_S) -> bool:
    """Wait for the training of a killed worker, which is stopping.

    Args:
        folder: of the run.
        patience_s: seconds after which to give up.

    Returns:
        Whether nobody writes into the folder.
    """
    deadline = time.monotonic() + patience_s
    while True:
        try:
            check_not_in_use(folder)
            check_not_in_use(_desk(folder))
        except ConfigError:
            if time.monotonic() > deadline:
                return False
            time.sleep(_LOOK_S)
        else:
            return True


def _desk(folder: Path) -> Path:
    """What a child locks for all of its life: the run's own lock is free while it loads and when it writes its end."""
    path = folder / ".sweep"
    path.mkdir(exist_ok=True)
    return path


@contextlib.contextmanager
def alone(folder: Path, patience_s: float = PATIENCE_S) -> Iterator[None]:
    """Wait for an earlier child of this run, and keep later ones waiting.

    Args:
        folder: of the run.
        patience_s: seconds after which to give up.

    Yields:
        Nothing.

    Raises:
        ConfigError: the other one did not end.
    """
    deadline = time.monotonic() + patience_s
    with contextlib.ExitStack() as stack:
        while True:
            try:
                stack.enter_context(lock_folder(_desk(folder)))
                break
            except ConfigError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(_LOOK_S)
        yield


def end_with(pipe: int, end: Callable[[], None]) -> threading.Thread:
    """Call a function when everybody who could write into a pipe is gone.

    Args:
        pipe: descriptor to read from.
        end: called once.

    Returns:
        The thread that waits.
    """

    def wait() -> None:
        while os.read(pipe, 1):
            pass
        end()

    thread = threading.Thread(target=wait, daemon=True)
    thread.start()
    return thread


@contextlib.contextmanager
def recorded(folder: Path) -> Iterator[None]:
    """Count a start, and note how it ends.

    Args:
        folder: of the run.

    Yields:
        Nothing.

    Raises:
        SystemExit: as it comes from inside.
    """
    starts = read_record(folder).starts + 1
    write_record(folder, Record(starts))
    code = 1
    try:
        yield
        code = 0
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(bool(ended.code))
        raise
    finally:
        write_record(folder, Record(starts, code))


def main(argv: Sequence[str]) -> None:
    """Train; ends as the training does.

    Args:
        argv: folder, module and its first words.
    """
    folder, module = Path(argv[0]), argv[1]
    end_with(0, lambda: os.kill(os.getpid(), signal.SIGTERM))
    with (folder / LOG).open("ab", buffering=0) as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    with alone(folder), recorded(folder):
        sys.argv = [module, *argv[2:], *words_of(folder)]
        runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main(sys.argv[1:])
