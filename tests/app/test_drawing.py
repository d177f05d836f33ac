"""W4: a drawing process that dies costs one job, one that is told to stop stops, and none outlives its server."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from app import drawing, worker
from app.drawing import DrawingError, DrawingProcess, ModelFacts
from app.jobs import Cancelled, Progress
from app.words import BROKEN
from tests.app.fake_worker import FakeArtist
from tests.contracts.sources import ROOT

pytestmark = pytest.mark.end_to_end

FAKE = (sys.executable, "-m", "tests.app.fake_worker")
REAL = (sys.executable, "-m", "app.worker")


def picture(folder: Path, number: int, prompt: str = "x", **changes: Any) -> dict[str, Any]:
    """A picture of an order."""
    return {
        "prompt": prompt,
        "negative_prompt": "",
        "seed": number,
        "steps": 10,
        "guidance": 4.0,
        "width": 64,
        "height": 64,
        "adapters": [],
        "file": str(folder / f"{number}.png"),
        "settings": {"prompt": prompt, "seed": number, "note": "Ü 猫"},
        **changes,
    }


def draw(process: Any, *pictures: dict[str, Any], cancelled: threading.Event | None = None) -> Any:
    """One order, without a listener."""
    order = {"id": "an order", "pictures": list(pictures)}
    return process.draw(order, lambda progress: None, cancelled or threading.Event())


def seen(path: Path) -> tuple[bytes, Any]:
    """Pixels of a picture and the settings it carries."""
    with Image.open(path) as image:
        return image.convert("RGB").tobytes(), json.loads(image.text["dreamrie"])


@contextmanager
def process_of(impl: Any, *words: str, **options: Any) -> Iterator[Any]:
    """A drawing process that is gone afterwards."""
    made = impl.DrawingProcess(None, None, command=(*FAKE, *words), **options)
    try:
        yield made
    finally:
        made.stop()


def cancel_later(seconds: float) -> threading.Event:
    """An event that is set after a while."""
    event = threading.Event()
    timer = threading.Timer(seconds, event.set)
    timer.daemon = True
    timer.start()
    return event


def is_gone(pid: int) -> bool:
    """Whether a process has ended; nobody may have asked for the exit code of an orphan."""
    try:
        os.kill(pid, 0)
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (ProcessLookupError, FileNotFoundError):
        return True


def waits_until(condition: Callable[[], bool], seconds: float) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


# ----------------------------------------------------------------------------------------------------- laws


def law_a_killed_process_costs_one_order(impl: Any, folder: Path) -> None:
    """Killed in the middle of an order, that order fails in plain words, and the next one is drawn by a new process."""
    with process_of(impl) as process:
        draw(process, picture(folder, 1))
        first = process.pid
        with pytest.raises(impl.DrawingError, match="ran out of memory or was killed"):
            draw(process, picture(folder, 2, "die"))
        assert not (folder / "2.png").exists()
        draw(process, picture(folder, 3))
        assert process.pid not in {None, first}
        assert seen(folder / "3.png")[0][:3] == bytes((3, 10, 1))


def law_a_cancelled_order_stops_soon(impl: Any, folder: Path) -> None:
    """Within 2 seconds, in the same process, which draws the next order right."""
    with process_of(impl, obey_s=3.0) as process:
        draw(process, picture(folder, 1))
        first, cancelled, started = process.pid, cancel_later(0.2), time.monotonic()
        with pytest.raises(Cancelled):
            draw(process, picture(folder, 2, "slow", steps=250), cancelled=cancelled)
        assert time.monotonic() - started < 2.2
        draw(process, picture(folder, 3, steps=7))
        assert process.pid == first
        assert seen(folder / "3.png")[0][:3] == bytes((3, 7, 1))


def law_an_order_that_does_not_obey_is_ended(impl: Any, folder: Path) -> None:
    """A process that does not look at its cancellation is killed after the time it is given."""
    with process_of(impl, obey_s=0.5) as process:
        process.facts()
        started = time.monotonic()
        with pytest.raises(Cancelled):
            draw(process, picture(folder, 1, "deaf"), cancelled=cancel_later(0.1))
        assert time.monotonic() - started < 3.0
        draw(process, picture(folder, 2))


TROUBLES = {
    "refuse": "cannot draw with a.safetensors",
    "broken": BROKEN,
    "memory": worker.NO_MEMORY,
}


def law_what_cannot_be_drawn_is_told_plainly(impl: Any, folder: Path) -> None:
    """An order that fails says why without a path or the words of a library, and the process goes on."""
    with process_of(impl) as process:
        first = None
        for how, words in TROUBLES.items():
            with pytest.raises(impl.DrawingError) as caught:
                draw(process, picture(folder, 1, how))
            assert str(caught.value) == words
            first = first or process.pid
            assert process.pid == first
        with pytest.raises(impl.DrawingError) as caught:
            impl.DrawingProcess("refused", None, command=FAKE).facts()
        assert str(caught.value) == "sd is incomplete"


SERVER = """
import subprocess, sys, time
import tests.app.light
from app.drawing import DrawingProcess
process = DrawingProcess(None, None, command=sys.argv[1:])
process.facts()
pipe = process._process._popen.stdin.fileno()
other = subprocess.Popen(["sleep", "30"], pass_fds=(pipe,), stdout=subprocess.DEVNULL)
print(process.pid, other.pid, flush=True)
time.sleep(60)
"""


def law_the_process_dies_with_its_server(words: Any) -> None:
    """The server killed with -9, its process ends within 5 seconds, though another child holds the pipe open."""
    command = [sys.executable, "-c", SERVER, *FAKE, *words]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as server:
        line = server.stdout.readline()
        server.kill()
    pid, other = map(int, line.split())
    try:
        assert waits_until(lambda: is_gone(pid), 5.0)
    finally:
        for each in (pid, other):
            if not is_gone(each):
                os.kill(each, signal.SIGKILL)


def law_each_picture_gets_its_own_settings(impl: Any, folder: Path) -> None:
    """Pictures are batched only with those like them, and each lands in its own file with its own seed and settings."""
    steps = {1: 10, 2: 5, 3: 10, 4: 5, 5: 20}
    order = {"order": 1, "pictures": [picture(folder, n, steps=s) for n, s in steps.items()]}
    told: list[dict[str, Any]] = []
    impl._draw(order, FakeArtist(), SimpleNamespace(is_cancelled=lambda order: False), told.append)
    for number, count in steps.items():
        pixels, settings = seen(folder / f"{number}.png")
        batch = list(steps.values()).count(count)
        assert pixels[:3] == bytes((number, count, batch))
        assert settings == {"prompt": "x", "seed": number, "note": "Ü 猫"}
    done = [row["done"] for row in told]
    assert done == sorted(done)
    assert (done[-1], {row["total"] for row in told}) == (50, {50})


IN_A_FOLDER = [
    law_a_killed_process_costs_one_order,
    law_a_cancelled_order_stops_soon,
    law_an_order_that_does_not_obey_is_ended,
    law_what_cannot_be_drawn_is_told_plainly,
]


@pytest.mark.parametrize("law", IN_A_FOLDER, ids=lambda law: law.__name__)
def test_the_process_keeps_its_laws(law: Callable[[Any, Path], None], tmp_path: Path) -> None:
    """Each law on the real server side, with an artist that paints one color."""
    law(drawing, tmp_path)


def test_each_picture_is_drawn_with_its_own_settings(tmp_path: Path) -> None:
    """The law on the real process, without the pipes."""
    law_each_picture_gets_its_own_settings(worker, tmp_path)


def test_no_process_outlives_its_server() -> None:
    """The law on the real input of the process."""
    law_the_process_dies_with_its_server(())


# ------------------------------------------------------------------------------------------ without a model


def test_stop_ends_an_order_and_facts_are_known_without_a_process(tmp_path: Path) -> None:
    """A training takes the device in the middle of a picture; the page still knows its model."""
    with process_of(drawing) as process:
        facts = process.facts()
        assert facts == ModelFacts("fake/model", 64, 8, 25, 4.0, True, "cpu")
        pid, timer = process.pid, threading.Timer(0.3, process.stop)
        timer.start()
        with pytest.raises(DrawingError):
            draw(process, picture(tmp_path, 1, "slow", steps=250))
        timer.join()
        assert is_gone(pid)
        assert process.pid is None
        assert process.facts() is facts
        assert process.pid is None, "facts start no second process"
        process.stop()


@pytest.mark.parametrize(
    ("how", "words"), [("broken", BROKEN), ("memory", worker.NO_MEMORY), ("slow", "within 1 sec")]
)
def test_a_model_that_cannot_be_loaded_is_told(how: str, words: str) -> None:
    """By its own words, and after the time that loading may take."""
    process = DrawingProcess(how, None, command=FAKE, start_timeout_s=1.0 if how == "slow" else 60)
    with pytest.raises(DrawingError, match=words[:30]):
        process.facts()
    assert process.pid is None


def test_loading_can_be_cancelled(tmp_path: Path) -> None:
    """Nobody waits minutes for a model that they no longer want."""
    process = DrawingProcess("slow", None, command=FAKE)
    started = time.monotonic()
    with pytest.raises(Cancelled):
        draw(process, picture(tmp_path, 1), cancelled=cancel_later(0.2))
    assert time.monotonic() - started < 3
    assert process.pid is None


def test_what_libraries_print_goes_to_the_log(tmp_path: Path) -> None:
    """The answers stay lines of JSON."""
    log = tmp_path / "drawing.log"
    with process_of(drawing, log=log) as process:
        draw(process, picture(tmp_path, 1))
        with pytest.raises(DrawingError):
            draw(process, picture(tmp_path, 2, "broken"))
    text = log.read_text("utf-8")
    assert "a library says something" in text
    assert "ValueError: a tensor of /srv/models" in text


# ------------------------------------------------------------------------------------ the embedded model


@pytest.fixture(scope="module")
def painter() -> Iterator[DrawingProcess]:
    """The real process with the model that comes along."""
    process = DrawingProcess(None, None)
    yield process
    process.stop()


@pytest.mark.slow
def test_the_same_order_draws_the_same_pixels(painter: DrawingProcess, tmp_path: Path) -> None:
    """Twice in one process, and once more in another after the first was killed in the middle of a picture."""
    assert painter.facts() == ModelFacts("dreamrie/tiny-sd", 64, 16, 25, 4.0, True, "cpu")
    told: list[Progress] = []
    orders = [tmp_path / name for name in ("first", "second", "third")]
    for folder in orders:
        folder.mkdir()
    wanted = [[picture(f, n, "a pumpkin", steps=6) for n in (1, 2)] for f in orders]
    never = threading.Event()
    painter.draw({"id": "1", "pictures": wanted[0]}, told.append, never)
    assert (told[-1].done, told[-1].total, told[-1].text) == (12, 12, "drawing 2 pictures")
    draw(painter, *wanted[1])
    pid = painter.pid

    def kill(progress: Progress) -> None:
        if progress.done == 2 and not is_gone(pid):
            os.kill(pid, signal.SIGKILL)

    long = picture(tmp_path, 9, "a pumpkin", steps=100)
    with pytest.raises(DrawingError, match="ran out of memory or was killed"):
        painter.draw({"id": "2", "pictures": [long]}, kill, never)
    draw(painter, *wanted[2])
    for number in (1, 2):
        pixels = {seen(folder / f"{number}.png")[0] for folder in orders}
        assert len(pixels) == 1
    assert seen(orders[0] / "1.png")[0] != seen(orders[0] / "2.png")[0]
    assert len(set(seen(orders[0] / "1.png")[0])) > 20, "a picture, not one color"


@pytest.mark.slow
def test_a_real_drawing_stops_within_two_seconds(painter: DrawingProcess, tmp_path: Path) -> None:
    """And the same process draws the next order."""
    draw(painter, picture(tmp_path, 1, "a duck", steps=1))
    pid, cancelled = painter.pid, threading.Event()
    stopped_at: list[float] = []

    def stop(progress: Progress) -> None:
        if progress.done == 3:
            stopped_at.append(time.monotonic())
            cancelled.set()

    long = picture(tmp_path, 2, "a duck", steps=100)
    with pytest.raises(Cancelled):
        painter.draw({"id": "1", "pictures": [long]}, stop, cancelled)
    assert time.monotonic() - stopped_at[0] < 2.0
    draw(painter, picture(tmp_path, 3, "a duck", steps=1))
    assert painter.pid == pid


def test_adapters_arrive_with_scale_and_rank(painter: DrawingProcess, tmp_path: Path) -> None:
    """Scale 0 is the base, two halves are a whole, and a rank beyond that of the file is the file as it is."""
    file = str(ROOT / "app" / "examples" / "pumpkin" / "adapter.safetensors")
    uses: list[list[tuple[float, int | None]]] = [[], [(0.0, None)], [(1.0, None)]]
    uses += [[(0.5, None), (0.5, None)], [(1.0, 64)], [(1.0, 1)]]
    for number, adapters in enumerate(uses):
        given = [{"path": file, "scale": scale, "rank": rank} for scale, rank in adapters]
        changes = {"seed": 3, "steps": 6, "adapters": given}
        draw(painter, picture(tmp_path, number, "a sks pumpkin", **changes))
    base, off, whole, halves, above, first = (seen(tmp_path / f"{n}.png")[0] for n in range(6))
    assert base == off
    assert whole == halves
    assert len({base, whole, first}) == 3
    # The nearest change of rank 64 is the change, up to rounding.
    pairs = zip(whole, above, strict=True)
    assert max(abs(a - b) for a, b in pairs) <= 2


def test_a_refusal_of_the_model_arrives_without_paths(
    painter: DrawingProcess, tmp_path: Path
) -> None:
    """An adapter that is not there, a size that the model cannot draw."""
    use = {"path": str(tmp_path / "no.safetensors"), "scale": 1.0, "rank": None}
    with pytest.raises(DrawingError) as caught:
        draw(painter, picture(tmp_path, 1, adapters=[use]))
    assert "no.safetensors" in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    with pytest.raises(DrawingError, match="multiple of 16"):
        draw(painter, picture(tmp_path, 1, width=63))
