"""Scores of the demo: base model and adapter on the same prompts and seeds, none of them used in training."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image

from eval import metrics
from eval.encoders import Encoder
from eval.scoring import intervals


def score_table(
    before: Sequence[Image.Image],
    after: Sequence[Image.Image],
    references: Sequence[Image.Image],
    texts: Sequence[str],
    encoders: tuple[Encoder, Encoder | None],
) -> str:
    """Image and text similarity with intervals, and the paired difference.

    Args:
        before: pictures of the base model.
        after: pictures with the adapter, same prompts and seeds.
        references: the pictures it was trained on.
        texts: prompt of each picture, without the rare token.
        encoders: for image similarity, and for text similarity if there is one.

    Returns:
        A table, and what its numbers depend on.
    """
    image, reader = encoders
    real = image.embed_images(references)
    pairs = {
        f"image similarity ({image.name})": [
            metrics.image_similarity(image.embed_images(pictures), real)
            for pictures in (before, after)
        ]
    }
    if reader is not None:
        read = reader.embed_texts(texts)
        pairs[f"text similarity ({reader.name})"] = [
            metrics.text_similarity(reader.embed_images(pictures), read)
            for pictures in (before, after)
        ]
    lines = [f"{'':<39} {'base model':<22} {'with the adapter':<22} difference [95 %]"]
    for name, (old, new) in pairs.items():
        cells = [intervals(values, texts) for values in (old, new, new - old)]
        lines.append(f"{name:<39} {cells[0]:<22} {cells[1]:<22} {cells[2]}")
    ceiling = float(metrics.ceiling(real).mean())
    lines.append(f"{'real pictures to each other':<39} {ceiling:.3f}")
    versions = ", ".join(
        f"{name} v{metrics.VERSIONS[name]}" for name in ("image_similarity", "text_similarity")
    )
    for encoder in dict.fromkeys(encoder for encoder in encoders if encoder is not None):
        said = f"weights {encoder.weights_sha256[:16]}, {encoder.preprocessing}"
        lines.append(f"{encoder.name}: {said}; {versions}")
    return "\n".join(lines)
