"""Which sizes of picture let an offline encoder tell concepts apart?

    python -m benchmarks.recognition

The adapters that `python -m benchmarks.concepts` has trained draw every prompt of the embedded set once. A picture is
recognized if its image similarity to the pictures of its own concept is higher than to those of every other concept.
The background says nothing here: all concepts are drawn on the same prompts. The base model's pictures of the same
prompts show what chance gives.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from benchmarks.concepts import CONCEPTS
from benchmarks.examiner import Examiner
from dreamrie.config import parse_config
from dreamrie.diffusion.images import list_images, load_image
from dreamrie.trainer import BEST
from eval import metrics
from eval.encoders import Encoder, load_encoder
from eval.encoders.preprocessing import TF_LITE, Preprocessing
from eval.encoders.registry import small_vision_encoder

# Sides in pixels, whose embeddings are joined. Training pictures of the embedded model have 64.
SIZES = (
    (48,),
    (64,),
    (96,),
    (128,),
    (160,),
    (224,),
    (48, 128),
    (64, 128),
    (64, 160),
    (64, 128, 160),
)
PICTURES = 22
Pictures = Mapping[str, Sequence[Image.Image]]


def recognized(own: str, ours: Tensor, real: Mapping[str, Tensor]) -> float:
    """Share of pictures that are nearer to their own concept than to every other one.

    Args:
        own: name of the concept.
        ours: (n, d) embeddings of pictures of it.
        real: (m, d) embeddings of the real pictures of every concept, by name.

    Returns:
        In [0, 1].
    """
    names = list(real)
    likeness = torch.stack([metrics.image_similarity(ours, real[name]) for name in names], 1)
    return float((likeness.argmax(1) == names.index(own)).double().mean())


def table_row(
    encoder: Encoder, drawn: Mapping[str, Pictures], base: Pictures, real: Pictures
) -> tuple[str, float]:
    """Measure one encoder.

    Args:
        encoder: what to measure.
        drawn: pictures by run, by concept (one concept in each run).
        base: pictures of the base model on the prompts of each concept.
        real: real pictures of each concept.

    Returns:
        A line of the table, and the share of pictures that are recognized.
    """
    known = {name: encoder.embed_images(pictures) for name, pictures in real.items()}
    started, shares, count = time.perf_counter(), [], 0
    for run in drawn.values():
        for concept, pictures in run.items():
            shares.append(recognized(concept, encoder.embed_images(pictures), known))
            count += len(pictures)
    milliseconds = 1000 * (time.perf_counter() - started) / count
    by_chance = [recognized(name, encoder.embed_images(base[name]), known) for name in base]
    share, spread = torch.tensor(shares).mean(), torch.tensor(shares).std(correction=0)
    line = f"{encoder.name:<16} {share:10.3f} {spread:12.3f} {sum(by_chance) / len(base):10.3f} {milliseconds:10.1f}"
    return line, float(share)


def main(argv: Sequence[str] | None = None) -> None:
    """Draw with every adapter, print one row for each encoder.

    Args:
        argv: `--runs DIR`.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/concepts"))
    folder = parser.parse_args(argv).runs
    runs = sorted(path.parent.parent for path in folder.glob(f"*/{BEST}/best.json"))
    if not runs:
        raise SystemExit(f"{folder} holds no run: python -m benchmarks.concepts makes them")
    reader = load_encoder("tiny-clip")
    examiner = Examiner((reader, reader), (10, 4.0, 16))
    drawn: dict[str, dict[str, list[Image.Image]]] = {}
    base: dict[str, list[Image.Image]] = {}
    for run in runs:
        concept = run.name.rpartition("-")[0]
        config = parse_config(["--config", str(run / "config.yaml")])
        drawn[run.name] = {concept: examiner.draw(config, run / BEST, PICTURES, "recognition")[1]}
        if concept not in base:
            base[concept] = examiner.draw(config, None, PICTURES, "recognition")[1]
    real = {name: [load_image(path) for path in list_images(CONCEPTS / name)] for name in base}
    print(f"{len(runs)} adapters of {len(base)} concepts, {PICTURES} pictures of each adapter")
    print(
        f"{'encoder':<16} {'recognized':>10} {'sd over runs':>12} {'base model':>10} {'ms/picture':>10}"
    )
    for sides in SIZES:
        views = [Preprocessing(side, side, TF_LITE, "TensorFlow") for side in sides]
        name = "effnet " + "+".join(map(str, sides))
        print(table_row(small_vision_encoder(name, views), drawn, base, real)[0], flush=True)
    print(table_row(reader, drawn, base, real)[0])


if __name__ == "__main__":
    sys.exit(main())
