"""A fence around what a test may touch: a broken storage must fail its law, not write to the machine it is tested on.

Python tells its audit hooks of a call before the system does it, so what is refused here has not happened.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
# Event of the audit hook: how many of its first arguments are paths.
CHANGES = {
    **dict.fromkeys(["os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.utime"], 1),
    **dict.fromkeys(["os.truncate", "shutil.rmtree"], 1),
    **dict.fromkeys(["os.rename", "shutil.move"], 2),
}
LISTS = {"os.listdir", "os.scandir"}
# Event: its first argument may be a path from outside, its second is what is made.
MAKES = {"os.link", "os.symlink", "shutil.copyfile"}
_fences = threading.local()
_is_installed = threading.Event()


def _touched(event: str, args: tuple[Any, ...], lists: bool) -> tuple[Any, ...]:
    if event in CHANGES:
        return args[: CHANGES[event]]
    if event in MAKES:
        return args[1:2]
    if event == "open" and isinstance(args[2], int) and args[2] & WRITING:
        return args[:1]
    return args[:1] if lists and event in LISTS else ()


def _watch(event: str, args: tuple[Any, ...]) -> None:
    stack = getattr(_fences, "stack", None)
    if not stack or event not in {*CHANGES, *MAKES, *LISTS, "open"}:
        return
    folder, lists = stack[-1]
    # Names relative to an open folder are told as they are; that folder was reached through a call that was watched.
    inside_open = (
        isinstance(args[-1], int) and args[-1] >= 0 and event not in {"open", "os.truncate", *LISTS}
    )
    for path in () if inside_open else _touched(event, args, lists):
        if not isinstance(path, str | bytes | os.PathLike):
            continue  # an open file, or the working folder
        real = os.path.realpath(os.fsdecode(path))
        if "__pycache__" not in real and os.path.commonpath([real, folder]) != folder:
            raise AssertionError(f"{event} outside the fence: {real}")


@contextmanager
def fenced(folder: Path, *, lists: bool = False) -> Iterator[None]:
    """Inside, this thread changes nothing but what lies in a folder.

    Args:
        folder: the only one that may be changed; a fence within a fence replaces it.
        lists: nothing else may be listed either.
    """
    if not _is_installed.is_set():
        _is_installed.set()
        sys.addaudithook(_watch)
    stack = _fences.__dict__.setdefault("stack", [])
    stack.append((os.path.realpath(folder), lists))
    try:
        yield
    finally:
        stack.pop()
