"""One self-contained page about a scored run: what it loads is inside it."""

from __future__ import annotations

from collections.abc import Mapping
from html import escape
from pathlib import Path

from dreamrie.diffusion.images import find_pictures
from dreamrie.errors import ConfigError, ImageError
from dreamrie.files import write_atomic
from eval.report import sections
from eval.report.facts import adapter, by_prompt, drift_pairs, of_kind, subject
from eval.report.headline import headline
from eval.report.sections import Shown, path_of
from eval.report.style import style_sheet
from eval.report.thumbnails import choose, make_thumbnails
from eval.results import FILE, Result

FILE_NAME = "report.html"
LIMIT_BYTES = 5_000_000
_PICTURE_BYTES = 3_600_000
# Tried in turn: so many pictures that each still can be seen, and at last none.
_ROOMS = (600, 300, 150, 60, 20, 0)
# Nothing is fetched, run or sent, whatever a prompt may say; pictures come from the page alone.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


def write_report(result: Result) -> Path:
    """Write `report.html` into the folder of a result, whole or not at all.

    Args:
        result: scored run, whose pictures lie in its folder.

    Returns:
        Path of the page, below 5 MB.

    Raises:
        ConfigError: generated pictures are missing, or there are none, or one of drift has no counterpart.
    """
    concept = of_kind(result, "concept")
    if not concept:
        raise ConfigError(
            f"{result.folder}: no picture of the concept; there is nothing to report."
        )
    gone = [p.file for p in result.pictures if not path_of(result, p).is_file()]
    if gone:
        raise ConfigError(
            f"{result.folder}: {len(gone)} of {len(result.pictures)} pictures are missing: "
            f"{', '.join(gone[:5])}. A report shows what was scored; run python -m eval run again."
        )
    page, fixed = b"", _fixed(result)
    for room in _ROOMS:
        page = _page(result, _show(result, room), fixed).encode()
        if len(page) < LIMIT_BYTES:
            break
    path = result.folder / FILE_NAME
    write_atomic(path, page)
    return path


def _reference(result: Result) -> tuple[list[Path], str]:
    """Real pictures, or why they are not shown: a result may be read on another machine."""
    try:
        return find_pictures(Path(result.reference)), ""
    except ImageError as error:
        return [], f"The real pictures are not shown: {error}"


def _show(result: Result, room: int) -> Shown:
    """Choose at most `room` pictures, and shrink them."""
    concept, pairs = of_kind(result, "concept"), drift_pairs(result)
    real, why_not = _reference(result)
    some_real, some_pairs = real[: min(24, room // 4)], pairs[: min(60, room // 8)]
    left = room - len(some_real) - 2 * len(some_pairs)
    prompts = choose(by_prompt(concept), list(sections.marks(result)), left)
    pictures = [picture for row in prompts.values() for picture in row]
    pictures += [picture for pair in some_pairs for picture in pair]
    paths = [*some_real, *(path_of(result, picture) for picture in pictures)]
    uris, size_px = make_thumbnails(paths, _PICTURE_BYTES) if paths else ({}, 0)
    notes = [why_not] if why_not else []
    count = sum(map(len, prompts.values()))
    if count < len(concept):
        notes.append(
            f"{count} of {len(concept)} generated pictures are shown, of {len(prompts)} of "
            f"{len(by_prompt(concept))} prompts; marked ones first. All lie beside this page and count in every number."
        )
    for some, every, what in (
        (some_real, real, "real pictures"),
        (some_pairs, pairs, "drift pairs"),
    ):
        if len(some) < len(every):
            notes.append(f"{len(some)} of {len(every)} {what} are shown.")
    if size_px:
        notes.append(
            f"Pictures are reduced to at most {size_px} pixels; they were scored at full size."
        )
    return Shown(tuple(some_real), prompts, some_pairs, uris, tuple(notes))


def _fixed(result: Result) -> dict[str, str]:
    """The sections that do not depend on how many pictures are shown."""
    return {
        "numbers": headline(result),
        "prompts": sections.plots(result) + sections.prompts_table(result),
        "scores": _SCORES + sections.scores_table(result),
        "protocol": sections.protocol_table(result),
    }


def _page(result: Result, shown: Shown, fixed: Mapping[str, str]) -> str:
    title = f"{subject(result)} · {adapter(result)}"
    drift = sections.drift(result, shown)
    parts = [
        ("numbers", "Main numbers", fixed["numbers"]),
        ("prompts", "Prompts", fixed["prompts"]),
        ("pictures", "Pictures", sections.gallery(result, shown)),
        ("drift", "Drift", drift and _DRIFT + drift),
        ("scores", "All scores", fixed["scores"]),
        ("protocol", "Protocol", fixed["protocol"]),
    ]
    parts = [part for part in parts if part[2]]
    links = "".join(f'<li><a href="#{key}">{name}</a></li>' for key, name, _ in parts)
    body = "".join(
        f'<section id="{key}" aria-labelledby="h-{key}"><h2 id="h-{key}">{name}</h2>{content}</section>'
        for key, name, content in parts
    )
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<meta name="color-scheme" content="light dark">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f"<style>{style_sheet()}</style></head><body><header>"
        f'<p class="eyebrow">Score report</p><h1>{sections.short(subject(result))}</h1>'
        f'<p class="lead">{_lead(result)}</p><nav aria-label="Contents"><ul>{links}</ul></nav></header>'
        f"<main>{body}</main><footer><p>Written by python -m eval. Every single value stands in {FILE} beside this "
        "page. Numbers of different encoders, preprocessings or metric versions must not share a table.</p></footer>"
        "</body></html>"
    )


_DRIFT = (
    '<p class="note">The same prompt and seed without and with the adapter. What was not asked for should not '
    "change.</p>"
)
_SCORES = (
    '<p class="note">Means over pictures; intervals hold 95 % and are drawn over prompts, because pictures of one '
    "prompt are not independent. One subject and one training: they say nothing about others.</p>"
)


def _lead(result: Result) -> str:
    """Adapter, and how many pictures of how many prompts."""
    concept = of_kind(result, "concept")
    count = len(by_prompt(concept))
    words = f"{len(concept)} pictures of {count} prompt{'s' * (count != 1)}"
    return f"Adapter {sections.short(adapter(result))} · {words}"
