"""The drawing process without a model: the real protocol around an artist that paints one color.

    python -m tests.app.fake_worker [--model=HOW] [--immortal | --only-input]

The color tells seed and steps; the prompt says how it goes: "slow", "deaf", "die", "memory", "broken", "refuse". The
flags make it outlive its server: always, or when another process holds the pipe.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from PIL import Image

if __name__ == "__main__":
    from tests.app import light as _light  # noqa: F401

from app import worker
from dreamrie.errors import ConfigError

STEP_S = 0.02
DEAF_S = 6.0


class FakeArtist:
    """Paints (seed, steps, pictures in the batch)."""

    def __init__(self, model: str | None = None) -> None:
        if model == "refused":
            raise ConfigError("/srv/models/sd is incomplete")
        if model == "broken":
            raise KeyError("unet")
        if model == "memory":
            raise MemoryError
        if model == "slow":
            time.sleep(30)
        print("a library says something")
        self.facts: Mapping[str, Any] = {
            "base": "fake/model",
            "resolution": 64,
            "unit": 8,
            "usual_steps": 25,
            "usual_guidance": 4.0,
            "embedded": True,
            "device": "cpu",
        }

    def draw(
        self, pictures: Sequence[Mapping[str, Any]], on_step: Callable[[int, int], None]
    ) -> Sequence[Image.Image]:
        how, steps = pictures[0]["prompt"], pictures[0]["steps"]
        if how == "deaf":
            time.sleep(DEAF_S)
        if how == "memory":
            raise MemoryError
        if how == "broken":
            raise ValueError("a tensor of /srv/models")
        if how == "refuse":
            raise ConfigError("cannot draw with /srv/models/a.safetensors")
        for step in range(steps):
            if how == "slow":
                time.sleep(STEP_S)
            if how == "die" and step == steps // 2:
                os.kill(os.getpid(), signal.SIGKILL)
            on_step(step + 1, steps)
        size = (pictures[0]["width"], pictures[0]["height"])
        return [
            Image.new("RGB", size, (picture["seed"] % 256, steps, len(pictures)))
            for picture in pictures
        ]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", default=None)
    parser.add_argument("--immortal", action="store_true")
    parser.add_argument("--only-input", action="store_true")
    options = parser.parse_args()
    if options.immortal:
        real = worker._Input._read

        def never(self: Any) -> None:
            self._leave = threading.Event().wait
            real(self)

        worker._Input._read = never  # type: ignore[method-assign]
    if options.immortal or options.only_input:
        worker._Input._watch_parent = lambda self: None  # type: ignore[method-assign]
    return worker.run(lambda: FakeArtist(options.model))


if __name__ == "__main__":
    sys.exit(main())
