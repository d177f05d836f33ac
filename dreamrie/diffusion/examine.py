"""What can be said about training pictures before training: too small, blurred, nearly the same, too dark or bright.

The thresholds were set on the 63 photos of 12 subjects of the DreamBooth data set, none of which is found at fault, and
on copies of them that are: see each constant, and tests/diffusion/test_doctor.py, which measures it again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image

from dreamrie.diffusion.images import BACKGROUND, load_layers
from dreamrie.errors import ImageError

Code = Literal[
    "broken", "same", "small", "blurred", "near", "dark", "bright", "transparent", "caption"
]
# Nothing can be learned from the first; one of the second is left out of a clean copy.
UNUSABLE = frozenset({"broken"})
LEFT_OUT = frozenset({"broken", "same"})
# Said, but nothing has to be done.
REMARKS = frozenset({"transparent"})

# Variance of the Laplacian, in squared grey levels, of the sharpest of 4 x 4 parts: a sharp subject before a blurred
# background is sharp. Measured at a longer side of 256 px: 63 photos have 510 or more, with
# a Gaussian blur of 3 px at 512 px at most 115; a blur of 2 px is not always seen (at most 509).
LIMIT_SHARPNESS = 250.0
_SHARPNESS_SIDE_PX = 256
_PARTS = 4
# Bits of 128 that tell whether brightness rises to the right and downwards on a 9 x 9 grid. Measured: two photos of one
# subject differ in 30 and more, of two subjects in 36; one photo cut by 2 % on each side in up to 14, shifted by 3 %
# in up to 18, saved at JPEG quality 40 in up to 9.
LIMIT_BITS = 18
# Flat pictures have no such bits; then the mean difference of 16 x 16 colors must be small too. One photo made brighter
# by a quarter: up to 46.
LIMIT_COLOR = 48.0
# Grey levels. Measured: the brightest 5 % of a photo begin at 62 and above, the darkest end at 173 and below.
LIMIT_DARK = 40.0
LIMIT_BRIGHT = 215.0


class Finding(NamedTuple):
    """Something about a picture.

    Attributes:
        code: kind of finding.
        text: in words, for a table.
        others: names of the pictures that it has to do with.
    """

    code: Code
    text: str
    others: tuple[str, ...] = ()


class Look(NamedTuple):
    """What two pictures are compared by.

    Attributes:
        digest: of size, color and alpha: equal for equal pixels.
        rises: 128 truth values.
        colors: (16, 16, 3).
    """

    digest: str
    rises: np.ndarray
    colors: np.ndarray


@dataclass
class Examined:
    """One picture and what was found.

    Attributes:
        path: of the file.
        kind: format and mode of the file, "-" if it cannot be decoded.
        size: width and height in pixels, upright; None likewise.
        sharpness: see LIMIT_SHARPNESS; None likewise.
        look: None likewise.
        findings: in the order in which they matter.
    """

    path: Path
    kind: str = "-"
    size: tuple[int, int] | None = None
    sharpness: float | None = None
    look: Look | None = None
    findings: list[Finding] = field(default_factory=list)

    def has(self, codes: frozenset[str]) -> bool:
        """Whether one of these was found."""
        return any(finding.code in codes for finding in self.findings)

    @property
    def is_usable(self) -> bool:
        """Training accepts it."""
        return not self.has(UNUSABLE)

    @property
    def needs_attention(self) -> bool:
        """Something was found that is more than a remark."""
        return any(finding.code not in REMARKS for finding in self.findings)


def examine(path: Path, resolution: int) -> Examined:
    """Decode one picture and judge it by itself.

    Args:
        path: a file.
        resolution: side of the training squares, in pixels.

    Returns:
        What was found; a file that cannot be decoded is a finding, not an error.
    """
    found = Examined(path)
    try:
        layers = load_layers(path)
    except ImageError as error:
        reason = str(error).removeprefix(f"{path}: ").rstrip(".")
        found.findings.append(Finding("broken", reason))
        return found
    picture = layers.on(BACKGROUND)
    grey = picture.convert("L")
    found.kind, found.size = layers.kind, picture.size
    found.sharpness, found.look = sharpness(grey), _look(picture, layers.alpha)
    side = min(picture.size)
    if side < resolution:
        text = f"smaller than {resolution} px: enlarged {resolution / side:.2g} times"
        found.findings.append(Finding("small", text))
    dark, bright = np.percentile(np.asarray(grey), (5, 95))
    # Where there is hardly any light or shade, nothing can be said about sharpness.
    if bright < LIMIT_DARK:
        found.findings.append(Finding("dark", "very dark nearly everywhere"))
    elif dark > LIMIT_BRIGHT:
        found.findings.append(Finding("bright", "very bright nearly everywhere"))
    elif found.sharpness < LIMIT_SHARPNESS:
        usual = f"photos have {LIMIT_SHARPNESS:.0f} and more"
        text = f"blurred (sharpness {found.sharpness:.0f}, {usual})"
        found.findings.append(Finding("blurred", text))
    if layers.alpha is not None:
        share = float((np.asarray(layers.alpha) < 128).mean())
        text = f"{share:.0%} transparent: white will be there"
        found.findings.append(Finding("transparent", text))
    return found


def compare(pictures: Sequence[Examined]) -> None:
    """Find equal and nearly equal pictures; each is told about the earlier ones that it repeats.

    Args:
        pictures: as examined, those to keep first; findings are added.
    """
    for place, later in enumerate(pictures):
        same = [e for e in pictures[:place] if _is_same(e, later)]
        near = [e for e in pictures[:place] if e not in same and _is_near(e, later)]
        if same:
            text = f"the same picture as {same[0].path.name}"
            later.findings.append(Finding("same", text, (same[0].path.name,)))
        elif near:
            names = tuple(e.path.name for e in near)
            later.findings.append(Finding("near", f"nearly the same as {', '.join(names)}", names))


def sharpness(grey: Image.Image) -> float:
    """Measure how sharp the sharpest part is.

    Args:
        grey: mode L; larger ones are reduced to a longer side of 256 px, smaller ones are taken as they are.

    Returns:
        Variance of the Laplacian of the sharpest of 4 x 4 parts, in squared grey levels; 0 if there is nothing to see.
    """
    scale = min(1.0, _SHARPNESS_SIDE_PX / max(grey.size))
    width, height = (max(1, round(side * scale)) for side in grey.size)
    small = np.asarray(grey.resize((width, height), Image.Resampling.LANCZOS), dtype=np.float32)
    if min(small.shape) < 2 + _PARTS:
        return 0.0
    middle = small[1:-1, 1:-1]
    around = small[:-2, 1:-1] + small[2:, 1:-1] + small[1:-1, :-2] + small[1:-1, 2:]
    parts = (
        part
        for rows in np.array_split(4 * middle - around, _PARTS)
        for part in np.array_split(rows, _PARTS, axis=1)
    )
    return max(float(part.var()) for part in parts)


def _look(picture: Image.Image, alpha: Image.Image | None) -> Look:
    """What it is compared by."""
    digest = hashlib.sha256(f"{picture.size}".encode() + picture.tobytes())
    digest.update(b"" if alpha is None else alpha.tobytes())
    grid = picture.convert("L").resize((9, 9), Image.Resampling.LANCZOS)
    levels = np.asarray(grid, dtype=np.int16)
    rises = np.concatenate(
        [
            (levels[:-1, 1:] > levels[:-1, :-1]).ravel(),
            (levels[1:, :-1] > levels[:-1, :-1]).ravel(),
        ]
    )
    colors = np.asarray(picture.resize((16, 16), Image.Resampling.LANCZOS), dtype=np.float32)
    return Look(digest.hexdigest(), rises, colors)


def _is_same(one: Examined, other: Examined) -> bool:
    """Equal pixels."""
    return one.look is not None and other.look is not None and one.look.digest == other.look.digest


def _is_near(one: Examined, other: Examined) -> bool:
    """The same photo, saved anew, cut a little or made brighter."""
    if one.look is None or other.look is None:
        return False
    differing = int((one.look.rises != other.look.rises).sum())
    apart = float(np.abs(one.look.colors - other.look.colors).mean())
    return differing <= LIMIT_BITS and apart <= LIMIT_COLOR
