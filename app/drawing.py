"""The drawing process as the server sees it: started when needed, stopped to free the device, never trusted to live.

The model lies in a process of its own, so that a training can have the device, and so that running out of memory costs
one picture and not the server. `app.worker` is that process, and says what goes over the pipes.
"""

from __future__ import annotations

import itertools
import json
import logging
import queue
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

from app.jobs import Cancelled, Progress
from app.running import CHECKOUT
from app.words import without_paths
from dreamrie.errors import DreamrieError

logger = logging.getLogger(__name__)

# How long an order may go on after it was cancelled.
OBEY_S = 10.0
# A step of a large picture on a slow machine takes a minute; without any word for so long it hangs.
_SILENCE_S = 900.0
_POLL_S = 0.1
DIED = "the drawing process ran out of memory or was killed; the next job starts it anew"


class DrawingError(DreamrieError):
    """The drawing process cannot start, has died, or could not draw; the message is fit for a browser."""


@dataclass(frozen=True)
class ModelFacts:
    """What the page must know about the base model.

    Attributes:
        base: id, as adapters name their base; of a local folder its path.
        resolution: side in pixels that it was trained on.
        unit: sides must be multiples of so many pixels.
        usual_steps: denoising steps.
        usual_guidance: at which it draws at its best.
        embedded: it is the toy that comes along.
        device: as torch names it.
    """

    base: str
    resolution: int
    unit: int
    usual_steps: int
    usual_guidance: float
    embedded: bool
    device: str


class _Process:
    """One life of the process: its pipes, and a thread that reads what it says."""

    def __init__(self, command: Sequence[str], log: Path | None) -> None:
        errors: IO[bytes] | None = None if log is None else log.open("wb")
        try:
            # A session of its own: Ctrl-C in the server's terminal is the server's business.
            self._popen = subprocess.Popen(  # noqa: S603  a list, and no word of a user in it
                list(command),
                cwd=CHECKOUT,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                encoding="utf-8",
                start_new_session=True,
            )
        finally:
            if errors is not None:
                errors.close()
        # None is its end.
        self.lines: queue.SimpleQueue[dict[str, Any] | None] = queue.SimpleQueue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self._popen.stdout is not None  # noqa: S101  it was asked for
        for line in self._popen.stdout:
            try:
                message = json.loads(line)
            except ValueError:  # cut by its end
                break
            self.lines.put(message)
        self.lines.put(None)

    def send(self, message: Mapping[str, Any]) -> None:
        """Write a line; a process that is gone is noticed by its silence."""
        assert self._popen.stdin is not None  # noqa: S101  it was asked for
        try:
            self._popen.stdin.write(json.dumps(message) + "\n")
            self._popen.stdin.flush()
        except (BrokenPipeError, ValueError):  # ValueError: `kill` has closed it
            logger.info("the drawing process is gone")

    @property
    def is_alive(self) -> bool:
        return self._popen.poll() is None

    @property
    def pid(self) -> int:
        return self._popen.pid

    def kill(self) -> None:
        """End it and everything of it; may be called twice, and by two threads."""
        self._popen.kill()
        self._popen.wait()
        self._reader.join()
        for stream in (self._popen.stdin, self._popen.stdout):
            try:
                if stream is not None:
                    stream.close()
            except BrokenPipeError:  # what it never read
                continue


class DrawingProcess:
    """The one process that draws; used by one job at a time.

    Args:
        model: base model as in training; None: the embedded one.
        revision: of the Hub.
        start_timeout_s: how long loading the model may take.
        log: file for what the process says beside its answers; None: where the server says it.
        command: starts the process.
        obey_s: how long an order may go on after it was cancelled.
    """

    def __init__(
        self,
        model: str | None,
        revision: str | None,
        *,
        start_timeout_s: float = 600,
        log: Path | None = None,
        command: Sequence[str] = (sys.executable, "-m", "app.worker"),
        obey_s: float = OBEY_S,
    ) -> None:
        is_folder = model is not None and Path(model).expanduser().exists()
        # The process stands in another folder than the server.
        place = str(Path(str(model)).expanduser().absolute()) if is_folder else model
        given = {"--model": place, "--revision": revision}
        words = [f"{flag}={value}" for flag, value in given.items() if value is not None]
        self._command, self._log = [*command, *words], log
        self._start_timeout_s, self._obey_s = start_timeout_s, obey_s
        self._secrets = [CHECKOUT, Path.home(), Path(sys.prefix)]
        self._numbers = itertools.count(1)
        self._lock = threading.RLock()
        self._process: _Process | None = None
        self._facts: ModelFacts | None = None

    @property
    def pid(self) -> int | None:
        """Of the process; None while there is none."""
        process = self._process
        return process.pid if process is not None and process.is_alive else None

    def facts(self) -> ModelFacts:
        """What is known of the model; the process is started if it never was.

        Returns:
            The same after the process has ended.
        """
        if self._facts is not None:
            return self._facts
        with self._lock:
            self._ready()
            assert self._facts is not None  # noqa: S101  `_ready` has set it
            return self._facts

    def draw(
        self,
        order: Mapping[str, Any],
        report: Callable[[Progress], None],
        cancelled: threading.Event,
    ) -> list[dict[str, Any]]:
        """Draw pictures into files.

        Args:
            order: {"id": any, "pictures": [...]}. A picture has "prompt", "negative_prompt", "seed", "steps",
                "guidance", "width", "height", "adapters" (each with "path", "scale", "rank"), "file" (path of the PNG)
                and "settings" (kept in the PNG).
            report: is told of every denoising step.
            cancelled: stops it at the next step.

        Returns:
            The pictures of the order; their files are there.

        Raises:
            Cancelled: it was stopped; some of the files may be there.
            DrawingError: it cannot be drawn, or the process has died.
        """
        pictures = [dict(picture) for picture in order["pictures"]]
        with self._lock:
            if self.pid is None:
                report(Progress(0, 1, "loading the model"))
            process = self._ready(cancelled)
            number = next(self._numbers)
            process.send({"order": number, "pictures": pictures})
            text = (
                "drawing a picture" if len(pictures) == 1 else f"drawing {len(pictures)} pictures"
            )
            self._follow(process, number, text, report, cancelled)
        return pictures

    def stop(self) -> None:
        """End the process, also in the middle of an order; the next one starts it anew."""
        process = self._process
        if process is not None:
            # Before the lock: whoever has it may be waiting for this process.
            process.kill()
        with self._lock:
            self._end()

    # ------------------------------------------------------------------------------- with the lock held

    def _ready(self, cancelled: threading.Event | None = None) -> _Process:
        """A process that has loaded the model."""
        if self._process is not None and self._process.is_alive:
            return self._process
        self._end()
        try:
            self._process = process = _Process(self._command, self._log)
        except OSError as error:
            reason = error.strerror or type(error).__name__
            raise DrawingError(f"the drawing process cannot be started: {reason}") from error
        with ExitStack() as undo:
            # A process that is there has loaded its model, or it is not there.
            undo.callback(self._end)
            self._facts = self._first_word(process, cancelled)
            undo.pop_all()
        return process

    def _first_word(self, process: _Process, cancelled: threading.Event | None) -> ModelFacts:
        """Wait until the model is loaded."""
        deadline = time.monotonic() + self._start_timeout_s
        while True:
            try:
                message = process.lines.get(timeout=_POLL_S)
            except queue.Empty:
                if cancelled is not None and cancelled.is_set():
                    raise Cancelled("stopped") from None
                if time.monotonic() > deadline:
                    raise DrawingError(
                        f"the model was not loaded within {self._start_timeout_s:g} seconds"
                    ) from None
                continue
            if message is None:
                raise DrawingError(f"the model could not be loaded: {DIED}")
            if "refused" in message:
                raise DrawingError(without_paths(str(message["refused"]), self._secrets))
            names = [field.name for field in fields(ModelFacts)]
            return ModelFacts(**{name: message["ready"][name] for name in names})

    def _follow(
        self,
        process: _Process,
        number: int,
        text: str,
        report: Callable[[Progress], None],
        cancelled: threading.Event,
    ) -> None:
        """Wait for the end of an order."""
        asked_at: float | None = None
        heard_at = time.monotonic()
        while True:
            now = time.monotonic()
            if cancelled.is_set() and asked_at is None:
                process.send({"cancel": number})
                asked_at = now
            if asked_at is not None and now - asked_at > self._obey_s:
                logger.warning("an order went on %g s after it was cancelled", self._obey_s)
                self._end()
                raise Cancelled("stopped")
            if now - heard_at > _SILENCE_S:
                self._end()
                raise DrawingError(f"nothing was heard for {_SILENCE_S:g} seconds: {DIED}")
            try:
                message = process.lines.get(timeout=_POLL_S)
            except queue.Empty:
                continue
            heard_at = time.monotonic()
            if message is None:
                self._end()
                raise DrawingError(DIED)
            if message.get("progress") == number:
                report(Progress(int(message["done"]), int(message["total"]), text))
            elif message.get("drawn") == number:
                return
            elif message.get("cancelled") == number:
                raise Cancelled("stopped")
            elif message.get("failed") == number:
                raise DrawingError(without_paths(str(message["why"]), self._secrets))

    def _end(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process = None
