"""The parts of a report below its headline; every text of a run is escaped here."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

from eval.report.facts import (
    Copies,
    by_prompt,
    digits,
    find_copies,
    find_score,
    flatten,
    mean_of,
    metric_of,
    of_kind,
    percent,
    value_of,
)
from eval.report.figures import DARK, LIGHT, Theme
from eval.report.plots import Point, plot_distributions, plot_prompts
from eval.report.thumbnails import data_uri
from eval.results import FILE, PICTURES, Picture, Result
from eval.scoring import Score

_LONGEST_TEXT = 300
_LONGEST_ALT = 120
_MOST_PROMPTS = 200
_HASH_DIGITS = 16
_SHARES = frozenset({"prompt_retrieval", "background_color"})


@dataclass(frozen=True)
class Shown:
    """What of a run is shown, and as what.

    Attributes:
        reference: real pictures. concept: generated ones under their prompts. pairs: (base, adapted) of drift.
        uris: data URI of each path. notes: what is not shown or reduced, in words.
    """

    reference: tuple[Path, ...]
    concept: Mapping[str, Sequence[Picture]]
    pairs: Sequence[tuple[Picture, Picture]]
    uris: Mapping[Path, str]
    notes: tuple[str, ...]


def short(text: str, longest: int = _LONGEST_TEXT) -> str:
    """A text as it may stand in a page: escaped, and cut where it would be a page of its own."""
    return escape(text if len(text) <= longest else text[: longest - 1] + "…")


def plots(result: Result) -> str:
    """Scatter of prompts and distributions over pictures.

    Args:
        result: scored run.

    Returns:
        Elements of a section; "" without image similarity.
    """
    image = find_score(result, "image_similarity")
    if image is None:
        return ""
    ceiling = find_score(result, "ceiling", image.encoder)
    copies = find_copies(result, image.encoder)
    real = list(ceiling.values.values()) if ceiling else []
    spread = _figure(
        lambda theme: plot_distributions(
            list(image.values.values()), real, copies, image.encoder, theme
        ),
        _spread_alt(image, ceiling, copies),
        "How the pictures are spread. Short green strokes: each real picture against the others. "
        "A picture right of the orange line is nearer to a real one than any two real ones are to each other.",
    )
    return f'<div class="plots">{_scatter(result, image, ceiling)}{spread}</div>'


def _scatter(result: Result, image: Score, ceiling: Score | None) -> str:
    text = find_score(result, "text_similarity")
    points = []
    for number, pictures in enumerate(by_prompt(of_kind(result, "concept")).values(), start=1):
        x, y = mean_of(text, pictures), mean_of(image, pictures)
        if x is not None and y is not None:
            points.append(Point(str(number), x, y))
    if text is None or not points:
        return '<p class="note">There is no text similarity to draw image similarity against.</p>'
    low, high = (end(points, key=lambda point: point.y) for end in (min, max))
    return _figure(
        lambda theme: plot_prompts(
            points, ceiling.mean if ceiling else None, (text.encoder, image.encoder), theme
        ),
        f"Scatter plot of {len(points)} prompts. Image similarity runs from {digits(low.y)} for prompt {low.label} "
        f"to {digits(high.y)} for prompt {high.label}.",
        "One point a prompt, numbered as in the table below. Up: more like the concept. Right: nearer to the prompt.",
    )


def _spread_alt(image: Score, ceiling: Score | None, copies: Copies | None) -> str:
    values = sorted(image.values.values())
    words = f"Histogram of image similarity, {digits(values[0])} to {digits(values[-1])}"
    if ceiling is not None:
        words += f", real against real {digits(ceiling.mean)}"
    if copies is not None:
        words += f"; histogram of the copy score, {len(copies.files)} pictures above {digits(copies.bar)}"
    return f"{words}."


def _figure(draw: Callable[[Theme], bytes], alt: str, caption: str) -> str:
    """One plot in both themes."""
    light, dark = (data_uri(draw(theme), "image/svg+xml") for theme in (LIGHT, DARK))
    return (
        f'<figure><picture><source media="(prefers-color-scheme: dark)" srcset="{dark}">'
        f'<img src="{light}" alt="{escape(alt)}"></picture><figcaption>{escape(caption)}</figcaption></figure>'
    )


def prompts_table(result: Result) -> str:
    """A line for each prompt with its means.

    Args:
        result: scored run.

    Returns:
        A table in a frame that scrolls.
    """
    columns = {
        "image similarity": find_score(result, "image_similarity"),
        "text similarity": find_score(result, "text_similarity"),
        "retrieved": find_score(result, "prompt_retrieval"),
        "background right": find_score(result, "background_color"),
    }
    known = {name: score for name, score in columns.items() if score is not None}
    prompts = by_prompt(of_kind(result, "concept"))
    rows = []
    for number, (prompt, pictures) in enumerate(list(prompts.items())[:_MOST_PROMPTS], start=1):
        means = [mean_of(score, pictures) for score in known.values()]
        cells = [
            "" if mean is None else percent(mean) if metric_of(score) in _SHARES else digits(mean)
            for mean, score in zip(means, known.values(), strict=True)
        ]
        rows.append(
            [f'<span class="number">{number}</span>{short(prompt)}', *cells, str(len(pictures))]
        )
    note = ""
    if len(prompts) > _MOST_PROMPTS:
        note = f'<p class="note">The first {_MOST_PROMPTS} of {len(prompts)} prompts; all are in {FILE}.</p>'
    heads = ["prompt", *known, "pictures"]
    return note + _table("Scores of each prompt", heads, rows, range(1, len(heads)), {0})


def scores_table(result: Result) -> str:
    """Every score with everything that it depends on.

    Args:
        result: scored run.

    Returns:
        A table in a frame that scrolls.
    """
    heads = [
        "score",
        "mean",
        "95 % interval",
        "values",
        "metric",
        "encoder",
        "weights",
        "preprocessing",
    ]
    rows = []
    for score in result.scores:
        ends = "" if score.interval is None else "{:.4f} {:.4f}".format(*score.interval)
        digest = f"<code>{escape(score.weights_sha256[:_HASH_DIGITS])}</code>"
        row = [short(score.name), f"{score.mean:.4f}", ends, str(len(score.values))]
        row += [short(score.metric), short(score.encoder), digest, short(score.preprocessing)]
        rows.append(row)
    return _table("Scores and what they depend on", heads, rows, range(1, 4), {7})


def protocol_table(result: Result) -> str:
    """Everything that decided the pictures.

    Args:
        result: scored run.

    Returns:
        A table in a frame that scrolls.
    """
    rows = [["folder of real pictures", short(result.reference)]]
    rows += [
        [short(name), short(_words(value))] for name, value in flatten(result.protocol).items()
    ]
    return _table("Protocol", ["setting", "value"], rows, (), {1})


def _words(value: Any) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    return json.dumps(value, ensure_ascii=False)


def _table(
    label: str,
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    numeric: Sequence[int],
    long: set[int],
) -> str:
    """A table of cells that are HTML already; a keyboard can scroll its frame."""

    def kind(column: int) -> str:
        return ' class="n"' if column in numeric else ' class="long"' if column in long else ""

    head = "".join(f'<th scope="col"{kind(i)}>{name}</th>' for i, name in enumerate(heads))
    body = "".join(
        f'<tr><th scope="row"{kind(0)}>{row[0]}</th>'
        + "".join(f"<td{kind(i)}>{cell}</td>" for i, cell in enumerate(row[1:], start=1))
        + "</tr>"
        for row in rows
    )
    return (
        f'<div class="scroll" role="region" tabindex="0" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def marks(result: Result) -> dict[str, list[tuple[str, str]]]:
    """Words and kind ("good" or "bad") that mark a picture: best and worst of the run, copies, failures.

    Args:
        result: scored run.

    Returns:
        Marks by file; best, worst and copies come first.
    """
    found: dict[str, list[tuple[str, str]]] = {}
    for metric, name in (("image_similarity", "image"), ("text_similarity", "text")):
        values = getattr(find_score(result, metric), "values", {})
        if len(set(values.values())) > 1:
            found.setdefault(max(values, key=values.__getitem__), []).append(
                (f"best {name}", "good")
            )
            found.setdefault(min(values, key=values.__getitem__), []).append(
                (f"worst {name}", "bad")
            )
    score = find_score(result, "copy_score")
    copies = score and find_copies(result, score.encoder)
    for file in copies.files if copies else ():
        found.setdefault(file, []).append(("copy?", "bad"))
    return found


def gallery(result: Result, shown: Shown) -> str:
    """Real pictures, then a row of generated ones for each prompt.

    Args:
        result: scored run.
        shown: what of it.

    Returns:
        Elements of a section.
    """
    notes = "".join(f'<p class="note">{escape(note)}</p>' for note in shown.notes)
    parts = [_LEGEND, notes]
    if shown.reference:
        cells = "".join(
            _cell(shown.uris[path], f"Real picture {escape(path.name)}", escape(path.name))
            for path in shown.reference
        )
        parts.append(f'<h3>Real pictures</h3><div class="pictures">{cells}</div>')
    numbers = {prompt: i for i, prompt in enumerate(by_prompt(of_kind(result, "concept")), start=1)}
    marked = marks(result)
    for prompt, pictures in shown.concept.items():
        cells = "".join(_generated(result, shown, picture, marked) for picture in pictures)
        heading = f'<span class="number">{numbers[prompt]}</span>{short(prompt)}'
        parts.append(f'<h3>{heading}</h3><div class="pictures">{cells}</div>')
    return "".join(parts)


_LEGEND = (
    '<p class="note">Below each picture: image similarity, text similarity and the cosine to the nearest real '
    "picture. Best and worst are those of the whole run. “copy?”: nearer to a real picture than any two real "
    "ones are to each other. “wrong prompt”: nearer to another prompt of the set.</p>"
)
_BESIDE = (
    ("image", "image_similarity"),
    ("text", "text_similarity"),
    ("nearest real", "copy_score"),
)
_FAILURES = (
    ("prompt_retrieval", "wrong prompt"),
    ("background_color", "wrong background"),
)


def _generated(
    result: Result, shown: Shown, picture: Picture, marked: Mapping[str, list[tuple[str, str]]]
) -> str:
    """One generated picture with its scores."""
    found = [(name, value_of(find_score(result, metric), picture.file)) for name, metric in _BESIDE]
    known = [(name, digits(value)) for name, value in found if value is not None]
    tags = list(marked.get(picture.file, []))
    for metric, words in _FAILURES:
        if value_of(find_score(result, metric), picture.file) == 0:
            tags.append((words, "miss"))
    labels = "".join(f'<span class="tag {kind}">{words}</span>' for words, kind in tags)
    lines = "".join(f"<span>{name}</span><b>{value}</b>" for name, value in known)
    alt = f"{short(picture.prompt, _LONGEST_ALT)}, seed {picture.seed}"
    caption = (
        f'<span class="scores">{lines}</span>'
        f"{short(picture.file)}{f'<span class=tags>{labels}</span>' if labels else ''}"
    )
    return _cell(shown.uris[path_of(result, picture)], alt, caption)


def path_of(result: Result, picture: Picture) -> Path:
    """Where a generated picture lies."""
    return result.folder / PICTURES / picture.file


def _cell(uri: str, alt: str, caption: str) -> str:
    return f'<figure><img src="{uri}" alt="{alt}"><figcaption>{caption}</figcaption></figure>'


def drift(result: Result, shown: Shown) -> str:
    """Pictures of unrelated prompts, without the adapter and with it.

    Args:
        result: scored run.
        shown: what of it.

    Returns:
        Elements of a section; "" where no such pictures were drawn.
    """
    if not shown.pairs:
        return ""
    score = find_score(result, "prior_drift")
    items = []
    for base, adapted in shown.pairs:
        value = value_of(score, adapted.file, base.file)
        cells = "".join(
            _cell(
                shown.uris[path_of(result, picture)],
                f"{short(picture.prompt, _LONGEST_ALT)}, {words}",
                words,
            )
            for picture, words in ((base, "base model"), (adapted, "with adapter"))
        )
        moved = "" if value is None else f' <span class="note">drift {digits(value)}</span>'
        items.append(
            f'<div><h3>{short(adapted.prompt)}{moved}</h3><div class="two">{cells}</div></div>'
        )
    return f'<div class="drift">{"".join(items)}</div>'
