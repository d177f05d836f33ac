"""Charts of a training and of an adapter for a web page, each in light and dark."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.patches import PathPatch
from matplotlib.path import Path
from numpy.typing import NDArray

from dreamrie.errors import ConfigError
from eval.report.curves import curves_figure
from eval.report.figures import Theme, make_figure, name_axes, padded, whole_numbers
from eval.report.inline import PANEL_IN, themed, words_instead
from eval.report.plane import PlanePoint, plane_chart

__all__ = [
    "PlanePoint",
    "energy_chart",
    "loss_chart",
    "plane_chart",
    "scores_chart",
    "spectrum_chart",
    "themed",
]

_SCORED = ("image", "text", "prompts_kept")
_NUMBERED_BARS = 12
_NUMBERED_CURVES = 8
_MARKED_STEPS = 12
# Charts that a page which refreshes itself asks for again.
_REMEMBERED = 32


# ------------------------------------------------------------------------------------- a training


def loss_chart(losses: Sequence[tuple[int, float]], max_steps: int) -> str:
    """The loss of every step, faint, and its running median, strong.

    Args:
        losses: steps in order, and losses; those that are not finite are counted instead of drawn.
        max_steps: where the training will end; the axis goes from 0 to there, or to the last step if that is later.

    Returns:
        HTML, see `themed`.
    """
    return _loss_chart(tuple((int(step), float(loss)) for step, loss in losses), int(max_steps))


@lru_cache(_REMEMBERED)
def _loss_chart(losses: tuple[tuple[int, float], ...], max_steps: int) -> str:
    drawn = [(step, loss) for step, loss in losses if math.isfinite(loss)]
    if not drawn:
        missing = f"\n{len(losses)} losses so far, none of them finite" if losses else ""
        return words_instead(f"the loss of each step will be here{missing}", "No losses yet")
    steps, values = (np.array(column) for column in zip(*drawn, strict=True))
    lost = len(losses) - len(drawn)
    note = f", {lost} not finite" if lost else ""
    median = running_median(values)

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = make_figure(*PANEL_IN, theme)
        # Limits are set below: a patch would look for its own, stroke by stroke.
        axes.add_artist(_dots(steps, values, theme.faint))
        axes.plot(steps, median, color=theme.main, linewidth=2)
        axes.set_xlim(0, max(max_steps, steps[-1], 1))
        axes.set_ylim(*padded(list(values), least=1e-6))
        whole_numbers(axes.xaxis)
        x = "step\nthe loss does not tell whether the concept is learned"
        name_axes(axes, theme, x, "loss", f"Training loss and its running median{note}")
        return figure

    return themed(draw, f"Training loss of {len(drawn)} steps, the last of them {steps[-1]}{note}")


def _dots(x: NDArray[Any], y: NDArray[Any], color: str) -> PathPatch:
    """All points as one element, strokes without length: as markers they are nine tenths of the file."""
    ends = np.repeat(np.stack([x, y], axis=1), 2, axis=0)
    path = Path(ends, [Path.MOVETO, Path.LINETO] * len(x))
    path.should_simplify = False
    dots = PathPatch(path, fill=False, color=color, linewidth=2.4, alpha=0.5, capstyle="round")
    dots.set_snap(False)
    return dots


def running_median(values: NDArray[Any]) -> NDArray[Any]:
    """The median of a window around each value, which at the ends is cut off rather than moved.

    Args:
        values: (n,).

    Returns:
        (n,); the window has about an eighth of the values, an odd number of them.
    """
    half = max(len(values) // 16, 1)
    return np.array(
        [np.median(values[max(at - half, 0) : at + half + 1]) for at in range(len(values))]
    )


def scores_chart(
    scorings: Sequence[Mapping[str, Any]], best_step: int | None, ceiling: float | None = None
) -> str:
    """The panels of `scores.png` below each other.

    Args:
        scorings: see `eval.report.curves.plot_curves`.
        best_step: marked; None: none.
        ceiling: image similarity of the real pictures to each other; None: not drawn.

    Returns:
        HTML, see `themed`.

    Raises:
        ConfigError: `best_step` is none of the scorings.
    """
    rows = tuple(
        (int(row["step"]), *(tuple(map(float, row.get(key) or ())) for key in _SCORED))
        for row in scorings
    )
    if best_step is not None and best_step not in [row[0] for row in rows]:
        raise ConfigError(
            f"the chosen step {best_step} has no scores to draw; scored are {[row[0] for row in rows]}."
        )
    return _scores_chart(rows, best_step, ceiling)


@lru_cache(_REMEMBERED)
def _scores_chart(
    rows: tuple[tuple[Any, ...], ...], best_step: int | None, ceiling: float | None
) -> str:
    if not rows:
        text = "image similarity, text similarity and how well\nprompts are followed will be here"
        return words_instead(text, "No scores yet")
    scorings = [dict(zip(("step", *_SCORED), row, strict=True)) for row in rows]

    def draw(theme: Theme) -> Figure:
        return curves_figure(scorings, best_step, ceiling, theme, PANEL_IN, stacked=True)

    chosen = "" if best_step is None else f", the best of them {best_step}"
    return themed(draw, f"Scores of {len(rows)} steps{chosen}")


def spectrum_chart(steps: Sequence[int], values: Sequence[Sequence[float]]) -> str:
    """How large the change of the model is in each of its directions, over steps.

    Args:
        steps: in order.
        values: for each step the singular values, largest first, mean over layers.

    Returns:
        HTML, see `themed`.

    Raises:
        ConfigError: not a row for each step, or rows of several lengths.
    """
    rows = tuple(tuple(map(float, row)) for row in values)
    if len(rows) != len(steps) or len({len(row) for row in rows}) > 1:
        raise ConfigError(
            f"a spectrum needs equally many singular values for each of its {len(steps)} steps; "
            f"got rows of lengths {[len(row) for row in rows]}."
        )
    return _spectrum_chart(tuple(map(int, steps)), rows)


@lru_cache(_REMEMBERED)
def _spectrum_chart(steps: tuple[int, ...], rows: tuple[tuple[float, ...], ...]) -> str:
    if not steps or not rows[0]:
        text = "the singular values of the change\nwill be here, over steps"
        return words_instead(text, "No singular values yet")
    curves = np.array(rows).T
    last = len(curves) - 1

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = make_figure(*PANEL_IN, theme)
        top = max(float(np.nanmax(curves)), 1e-12)
        reach = max(steps[-1] - steps[0], 1)
        axes.set_xlim(steps[0] - 0.02 * reach, steps[-1] + 0.02 * reach)
        axes.set_ylim(0, 1.08 * top)
        free = math.inf
        marker = "o" if len(steps) < _MARKED_STEPS else ""
        for place, curve in enumerate(curves):
            alpha = 1.0 - 0.65 * place / max(last, 1)
            axes.plot(steps, curve, color=theme.main, alpha=alpha, marker=marker, markersize=3)
            # A twelfth of the height holds a line of text.
            named = last < _NUMBERED_CURVES or place in (0, last)
            if named and curve[-1] < free:
                axes.annotate(
                    ordinal(place + 1),
                    (1.0, curve[-1]),
                    xycoords=("axes fraction", "data"),
                    xytext=(4, 0),
                    textcoords="offset points",
                    va="center",
                    color=theme.faint,
                    fontsize=9,
                )
                free = curve[-1] - 0.09 * top
        whole_numbers(axes.xaxis)
        name_axes(axes, theme, "step", "mean over layers", "Singular values of the change")
        return figure

    return themed(
        draw, f"{last + 1} singular values over {len(steps)} steps, the last of them {steps[-1]}"
    )


# ------------------------------------------------------------------------------------- an adapter


def energy_chart(layers: Sequence[Sequence[float]], rank: int) -> str:
    """How much of a change each of its directions holds, and how much the first `rank` of them hold together.

    Args:
        layers: singular values of each layer, largest first; layers may have several ranks.
        rank: how many are kept, at least 1.

    Returns:
        HTML, see `themed`.

    Raises:
        ConfigError: a rank below 1, or a singular value that is negative or not finite.
    """
    rows = tuple(tuple(map(float, layer)) for layer in layers)
    if rank < 1:
        raise ConfigError(f"a truncation keeps a rank of at least 1; got {rank}.")
    wrong = [value for row in rows for value in row if not 0.0 <= value < math.inf]
    if wrong:
        raise ConfigError(f"singular values are finite and not negative; got {wrong[0]}.")
    return _energy_chart(rows, int(rank))


def energy_shares(layers: Sequence[Sequence[float]]) -> list[float]:
    """Share of the 1st, 2nd, ... singular value in the squared Frobenius norm of a change over all layers.

    Args:
        layers: singular values of each layer, largest first.

    Returns:
        As many as the longest layer has, with sum 1; none for a change of zero.
    """
    energies = [0.0] * max((len(layer) for layer in layers), default=0)
    for layer in layers:
        for place, value in enumerate(layer):
            energies[place] += value * value
    total = sum(energies)
    return [energy / total for energy in energies] if total > 0.0 else []


@lru_cache(_REMEMBERED)
def _energy_chart(layers: tuple[tuple[float, ...], ...], rank: int) -> str:
    shares = energy_shares(layers)
    if not shares:
        text = "the change is zero:\nthere is nothing to keep" if any(layers) else ""
        return words_instead(
            text or "the energy of each direction\nwill be here", "No energies yet"
        )
    title = f"rank {rank} keeps {percent(sum(shares[:rank]), len(shares) <= rank)} of the energy"

    def draw(theme: Theme) -> Figure:
        figure, (axes,) = make_figure(*PANEL_IN, theme)
        places = range(1, len(shares) + 1)
        bars = axes.bar(places, [100 * share for share in shares], width=0.72, color=theme.main)
        for place, bar in enumerate(bars):
            bar.set_alpha(1.0 if place < rank else 0.3)
            if len(shares) <= _NUMBERED_BARS:
                axes.annotate(
                    f"{100 * shares[place]:.1f}",
                    (place + 1, 100 * shares[place]),
                    xytext=(0, 2),
                    textcoords="offset points",
                    ha="center",
                    color=theme.ink if place < rank else theme.faint,
                    fontsize=9,
                )
        axes.set_xlim(0.4, len(shares) + 0.6)
        axes.set_ylim(0, 115 * max(shares))
        axes.grid(visible=False, axis="x")
        whole_numbers(axes.xaxis, 12)
        name_axes(axes, theme, "singular value, largest first", "% of the energy", title)
        return figure

    return themed(draw, f"{title}; shares of {len(shares)} singular values")


def percent(share: float, is_all: bool) -> str:
    """A share in words that do not say 100 % for less than all.

    Args:
        share: of 1.
        is_all: nothing is left out.

    Returns:
        Such as "98.6 %".
    """
    if is_all:
        return "100 %"
    return "over 99.9 %" if share >= 0.9995 else f"{100 * share:.1f} %"


def ordinal(number: int) -> str:
    """A place in a row.

    Args:
        number: from 1.

    Returns:
        Such as "1st", "12th" or "22nd".
    """
    last = 0 if number % 100 in (11, 12, 13) else number % 10
    return f"{number}{ {1: 'st', 2: 'nd', 3: 'rd'}.get(last, 'th') }"
