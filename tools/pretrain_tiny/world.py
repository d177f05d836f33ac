"""The toy world: emoji on colored and simple scenic backgrounds, with captions that say what is to be seen.

`Sprites` loads the art once; `World.draw(rng)` paints one 64 x 64 picture and its caption. Everything is driven by one
`numpy.random.Generator`, so the same seed gives the same world.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from tools.pretrain_tiny import backgrounds, objects

SIZE_PX = 64
SPRITE_PX = (
    112  # stored size: the largest drawn size times sqrt(2), so that rotation never upsamples much
)

TRAIN_STYLES = ("3d", "flat")
_STYLE_WORDS = {"3d": ("",), "flat": ("flat drawing of ", "flat sticker of ")}


@dataclass(frozen=True)
class Variation:
    """How much pictures of one object differ.

    Attributes:
        flat_share: share of flat art among the styles.
        kinds: shares of one object, and of two of a kind; the rest are pairs.
        adjectives: shares of small, and of big, among single objects.
        size_px: range of the size of a single object without adjective.
        slack: how much of the free room around an object its place may use, 0 to 1.
        turn: standard deviation of the angle in degrees, and the share of large turns up to 35 degrees.
        steady: share of pictures whose objects stand upright, at one size and place, on the 8-pixel cells of the latents.
    """

    flat_share: float
    kinds: tuple[float, float]
    adjectives: tuple[float, float]
    size_px: tuple[float, float]
    slack: float
    turn: tuple[float, float]
    steady: float = 0.0


WIDE = Variation(0.12, (0.78, 0.09), (0.10, 0.12), (38, 50), 0.8, (6, 0.08))
# A patch code does not shift with its picture, so every place inside the 8-pixel cells is learned anew: most objects stand
# at one place, and the others say that they may be anywhere.
STEADY = Variation(0.03, (0.88, 0.06), (0.05, 0.05), (38, 54), 0.6, (7, 0.08), steady=0.7)
_STEADY_PX = {
    "": 48.0,
    "s": 32.0,
    "t": 32.0,
    "b": 64.0,
    "l": 64.0,
}  # by first letter of the adjective


@dataclass(frozen=True)
class Sprite:
    """One piece of art: premultiplied RGBA (SPRITE_PX, SPRITE_PX), its name and its style."""

    name: str
    style: str
    art: Image.Image


def _codes(raw: Path) -> dict[str, str]:
    data = json.loads((raw / "emojibase-data" / "en" / "data.json").read_text(encoding="utf-8"))
    return {entry["label"]: entry["hexcode"].lower() for entry in data}


def _art_path(raw: Path, code: str, style: str) -> Path | None:
    bare = code.replace("-fe0f", "")
    if style == "3d":
        folder = raw / "fluent-emoji-3d" / "assets"
        names = [f"{code}.webp", f"{bare}.webp", f"{code}-fe0f.webp"]
    else:
        folder = raw / "noto-emoji" / "png" / "128"
        names = [f"emoji_u{bare.replace('-', '_')}.png"]
    return next((folder / name for name in names if (folder / name).exists()), None)


def load_art(path: Path, size_px: int = SPRITE_PX) -> Image.Image:
    """Read one piece of art, crop it to what is visible, center it in a square, premultiplied RGBA."""
    image = Image.open(path).convert("RGBA")
    box = image.getchannel("A").point(lambda a: 255 if a > 8 else 0).getbbox()
    image = image.crop(box)
    side = max(image.size)
    square = Image.new("RGBA", (side, side), (0, 0, 0, 0))
    square.paste(image, ((side - image.width) // 2, (side - image.height) // 2))
    return square.convert("RGBa").resize((size_px, size_px), Image.Resampling.LANCZOS)


def load_sprites(raw: Path, nouns: dict[str, str], styles: tuple[str, ...]) -> list[Sprite]:
    """All art of the given nouns in the given styles; a noun missing in the 3d style is an error."""
    codes = _codes(raw)
    sprites = []
    for label, name in nouns.items():
        for style in styles:
            path = _art_path(raw, codes[label], style)
            if path is None:
                if style == "3d":
                    raise FileNotFoundError(f"no 3d art for {label!r} ({codes[label]}) under {raw}")
                continue
            sprites.append(Sprite(name, style, load_art(path)))
    return sprites


def place(
    canvas: Image.Image, art: Image.Image, size_px: float, angle: float, center: tuple[float, float]
) -> None:
    """Paint premultiplied art of the given size (pixels), angle (degrees), center (pixels) onto an RGB canvas."""
    side = max(4, round(size_px))
    small = art.resize((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    turned = small.rotate(angle, Image.Resampling.BICUBIC, expand=True)
    x = round(center[0] - turned.width / 2)
    y = round(center[1] - turned.height / 2)
    straight = turned.convert("RGBA")
    canvas.paste(straight, (x, y), straight)


def with_article(noun: str) -> str:
    """'an owl', 'a cat', by the first letter alone."""
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


_PLURALS = {
    "mouse": "mice", "goose": "geese", "fish": "fish", "sheep": "sheep", "wolf": "wolves", "knife": "knives",
    "tropical fish": "tropical fish", "puffer fish": "puffer fish", "deer": "deer", "bison": "bison",
    "shrimp": "shrimp", "squid": "squid", "moose": "moose", "potato": "potatoes", "tomato": "tomatoes",
    "mango": "mangoes", "loaf of bread": "loaves of bread", "octopus": "octopuses",
}  # fmt: skip


def plural(noun: str) -> str:
    """English plural of a noun of the world; of 'box of X' the first word is inflected."""
    if noun in _PLURALS:
        return _PLURALS[noun]
    if " of " in noun:
        head, tail = noun.split(" of ", 1)
        return f"{plural(head)} of {tail}"
    if noun.endswith(("s", "x", "ch", "sh")):
        return noun + "es"
    if noun.endswith("y") and noun[-2] not in "aeiou":
        return noun[:-1] + "ies"
    return noun + "s"


_OPENINGS = ("", "", "", "a photo of ", "a photo of ", "a picture of ")


class World:
    """Draws pictures with captions. `sprites` are the nouns that may appear."""

    def __init__(self, sprites: list[Sprite], variation: Variation = WIDE) -> None:
        self._variation = variation
        self._is_steady = False
        self._by_style = {style: [s for s in sprites if s.style == style] for style in TRAIN_STYLES}

    def _pick(self, rng: np.random.Generator, style: str) -> Sprite:
        choices = self._by_style[style]
        return choices[int(rng.integers(len(choices)))]

    def draw(self, rng: np.random.Generator) -> tuple[Image.Image, str]:
        """One 64 x 64 RGB picture and its caption."""
        self._is_steady = bool(rng.random() < self._variation.steady)
        style = "flat" if rng.random() < self._variation.flat_share else "3d"
        background = backgrounds.random_background(rng)
        canvas = background.paint(rng)
        kind = rng.random()
        one, two = self._variation.kinds
        if kind < one:
            subject = self._one(rng, canvas, style)
        elif kind < one + two:
            subject = self._two_of_a_kind(rng, canvas, style)
        else:
            subject = self._pair(rng, canvas, style)
        opening = _OPENINGS[int(rng.integers(len(_OPENINGS)))]
        ending = f" {background.phrase(rng)}" if rng.random() < 0.9 else ""
        return canvas, f"{opening}{subject}{ending}"

    def _one(self, rng: np.random.Generator, canvas: Image.Image, style: str) -> str:
        sprite = self._pick(rng, style)
        words = _STYLE_WORDS[style][int(rng.integers(len(_STYLE_WORDS[style])))]
        kind = rng.random()
        small, big = self._variation.adjectives
        if kind < small:
            size, adjective = rng.uniform(20, 28), "small " if rng.random() < 0.9 else "tiny "
        elif kind < small + big:
            size, adjective = rng.uniform(52, 60), "big " if rng.random() < 0.8 else "large "
        else:
            size, adjective = rng.uniform(*self._variation.size_px), ""
        if self._is_steady:
            size = _STEADY_PX[adjective[:1]]
        self._scatter(rng, canvas, sprite.art, size)
        if words:
            noun = f"{adjective}{sprite.name}"
            return f"a {words}{with_article(noun)}"
        return with_article(f"{adjective}{sprite.name}")

    def _two_of_a_kind(self, rng: np.random.Generator, canvas: Image.Image, style: str) -> str:
        sprite = self._pick(rng, style)
        for x in (17.0, 47.0):
            self._jitter(rng, canvas, sprite.art, rng.uniform(23, 30), x)
        words = "flat drawings of " if style == "flat" else ""
        return f"two {words}{plural(sprite.name)}"

    def _pair(self, rng: np.random.Generator, canvas: Image.Image, style: str) -> str:
        first, second = self._pick(rng, style), self._pick(rng, style)
        self._jitter(rng, canvas, first.art, rng.uniform(24, 31), 17.0)
        self._jitter(rng, canvas, second.art, rng.uniform(24, 31), 47.0)
        joint = ("and", "next to", "beside")[int(rng.integers(3))]
        words = "a flat drawing of " if style == "flat" else ""
        return f"{words}{with_article(first.name)} {joint} {with_article(second.name)}"

    def _angle(self, rng: np.random.Generator) -> float:
        deviation, large = self._variation.turn
        if self._is_steady:
            return 0.0
        return float(rng.normal(0, deviation) if rng.random() >= large else rng.uniform(-35, 35))

    def _scatter(
        self, rng: np.random.Generator, canvas: Image.Image, art: Image.Image, size: float
    ) -> None:
        slack = max(0.0, (SIZE_PX - size) / 2) * self._variation.slack
        center = (
            SIZE_PX / 2 + float(rng.uniform(-slack, slack)),
            SIZE_PX / 2 + float(rng.uniform(-slack, slack)) * 0.7,
        )
        if self._is_steady:
            center = (SIZE_PX / 2, SIZE_PX / 2)
        place(canvas, art, size, self._angle(rng), center)

    def _jitter(
        self, rng: np.random.Generator, canvas: Image.Image, art: Image.Image, size: float, x: float
    ) -> None:
        if self._is_steady:
            place(canvas, art, 32.0, 0.0, (16.0 if x < SIZE_PX / 2 else 48.0, SIZE_PX / 2))
            return
        slack = 11 * self._variation.slack
        center = (x + float(rng.uniform(-2, 2)), SIZE_PX / 2 + float(rng.uniform(-slack, slack)))
        place(canvas, art, size, self._angle(rng), center)


def make_world(raw: Path, variation: Variation) -> World:
    """The world of pretraining: the training nouns only, in the training styles."""
    return World(load_sprites(raw, objects.TRAIN, TRAIN_STYLES), variation)


def render(world: World, count: int, seed: int) -> tuple[np.ndarray, list[str]]:
    """`count` pictures as uint8 (count, 64, 64, 3), and their captions."""
    rng = np.random.default_rng(seed)
    pixels = np.empty((count, SIZE_PX, SIZE_PX, 3), dtype=np.uint8)
    captions = []
    for index in range(count):
        image, caption = world.draw(rng)
        pixels[index] = np.asarray(image)
        captions.append(caption)
    return pixels, captions
