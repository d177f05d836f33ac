"""Adapters and their steps on the plane of text and image similarity; every point can be clicked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.textpath import TextPath
from matplotlib.ticker import FixedLocator, MaxNLocator

from dreamrie.errors import ConfigError
from eval.report.figures import Theme, make_figure, name_axes, padded
from eval.report.inline import PANEL_IN, Spot, plain, themed, words_instead

_HEIGHT_IN = 3.8
_REMEMBERED = 32
_LONGEST_LABEL = 24
_LABEL_SIZE = 9.0
# Where a label may stand: shares of its own size, and points away from its point.
_PLACES = (
    *((0.0, -0.5, 8, 0), (-1.0, -0.5, -8, 0), (-0.5, 0.0, 0, 8), (-0.5, -1.0, 0, -8)),
    *((0.0, 0.0, 6, 6), (0.0, -1.0, 6, -6), (-1.0, 0.0, -6, 6), (-1.0, -1.0, -6, -6)),
    *((-0.5, 0.0, 0, 20), (-0.5, -1.0, 0, -20), (0.0, -0.5, 20, 0), (-1.0, -0.5, -20, 0)),
)
Box = tuple[float, float, float, float]
"""Left, bottom, right and top, in points."""


@dataclass(frozen=True)
class PlanePoint:
    """An adapter, or the base model, with its scores.

    Attributes:
        id: by which it is selected.
        label: any text; stands at the point if it is chosen, selected, the base model or the last of its series.
        series: points of a series share a color and are joined in their order.
        image: similarity to the real pictures: mean, and the limits of its interval.
        text: similarity to the prompts, likewise; None: not scored.
        is_base: drawn hollow.
        is_chosen: drawn with a ring.
    """

    id: str
    label: str
    series: str
    image: tuple[float, float, float]
    text: tuple[float, float, float] | None
    is_base: bool = False
    is_chosen: bool = False


def plane_chart(points: Sequence[PlanePoint], selected: str | None = None) -> str:
    """Image similarity against text similarity, with intervals.

    The N-th of the points, from 0, is the group with the id `point-N`, in the dark SVG `point-N-dark`. It has the
    class "point", its label as a title, and a transparent circle that is wide enough for a finger. Points without
    text similarity stand in a strip at the left.

    Args:
        points: steps of a series in order.
        selected: id of the point that is shown elsewhere on the page; None: none.

    Returns:
        HTML, see `eval.report.inline.themed`.

    Raises:
        ConfigError: no point has the id `selected`.
    """
    if selected is not None and selected not in [point.id for point in points]:
        raise ConfigError(f"none of the {len(points)} points of the plane has the id {selected!r}.")
    return _plane_chart(tuple(points), selected)


@lru_cache(_REMEMBERED)
def _plane_chart(points: tuple[PlanePoint, ...], selected: str | None) -> str:
    if not points:
        text = "adapters will be here:\nimage similarity against text similarity"
        return words_instead(text, "No scored adapters yet")
    label = f"Image similarity against text similarity of {len(points)} points"
    return themed(partial(_draw, points, selected), label, partial(find_spots, points))


def _draw(points: Sequence[PlanePoint], selected: str | None, theme: Theme) -> Figure:
    figure, (axes,) = make_figure(PANEL_IN[0], _HEIGHT_IN, theme)
    strip = _set_limits(axes, points, theme)
    names = list(dict.fromkeys(point.series for point in points))
    colors = {name: theme.series[at % len(theme.series)] for at, name in enumerate(names)}
    for name in names:
        known = [point for point in points if point.series == name and point.text is not None]
        if len(known) > 1:
            across, up = zip(*(_middle(point, strip) for point in known), strict=True)
            axes.plot(across, up, color=colors[name], linewidth=1.3, alpha=0.7)
    for place, point in enumerate(points):
        color = theme.ink if point.is_base else colors[point.series]
        fill = theme.paper if point.is_base else color
        _draw_point(axes, point, _middle(point, strip), color, fill, place)
        if point.id == selected:
            _ring(axes, _middle(point, strip), 19, theme.ink, 0.2)
        if point.is_chosen:
            _ring(axes, _middle(point, strip), 13, theme.alarm)
    marks = {
        "hollow: base model": any(point.is_base for point in points),
        "ring: chosen step": any(point.is_chosen for point in points),
    }
    below = ", ".join(name for name, is_there in marks.items() if is_there)
    x_name = "text similarity" + (f"\n{below}" if below else "")
    name_axes(axes, theme, x_name, "image similarity", "Means and 95 % intervals")
    _write_labels(figure, points, selected, strip, colors, theme)
    return figure


def _draw_point(
    axes: Axes, point: PlanePoint, where: tuple[float, float], color: str, fill: str, place: int
) -> None:
    """Cross and marker."""
    axes.vlines(where[0], *point.image[1:], color=color, alpha=0.35, linewidth=1)
    if point.text is not None:
        axes.hlines(where[1], *point.text[1:], color=color, alpha=0.35, linewidth=1)
    axes.plot(
        *where,
        linestyle="none",
        marker="o",
        markersize=6.5,
        markerfacecolor=fill,
        markeredgecolor=color,
        markeredgewidth=1.5,
        zorder=4,
        gid=f"point-{place}",
    )


def _ring(
    axes: Axes, where: tuple[float, float], size: float, color: str, filled: float = 0.0
) -> None:
    """A circle around a point: a line, or with a share of the color a disc."""
    axes.plot(
        *where,
        linestyle="none",
        marker="o",
        markersize=size,
        markerfacecolor=color if filled else "none",
        markeredgecolor=color,
        markeredgewidth=0.0 if filled else 1.8,
        alpha=filled or 1.0,
        zorder=3,
    )


def _set_limits(axes: Axes, points: Sequence[PlanePoint], theme: Theme) -> float:
    """Limits that hold all intervals.

    Returns:
        Where on the x axis the points without text similarity stand.
    """
    axes.set_ylim(*padded([value for point in points for value in point.image], 0.1))
    known = [value for point in points if point.text is not None for value in point.text]
    low, high = padded(known, 0.1) if known else (0.0, 1.0)
    if all(point.text is not None for point in points):
        axes.set_xlim(low, high)
        return low
    width = 0.12 * (high - low)
    axes.set_xlim(low - width, high)
    ticks = MaxNLocator(5).tick_values(low, high) if known else ()
    axes.xaxis.set_major_locator(FixedLocator([tick for tick in ticks if low <= tick <= high]))
    axes.axvline(low, color=theme.faint, linestyle=":", linewidth=1.2)
    axes.annotate(
        "text not scored",
        (low, 0.02),
        xycoords=("data", "axes fraction"),
        xytext=(3, 0),
        textcoords="offset points",
        rotation=90,
        color=theme.faint,
        fontsize=_LABEL_SIZE,
    )
    return low - width / 2


def _middle(point: PlanePoint, strip: float) -> tuple[float, float]:
    """Where a point stands, in data."""
    return (strip if point.text is None else point.text[0]), point.image[0]


def find_spots(points: Sequence[PlanePoint], figure: Figure) -> list[Spot]:
    """The points as parts of a rendered figure.

    Args:
        points: as they were drawn.
        figure: their figure, rendered, so that its panel has its final place.

    Returns:
        One for each point, in their order.
    """
    (axes,) = figure.axes
    to_figure = axes.transData + figure.transFigure.inverted()
    drawn = {line.get_gid(): line for line in axes.lines}
    spots = []
    for place, point in enumerate(points):
        name = f"point-{place}"
        x, y = to_figure.transform(np.asarray(drawn[name].get_xydata())[0])
        spots.append(Spot(name, point.label, float(x), float(y)))
    return spots


# ------------------------------------------------------------------------------------------ labels


def _write_labels(
    figure: Figure,
    points: Sequence[PlanePoint],
    selected: str | None,
    strip: float,
    colors: dict[str, str],
    theme: Theme,
) -> None:
    """Labels of the points that matter, each where it covers the least of markers and other labels."""
    (axes,) = figure.axes
    last = {point.series: point for point in points}
    named = [
        (not (point.is_chosen or point.id == selected), place)
        for place, point in enumerate(points)
        if point.is_chosen or point.is_base or point.id == selected or last[point.series] is point
    ]
    # The panel has its place after this alone; the labels lie inside of it and do not move it.
    figure.draw_without_rendering()
    scale = 72.0 / figure.dpi
    middles = [axes.transData.transform(_middle(point, strip)) * scale for point in points]
    room: Box = tuple(float(side) * scale for side in axes.bbox.extents)  # type: ignore[assignment]
    taken: list[Box] = [(x - 5, y - 5, x + 5, y + 5) for x, y in middles]
    for _, place in sorted(named):
        label = _shortened(points[place].label)
        size = TextPath((0, 0), label or " ", size=_LABEL_SIZE).get_extents().size
        x, y = middles[place]
        boxes = [
            (
                left := x + share_x * size[0] + dx,
                low := y + share_y * _LABEL_SIZE + dy,
                left + size[0],
                low + _LABEL_SIZE,
            )
            for share_x, share_y, dx, dy in _PLACES
        ]
        best = min(boxes, key=lambda box: _cost(box, taken, room))
        taken.append(best)
        axes.annotate(
            label,
            best[:2],
            xycoords="figure points",
            color=theme.ink if points[place].is_base else colors[points[place].series],
            fontsize=_LABEL_SIZE,
            parse_math=False,
            zorder=5,
        ).set_in_layout(False)


def _cost(box: Box, taken: Sequence[Box], room: Box) -> float:
    """Area that lies on other things, or, three times as bad, outside of the panel; square points."""
    area = (box[2] - box[0]) * (box[3] - box[1])
    return sum(_shared(box, other) for other in taken) + 3.0 * (area - _shared(box, room))


def _shared(one: Box, other: Box) -> float:
    """Area that two boxes have in common, square points."""
    width = min(one[2], other[2]) - max(one[0], other[0])
    height = min(one[3], other[3]) - max(one[1], other[1])
    return max(width, 0.0) * max(height, 0.0)


def _shortened(label: str) -> str:
    """One line that leaves room for the picture."""
    line = plain(label).strip()
    return line if len(line) <= _LONGEST_LABEL else line[: _LONGEST_LABEL - 1].rstrip() + "…"
