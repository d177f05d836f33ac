"""The job of a training: start its process, wait, stop it in order, and say why it failed."""

from __future__ import annotations

import logging
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from app.drawing import DrawingProcess
from app.jobs import Cancelled, Progress
from app.running import LOG, STOPPED, TrainingError, is_alive, launch, send, write_record
from app.words import BROKEN, without_paths
from dreamrie.checkpoint import list_checkpoints

logger = logging.getLogger(__name__)

CONFIG = "config.yaml"
KILL_AFTER_S = 120.0
_LOOK_S = 0.25
_LOG_BYTES = 100_000


class TrainingWork:
    """Implements `app.jobs.Work`: hold the device while a training runs.

    Args:
        folder: of the run, with its settings.
        drawing: gives its memory back first; None: there is no such process.
        adopts: the training runs already, since an earlier server.
        kill_after_s: seconds that a training gets to stop.
    """

    name = "a training"

    def __init__(
        self,
        folder: Path,
        drawing: DrawingProcess | None,
        *,
        adopts: bool = False,
        kill_after_s: float = KILL_AFTER_S,
    ) -> None:
        self._folder, self._drawing, self._adopts = folder, drawing, adopts
        self._kill_after_s = kill_after_s

    def run(self, report: Callable[[Progress], None], cancelled: threading.Event) -> None:
        """Train until the end, or until it is stopped.

        Args:
            report: is told that it runs; how far it is stands in the run folder.
            cancelled: stops it in order, and after a while by force.

        Raises:
            Cancelled: it was stopped.
            TrainingError: it failed.
        """
        if self._drawing is not None:
            self._drawing.stop()
        if cancelled.is_set():
            raise Cancelled("stopped before it began")
        process = None if self._adopts else launch(self._folder, _arguments(self._folder))
        report(Progress(0, 1, "training"))
        code = self._until_its_end(process, cancelled)
        if cancelled.is_set() and code == -signal.SIGKILL:
            # By force, but stopped all the same: it did not fail.
            code = -signal.SIGTERM
        write_record(self._folder, {"pid": None, "exit": code})
        if cancelled.is_set():
            raise Cancelled("stopped")
        if code is not None and code not in {0, *STOPPED}:
            raise TrainingError(why_it_failed(self._folder, code, []))

    def _until_its_end(
        self, process: subprocess.Popen[bytes] | None, cancelled: threading.Event
    ) -> int | None:
        """Wait; returns its exit code, None of a training that is no child of this server."""
        asked_at: float | None = None
        while True:
            if process is None:
                if not is_alive(self._folder):
                    return None
            elif (code := process.poll()) is not None:
                return code
            if cancelled.is_set():
                if asked_at is None:
                    send(self._folder, signal.SIGTERM)
                    asked_at = time.monotonic()
                elif time.monotonic() - asked_at > self._kill_after_s:
                    logger.warning("a training did not stop in %g s: killed", self._kill_after_s)
                    send(self._folder, signal.SIGKILL)
                time.sleep(_LOOK_S)
            else:
                cancelled.wait(_LOOK_S)


def _arguments(folder: Path) -> list[str]:
    """Of the command: from the newest checkpoint if there is one."""
    resumes = bool(list_checkpoints(folder))
    write_record(folder, {"resumed": resumes})
    config = ["--config", str(folder / CONFIG)]
    return [*config, "--resume_from_checkpoint", "latest"] if resumes else config


def log_of(folder: Path) -> str:
    """End of what the training said since it was started last.

    Args:
        folder: of the run.

    Returns:
        Text; "" if there is none.
    """
    try:
        with (folder / LOG).open("rb") as stream:
            stream.seek(max(0, stream.seek(0, 2) - _LOG_BYTES))
            return stream.read(_LOG_BYTES).decode("utf-8", errors="replace")
    except OSError:
        return ""


def why_it_failed(folder: Path, code: int | None, secrets: Sequence[Path]) -> str:
    """Why a training ended early, in plain words.

    Args:
        folder: of the run.
        code: its exit code; None: nobody saw it end.
        secrets: see `app.words.without_paths`.

    Returns:
        The error that it told, or what else is known.
    """
    lines = log_of(folder).splitlines()
    told = [number for number, line in enumerate(lines) if line.startswith("error: ")]
    if told:
        words = lines[told[-1]].removeprefix("error: ")
        if "out of memory" in words.lower():
            return "the training ran out of memory; try a smaller rank, or close other programs"
        if words.startswith("unexpected "):
            return f"the training failed: {BROKEN}"
        remedy = [line for line in lines[told[-1] + 1 :] if line.startswith("  what to do: ")]
        # Flags are no words for a page.
        if remedy and "--" not in remedy[0]:
            words += f"; {remedy[0].strip()}"
        return without_paths(words, secrets)
    if code is not None and code > 0:
        return f"the training failed: {BROKEN}"
    if code is None:
        return "the training ended while the app was not there to see it"
    return "the training ran out of memory or was killed from outside"
