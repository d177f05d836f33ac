"""The plain colors of the embedded world, and which of them a picture has for background."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamrie.errors import ConfigError

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 48, 44),
    "orange": (245, 140, 34),
    "yellow": (248, 214, 60),
    "green": (66, 160, 71),
    "blue": (44, 104, 214),
    "purple": (128, 62, 178),
    "pink": (246, 150, 186),
    "brown": (122, 80, 50),
    "black": (20, 20, 22),
    "white": (248, 248, 246),
    "gray": (136, 138, 142),
}

# Part of the shorter side that counts as border: 3 of 64 pixels. Objects of the embedded world stay inside.
_BORDER = 0.05


def nearest_color(image: Tensor) -> str:
    """Name of the palette color nearest to the mean of the border of a picture.

    Args:
        image: (3, h, w) in [-1, 1].

    Returns:
        Key of `COLORS`, by distance in RGB.
    """
    width_px = max(1, round(_BORDER * min(image.shape[1:])))
    mask = torch.ones(image.shape[1:], dtype=torch.bool)
    mask[width_px:-width_px, width_px:-width_px] = False
    mean = ((image + 1) * 127.5)[:, mask].mean(1)
    palette = torch.tensor(list(COLORS.values()), dtype=torch.float32)
    return list(COLORS)[int((palette - mean).square().sum(1).argmin())]


def background_color(images: Sequence[Image.Image], expected: Sequence[str]) -> Tensor:
    """Whether each picture stands on the plain color that its prompt asked for.

    Args:
        images: RGB pictures.
        expected: key of `COLORS` for each.

    Returns:
        (n,), 1 or 0; the mean is the share that is right. Chance is 1 in 11.

    Raises:
        ConfigError: there is no picture, the numbers differ, or a color is not in the palette.
    """
    if not images or len(images) != len(expected):
        raise ConfigError(
            f"each picture needs the color that is expected of it: {len(images)} pictures, {len(expected)} colors."
        )
    unknown = sorted(set(expected) - set(COLORS))
    if unknown:
        raise ConfigError(f"no palette color: {', '.join(unknown)}; known: {', '.join(COLORS)}.")
    found = [nearest_color(_to_tensor(image)) for image in images]
    right = [name == wanted for name, wanted in zip(found, expected, strict=True)]
    return torch.tensor(right, dtype=torch.float64)


def _to_tensor(image: Image.Image) -> Tensor:
    """RGB picture to (3, h, w) in [-1, 1]."""
    pixels = np.asarray(image.convert("RGB"), dtype=np.float32)
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy()) / 127.5 - 1
