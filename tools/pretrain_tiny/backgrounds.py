"""Backgrounds of the toy world: plain colors and simple scenes, each with the words that name it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from eval.palette import COLORS

SIZE_PX = 64


@dataclass(frozen=True)
class Background:
    """A named background: the phrases that say it, and a painter of one 64 x 64 picture."""

    name: str
    phrases: tuple[str, ...]
    painter: Callable[[np.random.Generator], Image.Image]

    def phrase(self, rng: np.random.Generator) -> str:
        """One of the wordings."""
        return self.phrases[int(rng.integers(len(self.phrases)))]

    def paint(self, rng: np.random.Generator) -> Image.Image:
        """A fresh RGB picture (64, 64)."""
        return self.painter(rng)


def _shade(
    color: tuple[int, int, int], rng: np.random.Generator, spread: float = 9.0
) -> np.ndarray:
    return np.clip(np.asarray(color, dtype=np.float64) + rng.normal(0, spread, 3), 0, 255)


def _vertical(top: np.ndarray, bottom: np.ndarray) -> Image.Image:
    t = np.linspace(0, 1, SIZE_PX)[:, None, None]
    field = np.broadcast_to(top * (1 - t) + bottom * t, (SIZE_PX, SIZE_PX, 3))
    return Image.fromarray(field.astype(np.uint8))


def _plain(color: tuple[int, int, int]) -> Callable[[np.random.Generator], Image.Image]:
    def paint(rng: np.random.Generator) -> Image.Image:
        base = _shade(color, rng)
        tilt = rng.uniform(-10, 10)
        return _vertical(np.clip(base + tilt, 0, 255), np.clip(base - tilt, 0, 255))

    return paint


def _ground(
    sky: tuple[int, int, int],
    horizon: tuple[int, int, int],
    near: tuple[int, int, int],
    far: tuple[int, int, int],
    level: tuple[float, float] = (0.5, 0.7),
) -> Callable[[np.random.Generator], tuple[Image.Image, int]]:
    def paint(rng: np.random.Generator) -> tuple[Image.Image, int]:
        image = _vertical(_shade(sky, rng), _shade(horizon, rng))
        row = int(SIZE_PX * rng.uniform(*level))
        ground = _vertical(_shade(far, rng), _shade(near, rng)).resize((SIZE_PX, SIZE_PX - row))
        image.paste(ground, (0, row))
        return image, row

    return paint


def _grass(rng: np.random.Generator) -> Image.Image:
    image, row = _ground((120, 190, 245), (196, 228, 250), (52, 140, 48), (112, 186, 72))(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(26):
        x, y = int(rng.integers(0, SIZE_PX)), int(rng.integers(row + 2, SIZE_PX))
        draw.line([(x, y), (x + int(rng.integers(-1, 2)), y - 3)], fill=(40, 120, 40))
    return image


def _snow(rng: np.random.Generator) -> Image.Image:
    image, _ = _ground((150, 180, 210), (205, 222, 238), (236, 242, 250), (250, 252, 255))(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(30):
        x, y = int(rng.integers(0, SIZE_PX)), int(rng.integers(0, SIZE_PX))
        draw.ellipse([x, y, x + 1, y + 1], fill=(255, 255, 255))
    return image


def _beach(rng: np.random.Generator) -> Image.Image:
    image, row = _ground((110, 195, 250), (190, 230, 250), (228, 200, 140), (244, 222, 170))(rng)
    sea = Image.new("RGB", (SIZE_PX, 10), tuple(int(v) for v in _shade((30, 140, 200), rng)))
    image.paste(sea, (0, row - 10))
    return image


def _night(rng: np.random.Generator) -> Image.Image:
    image, _ = _ground((10, 14, 46), (34, 42, 92), (16, 26, 30), (26, 40, 48), (0.7, 0.85))(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(22):
        draw.point((int(rng.integers(0, SIZE_PX)), int(rng.integers(0, 44))), fill=(240, 240, 210))
    x, y = int(rng.integers(4, 50)), int(rng.integers(3, 12))
    draw.ellipse([x, y, x + 8, y + 8], fill=(250, 244, 200))
    return image


def _sea(rng: np.random.Generator) -> Image.Image:
    image, row = _ground(
        (150, 210, 250), (208, 234, 250), (14, 84, 160), (40, 140, 205), (0.3, 0.45)
    )(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(14):
        x, y = int(rng.integers(-4, SIZE_PX)), int(rng.integers(row + 2, SIZE_PX))
        draw.line([(x, y), (x + int(rng.integers(4, 9)), y)], fill=(130, 200, 235))
    return image


def _desert(rng: np.random.Generator) -> Image.Image:
    image, row = _ground((250, 190, 120), (252, 224, 170), (196, 128, 60), (226, 164, 86))(rng)
    draw = ImageDraw.Draw(image)
    for _ in range(2):
        x = int(rng.integers(-10, SIZE_PX))
        draw.polygon([(x - 18, row), (x, row - 9), (x + 18, row)], fill=(214, 150, 76))
    return image


def _forest(rng: np.random.Generator) -> Image.Image:
    image, row = _ground(
        (150, 200, 190), (180, 215, 190), (46, 88, 40), (66, 110, 54), (0.6, 0.75)
    )(rng)
    draw = ImageDraw.Draw(image)
    for x in range(-4, SIZE_PX + 8, 9):
        left, top = x + int(rng.integers(-3, 3)), row - int(rng.integers(22, 38))
        green = tuple(int(v) for v in _shade((26, 96, 52), rng, 7))
        draw.polygon([(left - 8, row + 1), (left, top), (left + 8, row + 1)], fill=green)
    return image


def _space(rng: np.random.Generator) -> Image.Image:
    image = _vertical(_shade((14, 6, 36), rng, 5), _shade((46, 14, 70), rng, 6))
    draw = ImageDraw.Draw(image)
    for _ in range(40):
        white = int(rng.integers(150, 255))
        point = (int(rng.integers(0, SIZE_PX)), int(rng.integers(0, SIZE_PX)))
        draw.point(point, fill=(white, white, white))
    x, y, r = int(rng.integers(0, 54)), int(rng.integers(0, 20)), int(rng.integers(4, 8))
    draw.ellipse([x, y, x + 2 * r, y + 2 * r], fill=tuple(int(v) for v in rng.integers(90, 230, 3)))
    return image


def _table(rng: np.random.Generator) -> Image.Image:
    image, row = _ground((232, 222, 204), (222, 208, 186), (138, 86, 44), (168, 110, 60))(rng)
    draw = ImageDraw.Draw(image)
    for y in range(row + 4, SIZE_PX, 6):
        draw.line([(0, y), (SIZE_PX, y)], fill=(118, 72, 36))
    return image


def _city(rng: np.random.Generator) -> Image.Image:
    image, row = _ground((170, 200, 230), (214, 222, 232), (70, 72, 78), (92, 94, 100), (0.7, 0.8))(
        rng
    )
    draw = ImageDraw.Draw(image)
    x = -3
    while x < SIZE_PX:
        width, top = int(rng.integers(9, 16)), row - int(rng.integers(16, 40))
        tone = int(rng.integers(96, 170))
        draw.rectangle([x, top, x + width, row], fill=(tone, tone, tone + 14))
        for wy in range(top + 3, row - 2, 5):
            for wx in range(x + 2, x + width - 1, 4):
                draw.point((wx, wy), fill=(250, 236, 150))
        x += width + 1
    return image


def _sky(rng: np.random.Generator) -> Image.Image:
    image = _vertical(_shade((70, 150, 235), rng), _shade((170, 215, 250), rng))
    draw = ImageDraw.Draw(image)
    for _ in range(4):
        x, y = int(rng.integers(-6, 58)), int(rng.integers(0, 58))
        draw.ellipse([x, y, x + 15, y + 6], fill=(250, 252, 255))
        draw.ellipse([x + 4, y - 3, x + 12, y + 4], fill=(250, 252, 255))
    return image.filter(ImageFilter.GaussianBlur(0.6))


SCENES: tuple[Background, ...] = (
    Background("grass", ("on grass", "on the grass", "in a meadow"), _grass),
    Background("snow", ("in the snow", "in the snow", "on snow"), _snow),
    Background("beach", ("on the beach", "on a beach", "on sand"), _beach),
    Background("night", ("at night", "at night", "under the moon"), _night),
    Background("sea", ("in the sea", "in the water", "in the ocean"), _sea),
    Background("desert", ("in the desert", "in a desert"), _desert),
    Background("forest", ("in the forest", "in a forest", "in the woods"), _forest),
    Background("space", ("in space", "in outer space"), _space),
    Background("table", ("on a wooden table", "on a table"), _table),
    Background("city", ("in the city", "in a city"), _city),
    Background("sky", ("in the sky", "in the clouds"), _sky),
)


def _color_phrases(name: str) -> tuple[str, ...]:
    article = "an" if name[0] in "aeiou" else "a"
    return (
        f"on {article} {name} background",
        f"on {article} {name} background",
        f"on {name}",
        f"in front of {article} {name} wall",
    )


PLAIN: tuple[Background, ...] = tuple(
    Background(name, _color_phrases(name), _plain(rgb)) for name, rgb in COLORS.items()
)


def random_background(rng: np.random.Generator) -> Background:
    """A plain color (55 %) or a scene."""
    choices = PLAIN if rng.random() < 0.55 else SCENES
    return choices[int(rng.integers(len(choices)))]
