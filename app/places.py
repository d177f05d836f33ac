"""Where a path really leads: links, places inside folders, what lies below them."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from app import names as naming
from app.names import StorageError


def real(path: Path) -> str:
    """The path with every link resolved.

    Args:
        path: need not exist.

    Returns:
        Absolute.
    """
    return os.path.realpath(path)


def is_inside(path: Path, folder: Path) -> bool:
    """Whether a path lies in a folder as it is written, with no link on the way to it.

    Args:
        path: need not exist.
        folder: without links.

    Returns:
        False for the folder itself.
    """
    try:
        found = real(path)
        return found == str(path) != str(folder) and os.path.commonpath([found, folder]) == str(
            folder
        )
    except (OSError, ValueError):  # what the system cannot even look up
        return False


def refuse_links(path: Path) -> None:
    """Refuse a folder of the storage that has become a link.

    Args:
        path: need not exist.

    Raises:
        StorageError: it, or one above it, is a link.
    """
    if real(path) != str(path):
        raise StorageError("a folder of the storage has been replaced by a link.")


def has_twin(folder: Path, name: str) -> bool:
    """Whether a folder holds the name in other capital letters, which other systems take for the same file.

    Args:
        folder: need not exist.
        name: of a file.

    Returns:
        False if the very name is there.
    """
    try:
        there = os.listdir(folder)
    except OSError:  # a folder that is yet to be made
        return False
    return name not in there and naming.key(name) in {naming.key(each) for each in there}


def files_below(folder: Path) -> Iterator[tuple[Path, int]]:
    """Regular files below a folder; links are neither followed nor counted.

    Args:
        folder: need not exist.

    Yields:
        Path and bytes.
    """
    for place, folders, files in os.walk(folder):
        folders.sort()
        for file in sorted(files):
            path = Path(place, file)
            try:
                about = path.lstat()
            except FileNotFoundError:  # a training replaces files at any time
                continue
            if stat.S_ISREG(about.st_mode):
                yield path, about.st_size


@contextmanager
def in_words(what: str) -> Iterator[None]:
    """What the system refuses, without the path that its own words hold.

    Args:
        what: cannot be done.

    Yields:
        Nothing.

    Raises:
        StorageError: instead of the system's own error.
    """
    try:
        yield
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise StorageError(f"{what}: {reason}.") from error
