"""The pictures of the demo: a labelled grid, the loss curve, the singular values over time."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib as mpl

mpl.use("Agg")  # a demo on a server has no screen

import matplotlib.pyplot as plt
from PIL import Image, ImageDraw, ImageFont

CELL_PX = 176
GAP_PX = 10
LABEL_PX = 128
FONT_PX = 16
PAPER, INK, FAINT = (255, 255, 255), (20, 20, 20), (110, 110, 110)
SMOOTHING_STEPS = 25


@dataclass(frozen=True)
class Row:
    """One row of the grid.

    Attributes:
        label: what all its pictures have in common; stands to their left.
        pictures: RGB, any size.
        captions: one for each picture, below it; "" for none.
    """

    label: str
    pictures: Sequence[Image.Image]
    captions: Sequence[str]


def wrap(text: str, width_px: float, font: Any) -> list[str]:
    """Break a text at spaces into lines that fit; a single long word keeps its line."""
    lines: list[str] = []
    for word in text.split():
        longer = f"{lines[-1]} {word}" if lines else word
        if lines and font.getlength(longer) <= width_px:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines


def make_grid(rows: Sequence[Row]) -> Image.Image:
    """Lay the rows out on white, every picture at the same size.

    Args:
        rows: top to bottom; they may differ in length.

    Returns:
        One RGB picture. Small pictures are enlarged with a Lanczos filter.
    """
    font = ImageFont.load_default(FONT_PX)
    columns = max(len(row.pictures) for row in rows)
    line_px = FONT_PX + 4
    wrapped = [[wrap(caption, CELL_PX, font) for caption in row.captions] for row in rows]
    heights = [
        CELL_PX + GAP_PX + line_px * max((len(lines) for lines in captions), default=0)
        for captions in wrapped
    ]
    width = LABEL_PX + columns * (CELL_PX + GAP_PX) + GAP_PX
    sheet = Image.new("RGB", (width, sum(heights) + GAP_PX * (len(rows) + 1)), PAPER)
    pen = ImageDraw.Draw(sheet)
    top = GAP_PX
    for row, captions, height in zip(rows, wrapped, heights, strict=True):
        label = "\n".join(wrap(row.label, LABEL_PX - 2 * GAP_PX, font))
        pen.multiline_text((GAP_PX, top + CELL_PX // 2), label, INK, font, anchor="lm")
        for column, (picture, lines) in enumerate(zip(row.pictures, captions, strict=True)):
            left = LABEL_PX + column * (CELL_PX + GAP_PX)
            fitted = picture.convert("RGB").resize((CELL_PX, CELL_PX), Image.Resampling.LANCZOS)
            sheet.paste(fitted, (left, top))
            pen.multiline_text((left, top + CELL_PX + 4), "\n".join(lines), FAINT, font)
        top += height + GAP_PX
    return sheet


def read_records(path: Path) -> list[dict[str, Any]]:
    """Every line of a JSON-lines file."""
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def smooth(values: Sequence[float], window: int) -> list[float]:
    """Mean over the last `window` values, fewer at the start."""
    return [
        statistics.fmean(values[max(0, end - window) : end]) for end in range(1, len(values) + 1)
    ]


def plot_loss(metrics: Path, target: Path) -> None:
    """Draw the loss of each step and its running mean.

    Args:
        metrics: `metrics.jsonl` of a run.
        target: picture to write.
    """
    records = [record for record in read_records(metrics) if record.get("loss") is not None]
    steps = [record["step"] for record in records]
    losses = [record["loss"] for record in records]
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=1, label="one step")
    mean = smooth(losses, SMOOTHING_STEPS)
    axes.plot(steps, mean, color="tab:blue", label=f"mean of {SMOOTHING_STEPS} steps")
    axes.set(xlabel="optimizer step", ylabel="loss", title="Training loss")
    axes.legend()
    figure.savefig(target, dpi=120)
    plt.close(figure)


TITLES = {
    "point": "Trained point X",
    "change": "Change of the weights",
}


def plot_spectrum(spectrum: Path, target: Path) -> None:
    """Draw the singular values over the steps: the median layer as a line, 10 to 90 % as a band.

    Args:
        spectrum: `spectrum.jsonl` of a run.
        target: picture to write.
    """
    records = read_records(spectrum)
    kinds = [kind for kind in TITLES if kind in records[0]]
    figure, panels = plt.subplots(
        1, len(kinds), figsize=(5.5 * len(kinds), 4), layout="constrained", squeeze=False
    )
    steps = [record["step"] for record in records]
    for kind, axes in zip(kinds, panels[0], strict=True):
        count = max(len(values) for values in records[0][kind].values())
        for index in range(count):
            color = plt.get_cmap("viridis")(0.9 * index / max(1, count - 1))
            columns = [
                sorted(layer[index] for layer in record[kind].values() if len(layer) > index)
                for record in records
            ]
            low = [column[len(column) // 10] for column in columns]
            high = [column[-1 - len(column) // 10] for column in columns]
            middle = [statistics.median(column) for column in columns]
            axes.plot(steps, middle, color=color, label=f"value {index + 1}")
            axes.fill_between(steps, low, high, color=color, alpha=0.12, linewidth=0)
        axes.set(xlabel="optimizer step", ylabel="singular value", title=TITLES[kind])
        axes.set_ylim(bottom=0)
        axes.legend(fontsize="small")
    figure.suptitle("Singular values: median of the layers, band of 10 to 90 %")
    figure.savefig(target, dpi=120)
    plt.close(figure)
