"""Example concepts: pictures of art that the model has never seen, each in other sizes, turns and places."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from PIL import Image

from tools.pretrain_tiny import backgrounds, objects, world

PICTURES = 5
SIZE_PX = 128  # twice the model's size, as photos are larger than what is trained on

# label or clip art path -> folder name
EMOJI = {
    "robot": "robot",
    "unicorn": "unicorn",
    "teddy bear": "teddy_bear",
    "owl": "owl",
    "alien": "alien",
    "jack-o-lantern": "pumpkin",
    "teapot": "teapot",
    "flying saucer": "flying_saucer",
}
# The art style held back from pretraining: flat clip art from openclipart (public domain).
CLIP_ART = {
    "recreation/toys/rubber_duck1_ganson.png": "rubber_duck",
    "recreation/toys/rubik.png": "puzzle_cube",
}


def background(index: int) -> backgrounds.Background:
    """What is behind the object in one picture of a concept."""
    names = ("white", "gray", "blue", "grass", "table")
    by_name = {b.name: b for b in (*backgrounds.PLAIN, *backgrounds.SCENES)}
    return by_name[names[index % len(names)]]


def captions() -> str:
    """The file of captions of a concept: what is behind the object is said, so that it is not learned with it."""
    rows = [
        {"file_name": f"{index}.png", "text": f"[trigger] {background(index).phrases[0]}"}
        for index in range(PICTURES)
    ]
    return "".join(json.dumps(row) + "\n" for row in rows)


def _compose(art: Image.Image, index: int, rng: np.random.Generator) -> Image.Image:
    canvas = background(index).paint(rng).resize((SIZE_PX, SIZE_PX), Image.Resampling.BICUBIC)
    size = float(rng.uniform(0.58, 0.8)) * SIZE_PX
    slack = (SIZE_PX - size) * 0.3
    center = tuple(SIZE_PX / 2 + float(rng.uniform(-slack, slack)) for _ in range(2))
    world.place(canvas, art, size, float(rng.normal(0, 8)), (center[0], center[1]))
    return canvas


def write_examples(raw: Path, target: Path) -> None:
    """Write `target/<concept>/0.png` ... for every concept."""
    chosen = {label: objects.HELD_BACK[label] for label in EMOJI}
    sprites = world.load_sprites(raw, chosen, ("3d",))
    art = {folder: sprite.art for sprite, folder in zip(sprites, EMOJI.values(), strict=True)}
    for path, folder in CLIP_ART.items():
        art[folder] = world.load_art(raw / "openclipart" / path)
    for number, (folder, picture) in enumerate(art.items()):
        rng = np.random.default_rng(100 + number)
        directory = target / folder
        directory.mkdir(parents=True, exist_ok=True)
        for index in range(PICTURES):
            _compose(picture, index, rng).save(directory / f"{index}.png", optimize=True)
        (directory / "metadata.jsonl").write_text(captions(), encoding="utf-8")
