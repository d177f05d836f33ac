"""Reads the folders and prompts to be scored; whatever cannot be scored is named before a network is loaded."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from dreamrie.diffusion.images import find_pictures, map_images
from dreamrie.errors import ConfigError, ImageError

# Generated pictures of a broken run are black or of one color; JPEG leaves a little noise on them.
_BLANK_SPREAD = 2.0


@dataclass(frozen=True)
class Folder:
    """Decoded pictures of one folder, in the order of their names."""

    path: Path
    names: tuple[str, ...]
    images: tuple[Image.Image, ...]


def read_folder(path: Path, least: int) -> Folder:
    """Decode every picture of a folder.

    Args:
        path: folder.
        least: number of pictures that are needed.

    Returns:
        The pictures.

    Raises:
        ImageError: the folder is missing or empty, holds too few pictures, or some are broken or of one color.
    """
    paths = find_pictures(path)
    images = map_images(paths, lambda image: image)
    if len(images) < least:
        raise ImageError(
            f"{path} holds {len(images)} picture; at least {least} are needed, because scores are judged "
            "against how similar the real pictures are to each other."
        )
    blank = [entry.name for entry, image in zip(paths, images, strict=True) if is_blank(image)]
    if blank:
        raise ImageError(
            f"{path}: {len(blank)} of {len(images)} pictures are black or of one color: {', '.join(blank)}. "
            "They would lower a mean without saying why; find out why they are blank, or remove them."
        )
    return Folder(path, tuple(entry.name for entry in paths), tuple(images))


def is_blank(image: Image.Image) -> bool:
    """Whether a picture is black or of one color, as those of a broken run are."""
    return bool(np.asarray(image, dtype=np.float32).std(axis=(0, 1)).max() < _BLANK_SPREAD)


def check_apart(generated: Path, reference: Path) -> None:
    """Refuse to score a folder against itself.

    Args:
        generated: folder of generated pictures.
        reference: folder of real pictures.

    Raises:
        ConfigError: both are one folder.
    """
    if generated.resolve() == reference.resolve():
        raise ConfigError(
            f"generated pictures and --reference are the same folder, {generated}. Give the generated pictures and "
            "the real ones separately."
        )


def read_prompts(path: Path, names: tuple[str, ...]) -> list[str]:
    """Read the prompt of every generated picture.

    Args:
        path: JSON lines with `file_name` and `prompt`, as `metadata.jsonl`.
        names: file names of the generated pictures.

    Returns:
        Prompts in the order of `names`.

    Raises:
        ConfigError: the file is missing or malformed, or names other pictures than there are.
    """
    if not path.is_file():
        raise ConfigError(f"--prompts: there is no file {path}.")
    found: dict[str, str] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, prompt = row["file_name"], row["prompt"]
        except (json.JSONDecodeError, KeyError, TypeError) as error:
            raise ConfigError(
                f"--prompts {path}, line {number}: expected "
                '{"file_name": "0.png", "prompt": "a photo of a dog"}, got ' + repr(line[:80])
            ) from error
        if not isinstance(name, str) or not isinstance(prompt, str) or not prompt.strip():
            raise ConfigError(f"--prompts {path}, line {number}: an empty or non-text value.")
        if name in found:
            raise ConfigError(f"--prompts {path}, line {number}: {name!r} stands twice.")
        found[name] = prompt
    missing = sorted(set(names) - set(found))
    extra = sorted(set(found) - set(names))
    if missing or extra:
        raise ConfigError(
            f"--prompts {path}: pictures without prompt: {missing or 'none'}; prompts without picture: "
            f"{extra or 'none'}. A missing picture must not make a smaller mean."
        )
    return [found[name] for name in names]


def without_token(prompt: str, token: str) -> str:
    """The prompt as text similarity sees it: the rare token depresses the score of every method alike.

    Args:
        prompt: "a photo of a sks dog".
        token: "sks"; an empty one changes nothing.

    Returns:
        "a photo of a dog".
    """
    if not token:
        return prompt
    kept = re.sub(rf"(?<!\w){re.escape(token)}(?!\w)", " ", prompt)
    return re.sub(r"\s+", " ", kept).strip()
