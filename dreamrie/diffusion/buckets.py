"""Training sizes that keep the aspect of a picture: about the pixels of a square, sides that the U-Net can halve."""

from __future__ import annotations

import math

from PIL import Image

# Beyond it a picture is cut: Stable Diffusion has hardly seen longer ones, and a side would fall below half.
BUCKET_ASPECT = 2


def bucket_size(width: int, height: int, resolution: int, unit: int) -> tuple[int, int]:
    """Choose the training size of one picture.

    Among all sizes whose sides are multiples of `unit` and at most 2 to 1, the one with the least sum of |log| of two
    ratios: of the aspects (what is cut off), and of the areas (what memory and time depend on). A picture with sides
    exchanged gets the size with sides exchanged, and a square one gets the square.

    Args:
        width: of the picture, in pixels.
        height: of the picture.
        resolution: its square is the area aimed at; a multiple of `unit`.
        unit: pixels; what the sides must be multiples of.

    Returns:
        Width and height in pixels.
    """
    limit = math.log(BUCKET_ASPECT)
    aspect = max(-limit, min(limit, math.log(width) - math.log(height)))
    most = BUCKET_ASPECT * (resolution // unit)
    sides = range(1, most + 1)

    def cost(size: tuple[int, int]) -> tuple[float, int, float]:
        across, down = math.log(size[0]), math.log(size[1])
        area = across + down - 2 * math.log(resolution / unit)
        # Rounded, so that sums that differ by their order alone count as equal; then the larger size wins.
        total = round(abs(across - down - aspect) + abs(area), 9)
        return total, -size[0] * size[1], round(abs(across - down - aspect), 9)

    allowed = [(x, y) for x in sides for y in sides if max(x, y) <= BUCKET_ASPECT * min(x, y)]
    across, down = min(allowed, key=cost)
    return across * unit, down * unit


def cover(
    image: Image.Image, size: tuple[int, int], resample: Image.Resampling = Image.Resampling.LANCZOS
) -> Image.Image:
    """Resize until a size is covered, keeping the aspect, and cut the middle out.

    Args:
        image: picture.
        size: width and height wanted, in pixels.
        resample: filter of the resizing.

    Returns:
        A picture of exactly that size.
    """
    width, height = image.size
    scale = max(size[0] / width, size[1] / height)
    fitted = (max(size[0], round(width * scale)), max(size[1], round(height * scale)))
    if fitted != image.size:
        image = image.resize(fitted, resample)
    left, top = (fitted[0] - size[0]) // 2, (fitted[1] - size[1]) // 2
    return image if fitted == size else image.crop((left, top, left + size[0], top + size[1]))
