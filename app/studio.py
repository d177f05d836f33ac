"""Everything behind the page: the data folder, the device and its queue, the model, the adapters, the trainings."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.asked import AskError, Generate, Limits, asked
from app.drawing import DrawingProcess
from app.gallery import Gallery
from app.jobs import Device, Job
from app.orders import LOOKS, DrawWork, Look, plan, sizes
from app.storage import Owner, Storage
from app.training import Trainings
from app.words import without_paths

# A picture may have half as many pixels again as the model's own.
_MOST_PIXELS = 1.5
_LOG = "drawing.log"


@dataclass(frozen=True)
class AppSettings:
    """What the command line says.

    Attributes:
        data: folder of everything that users upload, train and draw.
        model: base model as in training; None: the embedded one.
        revision: of the Hub.
    """

    data: Path
    model: str | None = None
    revision: str | None = None


class Studio:
    """The parts of a running app; the page calls nothing else.

    Args:
        settings: of the app.
        drawing: draws the pictures; None: a process with the model of the settings.

    Attributes:
        storage, device, drawing, gallery, trainings: see their modules.
        facts: of the base model. base_name: how it is called on the page.
        limits: of what may be asked for.
    """

    def __init__(self, settings: AppSettings, drawing: DrawingProcess | None = None) -> None:
        self.storage = Storage(settings.data)
        self.drawing = drawing or DrawingProcess(
            settings.model, settings.revision, log=settings.data / _LOG
        )
        self.facts = self.drawing.facts()
        self.device = Device(secrets=(settings.data,))
        # A local model is named by its folder, and where that lies is not for browsers.
        self.base_name = without_paths(self.facts.base)
        self.gallery = Gallery(self.storage, self.facts.base)
        self.trainings = Trainings(
            self.storage, self.device, self.drawing, settings.model, settings.revision
        )
        side = self.facts.resolution
        self.limits = Limits(sizes=sizes(self.facts), max_pixels=int(_MOST_PIXELS * side * side))

    def order(self, owner: Owner, values: dict[str, Any], look: str) -> Job:
        """Check what a user asks for and put it in the queue.

        Args:
            owner: who asks.
            values: see `app.asked.Generate`.
            look: one of `LOOKS`.

        Returns:
            The job; its result is an `app.orders.Outcome`.

        Raises:
            AskError: something cannot be asked for.
        """
        wanted = asked(Generate, values, self.limits)
        if look not in LOOKS:
            raise AskError(f"Show: choose one of {', '.join(LOOKS)}.")
        entries = [self.gallery.entry(owner, choice.id) for choice in wanted.adapters]
        for entry in entries:
            if entry.usable:
                raise AskError(f"{entry.title} cannot be used: {entry.usable}")
        found: Sequence[Look] = [name for name in LOOKS if name == look]
        planned, columns = plan(wanted, entries, found[0], self.base_name)
        work = DrawWork(self.storage, owner, self.drawing, planned, columns)
        return self.device.submit(owner, work)

    def close(self) -> None:
        """Stop what runs; trainings keep what they have learned."""
        self.device.close()
        self.drawing.stop()
