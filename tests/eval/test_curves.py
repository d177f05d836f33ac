"""The plot of scores while training: what is drawn, and that a broken plot leaves the old file."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from dreamrie.errors import ConfigError
from eval.report import curves


def row(step: int, text: bool = True) -> dict[str, Any]:
    mean = 0.5 + step / 1000
    found: dict[str, Any] = {"step": step, "image": (mean, mean - 0.05, mean + 0.04)}
    found["text"] = (0.3, 0.28, 0.31) if text else None
    return found | {"drift": None, "share": 0.9}


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """Figures that were rendered."""
    figures: list[Figure] = []
    render = curves.render

    def keep(figure: Figure, kind: str) -> bytes:
        figures.append(figure)
        return render(figure, kind)

    monkeypatch.setattr(curves, "render", keep)
    return figures


def words(axes: Axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


def levels(axes: Axes) -> list[tuple[float, str]]:
    """Horizontal lines by height and style."""
    return [
        (float(line.get_ydata()[0]), str(line.get_linestyle()))
        for line in axes.lines
        if list(line.get_xdata()) == [0, 1]
    ]


def test_two_panels_with_ceiling_base_and_choice(tmp_path: Path, drawn: list[Figure]) -> None:
    """Rows in any order; the ceiling is dashed and in the panel of images alone, the base model dotted in both."""
    path = tmp_path / "scores.png"
    curves.plot_curves([row(200), row(0), row(100)], path, 100, 0.84)
    image, text = drawn[0].axes
    assert list(image.lines[0].get_xdata()) == [0, 100, 200]
    assert list(image.lines[0].get_ydata()) == [0.5, 0.6, 0.7]
    assert levels(image) == [(0.84, "--"), (0.5, ":")]
    assert levels(text) == [(0.3, ":")]
    assert words(image) == ["real against real 0.840", "base model 0.500", "chosen: step 100"]
    assert words(text) == ["base model 0.300", "chosen: step 100"]
    chosen = [line for line in image.lines if list(line.get_ydata()) == [0, 1]]
    assert [list(line.get_xdata()) for line in chosen] == [[100, 100]]
    band = image.collections[0].get_paths()[0].vertices[:, 1]
    assert (band.min(), band.max()) == pytest.approx((0.45, 0.74))
    with Image.open(path) as picture:
        assert picture.width > 2 * picture.height


def test_without_texts_there_is_one_panel(tmp_path: Path, drawn: list[Figure]) -> None:
    """No base level either when step 0 was not scored, and no choice yet."""
    curves.plot_curves([row(50, text=False), row(100, text=False)], tmp_path / "s.png", None, None)
    (image,) = drawn[0].axes
    assert words(image) == []
    assert levels(image) == []


def test_a_row_without_text_is_left_out_of_its_panel_alone(
    tmp_path: Path, drawn: list[Figure]
) -> None:
    curves.plot_curves([row(0), row(50, text=False), row(100)], tmp_path / "s.png", None, 0.8)
    image, text = drawn[0].axes
    assert list(image.lines[0].get_xdata()) == [0, 50, 100]
    assert list(text.lines[0].get_xdata()) == [0, 100]


def test_no_rows_and_one_row_are_drawn(tmp_path: Path, drawn: list[Figure]) -> None:
    """A training whose first pictures are blank goes on."""
    curves.plot_curves([], tmp_path / "s.png", None, 0.8)
    assert words(drawn[0].axes[0]) == ["no step could be scored yet"]
    curves.plot_curves([row(0)], tmp_path / "s.png", None, 0.8)
    assert [tick for tick in drawn[1].axes[0].get_xticks() if -0.5 <= tick <= 0.5] == [0]


def test_a_choice_that_was_not_scored_is_refused(tmp_path: Path) -> None:
    """And what was there before is left as it is; nothing else lies in the folder."""
    path = tmp_path / "s.png"
    path.write_bytes(b"old")
    with pytest.raises(ConfigError, match=r"chosen step 30 .* scored are \[0, 50\]"):
        curves.plot_curves([row(0), row(50)], path, 30, None)
    assert path.read_bytes() == b"old"
    curves.plot_curves([row(0), row(50)], path, 50, None)
    assert [entry.name for entry in tmp_path.iterdir()] == ["s.png"]
