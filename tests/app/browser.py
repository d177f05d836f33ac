"""A browser and a server for tests that use the page as a person does."""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from tests.contracts.sources import ROOT

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
CONCEPTS = ROOT / "examples" / "concepts"
SCREENSHOTS = "DREAMRIE_SCREENSHOTS"
WIDE, PHONE = (1280, 900), (390, 844)
TABS = ("Generate", "Train", "Score")
# Words of the machine that no page may show.
TELLTALE = re.compile(r"Traceback|File \"|/tmp/|/home/|/root/|/work/|site-packages")
_START_S, _STOP_S = 120.0, 60.0


def require_browser() -> None:
    """Skip, and say why, where there is no browser to drive."""
    pytest.importorskip("playwright", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("neither chromium nor google-chrome is on PATH")


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


class Server:
    """`python -m app` as a process.

    Args:
        data: its folder.
        log: file for what it says.
        port: None: any that is free. What a browser keeps, it keeps for one port.
        command: starts it; None: the app.
    """

    def __init__(
        self, data: Path, log: Path, port: int | None = None, command: list[str] | None = None
    ) -> None:
        self.data, self.log, self.port = data, log, port or free_port()
        self.url = f"http://127.0.0.1:{self.port}/"
        usual = [sys.executable, "-m", "app", "--data", str(data), "--port", str(self.port)]
        with log.open("ab") as said:
            self._process = subprocess.Popen(
                command or usual,
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1"},
                stdout=said,
                stderr=said,
                start_new_session=True,
            )

    def wait_until_served(self) -> None:
        end = time.monotonic() + _START_S
        while not self._answers():
            assert self._process.poll() is None, self.log.read_text("utf-8")
            assert time.monotonic() < end, self.log.read_text("utf-8")
            time.sleep(0.1)

    def _answers(self) -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", self.port)) == 0

    @property
    def pid(self) -> int:
        return self._process.pid

    def stop(self) -> int:
        """As a system that shuts down does it; returns the exit code."""
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)
        try:
            return self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise


@contextmanager
def served(data: Path, log: Path, port: int | None = None) -> Iterator[Server]:
    """A server that is ready; it is stopped at the end."""
    server = Server(data, log, port)
    try:
        server.wait_until_served()
        yield server
    finally:
        server.stop()


@dataclass
class Watched:
    """What went wrong in a browser without a word to its user."""

    url: str
    said: list[str] = field(default_factory=list)

    def watch(self, page: Any) -> None:
        page.on("console", lambda m: self.said.append(m.text) if m.type == "error" else None)
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("request", lambda request: self._check(request.url))

    def _check(self, url: str) -> None:
        if not url.startswith((self.url, "data:", "blob:")):
            self.said.append(f"request to {url}")


@contextmanager
def browser() -> Iterator[Any]:
    """A browser without a window."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as play:
        window = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        try:
            yield window
        finally:
            window.close()


@contextmanager
def person(window: Any, url: str, **options: Any) -> Iterator[tuple[Any, Watched]]:
    """Somebody with a browser profile of their own, looking at the page."""
    options = {"viewport": {"width": WIDE[0], "height": WIDE[1]}, **options}
    context = window.new_context(**options)
    watched = Watched(url)
    try:
        page = context.new_page()
        page.set_default_timeout(60_000)
        watched.watch(page)
        open_page(page, url)
        yield page, watched
    finally:
        context.close()


def open_page(page: Any, url: str) -> None:
    """Load the page and wait until it knows its user."""
    page.goto(url)
    page.wait_for_selector("#concepts .dr-card")


def tab(page: Any, name: str) -> None:
    """Open a tab of the page."""
    page.locator("button[role=tab]", has_text=name).first.click()


def choose(page: Any, title: str) -> None:
    """Click on a concept."""
    page.locator("#concepts .dr-card", has_text=title).first.click()
    page.locator("#concepts .dr-card.dr-chosen", has_text=title).wait_for()


def drawn_seed(page: Any, before: str = "") -> int:
    """Wait for pictures; the seed that is said beside them."""
    line = page.locator("#drawn", has_text=re.compile(r"first seed \d+"))
    line.wait_for()
    found = re.search(r"first seed (\d+)", line.inner_text())
    assert found is not None
    return int(found[1])


def draw(page: Any, how: str = "button") -> int:
    """Draw by button or by key; returns the seed."""
    if how == "button":
        page.click("#draw")
    else:
        page.locator("#prompt textarea").press("Enter")
    # The last result stands there until the order is in the queue.
    page.locator("#drawn .dr-track").wait_for()
    return drawn_seed(page)


def toast(page: Any) -> str:
    """Wait for an error message, close it, and return its words."""
    shown = page.locator(".toast-body.error")
    shown.first.wait_for()
    words: str = shown.first.inner_text()
    page.locator(".toast-close").first.click()
    shown.first.wait_for(state="detached")
    return words


def screenshots(
    page: Any, folder: Path, stage: str, schemes: Sequence[str] = ("light", "dark")
) -> list[Path]:
    """Every tab, on a wide screen and a phone, light and dark; nothing is wider than the phone."""
    made = []
    for scheme in schemes:
        page.emulate_media(color_scheme=scheme)
        page.evaluate(f"document.body.classList.toggle('dark', {str(scheme == 'dark').lower()})")
        for size in (WIDE, PHONE):
            page.set_viewport_size({"width": size[0], "height": size[1]})
            for name in TABS:
                tab(page, name)
                page.wait_for_timeout(300)
                path = folder / f"{stage}-{name.lower()}-{size[0]}-{scheme}.png"
                page.screenshot(path=str(path), full_page=True)
                made.append(path)
                width, inner = page.evaluate(
                    "[document.documentElement.scrollWidth, window.innerWidth]"
                )
                assert width <= inner, f"{path.name}: {width} px on a screen of {inner} px"
    page.set_viewport_size({"width": WIDE[0], "height": WIDE[1]})
    return made


def screenshot_folder(otherwise: Path) -> Path:
    """Where screenshots go; printed, so that somebody can look at them."""
    folder = Path(os.environ.get(SCREENSHOTS) or otherwise)
    folder.mkdir(parents=True, exist_ok=True)
    print(f"screenshots: {folder}")
    return folder
