"""Results with values that are set by hand: no network draws or scores them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from eval.results import PICTURES, Picture, Result, save_result
from eval.scoring import Score
from tests.eval.test_pictures import write_pictures

PROTOCOL: dict[str, Any] = {
    "base_model": "embedded",
    "adapter": "runs/owl/pytorch_lora_weights.safetensors",
    "adapter_sha256": "ab" * 32,
    "token": "sks",
    "class": "owl",
    "prompts": [{"name": "embedded", "sha256": "cd" * 32, "count": 3}],
    "drift_prompts": {"name": "drift", "sha256": "ef" * 32},
    "steps": 25,
    "guidance": 4.0,
    "size_px": 64,
    "seed": 0,
    "versions": {"torch": "2.15"},
}
ENCODER = ("effnet-lite2", "94" * 32, "resize 224")
TEXTER = ("tiny-clip", "a1" * 32, "resize 64")


def make_score(
    name: str,
    metric: str,
    values: dict[str, float],
    by: tuple[str, str, str] = ENCODER,
    interval: tuple[float, float] | None = None,
) -> Score:
    mean = sum(values.values()) / len(values)
    return Score(name, mean, interval, values, f"{metric} v1", *by)


def plan(prompts: Sequence[str], each: int) -> list[Picture]:
    return [
        Picture(f"{i:03d}-{j:02d}.png", prompt, prompt.replace("sks ", ""), 100 * i + j, "concept")
        for i, prompt in enumerate(prompts)
        for j in range(each)
    ]


def make_result(
    folder: Path,
    prompts: Sequence[str] = ("a sks owl in snow", "a sks owl at sea", "a sks owl on sand"),
    each: int = 2,
    image: Callable[[int], float] = lambda index: 0.70 + 0.01 * index,
) -> Result:
    """A whole result without picture files: image similarity `image(i)`, real pictures 0.png to 2.png."""
    concept = plan(prompts, each)
    drift = [
        Picture(f"{kind}-000.png", "a <b>cup</b>", "a <b>cup</b>", 7, kind)
        for kind in ("drift", "drift-base")
    ]
    files = [picture.file for picture in concept]
    likeness = {file: image(i) for i, file in enumerate(files)}
    real = {"0.png": 0.8, "1.png": 0.82, "2.png": 0.84}
    nearest = {file: 0.80 + 0.02 * i for i, file in enumerate(files)}
    low, high = min(likeness.values()), max(likeness.values())
    scores = (
        make_score("effnet-lite2 image", "image_similarity", likeness, interval=(low, high)),
        make_score("effnet-lite2 image, real against real", "ceiling", real),
        make_score("effnet-lite2 image, nearest real", "copy_score", nearest),
        make_score(
            "effnet-lite2 image, nearest, real to real",
            "copy_score",
            {"0.png": 0.85, "1.png": 0.85, "2.png": 0.83},
        ),
        make_score(
            "tiny-clip text",
            "text_similarity",
            {file: 0.3 - 0.01 * i for i, file in enumerate(files)},
            TEXTER,
            (0.2, 0.3),
        ),
        make_score(
            "tiny-clip text, own prompt nearest",
            "prompt_retrieval",
            {file: float(i > 0) for i, file in enumerate(files)},
            TEXTER,
        ),
        make_score("effnet-lite2 image, drift", "prior_drift", {"drift-000.png": 0.0123}),
    )
    pictures = (*concept, *drift)
    return Result(folder, PROTOCOL, str(folder.parent / "real"), pictures, scores)


def write_files(result: Result, size_px: int = 40, noise: bool = False) -> Result:
    """Draw the pictures of a result as blocks, or as noise that no codec shrinks, and its real ones."""
    (result.folder / PICTURES).mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    grains = size_px if noise else 5
    for picture in result.pictures:
        blocks = rng.integers(0, 256, (grains, grains, 3), dtype=np.uint8)
        image = Image.fromarray(blocks).resize((size_px, size_px), Image.Resampling.NEAREST)
        image.save(result.folder / PICTURES / picture.file, compress_level=1)
    if not Path(result.reference).exists():
        write_pictures(Path(result.reference), 3)
    return result


def saved(result: Result, **changes: Any) -> Path:
    """Save a result with some fields replaced; its folder."""
    result.folder.mkdir(parents=True, exist_ok=True)
    save_result(dataclasses.replace(result, **changes))
    return result.folder
