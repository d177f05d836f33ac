"""The figures of the bench."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from benchmarks.convergence.gains import Series
from benchmarks.convergence.targets import Row, plateau
from dreamrie.files import write_atomic

matplotlib.use("Agg")
from matplotlib import pyplot as plt
from matplotlib.figure import Figure

MARKERS = "osD^v<>ph*XP"
# In color against steps, at any rank; with the others, twenty bands of color would hide each other.
NAMED = ("adamw", "riemannion+loi", "muon", "lora_muon")
_DPI = 110


def _styles(names: Sequence[str]) -> list[dict[str, Any]]:
    """Color and marker of each: those of `NAMED` are the same in every figure; other ranks are dashed."""
    known = [name.partition(",")[0] for name in names]
    order = [*NAMED, *dict.fromkeys(name for name in known if name not in NAMED)]
    found = [_style(order.index(name)) for name in known]
    return [
        style | {"linestyle": "--" if "," in name else "-"}
        for name, style in zip(names, found, strict=True)
    ]


def _style(number: int) -> dict[str, Any]:
    """One of many colors and markers."""
    # Every fourth color of tab20b, because neighbors there are shades of one.
    color = (
        plt.get_cmap("tab10")(number) if number < 10 else plt.get_cmap("tab20b")(number * 4 % 20)
    )
    return {"color": color, "marker": MARKERS[number % 12]}


def _save(figure: Figure, path: Path) -> None:
    """Write a PNG and close the figure."""
    figure.tight_layout()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=_DPI, metadata={"Software": None})
    plt.close(figure)
    write_atomic(path, buffer.getvalue())


class Figures:
    """Figures with a panel for each measure, side by side.

    Args:
        folder: gets convergence-steps.png, -rates.png and -ranks.png.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._panels: dict[str, list[Callable[[Any], None]]] = {}

    def steps(self, rows: Sequence[Row], steps: Sequence[int], words: str) -> None:
        """Gain against steps, each method at its own learning rate, with intervals."""
        self._add("steps", lambda axes: _steps(axes, rows, steps, words))

    def rates(self, series: Mapping[str, Series], words: str) -> None:
        """Gain at the end against the learning rate, in multiples of each method's best."""
        self._add("rates", lambda axes: _rates(axes, series, words))

    def ranks(self, by_rank: Mapping[int, Mapping[str, Series]], words: str) -> None:
        """Best learning rate and its plateau against the rank."""
        self._add("ranks", lambda axes: _ranks(axes, by_rank, words))

    def _add(self, name: str, panel: Callable[[Any], None]) -> None:
        self._panels.setdefault(name, []).append(panel)

    def save(self) -> None:
        """Draw what was added."""
        for name, panels in self._panels.items():
            figure, every = plt.subplots(
                1, len(panels), figsize=(6 * len(panels), 4.2), squeeze=False
            )
            for axes, panel in zip(every[0], panels, strict=True):
                panel(axes)
                _legend(axes)
            _save(figure, self._folder / f"convergence-{name}.png")


def _legend(axes: Any) -> None:
    """Below the axes: there are more methods than free corners."""
    axes.legend(fontsize=7, loc="upper center", bbox_to_anchor=(0.5, -0.16), ncols=3, frameon=False)


def _steps(axes: Any, rows: Sequence[Row], steps: Sequence[int], words: str) -> None:
    named, others = (
        [row for row in rows if (row.name.partition(",")[0] in NAMED) == is_named]
        for is_named in (True, False)
    )
    for place, row in enumerate(others):
        label = "_" if place else f"{len(others)} others with all seeds"
        axes.plot(steps, row.curve[0], label=label, color="0.75", linewidth=0.8)
    for row, style in zip(named, _styles([row.name for row in named]), strict=True):
        axes.plot(steps, row.curve[0], label=f"{row.name}, lr {row.lr:g}", markersize=4, **style)
        axes.fill_between(
            steps, row.curve[1], row.curve[2], color=style["color"], alpha=0.12, linewidth=0
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    axes.set(xlabel="optimizer steps", ylabel="gain", title=words)
    axes.title.set_fontsize(8)


def _rates(axes: Any, series: Mapping[str, Series], words: str) -> None:
    for (name, one), style in zip(series.items(), _styles(list(series)), strict=True):
        flat, best = plateau(one.lrs, one.finals), one.lrs[one.best]
        axes.semilogx(
            [lr / best for lr in one.lrs],
            one.finals,
            label=f"{name}, best {best:g}",
            markersize=4,
            **style,
        )
        axes.plot(
            [flat.low / best, flat.high / best],
            [0.95 * one.finals.max()] * 2,
            color=style["color"],
            linewidth=4,
            alpha=0.35,
        )
    axes.axhline(0, color="0.6", linewidth=0.8)
    # A rate that breaks the training would leave no room for the others.
    top = max(one.finals.max() for one in series.values())
    axes.set_ylim(bottom=max(axes.get_ylim()[0], -top))
    axes.set(xlabel="learning rate, in multiples of the method's best", ylabel="gain", title=words)
    axes.title.set_fontsize(8)


def _ranks(axes: Any, by_rank: Mapping[int, Mapping[str, Series]], words: str) -> None:
    names = list(dict.fromkeys(name for found in by_rank.values() for name in found))
    for number, (name, style) in enumerate(zip(names, _styles(names), strict=True)):
        ranks = [rank for rank in sorted(by_rank) if name in by_rank[rank]]
        found = [by_rank[rank][name] for rank in ranks]
        flats = [plateau(one.lrs, one.finals) for one in found]
        best = np.array([one.lrs[one.best] for one in found])
        bars = np.array(
            [best - [flat.low for flat in flats], np.array([flat.high for flat in flats]) - best]
        )
        # Side by side, so that the bars of two methods do not hide each other.
        places = [rank * 1.04**number for rank in ranks]
        axes.errorbar(places, best, yerr=bars.clip(0), label=name, markersize=5, capsize=3, **style)
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="rank",
        ylabel="best learning rate, bar: within 95 % of its gain",
        title=words,
    )
    axes.title.set_fontsize(8)
    axes.set_xticks(sorted(by_rank), [str(rank) for rank in sorted(by_rank)])
    axes.minorticks_off()


def plot_plane(
    points: Mapping[str, Sequence[tuple[float, float]]], places: Mapping[str, int], path: Path
) -> None:
    """Likeness against prompts kept at the end; a line through the learning rates, the chosen one in full.

    Args:
        points: for each method (likeness, prompts kept) by learning rate, both as shares; "base model" alone.
        places: of the chosen learning rate.
        path: of the PNG.
    """
    figure, axes = plt.subplots(figsize=(6.4, 4.6))
    for (name, found), own in zip(points.items(), _styles(list(points)), strict=True):
        style = own if name in places else {"color": "black", "marker": "+", "linestyle": "-"}
        x, y = zip(*found, strict=True)
        axes.plot(x, y, alpha=0.35, markersize=3, linewidth=0.8, **style)
        place = places.get(name, 0)
        axes.plot(x[place], y[place], label=name, markersize=9, **{**style, "linestyle": ""})
    axes.set(
        xlabel="image similarity, share of the real pictures' to each other",
        ylabel="prompt margin, share of the base model's",
    )
    _legend(axes)
    _save(figure, path)
