"""Faults in the charts of the page: energies, places, ids, and what users wrote."""

from __future__ import annotations

import html
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree as ET

import numpy as np

from eval.report import inline, live, plane
from tests.eval import test_live_charts as laws
from tests.mutants import Mutant, replaced

_find_spots = plane.find_spots
_make_clickable = inline._make_clickable
_rename = inline._rename


def not_squared(layers: Sequence[Sequence[float]]) -> list[float]:
    """Shares of the sum of singular values."""
    sums = [
        sum(layer[k] for layer in layers if k < len(layer)) for k in range(max(map(len, layers)))
    ]
    return [value / sum(sums) for value in sums]


def mean_of_shares(layers: Sequence[Sequence[float]]) -> list[float]:
    """Every layer counts alike, however small its change."""
    shares = np.zeros(max(map(len, layers)))
    for layer in filter(None, layers):
        squares = np.square(layer)
        shares[: len(layer)] += squares / squares.sum()
    return list(shares / len(layers))


def trailing(values: Any) -> Any:
    """The window ends at the value: the curve comes late."""
    width = 2 * max(len(values) // 16, 1)
    return np.array([np.median(values[max(at - width, 0) : at + 1]) for at in range(len(values))])


def mean_instead(values: Any) -> Any:
    """A running mean, which an outlier moves."""
    half = max(len(values) // 16, 1)
    return np.array(
        [np.mean(values[max(at - half, 0) : at + half + 1]) for at in range(len(values))]
    )


def upside_down(points: Any, figure: Any) -> Any:
    """An SVG counts from above: forgotten."""
    return [inline.Spot(s.name, s.title, s.x, 1.0 - s.y) for s in _find_spots(points, figure)]


def exchanged(point: Any, strip: float) -> tuple[float, float]:
    """Image similarity to the right."""
    return (strip if point.text is None else point.image[0]), (point.text or point.image)[0]


def same_prefix(root: ET.Element, prefix: str, kept: set[str]) -> None:
    """One set of names for all charts."""
    _rename(root, "c", kept)


def themes_alike(root: ET.Element, prefix: str, kept: set[str]) -> None:
    """matplotlib's names are left as they are."""


def raw(element: ET.Element, **options: Any) -> str:
    """What was escaped is written as it was."""
    return html.unescape(ET.tostring(element, **options))


MUTANTS = [
    Mutant(
        name="energies of a chart are not squared",
        law=laws.law_energies_are_sums_of_squares,
        broken=lambda: replaced(live, energy_shares=not_squared),
        why="truncation error is measured in squares: 5 / 6 for 13 / 14",
    ),
    Mutant(
        name="energies of a chart averaged over layers",
        law=laws.law_energies_are_sums_of_squares,
        broken=lambda: replaced(live, energy_shares=mean_of_shares),
        why="a layer that hardly changed would weigh as much as all others",
    ),
    Mutant(
        name="running median trails",
        law=laws.law_the_median_is_centered,
        broken=lambda: replaced(live, running_median=trailing),
        why="the curve would show a fall of the loss after it happened",
    ),
    Mutant(
        name="running mean for a median",
        law=laws.law_the_median_is_centered,
        broken=lambda: replaced(live, running_median=mean_instead),
        why="one large loss would bend the curve",
    ),
    Mutant(
        name="click targets upside down",
        law=laws.law_points_stand_where_their_scores_are,
        broken=lambda: replaced(plane, find_spots=upside_down),
        why="a tap would select another point than the one that is seen",
    ),
    Mutant(
        name="text and image similarity exchanged on the plane",
        law=laws.law_points_stand_where_their_scores_are,
        broken=lambda: replaced(plane, _middle=exchanged),
        why="the axes are named the other way round",
    ),
    Mutant(
        name="ids shared by charts",
        law=laws.law_ids_are_unique_and_found,
        broken=lambda: replaced(inline, _rename=same_prefix),
        why="a clip path or a letter of another chart would be used, or of one that is hidden",
    ),
    Mutant(
        name="ids of matplotlib left",
        law=laws.law_ids_are_unique_and_found,
        broken=lambda: replaced(inline, _rename=themes_alike),
        why="both themes name their letters and panels alike",
    ),
    Mutant(
        name="labels written unescaped",
        law=laws.law_labels_stay_text,
        broken=lambda: replaced(inline, ET=SimpleNamespace(**{**vars(ET), "tostring": raw})),
        why="a title of a training would run as a script in the page",
        raises=(ET.ParseError,),
    ),
    Mutant(
        name="unprintable characters kept in labels",
        law=laws.law_labels_stay_text,
        broken=lambda: replaced(inline, plain=lambda text: text),
        why="a NUL in a title is no XML, and half a surrogate cannot be sent",
        raises=(ET.ParseError, UnicodeEncodeError),
    ),
]
