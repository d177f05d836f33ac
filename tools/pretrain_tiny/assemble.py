"""Puts the trained parts together as a plain Stable Diffusion 2 pipeline in fp16, and the tiny CLIP beside it."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import torch
from diffusers import StableDiffusionPipeline
from safetensors.torch import save_file

from tools.pretrain_tiny import autoencoder, clip, text, unet


def assemble(work: Path, raw: Path, target: Path) -> None:
    """Write `target/tiny-sd` (loadable by StableDiffusionPipeline.from_pretrained) and `target/tiny-clip`.

    The tiny CLIP's text tower is the pipeline's text encoder; only what is not there is stored a second time.
    """
    text_model, tokenizer = text.load(work)
    pipe = StableDiffusionPipeline(
        vae=autoencoder.written(work, raw),
        text_encoder=text_model,
        tokenizer=tokenizer,
        unet=unet.load(work),
        scheduler=unet.scheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    ).to(dtype=torch.float16)
    directory = target / "tiny-sd"
    shutil.rmtree(directory, ignore_errors=True)
    pipe.save_pretrained(directory, safe_serialization=True)
    _minify(directory / "tokenizer" / "tokenizer.json")
    _save_clip(work, target / "tiny-clip")
    _write_checksums(target)


def _minify(path: Path) -> None:
    """The same JSON without spaces: a third of the file is indentation."""
    content = json.loads(path.read_text(encoding="utf-8"))
    compact = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    path.write_text(compact, encoding="utf-8")


def _save_clip(work: Path, directory: Path) -> None:
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    state = clip.load(work).state_dict()
    kept = {
        name: value.half().contiguous()
        for name, value in state.items()
        if name.startswith("visual.") or name in ("logit_scale", "text_projection")
    }
    save_file(kept, directory / "model.safetensors")
    config = {
        "embed_dim": clip.EMBED_DIM,
        "vision_cfg": clip.VISION,
        "text_cfg": {**clip.TEXT, "context_length": clip.CONTEXT},
        "text_tower": "../tiny-sd/text_encoder",
        "preprocess": {"size_px": 64, "interpolation": "bicubic", "mean": 0.5, "std": 0.5},
    }
    (directory / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _write_checksums(target: Path) -> None:
    # The card beside the two folders is written later, with the numbers.
    files = sorted(p for p in target.rglob("*") if p.is_file() and p.parent != target)
    lines = [
        f"{hashlib.sha256(p.read_bytes()).hexdigest()}  {p.relative_to(target).as_posix()}"
        for p in files
    ]
    (target / "SHA256SUMS").write_text("\n".join(lines) + "\n", encoding="utf-8")
