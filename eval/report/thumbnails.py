"""Pictures as data URIs within a budget of bytes, and which of them are shown when there are too many."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image

from dreamrie.diffusion.images import map_images
from eval.results import Picture

# Longer side in pixels and JPEG quality, tried from the left until all pictures fit.
_LADDER = ((256, 86), (224, 82), (192, 80), (160, 76), (128, 72), (96, 62), (80, 45), (64, 30))
# Below this quality, color at half resolution is not the worst that is seen.
_FULL_COLOR_QUALITY = 75


def make_thumbnails(paths: Sequence[Path], budget_bytes: int) -> tuple[dict[Path, str], int]:
    """Shrink pictures until all of them together fit.

    Args:
        paths: readable pictures.
        budget_bytes: for the text of all data URIs.

    Returns:
        URI of each path, and the longest side in pixels if any picture was reduced, else 0. On the lowest rung of
        the ladder the budget may be exceeded; the caller then shows fewer pictures.
    """
    decoded = map_images(paths, lambda image: (max(image.size), _shrink(image, _LADDER[0][0])))
    images, longest = [image for _, image in decoded], max((side for side, _ in decoded), default=0)
    uris: list[str] = []
    size_px = 0
    for size_px, quality in _LADDER:
        uris, spent = [], 0
        for image in images:
            uris.append(_encode(_shrink(image, size_px), quality))
            spent += len(uris[-1])
            if spent > budget_bytes:
                break
        if spent <= budget_bytes:
            break
    else:
        size_px, quality = _LADDER[-1]
        uris = [_encode(_shrink(image, size_px), quality) for image in images]
    return dict(zip(paths, uris, strict=True)), size_px if longest > size_px else 0


def choose(
    prompts: Mapping[str, Sequence[Picture]], marked: Sequence[str], room: int
) -> dict[str, list[Picture]]:
    """The same number of pictures from each prompt, those that are marked first.

    Args:
        prompts: pictures of each prompt.
        marked: files that should not be left out, the most important first.
        room: pictures in all.

    Returns:
        At most `room` pictures under their prompts, in the order of the run; prompts without room are left out.
    """
    rank = {file: place for place, file in enumerate(marked)}
    each = max(room // max(len(prompts), 1), 1)
    chosen = {}
    for prompt, pictures in list(prompts.items())[: max(room, 0)]:
        first = sorted(pictures, key=lambda picture: rank.get(picture.file, len(rank)))[:each]
        chosen[prompt] = [picture for picture in pictures if picture in first]
    return chosen


def data_uri(content: bytes, kind: str) -> str:
    """Bytes of a file as they stand in a page.

    Args:
        content: of the file.
        kind: its media type.

    Returns:
        `data:image/png;base64,...`
    """
    return f"data:{kind};base64,{base64.b64encode(content).decode('ascii')}"


def _shrink(image: Image.Image, size_px: int) -> Image.Image:
    """Reduce to a longest side; a smaller picture stays as it is."""
    copy = image.copy()
    copy.thumbnail((size_px, size_px), Image.Resampling.LANCZOS)
    return copy


def _encode(image: Image.Image, quality: int) -> str:
    stream = io.BytesIO()
    subsampling = 0 if quality >= _FULL_COLOR_QUALITY else 2
    # Without `optimize`: with it, Pillow's buffer is too small for pictures that hardly compress.
    image.save(stream, "JPEG", quality=quality, subsampling=subsampling)
    return data_uri(stream.getvalue(), "image/jpeg")
