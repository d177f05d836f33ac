"""Numbers and pictures for the model card: reconstruction, background color, object, and a contact sheet to look at."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import numpy as np
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from eval import palette
from eval.encoders.registry import load_effnet
from tools.pretrain_tiny import (
    autoencoder,
    backgrounds,
    clip,
    judge,
    objects,
    stages,
    unet,
    world,
)

log = logging.getLogger("pretrain_tiny")

PROMPTS = 200
SAMPLER_STEPS = 25
GUIDANCE = 4.0
WANTED = {
    "reconstruction_psnr_db": 27.0,
    "background_color_right": 0.85,
    "object_top5_of_all": 0.40,
}
_VIEWS = 12  # reference pictures of each object for the judge


def load_pipeline(directory: Path) -> StableDiffusionPipeline:
    """The saved model as anyone would load it."""
    pipe = StableDiffusionPipeline.from_pretrained(directory, dtype=torch.float32)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: StableDiffusionPipeline, prompts: list[str], first_seed: int) -> Tensor:
    """One picture a prompt, (n, 3, 64, 64) in [-1, 1]; picture i has seed `first_seed + i`."""
    pictures = []
    for start in range(0, len(prompts), 20):
        part = prompts[start : start + 20]
        seeds = range(first_seed + start, first_seed + start + len(part))
        output = pipe(
            part,
            num_inference_steps=SAMPLER_STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator().manual_seed(seed) for seed in seeds],
            output_type="np",
        ).images
        pictures.append(torch.from_numpy(output).permute(0, 3, 1, 2) * 2 - 1)
    return torch.cat(pictures)


def reference_features(raw: Path, model: torch.nn.Module) -> tuple[list[str], Tensor]:
    """Names and mean judge features of every object, each drawn on different plain backgrounds."""
    rng = np.random.default_rng(7)
    nouns = {**objects.TRAIN, **objects.HELD_BACK}
    sprites = world.load_sprites(raw, nouns, ("3d",))
    features = []
    for sprite in sprites:
        views = []
        for _ in range(_VIEWS):
            plain = backgrounds.PLAIN[int(rng.integers(len(backgrounds.PLAIN)))]
            canvas = plain.paint(rng)
            world.place(
                canvas, sprite.art, float(rng.uniform(38, 50)), float(rng.normal(0, 6)), (32, 32)
            )
            views.append(np.asarray(canvas))
        mean = judge.embed(model, stages.to_tensor(np.stack(views))).mean(0)
        features.append(mean / mean.norm())
    return [sprite.name for sprite in sprites], torch.stack(features)


def sheet(images: Tensor, columns: int, scale: int = 2) -> Image.Image:
    """A contact sheet of (n, 3, h, w) in [-1, 1], each picture enlarged by `scale`."""
    pixels = ((images.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy()
    rows = []
    for start in range(0, len(pixels), columns):
        row = list(pixels[start : start + columns])
        row += [np.zeros_like(row[0])] * (columns - len(row))
        rows.append(np.concatenate(row, axis=1))
    whole = Image.fromarray(np.concatenate(rows))
    return whole.resize((whole.width * scale, whole.height * scale), Image.Resampling.LANCZOS)


def reconstruction(directory: Path, raw: Path) -> float:
    """PSNR (dB) of the saved autoencoder on held-out pictures of the world."""
    images, _ = stages.held_out(raw)
    return autoencoder.psnr(load_pipeline(directory).vae, images)


def write_card(directory: Path, numbers: dict[str, float]) -> None:
    """Fill the model card and put it beside the weights."""
    pipe = load_pipeline(directory)
    sizes = {
        name: f"{sum(p.numel() for p in part.parameters()) / 1e6:.1f} M"
        for name, part in (("unet", pipe.unet), ("vae", pipe.vae), ("text", pipe.text_encoder))
    }
    template = Path(__file__).with_name("card.md").read_text(encoding="utf-8")
    text = template.format(
        **numbers,
        **sizes,
        objects=len(objects.TRAIN),
        held_back=len(objects.HELD_BACK),
        clip_steps=clip.STEPS,
        clip_batch=clip.BATCH,
        unet_steps=unet.STEPS,
        unet_batch=unet.BATCH,
        uniform_steps=unet.UNIFORM_STEPS,
        held_out=stages.HELD_OUT_COUNT,
        sampler_steps=SAMPLER_STEPS,
        guidance=GUIDANCE,
    )
    (directory.parent / "README.md").write_text(text, encoding="utf-8")


def evaluate(directory: Path, raw: Path, output: Path) -> dict[str, float]:
    """Measure the saved model; write numbers and contact sheets to `output`, the model card beside the weights.

    Raises:
        SystemExit: a number is below what is wanted; everything has been written.
    """
    output.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(3)
    names = list(objects.TRAIN.values())
    pipe = load_pipeline(directory)
    colors = [backgrounds.PLAIN[i % len(backgrounds.PLAIN)].name for i in range(PROMPTS)]
    nouns = [names[i] for i in rng.choice(len(names), PROMPTS, replace=False)]
    prompts = [
        f"{world.with_article(noun)} on {world.with_article(color)} background"
        for noun, color in zip(nouns, colors, strict=True)
    ]
    images = draw(pipe, prompts, 1000)
    color_right = np.mean(
        [palette.nearest_color(i) == c for i, c in zip(images, colors, strict=True)]
    )
    model = load_effnet()
    all_names, references = reference_features(raw, model)
    ranks = (judge.embed(model, images) @ references.T).argsort(1, descending=True)
    top5 = np.mean([n in [all_names[j] for j in r[:5]] for n, r in zip(nouns, ranks, strict=True)])
    top1 = np.mean([n == all_names[int(r[0])] for n, r in zip(nouns, ranks, strict=True)])
    numbers = {
        "reconstruction_psnr_db": round(reconstruction(directory, raw), 2),
        "background_color_right": round(float(color_right), 3),
        "object_top5_of_all": round(float(top5), 3),
        "object_top1_of_all": round(float(top1), 3),
        "objects_compared": len(all_names),
        "prompts": PROMPTS,
    }
    (output / "numbers.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    sheet(images[:96], 12).save(output / "contact_sheet.jpg", quality=88)
    scenes = [
        f"{world.with_article(nouns[i])} {backgrounds.SCENES[i % 11].phrases[0]}" for i in range(22)
    ]
    pairs = [
        f"{world.with_article(nouns[2 * i])} next to {world.with_article(nouns[2 * i + 1])}"
        for i in range(8)
    ]
    twos = [
        f"two {world.plural(nouns[i])} on {world.with_article(colors[i])} background"
        for i in range(6)
    ]
    more = draw(pipe, scenes + pairs + twos, 2000)
    sheet(more, 12).save(output / "contact_sheet_scenes.jpg", quality=88)
    write_card(directory, numbers)
    log.info("numbers: %s", json.dumps(numbers))
    missed = {name: numbers[name] for name, wanted in WANTED.items() if numbers[name] < wanted}
    if missed:
        raise SystemExit(f"below what is wanted ({WANTED}): {missed}")
    return numbers
