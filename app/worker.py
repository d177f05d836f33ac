"""The process that holds the model and draws: `python -m app.worker`, started by `app.drawing` alone.

It reads orders as lines of JSON and answers with lines of JSON:

    {"order": 7, "pictures": [...]}     see `app.drawing.DrawingProcess.draw`
    {"cancel": 7}                       stop at the next denoising step

    {"ready": {...}}                    facts of the model; the first line
    {"refused": "..."}                  instead: why the model cannot be loaded
    {"progress": 7, "done": 3, "total": 50}
    {"drawn": 7}, {"cancelled": 7}, {"failed": 7, "why": "..."}

It ends when its input does, or when its parent is another process than at first: a server that is gone, however it
went, leaves no model in memory behind.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol

from app.words import BROKEN
from dreamrie.errors import DreamrieError
from dreamrie.files import write_atomic

logger = logging.getLogger("app.worker")

# What makes two pictures fit into one batch.
_COMMON = ("negative_prompt", "steps", "guidance", "width", "height", "adapters")
_BATCH = 4
_LOOK_AFTER_PARENT_S = 1.0
NO_MEMORY = "there is not enough memory for this: choose a smaller size, or fewer pictures at once"


class Artist(Protocol):
    """What draws."""

    facts: Mapping[str, Any]

    def draw(
        self, pictures: Sequence[Mapping[str, Any]], on_step: Callable[[int, int], None]
    ) -> Sequence[Any]:
        """Draw pictures that have everything in common but prompt and seed.

        Args:
            pictures: see `app.drawing.DrawingProcess.draw`.
            on_step: called with (done, total) after every denoising step; what it raises ends the drawing.

        Returns:
            PIL images.
        """
        ...


class _Stopped(Exception):  # noqa: N818  no error, but the way out of the denoising loop
    """The order was cancelled."""


class Painter:
    """Implements `Artist` with a Stable Diffusion model.

    Args:
        model: as in training; None: the embedded one.
        revision: of the Hub.
    """

    def __init__(self, model: str | None, revision: str | None) -> None:
        # Minutes of imports, so not before the input is being watched.
        import torch

        from dreamrie.config.train_config import usual_guidance
        from dreamrie.diffusion.components import load_components
        from dreamrie.diffusion.generating import Drawer, DrawRequest
        from dreamrie.diffusion.source import EMBEDDED
        from dreamrie.diffusion.task import picture_unit

        device = "cuda" if torch.cuda.is_available() else "cpu"
        components = load_components(model, revision=revision, device=device)
        embedded = components.source.resolved == EMBEDDED
        self._drawer = Drawer(components)
        self.facts: Mapping[str, Any] = {
            "base": components.source.resolved,
            "resolution": components.resolution,
            "unit": picture_unit(components),
            "usual_steps": DrawRequest.steps,
            "usual_guidance": usual_guidance(embedded),
            "embedded": embedded,
            "device": str(components.device),
        }

    def draw(
        self, pictures: Sequence[Mapping[str, Any]], on_step: Callable[[int, int], None]
    ) -> Sequence[Any]:
        """See `Artist`."""
        from dreamrie.diffusion.generating import AdapterUse, DrawRequest

        first = pictures[0]
        request = DrawRequest(
            prompts=tuple(picture["prompt"] for picture in pictures),
            seeds=tuple(picture["seed"] for picture in pictures),
            negative_prompt=first["negative_prompt"],
            steps=first["steps"],
            guidance_scale=first["guidance"],
            width=first["width"],
            height=first["height"],
            batch_size=_BATCH,
        )
        uses = [
            AdapterUse(Path(use["path"]), scale=use["scale"], rank=use["rank"])
            for use in first["adapters"]
        ]
        return self._drawer.draw(request, uses, on_step=on_step)


class _Input:
    """The lines of the server, read by a thread of its own from the first moment on.

    Args:
        stream: of the server.
        leave: ends the process at once.
    """

    def __init__(self, stream: IO[str], leave: Callable[[], None]) -> None:
        self.orders: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._cancelled: set[int] = set()
        self._stream, self._leave = stream, leave
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._watch_parent, daemon=True).start()

    def is_cancelled(self, order: int) -> bool:
        """Whether an order is to stop."""
        return order in self._cancelled

    def _read(self) -> None:
        for line in self._stream:
            message = json.loads(line)
            if "cancel" in message:
                self._cancelled.add(message["cancel"])
            else:
                self.orders.put(message)
        self._leave()

    def _watch_parent(self) -> None:
        """A copy of the pipe's other end, in some other child of the server, would keep the input open."""
        parent = os.getppid()
        while os.getppid() == parent:
            time.sleep(_LOOK_AFTER_PARENT_S)
        self._leave()


def serve(
    load: Callable[[], Artist],
    stream: IO[str],
    answer: Callable[[dict[str, Any]], None],
    leave: Callable[[], None],
) -> None:
    """Load the model and draw what is ordered, until the input ends.

    Args:
        load: makes what draws.
        stream: lines of the server.
        answer: writes a line to it.
        leave: ends the process at once.
    """
    lines = _Input(stream, leave)
    try:
        artist = load()
    except DreamrieError as error:
        answer({"refused": str(error)})
        return
    except BaseException as error:  # whatever it is, the server must not wait for it
        logger.error("the model cannot be loaded", exc_info=True)
        answer({"refused": NO_MEMORY if _is_memory(error) else BROKEN})
        return
    answer({"ready": dict(artist.facts)})
    while True:
        order = lines.orders.get()
        answer(_outcome(order, artist, lines, answer))


def _outcome(
    order: dict[str, Any],
    artist: Artist,
    lines: _Input,
    answer: Callable[[dict[str, Any]], None],
) -> dict[str, Any]:
    """Draw an order; the answer says how it went."""
    number = order["order"]
    try:
        _draw(order, artist, lines, answer)
    except _Stopped:
        return {"cancelled": number}
    except DreamrieError as error:
        return {"failed": number, "why": str(error)}
    except BaseException as error:  # the model stays loaded for the next order
        logger.error("an order failed", exc_info=True)
        return {"failed": number, "why": NO_MEMORY if _is_memory(error) else BROKEN}
    return {"drawn": number}


def _draw(
    order: dict[str, Any],
    artist: Artist,
    lines: _Input,
    answer: Callable[[dict[str, Any]], None],
) -> None:
    """All pictures, batch by batch, each written as soon as it is there."""
    number, pictures = order["order"], order["pictures"]
    total = sum(picture["steps"] for picture in pictures)
    begun = 0
    for batch in _batches(pictures):
        share = sum(picture["steps"] for picture in batch)

        def on_step(done: int, of: int, begun: int = begun, share: int = share) -> None:
            if lines.is_cancelled(number):
                raise _Stopped
            answer({"progress": number, "done": begun + share * done // max(of, 1), "total": total})

        if lines.is_cancelled(number):
            raise _Stopped
        for picture, image in zip(batch, artist.draw(batch, on_step), strict=True):
            write_png(Path(picture["file"]), image, picture["settings"])
        begun += share


def _batches(pictures: Sequence[Mapping[str, Any]]) -> list[list[Mapping[str, Any]]]:
    """Pictures that differ in nothing but prompt and seed, together."""
    groups: dict[str, list[Mapping[str, Any]]] = {}
    for picture in pictures:
        key = json.dumps([picture[name] for name in _COMMON])
        groups.setdefault(key, []).append(picture)
    return list(groups.values())


def write_png(path: Path, image: Any, settings: Mapping[str, Any]) -> None:
    """Write a picture that carries its settings.

    Args:
        path: of the file; its folder exists.
        image: a PIL image.
        settings: kept as JSON in the text chunk "dreamrie".

    Raises:
        DreamrieError: the file cannot be written.
    """
    from PIL.PngImagePlugin import PngInfo

    chunk = PngInfo()
    # Without letters outside ASCII, which that kind of chunk cannot hold.
    chunk.add_text("dreamrie", json.dumps(settings, ensure_ascii=True))
    content = BytesIO()
    image.save(content, "PNG", pnginfo=chunk)
    try:
        write_atomic(path, content.getvalue())
    except OSError as error:
        reason = error.strerror or type(error).__name__
        raise DreamrieError(f"the picture {path.name} cannot be written: {reason}") from error


def _is_memory(error: BaseException) -> bool:
    """Whether memory ran out; torch has a kind of its own for a GPU, and words for the CPU."""
    return (
        isinstance(error, MemoryError)
        or type(error).__name__ == "OutOfMemoryError"
        or (isinstance(error, RuntimeError) and "not enough memory" in str(error))
    )


@contextmanager
def own_output() -> Iterator[IO[str]]:
    """The output, for answers alone: what libraries print goes to the log.

    Yields:
        A stream to the server.
    """
    kept = os.dup(1)
    os.dup2(2, 1)
    # The error stream passes every line on at once; what waits in the other one is lost when the process is killed.
    with redirect_stdout(sys.stderr), os.fdopen(kept, "w", encoding="utf-8") as stream:
        yield stream


def run(load: Callable[[], Artist]) -> int:
    """Serve on the standard streams.

    Args:
        load: makes what draws.

    Returns:
        The exit code.
    """
    logging.basicConfig(format="%(asctime)s %(message)s", stream=sys.stderr)
    with own_output() as out:

        def answer(message: dict[str, Any]) -> None:
            try:
                out.write(json.dumps(message) + "\n")
                out.flush()
            except BrokenPipeError:  # the server is gone
                os._exit(0)

        serve(load, sys.stdin, answer, lambda: os._exit(0))
    return 1


def main(argv: Sequence[str] | None = None) -> int:
    """Run the process.

    Args:
        argv: arguments; None: those of the process.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(prog="app.worker", allow_abbrev=False)
    parser.add_argument("--model", default=None)
    parser.add_argument("--revision", default=None)
    options = parser.parse_args(argv)
    return run(lambda: Painter(options.model, options.revision))


if __name__ == "__main__":
    sys.exit(main())
