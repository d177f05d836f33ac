"""The app with a model that draws one color for each seed, as a process of its own: python -m tests.app.fake_server.

Its own process, because a test counts every loop and socket that is left open, and gradio leaves some.
"""

from __future__ import annotations

import argparse
import os
import signal
import threading
from pathlib import Path
from typing import Any, cast


def main() -> None:
    """Serve until SIGTERM; the last line says how many orders met another one on the device."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--step", type=float, default=0.0)
    parser.add_argument("--auth", action="append", default=[])
    options = parser.parse_args()
    os.environ["GRADIO_TEMP_DIR"] = str(options.data.absolute() / "incoming")
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    from app.main import launch
    from app.studio import AppSettings, Studio
    from tests.app.fakes import FakeDrawing

    stopped = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stopped.set())
    drawing = FakeDrawing(options.step)
    studio = Studio(AppSettings(options.data), cast(Any, drawing))
    auth = [tuple(word.split(":")) for word in options.auth]
    page, _ = launch(studio, port=options.port, auth=cast(Any, auth))
    stopped.wait()
    page.close(verbose=False)
    studio.close()
    print(f"two on the device: {drawing.overlaps}", flush=True)


if __name__ == "__main__":
    main()
