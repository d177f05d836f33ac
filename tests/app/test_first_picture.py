"""How long it takes from the start of the server to the first picture on the page."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.app import browser as by
from tests.mutants.summary import FIGURE

pytestmark = pytest.mark.end_to_end

BAR_S = 30.0


@pytest.mark.slow
def test_the_first_picture_comes_soon(tmp_path: Path, record_property: Any) -> None:
    """From `python -m app` to a picture of an example beside the base model: 30 s on an idle machine."""
    by.require_browser()
    with by.browser() as window:
        began = time.monotonic()
        with by.served(tmp_path / "data", tmp_path / "server.log") as server:
            served = time.monotonic() - began
            with by.person(window, server.url) as (page, watched):
                by.choose(page, "pumpkin")
                by.draw(page)
                page.locator("#pictures img").nth(3).wait_for()
                seconds = time.monotonic() - began
                assert watched.said == []
    words = f"{seconds:.1f} s, {served:.1f} s of them until the page answers"
    print(f"start to first picture: {words}")
    record_property(FIGURE, f"start of the app to the first picture: {words}")
    assert seconds < BAR_S
