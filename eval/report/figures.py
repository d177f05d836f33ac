"""Figures of matplotlib without its global state, in the colors of the report; light and dark."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.layout_engine import PlaceHolderLayoutEngine
from matplotlib.ticker import MaxNLocator

# Any: matplotlib's type is a literal of all its settings.
_RC: Any = {
    "font.family": "DejaVu Sans",
    "font.size": 10.0,
    "svg.fonttype": "path",
    # Names of elements in an SVG are drawn from this, so that equal figures are equal files.
    "svg.hashsalt": "dreamrie",
}


@dataclass(frozen=True)
class Theme:
    """Colors by their duty, as `#rrggbb`.

    Attributes:
        paper: background. ink: text. faint: axes and remarks. line: grid.
        main: the run itself. second: what it is compared with. alarm: what deserves a look.
        series: runs that are told apart.
    """

    paper: str
    ink: str
    faint: str
    line: str
    main: str
    second: str
    alarm: str
    series: tuple[str, ...]


LIGHT = Theme(
    paper="#ffffff",
    ink="#1c2126",
    faint="#59636d",
    line="#e3e7ea",
    main="#2166a5",
    second="#3c7d4e",
    alarm="#b4501d",
    series=("#2166a5", "#b4501d", "#3c7d4e", "#7a4fa3", "#8a6d00", "#0f7f86", "#a83a6c", "#59636d"),
)
DARK = Theme(
    paper="#1b2025",
    ink="#e8ebee",
    faint="#9aa5af",
    line="#333b43",
    main="#7db8ec",
    second="#86cf9a",
    alarm="#f2a36c",
    series=("#7db8ec", "#f2a36c", "#86cf9a", "#c3a1e8", "#e3c75a", "#6fd0d6", "#f093bd", "#9aa5af"),
)


def make_figure(
    width_in: float, height_in: float, theme: Theme, rows: int = 1, columns: int = 1
) -> tuple[Figure, list[Axes]]:
    """An empty figure with styled panels.

    Args:
        width_in: inches.
        height_in: inches.
        theme: colors.
        rows: of panels.
        columns: of panels.

    Returns:
        Figure, and its panels row by row.
    """
    with mpl.rc_context(_RC):
        figure = Figure((width_in, height_in), facecolor=theme.paper, layout="constrained")
        grid = figure.subplots(rows, columns, squeeze=False)
    panels: list[Axes] = list(grid.flatten())
    for axes in panels:
        axes.set_facecolor(theme.paper)
        axes.grid(color=theme.line, linewidth=0.8)
        axes.set_axisbelow(True)
        axes.tick_params(colors=theme.faint, length=0, labelsize=9)
        for side, spine in axes.spines.items():
            spine.set_visible(side in ("left", "bottom"))
            spine.set_color(theme.line)
    return figure, panels


def name_axes(axes: Axes, theme: Theme, x: str, y: str, title: str = "") -> None:
    """Write what is drawn.

    Args:
        axes: panel.
        theme: colors.
        x: label below.
        y: label to the left.
        title: above, "" for none.
    """
    axes.set_xlabel(x, color=theme.faint, fontsize=9.5)
    axes.set_ylabel(y, color=theme.faint, fontsize=9.5)
    if title:
        axes.set_title(title, color=theme.ink, fontsize=11, loc="left", pad=10)


def whole_numbers(axis: Axis, most: int = 6) -> None:
    """Label an axis at whole numbers alone.

    Args:
        axis: of a panel.
        most: intervals.
    """
    axis.set_major_locator(MaxNLocator(nbins=most, integer=True, min_n_ticks=1))


def mark(axes: Axes, theme: Theme, x: float, label: str, color: str, style: str = "--") -> None:
    """A vertical line with its name at the top, on the side where there is room.

    Args:
        axes: panel whose limits are final.
        theme: colors.
        x: where.
        label: what it is.
        color: of line and name.
        style: of the line.
    """
    low, high = axes.get_xlim()
    right = x <= (low + high) / 2
    axes.axvline(x, color=color, linestyle=style, linewidth=1.4)
    axes.annotate(
        label,
        (x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(5 if right else -5, -3),
        textcoords="offset points",
        ha="left" if right else "right",
        va="top",
        color=color,
        fontsize=9,
        parse_math=False,
        # Bars and bands may lie below the words.
        bbox={"facecolor": theme.paper, "edgecolor": "none", "pad": 1.5, "alpha": 0.85},
    )


def render(figure: Figure, kind: str = "svg", dpi: int = 160) -> bytes:
    """The file of a figure; equal figures give equal bytes.

    Args:
        figure: what to draw.
        kind: "svg" or "png".
        dpi: of a PNG.

    Returns:
        Content of the file.
    """
    stream = io.BytesIO()
    with mpl.rc_context(_RC), warnings.catch_warnings():
        # A name in a script that the font lacks is drawn as boxes; the tables beside spell it out.
        warnings.filterwarnings("ignore", message="Glyph .* missing")
        metadata = {"Date": None} if kind == "svg" else {"Software": None}
        if kind == "svg" and isinstance(figure.get_layout_engine(), PlaceHolderLayoutEngine):
            # The layout is done, and `savefig` would draw a first time for it alone.
            FigureCanvasSVG(figure).print_svg(stream, metadata=metadata)
        else:
            figure.savefig(
                stream, format=kind, dpi=dpi, facecolor=figure.get_facecolor(), metadata=metadata
            )
    return stream.getvalue()


def padded(
    values: Sequence[float], share: float = 0.08, least: float = 0.01
) -> tuple[float, float]:
    """Limits of an axis that hold all values with some air.

    Args:
        values: at least one.
        share: of the span, on each side.
        least: air where all values are equal.

    Returns:
        Lower and upper limit.
    """
    low, high = min(values), max(values)
    air = max((high - low) * share, least)
    return low - air, high + air
