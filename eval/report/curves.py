"""Scores while training, over steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic
from eval.report.facts import digits
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

_PANELS = (
    ("image", "image similarity"),
    ("text", "text similarity"),
    ("prompts_kept", "prompts followed, as a share of the base model"),
)


def plot_curves(
    rows: Sequence[Mapping[str, Any]], path: Path, chosen: int | None, ceiling: float | None
) -> None:
    """Draw image similarity, text similarity and how well prompts are followed over the steps of a run.

    Args:
        rows: scorings, each with "step" and any of "image", "text" and "prompts_kept" as (mean, low, high); other
            keys are not drawn. Step 0 is the base model. Each of the three has a panel if any row has it; without
            rows the picture says that there is nothing yet.
        path: PNG; written whole or not at all.
        chosen: the step that was taken for the best, marked; None: none.
        ceiling: image similarity of the real pictures to each other; None: not drawn.

    Raises:
        ConfigError: the chosen step is none of the rows.
    """
    write_atomic(path, render(curves_figure(rows, chosen, ceiling, LIGHT, (5.2, 3.9)), "png"))


def curves_figure(
    rows: Sequence[Mapping[str, Any]],
    chosen: int | None,
    ceiling: float | None,
    theme: Theme,
    panel_in: tuple[float, float],
    stacked: bool = False,
) -> Figure:
    """The figure of `plot_curves`.

    Args:
        rows: see `plot_curves`.
        chosen: see `plot_curves`.
        ceiling: see `plot_curves`.
        theme: colors.
        panel_in: width and height of a panel, inches.
        stacked: panels below each other instead of side by side.

    Returns:
        Not yet rendered.

    Raises:
        ConfigError: the chosen step is none of the rows.
    """
    ordered = sorted(rows, key=lambda row: int(row["step"]))
    steps = [int(row["step"]) for row in ordered]
    if chosen is not None and chosen not in steps:
        raise ConfigError(f"the chosen step {chosen} has no scores to draw; scored are {steps}.")
    panels = [panel for panel in _PANELS if any(row.get(panel[0]) for row in ordered)]
    # Scoring goes on when every step so far drew pictures that cannot be scored; the plot then says so.
    rows_of, columns = (max(len(panels), 1), 1) if stacked else (1, max(len(panels), 1))
    width_in, height_in = panel_in
    figure, axes = make_figure(columns * width_in, rows_of * height_in, theme, rows_of, columns)
    if not panels:
        axes[0].set_axis_off()
        axes[0].text(0.5, 0.5, "no step could be scored yet", color=theme.faint, ha="center")
        panels, axes = [], []
    for place, (key, name) in zip(axes, panels, strict=True):
        known = [row for row in ordered if row.get(key)]
        _draw(
            place,
            theme,
            [int(row["step"]) for row in known],
            [tuple(map(float, row[key])) for row in known],
            ceiling if key == "image" else None,
        )
        air = max(0.04 * (steps[-1] - steps[0]), 0.5)
        place.set_xlim(steps[0] - air, steps[-1] + air)
        if chosen is not None:
            mark(place, theme, chosen, f"chosen: step {chosen}", theme.alarm, "-")
        whole_numbers(place.xaxis)
        name_axes(place, theme, "step", "mean and 95 % interval", name)
    return figure


def _draw(
    axes: Axes,
    theme: Theme,
    steps: Sequence[int],
    values: Sequence[tuple[float, ...]],
    ceiling: float | None,
) -> None:
    """One panel: band and curve, the level of the base model, and the ceiling."""
    means, lows, highs = zip(*values, strict=True)
    levels = []
    if ceiling is not None:
        levels.append((ceiling, f"real against real {digits(ceiling)}", theme.second, "--"))
    if steps[0] == 0:
        levels.append((means[0], f"base model {digits(means[0])}", theme.faint, ":"))
    low, high = padded([*lows, *highs, *(level[0] for level in levels)])
    # Room above for the name of the chosen step.
    axes.set_ylim(low, high + 0.12 * (high - low))
    axes.fill_between(steps, lows, highs, color=theme.main, alpha=0.16, linewidth=0)
    # A band over a single step cannot be seen.
    axes.vlines(steps, lows, highs, color=theme.main, alpha=0.45, linewidth=1)
    axes.plot(steps, means, color=theme.main, linewidth=1.8, marker="o", markersize=4.5)
    for value, label, color, style in levels:
        axes.axhline(value, color=color, linestyle=style, linewidth=1.4)
        axes.annotate(
            label,
            (1.0, value),
            xycoords=("axes fraction", "data"),
            xytext=(-3, 3),
            textcoords="offset points",
            ha="right",
            color=color,
            fontsize=9,
            bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1, "alpha": 0.8},
        )
