"""From a picture file to the tensors that views are cut from: resized, with its alpha if that weighs the loss."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from dreamrie.diffusion.buckets import BUCKET_ASPECT, bucket_size, cover
from dreamrie.diffusion.images import fit_shorter_side, load_image_and_alpha
from dreamrie.errors import ImageError


class Framing(NamedTuple):
    """How pictures are resized and cut.

    Attributes:
        resolution: side of the squares, in pixels.
        center_crop: only the middle square is used.
        bucket_unit: keep the aspect, with sides that are multiples of this; None: squares.
        background: 8-bit RGB color behind transparent pictures.
        mask: keep the alpha.
    """

    resolution: int
    center_crop: bool
    bucket_unit: int | None
    background: tuple[int, int, int]
    mask: bool


class Taken(NamedTuple):
    """What is kept of a decoded picture.

    Attributes:
        pixels: (3, height, width), 8 bits.
        mask: alpha, (1, height, width), 8 bits; None: all of the picture counts.
        size: height and width of a view.
        starts: first rows and first columns that a view may have.
        is_transparent: some of it is.
        is_enlarged: it had fewer pixels.
        is_cut: it is narrower than a bucket can be.
    """

    pixels: Tensor
    mask: Tensor | None
    size: tuple[int, int]
    starts: tuple[Sequence[int], Sequence[int]]
    is_transparent: bool
    is_enlarged: bool
    is_cut: bool


def take_picture(path: Path, framing: Framing) -> Taken:
    """Decode a picture and keep it at the size that training needs; nothing else of it stays in memory.

    Args:
        path: picture file.
        framing: what size that is.

    Returns:
        The picture, and where views of it may begin.

    Raises:
        ImageError: the file is bad, or its mask is zero wherever training would look.
    """
    image, alpha = load_image_and_alpha(path, framing.background)
    is_transparent = alpha is not None and alpha.getextrema() != (255, 255)
    # BOX is the plain mean over the area that becomes a pixel; it has no overshoot at an edge.
    box = Image.Resampling.BOX
    if framing.bucket_unit is None:
        width, height = framing.resolution, framing.resolution
        fitted = fit_shorter_side(image, framing.resolution)
        shown = None if alpha is None else alpha.resize(fitted.size, box)
    else:
        width, height = bucket_size(*image.size, framing.resolution, framing.bucket_unit)
        fitted = cover(image, (width, height))
        shown = None if alpha is None else cover(alpha, (width, height), box)
    pixels = torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()
    mask = None
    if framing.mask and is_transparent:
        mask = torch.from_numpy(np.array(shown))[None]
    starts = _starts(pixels, mask, (height, width), framing.center_crop)
    if not all(starts):
        raise ImageError(
            f"{path}: transparent everywhere where training looks, so --alpha mask leaves nothing of it to learn "
            "from. Use --alpha background, or crop it."
        )
    return Taken(
        pixels=pixels,
        mask=mask,
        size=(height, width),
        starts=starts,
        is_transparent=is_transparent,
        is_enlarged=image.width < width or image.height < height,
        is_cut=framing.bucket_unit is not None and _is_narrow(image),
    )


def _is_narrow(image: Image.Image) -> bool:
    """Whether no bucket is as long as this picture."""
    return max(image.size) > BUCKET_ASPECT * min(image.size)


def _starts(
    pixels: Tensor, mask: Tensor | None, size: tuple[int, int], center_crop: bool
) -> tuple[Sequence[int], Sequence[int]]:
    """First rows and columns of the views that may be drawn: all, or those that show something."""
    rooms = [own - side for own, side in zip(pixels.shape[1:], size, strict=True)]
    found: list[Sequence[int]] = [[room // 2] if center_crop else range(room + 1) for room in rooms]
    if mask is not None:
        # At most one side is longer than a view, so rows and columns can be judged apart.
        for axis, side in enumerate(size):
            shown = mask[0].amax(1 - axis) > 0
            found[axis] = [
                first for first in found[axis] if bool(shown[first : first + side].any())
            ]
    return found[0], found[1]
