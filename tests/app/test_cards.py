"""Pieces of HTML: whatever a user calls something, it is shown as text and never run."""

from __future__ import annotations

import base64
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from app import cards
from app.gallery import Entry

EVIL = "\"><script>alert(1)</script><img src=x onerror='alert(2)'>&amp;"


class Seen(HTMLParser):
    """Tags, attributes and texts, as a browser would find them."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def entry(**changes: Any) -> Entry:
    about: dict[str, Any] = {
        "id": "upload:x",
        "title": EVIL,
        "trigger": EVIL,
        "kind": "upload",
        "path": Path("x"),
        "thumbnail": None,
        "rank": 4,
        "note": EVIL,
        "step": None,
        "usable": "",
    }
    return Entry(**{**about, **changes})


PHOTO = {"name": EVIL, "path": None, "usable": False, "findings": [EVIL], "size": (3, 4)}
ROW = {"name": EVIL, "title": EVIL, "status": EVIL, "doing": EVIL, "share": 0.5}
PIECES = {
    "empty": lambda: cards.empty(EVIL, EVIL),
    "adapters": lambda: cards.adapter_cards([entry()], []),
    "unusable adapter": lambda: cards.adapter_cards([entry(usable=EVIL)], ["upload:x"]),
    "bar": lambda: cards.bar(EVIL, None),
    "line": lambda: cards.line(EVIL),
    "photos": lambda: cards.photo_cards([PHOTO]),
    "trainings": lambda: cards.training_cards([ROW], EVIL),
    "facts": lambda: cards.facts([(EVIL, EVIL)]),
}


@pytest.mark.parametrize("name", sorted(PIECES))
def test_nothing_a_user_says_becomes_markup(name: str) -> None:
    """The text is there, letter for letter; no tag and no attribute has come of it."""
    seen = Seen(PIECES[name]())
    assert not {"script", "img"} & set(seen.tags)
    assert not [key for key, _ in seen.attributes if key.startswith("on")]
    values = [value for _, value in seen.attributes]
    assert EVIL in "".join(seen.texts) or EVIL in values


def test_a_picture_travels_in_the_page(tmp_path: Path) -> None:
    """Bytes inline, so that no address of a file is needed; what is none, or too large, is a placeholder."""
    path = tmp_path / "a.png"
    Image.new("RGB", (2, 3), "red").save(path)
    seen = Seen(cards.picture(path, EVIL))
    source = dict(seen.attributes)["src"] or ""
    assert source.startswith("data:image/png;base64,")
    assert base64.b64decode(source.split(",")[1]) == path.read_bytes()
    assert dict(seen.attributes)["alt"] == EVIL
    large = tmp_path / "large.png"
    with large.open("wb") as file:
        file.truncate((4 << 20) + 1)
    for other in (None, tmp_path / "none.png", tmp_path / "a.svg", large):
        html = cards.picture(other, "x")
        assert "no picture" in html
        assert "src" not in html
        assert str(tmp_path) not in html


def test_the_chosen_card_says_so_and_an_unusable_one_cannot_be_clicked() -> None:
    """Also to those who do not see the colors."""
    html = cards.adapter_cards([entry(id="example:a"), entry(id="example:b")], ["example:b"])
    assert html.count('aria-pressed="true"') == html.count("dr-chosen") == 1
    assert " disabled" not in html
    html = cards.adapter_cards([entry(usable="made for another model")], [])
    assert " disabled" in html
    assert "made for another model" in html


@pytest.mark.parametrize(
    ("share", "width"),
    [(0.0, "0.0%"), (0.25, "25.0%"), (1.0, "100.0%"), (7.0, "100.0%"), (-1, "0.0%")],
)
def test_a_bar_is_as_wide_as_its_share(share: float, width: str) -> None:
    assert f"width:{width}" in cards.bar("x", share)


def test_a_bar_without_a_share_moves() -> None:
    html = cards.bar("x", None)
    assert "dr-moving" in html
    assert "width" not in html


def test_photos_are_good_fair_or_bad() -> None:
    """Fine; usable with a remark; not usable."""
    photos = [
        {"name": "a", "path": None, "usable": True, "findings": [], "size": None},
        {"name": "b", "path": None, "usable": True, "findings": ["small"], "size": (9, 9)},
        {"name": "c", "path": None, "usable": False, "findings": ["no picture"], "size": None},
    ]
    html = cards.photo_cards(photos)
    kinds = [html.count(f"dr-{kind}") for kind in ("good", "fair", "bad")]
    assert kinds == [1, 1, 1]
    assert "9 x 9" in html
    assert html.count('data-action="remove"') == 3


@pytest.mark.parametrize(
    "piece", [cards.adapter_cards([], []), cards.photo_cards([]), cards.training_cards([], "")]
)
def test_where_there_is_nothing_the_page_says_what_to_do(piece: str) -> None:
    seen = Seen(piece)
    assert len([text for text in seen.texts if text.strip()]) == 2
