"""Class pictures for prior preservation: count them, check them, make exactly what is missing."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Mapping
from itertools import groupby
from pathlib import Path

from dreamrie.config.train_config import usual_guidance
from dreamrie.diffusion.images import list_images, load_image, map_images, save_png
from dreamrie.diffusion.pipeline import Components, check_prompt, sample
from dreamrie.diffusion.source import EMBEDDED
from dreamrie.errors import ConfigError, ImageError
from dreamrie.lora.fingerprint import base_fingerprint
from dreamrie.streams import derive_seed

_log = logging.getLogger(__name__)

_MANIFEST = "class_images.json"


def ensure_class_images(
    components: Components,
    prompt: str,
    directory: Path,
    count: int,
    *,
    seed: int = 0,
    batch_size: int = 4,
    steps: int = 30,
    guidance_scale: float | None = None,
) -> list[Path]:
    """Make sure that `count` pictures of the class exist.

    Pictures that lie directly in `directory` are the user's own and are used first, whatever the prompt. Made
    pictures live in a subfolder whose name depends on everything that shapes them (prompt, weights, sampler, seed), so
    that another prompt or model never gets them. Each has its own seed: a lost one comes back the same.

    Args:
        components: the base model; adapters that it carries must change nothing.
        prompt: names the class.
        directory: --class_data_dir; made if missing.
        count: pictures wanted.
        seed: of the run.
        batch_size: pictures made at a time.
        steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; default as for samples of this model.

    Returns:
        Exactly `count` paths: own pictures in the order of their names, then made ones.

    Raises:
        ConfigError: the prompt is empty or `directory` cannot hold pictures.
    """
    check_prompt(components.tokenizer, prompt, "--class_prompt")
    own = own_class_images(directory)[:count]
    if len(own) == count:
        return own
    if guidance_scale is None:
        guidance_scale = usual_guidance(components.source.resolved == EMBEDDED)
    settings = {
        "prompt": prompt,
        "model": components.source.resolved,
        **model_key(components),
        "resolution": components.resolution,
        "sampler": "ddim",
        "steps": steps,
        "guidance_scale": guidance_scale,
        "seed": seed,
    }
    folder = directory / folder_name(settings)
    wanted = [folder / f"class-{index:05d}.png" for index in range(count - len(own))]
    missing = [index for index, path in enumerate(wanted) if not _is_picture(path)]
    if missing:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            text = json.dumps(settings, indent=2, ensure_ascii=False) + "\n"
            (folder / _MANIFEST).write_text(text, encoding="utf-8")
        except OSError as error:
            raise ConfigError(
                f"--class_data_dir {directory} cannot be written: {error}."
            ) from error
        _log.info("making %d of %d class pictures in %s", len(missing), count, folder)
    # A picture keeps its neighbours when others of its folder are there already: sums that run in the same order
    # give the same bytes.
    for _, group in groupby(missing, lambda index: index // batch_size):
        chunk = list(group)
        pictures = sample(
            components,
            [prompt] * len(chunk),
            [derive_seed(seed, "class-image", index) for index in chunk],
            steps=steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
        )
        for index, picture in zip(chunk, pictures, strict=True):
            save_png(picture, wanted[index])
    return [*own, *wanted]


def model_key(components: Components) -> dict[str, object]:
    """What tells one base model from another that came from the same place.

    Args:
        components: the model, with or without adapters.

    Returns:
        The commit for a model of the Hub, with a digest of its first layer, which differs between variants of one
        commit; for a folder, which may change under its name, a digest of all weights (seconds for a large model).
        Both with the noise schedule and the size of a latent.
    """
    parts = (components.unet, components.text_encoder, components.vae)
    commit = components.source.commit
    hashed = parts if commit is None else (components.unet.conv_in,)
    config = components.scheduler_config.items()
    schedule = {name: value for name, value in config if not name.startswith("_")}
    return {
        "commit": commit,
        "weights": [base_fingerprint(part) for part in hashed],
        "schedule": hashlib.sha256(json.dumps(schedule, sort_keys=True).encode()).hexdigest(),
        "scaling_factor": float(components.vae.config.scaling_factor),
    }


def own_class_images(directory: Path) -> list[Path]:
    """The user's own class pictures, directly inside --class_data_dir.

    Args:
        directory: --class_data_dir; need not exist.

    Returns:
        Paths sorted by name; every one has been decoded.

    Raises:
        ConfigError: `directory` is a file.
    """
    if not directory.exists():
        return []
    if not directory.is_dir():
        raise ConfigError(f"--class_data_dir {directory} is a file, not a folder.")
    paths = list_images(directory)
    map_images(paths, lambda image: None)
    return paths


def folder_name(settings: Mapping[str, object]) -> str:
    """Name the subfolder for one way of making class pictures.

    Args:
        settings: everything that shapes the pictures, "prompt" among it.

    Returns:
        A readable beginning and a digest, safe on every file system.
    """
    digest = hashlib.sha256(json.dumps(dict(settings), sort_keys=True).encode("utf-8")).hexdigest()
    words = re.sub(r"[^a-z0-9]+", "-", str(settings["prompt"]).lower()).strip("-")[:40]
    return f"{words or 'class'}-{digest[:12]}"


def _is_picture(path: Path) -> bool:
    """Whether a made picture is there and whole; a damaged one is ours, so it may be replaced."""
    if not path.exists():
        return False
    try:
        load_image(path)
    except ImageError as error:
        _log.warning("%s It is made again.", error)
        return False
    return True
