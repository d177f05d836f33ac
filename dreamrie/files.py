"""Write a file, or a folder of files, so that a crash leaves the old one or the new one, never a part.

Errors are the system's own: each caller knows what the file is for, and says so in its own kind of error.
"""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

# What a file system answers that cannot sync a folder, such as some network drives; the rename still happened.
_NO_FOLDER_SYNC = frozenset({errno.EINVAL, errno.ENOTSUP})


def write_atomic(path: Path, content: bytes) -> None:
    """Write under another name, sync, rename; nothing is left beside the file when that fails.

    Args:
        path: the file; its folder exists.
        content: all of it.

    Raises:
        OSError: the file cannot be written; what was there before is intact.
    """
    descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name[:50]}.")
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())
        # mkstemp gives a file that its owner alone may read.
        temporary.chmod(0o666 & ~_umask())
        os.replace(temporary, path)
    finally:
        # After the rename it is no longer there.
        temporary.unlink(missing_ok=True)
    sync_folder(path.parent)


def commit_folder(path: Path, contents: Mapping[str, bytes]) -> None:
    """Write a folder of files at once, see `new_folder`; an older one of this name is replaced.

    Between the two renames of a replacement neither name stands; who finds `set_aside(path)` without `path` after a
    crash renames it back.

    Args:
        path: the folder; the one above it exists.
        contents: file names and all of their bytes, in the order of writing.

    Raises:
        OSError: it cannot be written; nothing of it is left, and what was there before is intact.
    """
    with new_folder(path, replaces=True) as folder:
        for name, content in contents.items():
            (folder / name).write_bytes(content)


def set_aside(path: Path) -> Path:
    """Name of a folder for the moment in which it is being replaced."""
    return path.with_name(f".{path.name}.old")


@contextmanager
def new_folder(path: Path, *, replaces: bool = False) -> Iterator[Path]:
    """A folder under another name to write into, which gets its own name when all of it is on the disk.

    Args:
        path: the folder to be; the one above it exists.
        replaces: an older folder of this name gives way; else there must be none.

    Yields:
        The folder under its temporary name.

    Raises:
        OSError: it cannot be written, or something has taken its name meanwhile; nothing of it is left. The same when
            an error comes from inside.
    """
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name[:50]}."))
    aside = set_aside(path) if replaces else None
    try:
        yield temporary
        # mkdtemp gives a folder that its owner alone may enter, and some writers files that he alone may read.
        open_to = ~_umask()
        temporary.chmod(0o777 & open_to)
        for place in sorted(temporary.rglob("*")):
            if place.is_dir():
                sync_folder(place)
            else:
                place.chmod(0o666 & open_to)
                _sync_file(place)
        sync_folder(temporary)
        if aside is not None and path.exists():
            os.replace(path, aside)
        # On POSIX a rename replaces an empty folder, and nothing else.
        os.rename(temporary, path)
    finally:
        if aside is not None and aside.exists():
            if path.exists():
                shutil.rmtree(aside, ignore_errors=True)
            else:
                os.replace(aside, path)
        shutil.rmtree(temporary, ignore_errors=True)
    sync_folder(path.parent)


def _sync_file(path: Path) -> None:
    # Windows syncs only what is open for writing.
    with path.open("r+b") as stream:
        os.fsync(stream.fileno())


def sync_folder(folder: Path) -> None:
    """Make renames in a folder survive a power cut.

    Args:
        folder: exists.

    Raises:
        OSError: the disk reports an error; a file system that cannot sync folders is none.
    """
    if os.name != "posix":
        return  # Windows has no handle for a folder, and syncs renames by itself.
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in _NO_FOLDER_SYNC:
            raise
    finally:
        os.close(descriptor)


def _umask() -> int:
    """Permission bits that new files lack; the system only tells by setting them."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
