"""A training as a process of its own, and how to be sure, at any time, whether it is still there.

The process is born with a lock of its run folder, which it inherits and never lets go of: the system frees it when the
process is gone, however it went, and not before. So while the lock is held the process lives, and its number cannot
have passed to another one. A server that was restarted finds its trainings by their locks.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dreamrie.errors import DreamrieError
from dreamrie.files import write_atomic

LOCK, RECORD, LOG = ".app.lock", "app.json", "log.txt"
CHECKOUT = Path(__file__).resolve().parent.parent
# What a training answers that was stopped: in order, and before Python could take the signal.
STOPPED = (130, -signal.SIGTERM, -signal.SIGINT)
# Whoever looks whether the lock is held has it for a moment.
_LOCK_PATIENCE_S = 2.0
# A record is a page of settings.
_LARGEST_RECORD = 100_000


class TrainingError(DreamrieError):
    """A training cannot be started, stopped or removed, or has failed; the message is fit for a browser."""


def read_record(folder: Path) -> dict[str, Any]:
    """What the app wrote down about a training.

    Args:
        folder: of the run.

    Returns:
        Empty if there is nothing that can be read.
    """
    try:
        path = folder / RECORD
        if path.stat().st_size > _LARGEST_RECORD:
            return {}
        content = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return content if isinstance(content, dict) else {}


def write_record(folder: Path, changes: Mapping[str, Any]) -> None:
    """Add to what is known of a training, or change it.

    Args:
        folder: of the run.
        changes: by name.

    Raises:
        TrainingError: it cannot be written.
    """
    content = {**read_record(folder), **changes}
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False)
    try:
        write_atomic(folder / RECORD, (text + "\n").encode())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TrainingError(f"the training cannot be recorded: {reason}.") from error


def is_alive(folder: Path) -> bool:
    """Whether the process of a training is there.

    Args:
        folder: of the run.

    Returns:
        True from its start to its end.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        # Shared: two who look at once do not take each other for the training.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def send(folder: Path, number: signal.Signals) -> bool:
    """Send a signal to the process of a training, and to no other one.

    Args:
        folder: of the run.
        number: of the signal.

    Returns:
        Whether it was sent; False when there is no such process any more.
    """
    pid = read_record(folder).get("pid")
    if not isinstance(pid, int) or isinstance(pid, bool) or pid <= 1:
        return False
    try:
        # The handle is taken first: if the lock is held afterwards, it is a handle of the process that holds it.
        handle = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else None
    except (OSError, OverflowError):  # no such process, and no number of one
        return False
    try:
        if not is_alive(folder):
            return False
        if handle is not None and hasattr(signal, "pidfd_send_signal"):
            signal.pidfd_send_signal(handle, number)
        else:
            os.kill(pid, number)
    except (ProcessLookupError, OverflowError):
        return False
    finally:
        if handle is not None:
            os.close(handle)
    return True


def launch(folder: Path, arguments: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that holds the lock of a run folder.

    Args:
        folder: of the run; its messages go to `LOG` there.
        arguments: of `train_dreambooth.py`.

    Returns:
        The process.

    Raises:
        TrainingError: another one runs in this folder, or it cannot be started.
    """
    try:
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise TrainingError(f"the training cannot be started: {reason}.") from error
    try:
        _take(descriptor)
        # No number of an earlier process may be left when the lock belongs to a new one.
        write_record(folder, {"pid": None, "exit": None, "launched": True})
        command = [sys.executable, str(CHECKOUT / "train_dreambooth.py"), *arguments]
        with (folder / LOG).open("wb") as log:
            process = subprocess.Popen(  # noqa: S603  a list, and no word of a user in it
                command,
                cwd=CHECKOUT,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                pass_fds=(descriptor,),
            )
        try:
            write_record(folder, {"pid": process.pid})
        except TrainingError:
            process.kill()
            process.wait()
            raise
    except OSError as error:
        write_record(folder, {"exit": 1})
        reason = error.strerror or type(error).__name__
        raise TrainingError(f"the training cannot be started: {reason}.") from error
    finally:
        os.close(descriptor)
    return process


def _take(descriptor: int) -> None:
    """Take the lock for good."""
    deadline = time.monotonic() + _LOCK_PATIENCE_S
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                raise TrainingError("this training runs already.") from error
            time.sleep(0.01)
        else:
            return
