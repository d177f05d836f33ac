"""Pieces of HTML of the page: everything that comes from a user is escaped, pictures travel inside the page."""

from __future__ import annotations

import base64
import html
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from app.gallery import Entry

# Clicks on anything with data-id reach the server as {id, action}.
CLICKS = """
element.addEventListener('click', event => {
  const target = event.target.closest('[data-id]');
  if (target && element.contains(target)) {
    trigger('click', {id: target.dataset.id, action: target.dataset.action || 'pick'});
  }
});
"""
_SUFFIXES = {".png": "png", ".webp": "webp", ".jpg": "jpeg", ".jpeg": "jpeg"}
_LARGEST_INLINE = 4 << 20


def text(value: object) -> str:
    """Text that may stand in HTML and in an attribute."""
    return html.escape(str(value), quote=True)


def _class(kind: str) -> str:
    """A further class; the prefix keeps the page's own classes apart from gradio's."""
    return f" dr-{kind}" if kind else ""


def picture(path: Path | None, alt: str) -> str:
    """A picture inside the page, or a placeholder.

    Args:
        path: of a picture; None: there is none.
        alt: what it shows.
    """
    kind = _SUFFIXES.get(path.suffix.lower()) if path is not None else None
    content = b""
    if path is not None and kind is not None:
        with suppress(OSError):  # removed meanwhile
            content = path.read_bytes()
    if not 0 < len(content) <= _LARGEST_INLINE:
        return '<span class="dr-no-picture" aria-hidden="true">no picture</span>'
    data = base64.b64encode(content).decode()
    return f'<img src="data:image/{kind};base64,{data}" alt="{text(alt)}" loading="lazy">'


def empty(what: str, todo: str) -> str:
    """What stands where there is nothing yet.

    Args:
        what: is missing.
        todo: how to change that.
    """
    return f'<div class="dr-empty"><b>{text(what)}</b><span>{text(todo)}</span></div>'


def adapter_cards(entries: Sequence[Entry], chosen: Collection[str]) -> str:
    """The gallery of concepts.

    Args:
        entries: to show.
        chosen: ids of those that are chosen.
    """
    if not entries:
        return empty("No concepts here yet.", "Train one in the tab Train, or add a file below.")
    cards = []
    for entry in entries:
        marks = " dr-chosen" if entry.id in chosen else ""
        off = f' disabled title="{text(entry.usable)}"' if entry.usable else ""
        note = entry.usable or entry.note
        cards.append(
            f'<button type="button" class="dr-card{marks}" data-id="{text(entry.id)}" '
            f'aria-pressed="{str(entry.id in chosen).lower()}"{off}>'
            f"{picture(entry.thumbnail, entry.title)}"
            f"<b>{text(entry.title)}</b><code>{text(entry.trigger)}</code>"
            f"<small>{text(note)}</small></button>"
        )
    return f'<div class="dr-cards">{"".join(cards)}</div>'


def bar(words: str, share: float | None, kind: str = "") -> str:
    """A line of words over a progress bar.

    Args:
        words: what happens.
        share: 0 to 1; None: not known.
        kind: "", "good", "bad".
    """
    width = "" if share is None else f' style="width:{100 * min(max(share, 0.0), 1.0):.1f}%"'
    moving = " dr-moving" if share is None else ""
    return (
        f'<div class="dr-status{_class(kind)}" role="status"><span>{text(words)}</span>'
        f'<div class="dr-track"><div class="dr-fill{moving}"{width}></div></div></div>'
    )


def line(words: str, kind: str = "") -> str:
    """A line of words.

    Args:
        words: to say.
        kind: "", "good", "bad".
    """
    return f'<div class="dr-status{_class(kind)}" role="status"><span>{text(words)}</span></div>'


def photo_cards(photos: Sequence[Mapping[str, Any]]) -> str:
    """What the doctor says of each photo.

    Args:
        photos: each with "name", "path", "usable", "findings" (texts) and "size".
    """
    if not photos:
        return empty("No photos yet.", "Drop 3 to 20 pictures of one thing above.")
    cards = []
    for photo in photos:
        kind = "good" if not photo["findings"] else "fair" if photo["usable"] else "bad"
        found = "; ".join(photo["findings"]) or "fine"
        size = "" if photo["size"] is None else "{} x {}".format(*photo["size"])
        cards.append(
            f'<div class="dr-card dr-photo{_class(kind)}">{picture(photo["path"], photo["name"])}'
            f"<b>{text(photo['name'])}</b><small>{size}</small><small>{text(found)}</small>"
            f'<button type="button" class="dr-remove" data-id="{text(photo["name"])}" '
            f'data-action="remove" aria-label="remove {text(photo["name"])}">remove</button></div>'
        )
    return f'<div class="dr-cards">{"".join(cards)}</div>'


def training_cards(rows: Sequence[Mapping[str, Any]], chosen: str) -> str:
    """The list of trainings.

    Args:
        rows: each with "name", "title", "status", "doing" and "share".
        chosen: name of the one that is looked at.
    """
    if not rows:
        return empty("No training yet.", "Drop photos, say what they show, press Train.")
    cards = []
    for row in rows:
        mark = " dr-chosen" if row["name"] == chosen else ""
        kind = {"finished": "good", "failed": "bad"}.get(row["status"], "")
        cards.append(
            f'<button type="button" class="dr-row{mark}" data-id="{text(row["name"])}">'
            f"<b>{text(row['title'])}</b><span class='dr-tag{_class(kind)}'>{text(row['status'])}</span>"
            f"{bar(row['doing'], row['share'], kind)}</button>"
        )
    return f'<div class="dr-rows">{"".join(cards)}</div>'


def facts(rows: Sequence[tuple[str, object]]) -> str:
    """A small table of names and values.

    Args:
        rows: in order.
    """
    cells = "".join(f"<dt>{text(name)}</dt><dd>{text(value)}</dd>" for name, value in rows)
    return f'<dl class="dr-facts">{cells}</dl>'
