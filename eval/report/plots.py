"""The plots of a report and of a comparison."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from eval.report.facts import Copies, digits
from eval.report.figures import (
    LIGHT,
    Theme,
    make_figure,
    mark,
    name_axes,
    padded,
    render,
    whole_numbers,
)

_BINS = 24
_MOST_NUMBERED = 60
_MARKERS = "osD^vP*X"
_MOST_STROKES = 200


@dataclass(frozen=True)
class Point:
    """One prompt or run among others.

    Attributes:
        label: short, stands at the point. x, y: text and image similarity.
        x_interval, y_interval: 95 %, or None.
    """

    label: str
    x: float
    y: float
    x_interval: tuple[float, float] | None = None
    y_interval: tuple[float, float] | None = None


def plot_prompts(
    points: Sequence[Point], ceiling: float | None, names: tuple[str, str], theme: Theme
) -> bytes:
    """Image similarity against text similarity, a point for each prompt; numbered while numbers can be read.

    Args:
        points: one a prompt.
        ceiling: similarity of the real pictures to each other, drawn as a line.
        names: of text and image similarity.
        theme: colors.

    Returns:
        SVG.
    """
    figure, (axes,) = make_figure(4.7, 3.9, theme)
    heights = [point.y for point in points]
    axes.set_xlim(*padded([point.x for point in points], 0.12))
    axes.set_ylim(*padded(heights if ceiling is None else [*heights, ceiling], 0.12))
    if ceiling is not None:
        _horizontal(axes, theme, ceiling, f"real against real {digits(ceiling)}")
    numbered = len(points) <= _MOST_NUMBERED
    axes.scatter(
        [point.x for point in points],
        heights,
        s=210 if numbered else 30,
        color=theme.main,
        edgecolor=theme.paper,
        linewidth=1.2 if numbered else 0.5,
        alpha=0.9,
    )
    for point in points if numbered else ():
        axes.text(
            point.x,
            point.y,
            point.label,
            color=theme.paper,
            fontsize=8,
            fontweight="bold",
            ha="center",
            va="center_baseline",
        )
    name_axes(axes, theme, f"text similarity ({names[0]})", f"image similarity ({names[1]})")
    return render(figure)


def plot_distributions(
    image: Sequence[float],
    ceiling: Sequence[float],
    copies: Copies | None,
    encoder: str,
    theme: Theme,
) -> bytes:
    """How image similarity and copy score are spread over the pictures.

    Args:
        image: image similarity of each generated picture.
        ceiling: of each real picture to the other real ones; may be empty.
        copies: see `find_copies`; None leaves its panel out.
        encoder: printed name of the encoder.
        theme: colors.

    Returns:
        SVG.
    """
    rows = 1 if copies is None else 2
    figure, panels = make_figure(4.7, 3.9 if rows == 2 else 2.4, theme, rows)
    every = [*image, *ceiling, *([*copies.nearest.values(), copies.bar] if copies else [])]
    # One scale for both: they are cosines of the same embeddings.
    limits = padded(every, 0.06)
    marks = [] if not ceiling else [(float(np.mean(ceiling)), "real against real", theme.second)]
    _histogram(panels[0], theme, image, limits, ceiling, marks)
    name_axes(panels[0], theme, f"image similarity ({encoder})", "pictures")
    if copies is not None:
        bar = (copies.bar, "two most alike real pictures", theme.alarm)
        _histogram(panels[1], theme, list(copies.nearest.values()), limits, [], [bar], copies.bar)
        name_axes(panels[1], theme, "cosine to the nearest real picture", "pictures")
    return render(figure)


def plot_runs(points: Sequence[Point], ceiling: float | None, names: tuple[str, str]) -> bytes:
    """Image similarity against text similarity of several runs, with intervals in both directions.

    Args:
        points: one a run.
        ceiling: similarity of the real pictures to each other.
        names: of text and image similarity.

    Returns:
        PNG.
    """
    theme = LIGHT
    figure, (axes,) = make_figure(7.2, 5.2, theme)
    ends_x = [end for point in points for end in (point.x, *(point.x_interval or ()))]
    ends_y = [end for point in points for end in (point.y, *(point.y_interval or ()))]
    axes.set_xlim(*padded(ends_x, 0.12))
    axes.set_ylim(*padded(ends_y if ceiling is None else [*ends_y, ceiling], 0.12))
    if ceiling is not None:
        _horizontal(axes, theme, ceiling, f"real against real {digits(ceiling)}")
    handles = []
    for index, point in enumerate(points):
        # Shape and color both tell the runs apart; names at the points would cover each other.
        marker, color = _MARKERS[index % len(_MARKERS)], theme.series[index % len(theme.series)]
        axes.errorbar(
            point.x,
            point.y,
            xerr=_arms(point.x, point.x_interval),
            yerr=_arms(point.y, point.y_interval),
            fmt=marker,
            color=color,
            markersize=8,
            capsize=3,
            linewidth=1.4,
        )
        handles.append(Line2D([], [], color=color, marker=marker, linestyle="", markersize=8))
    legend = figure.legend(
        handles,
        [point.label for point in points],
        loc="outside lower center",
        ncols=min(len(points), 3),
        frameon=False,
        labelcolor=theme.ink,
    )
    for text in legend.get_texts():
        text.set_parse_math(False)
    name_axes(
        axes,
        theme,
        f"text similarity ({names[0]})",
        f"image similarity ({names[1]})",
        "Runs with 95 % intervals over prompts",
    )
    return render(figure, "png")


def _arms(value: float, interval: tuple[float, float] | None) -> list[list[float]] | None:
    """Lengths of an error bar to both sides; a percentile interval may lie beside its mean by rounding."""
    if interval is None:
        return None
    return [[max(value - interval[0], 0.0)], [max(interval[1] - value, 0.0)]]


def _horizontal(axes: Axes, theme: Theme, y: float, label: str) -> None:
    axes.axhline(y, color=theme.second, linestyle="--", linewidth=1.4)
    axes.annotate(
        label,
        (0.0, y),
        xycoords=("axes fraction", "data"),
        xytext=(4, -3),
        textcoords="offset points",
        va="top",
        color=theme.second,
        fontsize=9,
    )


def _histogram(
    axes: Axes,
    theme: Theme,
    values: Sequence[float],
    limits: tuple[float, float],
    ticks: Sequence[float],
    marks: Sequence[tuple[float, str, str]],
    alarm_above: float | None = None,
) -> None:
    """Bars of values, short strokes for single real pictures, named lines; bars above the alarm are colored."""
    edges = np.linspace(*limits, _BINS + 1).tolist()
    if alarm_above is None:
        axes.hist(values, bins=edges, color=theme.main, rwidth=0.92)
    else:
        # No bar stands on both sides of the line.
        below = [value for value in values if value <= alarm_above]
        above = [value for value in values if value > alarm_above]
        edges = sorted({*edges, alarm_above})
        axes.hist(below, bins=edges, color=theme.main, rwidth=0.92)
        axes.hist(above, bins=edges, color=theme.alarm, rwidth=0.92)
    axes.set_xlim(*limits)
    top = max(axes.get_ylim()[1], 1.0)
    # Room for the names of the lines above the bars.
    axes.set_ylim(0, top * 1.35)
    whole_numbers(axes.yaxis, 4)
    axes.vlines(ticks[:_MOST_STROKES], top * 1.05, top * 1.14, color=theme.second, linewidth=2)
    for place, label, color in marks:
        mark(axes, theme, place, f"{label} {digits(place)}", color)
