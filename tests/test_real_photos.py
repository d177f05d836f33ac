"""Real photos: the same command, on the embedded model, moves its samples toward what it was shown."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import Tensor

import train_dreambooth
from dreamrie.diffusion.images import load_image
from dreamrie.diffusion.pipeline import encode_posterior, load_components, sample
from tests.contracts.sources import ROOT

PHOTOS = Path(os.environ.get("DREAMRIE_DATA", ROOT.parent / "shared" / "data")) / "dreambooth"
PROMPT = "a photo of sks dog"
SAMPLES = 12


def _latents(pictures: list[Image.Image], vae: object) -> Tensor:
    """Flat latents (n, d) of pictures, cut to squares and resized as the trainer does."""
    rows = []
    for picture in pictures:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        square = picture.crop((left, top, left + side, top + side)).resize((64, 64))
        pixels = torch.frombuffer(bytearray(square.tobytes()), dtype=torch.uint8).float()
        rows.append(pixels.reshape(64, 64, 3).permute(2, 0, 1) / 127.5 - 1)
    return encode_posterior(vae, torch.stack(rows)).mean.flatten(1)


def energy_distance(first: Tensor, second: Tensor) -> float:
    """Energy distance of two samples (n, d), (m, d): 2 E|X - Y| - E|X - X'| - E|Y - Y'|, unbiased; 0 if alike."""
    between = torch.cdist(first, second).mean()
    inside = [torch.cdist(x, x).sum() / (len(x) * (len(x) - 1)) for x in (first, second)]
    return float(2 * between - inside[0] - inside[1])


@pytest.mark.slow
@pytest.mark.skipif(not (PHOTOS / "dog6").is_dir(), reason=f"the photos are not at {PHOTOS}")
def test_samples_move_toward_the_photos(tmp_path: Path) -> None:
    """The distance between samples and photos, as distributions of latents, falls by a third and more."""
    flags = ["--instance_data_dir", str(PHOTOS / "dog6"), "--instance_prompt", PROMPT]
    flags += ["--center_crop", "--max_train_steps", "200", "--output_dir", str(tmp_path / "run")]
    assert train_dreambooth.main([*flags, "--learning_rate", "5e-2"]) == 0

    components = load_components()
    photos = [load_image(path) for path in sorted((PHOTOS / "dog6").iterdir())]
    reference = _latents(photos, components.vae)
    seeds = list(range(500, 500 + SAMPLES))

    def distance() -> float:
        pictures = sample(components, [PROMPT] * SAMPLES, seeds, steps=20, guidance_scale=3.0)
        return energy_distance(_latents(pictures, components.vae), reference)

    before = distance()
    components.unet.load_lora_adapter(
        tmp_path / "run", weight_name="pytorch_lora_weights.safetensors", prefix="unet"
    )
    after = distance()
    print(f"energy distance to the photos: {before:.2f} before, {after:.2f} after")
    assert before > 1.0
    assert after < 0.67 * before
