"""Scores of the demo: base model and adapter on the same prompts and seeds, none of them used in training."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from eval import metrics
from eval.encoders import load_encoder
from eval.scoring import intervals


def score_table(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    references: Sequence[Image.Image],
    texts: Sequence[str],
    encoders: tuple[str, str],
) -> str:
    """Image and text similarity with intervals, and the paired difference.

    Args:
        before: pictures of the base model.
        after: pictures with the adapter, same prompts and seeds.
        references: the pictures it was trained on.
        texts: prompt of each picture, without the rare token.
        encoders: names, for image similarity and for text similarity.

    Returns:
        A table.
    """
    image, text = (load_encoder(name) for name in encoders)
    real, read = image.embed_images(references), text.embed_texts(texts)
    pairs = {
        f"image similarity ({image.name})": [
            metrics.image_similarity(image.embed_images(pictures), real)
            for pictures in (before, after)
        ],
        f"text similarity ({text.name})": [
            metrics.text_similarity(text.embed_images(pictures), read)
            for pictures in (before, after)
        ],
    }
    lines = [f"{'':<36} {'base model':<22} {'with the adapter':<22} difference [95 %]"]
    for name, (old, new) in pairs.items():
        cells = [intervals(values, texts) for values in (old, new, new - old)]
        lines.append(f"{name:<36} {cells[0]:<22} {cells[1]:<22} {cells[2]}")
    ceiling = float(metrics.ceiling(real).mean())
    lines.append(f"{'real pictures to each other':<36} {ceiling:.3f}")
    return "\n".join(lines)
