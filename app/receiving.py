"""Take files over from where the page puts uploads: checked first, then copied, all of them or none."""

from __future__ import annotations

import os
import secrets
import shutil
import stat
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from app.names import StorageError, shown

STAGING = ".receiving-"
_HEAD = 4096
# Programs of Linux and macOS, and scripts. Programs of Windows are told below: "MZ" alone could be text.
_PROGRAMS = (
    *(b"\x7fELF", b"#!/", b"#! "),
    *(b"\xca\xfe\xba\xbe", b"\xcf\xfa\xed\xfe", b"\xce\xfa\xed\xfe"),
    *(b"\xfe\xed\xfa\xcf", b"\xfe\xed\xfa\xce"),
)


def check_number(before: int, more: int, most: int) -> None:
    """Refuse more files than a folder may hold.

    Args:
        before: files in it.
        more: files to come.
        most: files it may hold.

    Raises:
        StorageError: too many.
    """
    if before + more > most:
        there = f", {before} of them there already" if before else ""
        raise StorageError(f"{before + more} files are too many{there}; {most} are allowed.")


def check_bytes(before: int, more: int, most: int) -> None:
    """Refuse more bytes than a folder may hold.

    Args:
        before: bytes in it.
        more: bytes to come.
        most: bytes it may hold.

    Raises:
        StorageError: too many.
    """
    if before + more > most:
        there = f", {before / 1e6:.1f} MB of them there already" if before else ""
        raise StorageError(
            f"the files take {(before + more) / 1e6:.1f} MB{there}; {most / 1e6:.1f} MB are allowed. Give fewer or "
            "smaller ones."
        )


def check(path: Path, suffixes: frozenset[str]) -> int:
    """Refuse what is no plain file of an allowed kind.

    Args:
        path: of an upload; nothing above the file is a link.
        suffixes: allowed ones, in small letters.

    Returns:
        Its size in bytes.

    Raises:
        StorageError: the suffix is another one; the file is a link, no file, empty, or a program.
    """
    name = shown(path.name)
    if path.suffix.lower() not in suffixes:
        raise StorageError(f"{name} is not of a kind that is used here: {_listed(suffixes)}.")
    with _opened(path) as (stream, size):
        head = stream.read(_HEAD)
    if not size:
        raise StorageError(f"{name} is empty. Upload it again.")
    if head.startswith(_PROGRAMS) or (head.startswith(b"MZ") and b"PE\0\0" in head):
        raise StorageError(f"{name} is a program, whatever its name says.")
    return size


def copy_all(files: Sequence[tuple[Path, str, int]], folder: Path) -> None:
    """Copy files into a folder.

    Args:
        files: source, name in the folder, and size as it was checked.
        folder: exists; has no files of these names.

    Raises:
        StorageError: a source is no longer what was checked; the folder is as it was.
        OSError: the disk is full, or the like; the same.
    """
    staging = folder.with_name(f"{STAGING}{secrets.token_hex(8)}")
    moved: list[Path] = []
    try:
        staging.mkdir(mode=0o700)
        for source, name, size in files:
            copy_one(source, staging / name, size)
        for _, name, _ in files:
            os.rename(staging / name, folder / name)
            moved.append(folder / name)
        moved.clear()
    finally:
        for path in moved:
            path.unlink(missing_ok=True)
        shutil.rmtree(staging, ignore_errors=True)


def copy_one(source: Path, target: Path, size: int) -> None:
    """Copy one file, never with the right to execute it.

    Args:
        source: see `check`.
        target: does not exist.
        size: in bytes, as it was checked.

    Raises:
        StorageError: the source has another size now, or is no plain file any more.
    """
    with _opened(source) as (stream, now):
        with open(target, "xb", opener=_private) as copy:
            # One byte more than expected, so that a file that grows is seen and not followed.
            rest = size + 1
            while rest and (piece := stream.read(min(rest, 1 << 20))):
                copy.write(piece)
                rest -= len(piece)
            copy.flush()
            os.fsync(copy.fileno())
    if rest != 1 or now != size:
        raise StorageError(f"{shown(source.name)} changed while it was read. Upload it again.")


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, int]]:
    """An open upload and its size; what is checked is what is read, whatever happens to the name meanwhile."""
    # Without O_NONBLOCK the opening of a pipe would wait for its other end.
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        descriptor = os.open(path, flags | getattr(os, "O_BINARY", 0))
    except OSError as error:
        raise StorageError(f"{shown(path.name)} cannot be read. Upload it again.") from error
    with os.fdopen(descriptor, "rb", closefd=True) as stream:
        about = os.fstat(stream.fileno())
        # A second name could belong to a file that is none of the user's.
        if not stat.S_ISREG(about.st_mode) or about.st_nlink != 1:
            raise StorageError(f"{shown(path.name)} is not a plain file.")
        yield stream, about.st_size


def _private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _listed(suffixes: frozenset[str]) -> str:
    return ", ".join(sorted(suffixes))
