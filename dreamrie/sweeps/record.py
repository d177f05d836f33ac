"""What a sweep writes beside a training: how often it was started, and how it ended.

Light on purpose: a training's process reads it before anything else is loaded.
"""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from dreamrie.errors import CheckpointError
from dreamrie.files import write_atomic

RECORD, LOG, SETTINGS = "sweep.json", "log.txt", "settings.yaml"
"""Files of a run folder: this record, what the training said, and the settings that it was started with."""

_LOG_BYTES = 100_000


@dataclass(frozen=True)
class Record:
    """How a training of a sweep went.

    Attributes:
        starts: of its process.
        exit: code with which the last one ended; None: it runs, or was killed.
        error: why it was given up, if that is not in its log.
    """

    starts: int = 0
    exit: int | None = None
    error: str = ""


def read_record(folder: Path) -> Record:
    """Read the record.

    Args:
        folder: of the run.

    Returns:
        That of a training which was never started, if there is none that can be read.
    """
    try:
        content = json.loads((folder / RECORD).read_text("utf-8"))
        return Record(int(content["starts"]), content["exit"], str(content["error"]))
    except (OSError, ValueError, KeyError, TypeError):
        return Record()


def write_record(folder: Path, record: Record) -> None:
    """Write the record, whole or not at all.

    Args:
        folder: of the run; it exists.
        record: all of it.

    Raises:
        CheckpointError: it cannot be written.
    """
    text = json.dumps(dataclasses.asdict(record), indent=1, ensure_ascii=False)
    try:
        write_atomic(folder / RECORD, (text + "\n").encode())
    except OSError as error:
        raise CheckpointError(f"{folder / RECORD} cannot be written: {error}") from error


def last_error(folder: Path) -> str:
    """The error that a training told last, in one line.

    Args:
        folder: of the run.

    Returns:
        Without its "error: "; "" if it told none.
    """
    try:
        with (folder / LOG).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _LOG_BYTES))
            lines = stream.read().decode("utf-8", errors="replace").splitlines()
    except OSError:
        return ""
    told = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    return told[-1] if told else ""
