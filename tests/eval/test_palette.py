"""Which plain color a picture stands on."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from dreamrie.errors import ConfigError
from eval.palette import COLORS, background_color


def framed(
    border: tuple[int, int, int], inside: tuple[int, int, int], width: int, size: int = 64
) -> Image.Image:
    """A picture with a frame of `width` pixels."""
    image = Image.new("RGB", (size, size), border)
    image.paste(inside, (width, width, size - width, size - width))
    return image


@pytest.mark.parametrize("name", COLORS)
def test_each_color_is_told_by_the_border_alone(name: str) -> None:
    """Whatever is inside of the outer 3 of 64 pixels; an inch more of it, and the mean moves."""
    other = COLORS["black" if name == "white" else "white"]
    images = [framed(COLORS[name], other, 3), framed(other, COLORS[name], 3)]
    assert background_color(images, [name, name]).tolist() == [1, 0]


def test_the_border_grows_with_the_picture() -> None:
    """5 % of the shorter side, and never less than a pixel."""
    for size, width in ((20, 1), (64, 3), (512, 26)):
        image = framed(COLORS["red"], COLORS["blue"], width, size)
        assert background_color([image], ["red"]).tolist() == [1]
        thin = framed(COLORS["red"], COLORS["blue"], 0, size)
        assert background_color([thin], ["red"]).tolist() == [0]


def test_shades_count_as_their_color() -> None:
    rng = np.random.default_rng(0)
    for name, color in COLORS.items():
        pixels = np.clip(rng.normal(color, 9, (64, 64, 3)), 0, 255).astype(np.uint8)
        assert background_color([Image.fromarray(pixels)], [name]).tolist() == [1]


def test_wrong_arguments_are_named() -> None:
    image = Image.new("RGB", (8, 8))
    with pytest.raises(ConfigError, match="mauve"):
        background_color([image], ["mauve"])
    with pytest.raises(ConfigError, match="1 pictures, 2 colors"):
        background_color([image], ["red", "red"])
    with pytest.raises(ConfigError, match="0 pictures"):
        background_color([], [])
