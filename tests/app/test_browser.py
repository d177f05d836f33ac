"""W8: a person with a browser gets from an empty page to a trained concept, over reloads, errors and a restart."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.app import browser as by
from tests.app.serving import fake_page
from tests.mutants.summary import FIGURE

pytestmark = pytest.mark.end_to_end

# A training takes a minute on an idle machine.
LONG_S = 400.0
PUMPKINS = sorted((by.CONCEPTS / "pumpkin").glob("*.png"))


def settings_shown(page: Any) -> str:
    """Words of the box with the settings of the picture."""
    heading = page.locator("button", has_text="Settings of the picture")
    heading.click()
    box = page.locator("#settings")
    box.get_by_text("guidance_scale").first.wait_for()
    words: str = box.inner_text()
    heading.click()
    return words


def settings_in_archive(page: Any, folder: Path) -> list[dict[str, Any]]:
    """Download all pictures; their settings, as the PNG files carry them."""
    import zipfile

    from tests.app.fakes import settings_in

    with page.expect_download() as waiting:
        page.click("#archive")
    path = folder / "pictures.zip"
    waiting.value.save_as(path)
    with zipfile.ZipFile(path) as packed:
        packed.extractall(folder)
        listed = json.loads(packed.read("settings.json"))
    for row in listed:
        carried = settings_in(folder / row["file"])
        assert carried == {
            key: value for key, value in row.items() if key not in {"file", "caption"}
        }
    return listed


def generate_with_an_example(page: Any, folder: Path) -> None:
    """Base beside adapter, the seed that was used, the same again with the lock, settings in the PNG."""
    by.choose(page, "pumpkin")
    assert page.input_value("#prompt textarea") == "a sks pumpkin"
    seed = by.draw(page, "key")
    pictures = page.locator("#pictures img")
    pictures.nth(3).wait_for()
    assert pictures.count() == 4
    columns = page.evaluate(
        "getComputedStyle(document.querySelector('#pictures .grid-container')).gridTemplateColumns"
    )
    assert len(columns.split()) == 2
    page.locator("button", has_text="Seed, size, steps").click()
    assert page.input_value("#seed input") == str(seed)
    assert str(seed) in settings_shown(page)
    rows = settings_in_archive(page, folder)
    assert [row["seed"] for row in rows] == [seed, seed, seed + 1, seed + 1]
    ids = [[use["id"] for use in row["adapters"]] for row in rows]
    assert ids == [[], ["example:pumpkin"]] * 2
    assert {row["prompt"] for row in rows} == {"a sks pumpkin"}
    assert by.draw(page) != seed
    page.fill("#seed input", str(seed))
    page.locator("#keep input").check()
    assert by.draw(page) == seed
    page.locator("#keep input").uncheck()
    page.locator("button", has_text="Seed, size, steps").click()


@pytest.mark.slow
def test_from_an_empty_page_to_a_picture_and_back(tmp_path: Path) -> None:
    """The short way, with the real model: draw with an example, look at every tab."""
    by.require_browser()
    folder = by.screenshot_folder(tmp_path / "screenshots")
    with (
        by.served(tmp_path / "data", tmp_path / "server.log") as server,
        by.browser() as window,
        by.person(window, server.url) as (page, watched),
    ):
        generate_with_an_example(page, tmp_path)
        by.screenshots(page, folder, "short", ["light"])
        assert watched.said == []
    log = (tmp_path / "server.log").read_text("utf-8")
    assert "Traceback" not in log


def refused(page: Any, what: Callable[[], Any]) -> str:
    """Do it, and see its error as a toast that tells nothing of the machine."""
    what()
    words = by.toast(page)
    assert not by.TELLTALE.search(words), words
    return words


@pytest.mark.slow
def test_errors_are_toasts_in_plain_words(tmp_path: Path) -> None:
    """Nothing to draw, a file that is no adapter, photos that are none: what was wrong and what is allowed."""
    by.require_browser()
    fake_adapter, fake_photo = tmp_path / "mine.safetensors", tmp_path / "holiday.png"
    fake_adapter.write_text("no tensors in here\n" * 40, "utf-8")
    fake_photo.write_text("no picture", "utf-8")
    with fake_page(tmp_path / "data") as server, by.browser() as window:
        with by.person(window, server.url) as (page, watched):
            words = refused(page, lambda: page.click("#draw"))
            assert "prompt" in words
            assert "1 to 1000 characters" in words
            page.locator("button", has_text="Add an adapter file").click()
            field = page.locator("#adapter-file input[type=file]")
            words = refused(page, lambda: field.set_input_files(fake_adapter))
            assert "mine" in words
            assert page.locator("#concepts .dr-card", has_text="mine").count() == 0
            by.tab(page, "Train")
            field = page.locator("#photos input[type=file]")
            field.set_input_files(fake_photo)
            card = page.locator("#doctor .dr-photo.dr-bad", has_text="holiday")
            card.wait_for()
            assert "0 of 1 photos can be used" in page.inner_text("#doctor")
            assert not by.TELLTALE.search(page.inner_text("#doctor"))
            page.fill("#subject input, #subject textarea", "pumpkin")
            words = refused(page, lambda: page.click("#train-button"))
            assert watched.said == []
            assert page.locator("#trainings .dr-row").count() == 0


@pytest.mark.slow
def test_who_reloads_is_the_same_and_who_comes_anew_is_another(tmp_path: Path) -> None:
    """Photos belong to the browser that dropped them: there after a reload, never seen by another one."""
    by.require_browser()
    with fake_page(tmp_path / "data") as server, by.browser() as window:
        with (
            by.person(window, server.url) as (mine, _),
            by.person(window, server.url) as (other, _),
        ):
            by.tab(mine, "Train")
            mine.locator("#photos input[type=file]").set_input_files(PUMPKINS)
            mine.locator("#doctor .dr-photo").nth(len(PUMPKINS) - 1).wait_for()
            by.open_page(mine, server.url)
            by.tab(mine, "Train")
            mine.locator("#doctor .dr-photo").nth(len(PUMPKINS) - 1).wait_for()
            by.open_page(other, server.url)
            by.tab(other, "Train")
            other.wait_for_timeout(500)
            assert other.locator("#doctor .dr-photo").count() == 0


def start_training(page: Any, title: str, steps: int) -> None:
    """Five photos by the file input, a name, fewer steps than usual."""
    by.tab(page, "Train")
    page.locator("#photos input[type=file]").set_input_files(PUMPKINS)
    page.locator("#doctor .dr-photo").nth(len(PUMPKINS) - 1).wait_for()
    assert f"{len(PUMPKINS)} of {len(PUMPKINS)} photos can be used" in page.inner_text("#doctor")
    page.fill("#subject input, #subject textarea", "pumpkin")
    page.fill("#title input, #title textarea", title)
    number = page.locator("#train-steps input[type=number]")
    if not number.is_visible():
        page.locator("button", has_text="Steps, rank, learning rate").click()
        # What is typed while the box unfolds is lost.
        page.wait_for_timeout(500)
    number.fill(str(steps))
    number.press("Tab")
    page.wait_for_timeout(500)
    assert number.input_value() == str(steps)
    page.click("#train-button")
    row_of(page, title).wait_for()


def row_of(page: Any, title: str) -> Any:
    return page.locator("#trainings .dr-row", has_text=title)


def wait_for_words(page: Any, title: str, wanted: str, seconds: float) -> list[str]:
    """Watch a training until it says something; returns all it has said."""
    said: list[str] = []
    end = time.monotonic() + seconds
    while True:
        words = row_of(page, title).inner_text().replace("\n", " ")
        if not said or said[-1] != words:
            said.append(words)
        if re.search(wanted, words):
            return said
        assert "failed" not in words, [*said, page.inner_text("#training")]
        assert time.monotonic() < end, said
        page.wait_for_timeout(200)


def see_the_result(page: Any) -> None:
    """Scores, charts, pictures, and the step that was chosen with its reason."""
    page.locator("#training dd", has_text=re.compile(r"^step \d+$")).wait_for()
    words = page.inner_text("#training")
    assert re.search(r"chosen\s+step \d+\s+because\s+\S+", words), words
    assert "a sks pumpkin" in words
    page.locator("#charts svg").first.wait_for(state="attached")
    assert page.locator("#charts .only-light svg").count() >= 3
    assert page.locator("#sheets figure.dr-best").count() == 1
    assert page.locator("#sheets figure img").count() >= 2


@pytest.mark.slow
def test_the_whole_way(tmp_path: Path, record_property: Any) -> None:
    """Generate with an example, train, see the scores, use the result, reload."""
    by.require_browser()
    folder = by.screenshot_folder(tmp_path / "screenshots")
    log, began = tmp_path / "server.log", time.monotonic()
    with (
        by.served(tmp_path / "data", log) as server,
        by.browser() as window,
        by.person(window, server.url) as (page, watched),
    ):
        generate_with_an_example(page, tmp_path)
        start_training(page, "my lantern", 60)
        said = wait_for_words(page, "my lantern", "finished", LONG_S)
        assert any(re.search(r"running.*step \d+ of 60", words) for words in said), said
        see_the_result(page)
        by.screenshots(page, folder, "trained")
        by.tab(page, "Train")
        page.click("#open-trained")
        page.locator("#concepts .dr-chosen", has_text="my lantern").wait_for()
        page.wait_for_function(
            "document.querySelector('#prompt textarea').value === 'a sks pumpkin'"
        )
        by.draw(page)
        rows = settings_in_archive(page, tmp_path)
        assert [use["id"] for use in rows[1]["adapters"]] == ["run:my-lantern"]
        by.screenshots(page, folder, "used")
        by.open_page(page, server.url)
        assert page.locator("#concepts .dr-card", has_text="my lantern").count() == 1
        by.tab(page, "Train")
        row_of(page, "my lantern").wait_for()
        see_the_result(page)
        assert watched.said == []
    assert "Traceback" not in log.read_text("utf-8")
    record_property(FIGURE, f"the whole way in a browser: {time.monotonic() - began:.0f} s")


@pytest.mark.slow
def test_a_server_that_is_stopped_in_the_middle(tmp_path: Path, record_property: Any) -> None:
    """SIGTERM during a training: after the restart it is shown as stopped at its step, and goes on from there."""
    by.require_browser()
    folder = by.screenshot_folder(tmp_path / "screenshots")
    data, log, began = tmp_path / "data", tmp_path / "server.log", time.monotonic()
    with by.browser() as window, by.served(data, log) as server:
        with by.person(window, server.url) as (page, watched):
            start_training(page, "second", 120)
            wait_for_words(page, "second", r"step (5[1-9]|[6-9]\d|1\d\d) of 120", LONG_S)
            assert watched.said == []
            assert server.stop() == 0
            with by.served(data, log, port=server.port):
                by.open_page(page, server.url)
                # That the server was gone stands in the console, and should.
                watched.said.clear()
                by.tab(page, "Train")
                row_of(page, "second").wait_for()
                words = wait_for_words(page, "second", "stopped", 30)[-1]
                step = int(re.search(r"step (\d+) of 120", words)[1])  # type: ignore[index]
                assert 50 < step <= 120
                page.locator("#resume").wait_for()
                assert page.inner_text("#resume") == "Resume"
                by.screenshots(page, folder, "stopped")
                by.tab(page, "Train")
                page.click("#resume")
                said = wait_for_words(page, "second", "finished", LONG_S)
                numbers = [int(n) for w in said for n in re.findall(r"step (\d+) of 120", w)]
                assert min(numbers) >= step - 1, said
                see_the_result(page)
                assert watched.said == []
    assert "Traceback" not in log.read_text("utf-8")
    record_property(FIGURE, f"stop, restart, resume in a browser: {time.monotonic() - began:.0f} s")
