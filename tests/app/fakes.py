"""Stand-ins for what takes long: a model that draws one color for each seed, at once."""

from __future__ import annotations

import colorsys
import json
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from app.drawing import ModelFacts
from app.jobs import Progress

FACTS = ModelFacts(
    base="dreamrie/tiny-sd",
    resolution=64,
    unit=8,
    usual_steps=4,
    usual_guidance=4.0,
    embedded=True,
    device="cpu",
)


class FakeDrawing:
    """As `app.drawing.DrawingProcess`, without process and model.

    Args:
        step_s: seconds that a denoising step takes.
    """

    def __init__(self, step_s: float = 0.0) -> None:
        self.step_s = step_s
        self.at_work = threading.Lock()
        self.overlaps = 0

    def facts(self) -> ModelFacts:
        return FACTS

    def draw(
        self,
        order: dict[str, Any],
        report: Callable[[Progress], None],
        cancelled: threading.Event,
    ) -> list[dict[str, Any]]:
        if not self.at_work.acquire(blocking=False):
            self.overlaps += 1
            raise AssertionError("two jobs on the device")
        try:
            for number, picture in enumerate(order["pictures"]):
                report(Progress(number, len(order["pictures"]), "drawing"))
                if cancelled.wait(self.step_s):
                    raise InterruptedError
                save(picture)
            return list(order["pictures"])
        finally:
            self.at_work.release()

    def stop(self) -> None:
        pass


def color_of(seed: int) -> tuple[int, int, int]:
    """What a seed looks like."""
    red, green, blue = colorsys.hsv_to_rgb((seed * 0.618) % 1.0, 0.6, 0.9)
    return round(255 * red), round(255 * green), round(255 * blue)


def save(picture: dict[str, Any]) -> None:
    """One picture of an order, with its settings."""
    drawn = Image.new("RGB", (picture["width"], picture["height"]), color_of(picture["seed"]))
    about = PngImagePlugin.PngInfo()
    about.add_text("dreamrie", json.dumps(picture["settings"]))
    drawn.save(picture["file"], pnginfo=about)


def settings_in(path: Path) -> dict[str, Any]:
    """What a picture says about itself."""
    with Image.open(path) as picture:
        found: dict[str, Any] = json.loads(picture.info["dreamrie"])
    return found


def wait_until(done: Callable[[], bool], seconds: float = 20.0) -> None:
    """Until something is so; fails if it never is."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.02)
