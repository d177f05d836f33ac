"""Trainings of the app: started, watched, stopped and resumed; what is known of one stands in its run folder alone.

The job in the queue only holds the device while the process of `app.running` works. A server that ends in order stops
its training, which then commits a checkpoint. One that is killed leaves it running; the next server finds it by its
lock, gives it the device, and can watch and stop it as any other.
"""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

from app.asked import Train
from app.drawing import DrawingProcess
from app.fresh import fresh_folder
from app.jobs import BusyError, Device, Job
from app.recipe import Usual, prompt_of, settings_of, usual, with_folders
from app.running import CHECKOUT, STOPPED, TrainingError, is_alive, read_record, send, write_record
from app.storage import Owner, Storage, StorageError
from app.training_work import CONFIG, KILL_AFTER_S, TrainingWork, log_of, why_it_failed
from app.watching import (
    RunFacts,
    RunReader,
    Status,
    TrainingState,
    how_it_ended,
    phase_of,
    whole,
)
from app.words import without_paths
from dreamrie.config import make_config, parse_yaml, to_yaml
from dreamrie.diffusion.images import list_images
from dreamrie.errors import DreamrieError
from dreamrie.files import write_atomic

__all__ = ["TrainingError", "TrainingState", "Trainings"]

logger = logging.getLogger(__name__)


class Trainings:
    """All trainings of all owners.

    Args:
        storage: where their folders are.
        device: where they run, one at a time.
        drawing: gives way to a training; None: nothing is drawn.
        model: base model; None: the embedded one.
        revision: of the Hub.
        recipe: settings of a training, as `app.recipe.settings_of`.
        kill_after_s: seconds that a training gets to stop.
    """

    def __init__(
        self,
        storage: Storage,
        device: Device,
        drawing: DrawingProcess | None,
        model: str | None,
        revision: str | None,
        *,
        recipe: Callable[..., dict[str, Any]] = settings_of,
        kill_after_s: float = KILL_AFTER_S,
    ) -> None:
        self._storage, self._device, self._drawing = storage, device, drawing
        # The training stands in another folder than the server.
        is_folder = model is not None and Path(model).expanduser().exists()
        self._model = str(Path(str(model)).expanduser().absolute()) if is_folder else model
        self._revision, self._recipe, self._kill_after_s = revision, recipe, kill_after_s
        self._secrets = [storage.root, CHECKOUT, Path.home(), Path(sys.prefix)]
        self._reader = RunReader()
        self._jobs: dict[tuple[str, str], Job] = {}
        # Two clicks at once must not start one training twice.
        self._lock = threading.RLock()
        self._adopt()

    def usual(self) -> Usual:
        """What usually works with the present base model."""
        return usual(self._model is None)

    def start(self, owner: Owner, train: Train) -> str:
        """Put a training into the queue.

        Args:
            owner: whose it is.
            train: what to train.

        Returns:
            Its name.

        Raises:
            TrainingError: the photos or settings cannot be used. The same for a full queue, as `BusyError`; nothing is
                left behind.
        """
        photos = self._storage.folder(owner, "photos", train.photos)
        try:
            pictures = len(list_images(photos))
        except DreamrieError as error:
            raise TrainingError(without_paths(str(error), self._secrets)) from error
        if not pictures:
            raise TrainingError("there are no photos to learn from; add some first.")
        device = "cpu" if self._drawing is None else self._drawing.facts().device
        settings = self._recipe(
            train, pictures=pictures, model=self._model, revision=self._revision, device=device
        )
        record = {
            "title": train.title,
            "subject": train.subject,
            "prompt": prompt_of(train.subject),
            "photos": train.photos,
            "max_steps": train.steps,
            "settings": settings,
            "launched": False,
        }
        with fresh_folder(self._storage, owner, "runs", train.title) as name:
            write_record(self._storage.folder(owner, "runs", name), record)
            self._submit(owner, name)
        return name

    def resume(self, owner: Owner, name: str) -> None:
        """Go on after a stop, a failure or a restart: from the newest checkpoint, without one from the start.

        Args:
            owner: who asks.
            name: of the training.

        Raises:
            TrainingError: it runs, waits or has finished. The same for photos that are gone, as `StorageError`, and a
                full queue, as `BusyError`.
        """
        with self._lock:
            state = self.state(owner, name)
            if state.status == "finished":
                raise TrainingError(f"{state.title} has finished; there is nothing left to do.")
            if state.status not in {"stopped", "failed"}:
                raise TrainingError(f"{state.title} is {state.status} already.")
            self._submit(owner, name)

    def stop(self, owner: Owner, name: str) -> None:
        """Stop a training; one that runs commits a checkpoint first. One that has ended is left as it is.

        Args:
            owner: who asks.
            name: of the training.

        Raises:
            StorageError: there is none of this name.
        """
        folder = self._storage.folder(owner, "runs", name)
        job = self._jobs.get((owner.id, name))
        if job is not None and self._device.cancel(owner, job.id) and job.started is not None:
            return
        # What an earlier server had started, before its job had its turn or if the queue was full.
        send(folder, signal.SIGTERM)

    def remove(self, owner: Owner, name: str) -> None:
        """Remove a training and all that it has learned.

        Args:
            owner: who asks.
            name: of the training.

        Raises:
            TrainingError: it has not ended.
        """
        with self._lock:
            status = self._status(owner, name, self._storage.folder(owner, "runs", name))
            if status in {"waiting", "running", "stopping"}:
                raise TrainingError(f"{name} is {status}; stop it first, and wait until it has.")
            self._storage.remove(owner, "runs", name)

    def states(self, owner: Owner) -> list[TrainingState]:
        """All trainings of an owner, newest first.

        Args:
            owner: who asks.

        Returns:
            See `TrainingState`.
        """
        found = []
        for name in self._storage.names(owner, "runs"):
            try:
                found.append(self.state(owner, name))
            except StorageError:  # removed meanwhile
                continue
        return found

    def state(self, owner: Owner, name: str) -> TrainingState:
        """How a training goes.

        Args:
            owner: who asks.
            name: of the training.

        Returns:
            True also after a restart of the server.

        Raises:
            StorageError: there is none of this name.
        """
        folder = self._storage.folder(owner, "runs", name)
        # First whether it runs, then what it wrote: the reverse could call a run stopped that has finished.
        active = self._status(owner, name, folder)
        record = read_record(folder)
        max_steps = whole(record.get("max_steps"))
        facts = self._reader.read(folder, max_steps)
        ended = active or how_it_ended(record, facts, max_steps)
        pace = facts.seconds_per_step if active == "running" else None
        return TrainingState(
            name=name,
            title=str(record.get("title", name)),
            prompt=str(record.get("prompt", "")),
            subject=str(record.get("subject", "")),
            status=ended,
            doing=self._doing(owner, name, ended, facts, record),
            step=facts.step,
            max_steps=max_steps,
            eta_s=None if pace is None else pace * max(0, max_steps - facts.step),
            can_resume=ended in {"stopped", "failed"} and facts.checkpoint is not None,
            losses=facts.losses,
            scorings=facts.scorings,
            best_step=facts.best_step,
            reason=facts.reason if facts.best_step is not None else "",
            message=without_paths(facts.message, self._secrets),
            is_alarm=facts.is_alarm,
            sheets=facts.sheets,
            spectrum=facts.spectrum,
            error=self._error(folder, ended, record, facts),
        )

    # ------------------------------------------------------------------------------------------ the queue

    def _submit(self, owner: Owner, name: str, adopts: bool = False) -> None:
        """Write the settings with the folders of now, and queue the work."""
        folder = self._storage.folder(owner, "runs", name)
        if not adopts:
            record = read_record(folder)
            settings, photos = record.get("settings"), record.get("photos")
            if not isinstance(settings, dict) or not isinstance(photos, str):
                raise TrainingError(f"the record of {name} is damaged; it cannot go on.")
            pictures = self._storage.folder(owner, "photos", photos)
            try:
                if (folder / CONFIG).is_file():
                    # Of a run that goes on: what was left to the defaults then is not what they are now.
                    settings = parse_yaml((folder / CONFIG).read_text("utf-8"), CONFIG)
                values = with_folders(settings, pictures, folder)
                text = to_yaml(make_config(values))
                write_atomic(folder / CONFIG, text.encode())
            except DreamrieError as error:
                raise TrainingError(without_paths(str(error), self._secrets)) from error
            except UnicodeDecodeError as error:
                raise TrainingError(f"{CONFIG} of {name} is damaged; it cannot go on.") from error
            except OSError as error:
                reason = error.strerror or type(error).__name__
                raise TrainingError(
                    f"the settings cannot be read and written again: {reason}."
                ) from error
        work = TrainingWork(folder, self._drawing, adopts=adopts, kill_after_s=self._kill_after_s)
        with self._lock:
            self._jobs[owner.id, name] = self._device.submit(owner, work)

    def _adopt(self) -> None:
        """Give the device to a training that an earlier server has left running."""
        for owner in self._storage.owners():
            try:
                for name in self._storage.names(owner, "runs"):
                    if is_alive(self._storage.folder(owner, "runs", name)):
                        self._submit(owner, name, adopts=True)
            except (StorageError, BusyError) as error:
                logger.warning("a training could not be taken over: %s", error)

    def _status(
        self, owner: Owner, name: str, folder: Path
    ) -> Literal["waiting", "running", "stopping"] | None:
        """What a training does at this moment; None: it does not run and does not wait."""
        with self._lock:
            job = self._jobs.get((owner.id, name))
            if job is not None and job.has_ended:
                # Its work and result would be kept for ever.
                del self._jobs[owner.id, name]
                job = None
        if job is not None and job.status == "running":
            return "stopping" if job.is_stopping else "running"
        if is_alive(folder):
            return "running"
        # It may have begun, or ended, since it was looked up.
        if job is None or job.has_ended:
            return None
        return "waiting" if job.status == "waiting" else "running"

    # ------------------------------------------------------------------------------------------ in words

    def _doing(
        self, owner: Owner, name: str, status: Status, facts: RunFacts, record: dict[str, Any]
    ) -> str:
        max_steps = whole(record.get("max_steps"))
        if status == "waiting":
            job = self._jobs.get((owner.id, name))
            count = 0 if job is None else job.ahead()
            return f"waiting, {count} {'job' if count == 1 else 'jobs'} before it"
        if status == "stopping":
            return f"stopping at step {facts.step}, and saving what was learned"
        if status == "running":
            folder = self._storage.folder(owner, "runs", name)
            return phase_of(log_of(folder), facts, record, max_steps)
        if status == "finished":
            return f"finished after {facts.step} steps"
        return f"{status} at step {facts.step} of {max_steps}"

    def _error(self, folder: Path, status: Status, record: dict[str, Any], facts: RunFacts) -> str:
        if status not in {"stopped", "failed"}:
            return ""
        if not record:
            return "the record of this training is damaged; it cannot go on."
        if not record.get("launched"):
            return "it had not begun yet."
        code = record.get("exit")
        if status == "stopped" and code in STOPPED:
            return ""
        on = "from the start" if facts.checkpoint is None else f"from step {facts.checkpoint}"
        return f"{why_it_failed(folder, code, self._secrets)}; it can go on {on}."
