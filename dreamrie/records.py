"""A file of lines that loses none to a disk that is full for a while."""

from __future__ import annotations

import logging
import os
from contextlib import suppress
from pathlib import Path

logger = logging.getLogger(__name__)


class Record:
    """Appends whole lines, each at once on its way to the disk; what the disk refuses waits for the next line.

    A training is worth more than its records, so nothing here raises after the file has been opened.

    Args:
        path: the file.
        length: cut an existing file to so many bytes and go on behind them; None: begin anew.

    Raises:
        OSError: the file cannot be opened.
    """

    def __init__(self, path: Path, length: int | None = None) -> None:
        self.path = path
        self._good, self._waiting, self._has_failed = 0, b"", False
        if length is not None and path.is_file():
            self._good = self._cut(length)
        elif length:
            logger.warning("%s is gone; it begins again at this step", path)
        # Unbuffered: a buffer would lose lines when the disk refuses them.
        self._file = path.open("r+b" if self._good else "wb", buffering=0)

    def _cut(self, length: int) -> int:
        """Cut to a length; returns that of the last whole line before it."""
        with self.path.open("r+b") as stream:
            content = stream.read(length)
            good = content.rfind(b"\n") + 1
            if good < length:
                logger.warning("%s lacks the last %d bytes of its lines", self.path, length - good)
            stream.truncate(good)
        return good

    @property
    def is_closed(self) -> bool:
        """Whether no more lines are taken."""
        return self._file.closed

    def add(self, line: str) -> None:
        """Append a line, after those that wait.

        Args:
            line: text without a line end.
        """
        if self.is_closed:
            return
        self._waiting += line.encode("utf-8") + b"\n"
        self._flush()

    def _flush(self) -> None:
        """Write all that waits, or none of it: half a line would spoil the one after it."""
        try:
            self._file.seek(self._good)
            written = 0
            while written < len(self._waiting):
                written += self._file.write(self._waiting[written:])
        except OSError as error:
            with suppress(OSError):
                self._file.truncate(self._good)
            if not self._has_failed:
                failure = f"{self.path} takes no lines now, training goes on and they wait: {error}"
                logger.error(failure)  # noqa: TRY400  one line, as every message
            self._has_failed = True
            return
        if self._has_failed:
            logger.info("%s takes lines again; none is lost", self.path)
        self._good += len(self._waiting)
        self._waiting, self._has_failed = b"", False

    def sync(self) -> int:
        """Bring the lines onto the disk.

        Returns:
            Length in bytes of what is written, without the lines that wait.
        """
        try:
            os.fsync(self._file.fileno())
        except OSError as error:
            logger.warning("%s cannot be synced: %s", self.path, error)
        return self._good

    def close(self) -> None:
        """Close the file, and say how many lines it never took; may be called twice."""
        if self.is_closed:
            return
        if self._waiting:
            self._flush()
        if self._waiting:
            count = self._waiting.count(b"\n")
            logger.error("%s: the last %d lines were never written", self.path, count)
        self._file.close()
