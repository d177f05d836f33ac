"""Make the trained examples of the app from finished trainings of `benchmarks.concepts`.

    python -m tools.app_examples

The adapter of `best/` is written again in half precision, with a digest, its layers and the fingerprint of the base
model; the thumbnail is drawn with that very file. Nothing is trained.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from app.gallery import ABOUT, ADAPTER, EXAMPLES
from dreamrie.adapter_file import base_facts, save_diffusers
from dreamrie.adapter_open import open_adapter
from dreamrie.commands.files import lasting_facts
from dreamrie.config.train_config import EMBEDDED_GUIDANCE
from dreamrie.diffusion.adapters import load_saved_adapter, remove_adapter
from dreamrie.diffusion.images import load_image
from dreamrie.diffusion.pipeline import Components, load_components, sample
from dreamrie.files import commit_folder
from dreamrie.trainer import BEST
from dreamrie.trainer.scoring import SCORED

CONCEPTS = Path(__file__).resolve().parent.parent / "examples" / "concepts"
STEPS = 30
# Chosen by eye among the seeds 0 to 11, as about.json says; numbers in `reason` come from scorings, not from these.
SEEDS = {
    "alien": 11,
    "flying_saucer": 6,
    "owl": 6,
    "pumpkin": 3,
    "puzzle_cube": 6,
    "robot": 5,
    "rubber_duck": 11,
    "teapot": 8,
    "teddy_bear": 0,
    "unicorn": 1,
}
LARGEST_TOTAL = 4_500_000


def png(picture: Image.Image) -> bytes:
    """The bytes of a PNG file, packed as tightly as it goes."""
    memory = io.BytesIO()
    picture.save(memory, format="PNG", optimize=True)
    return memory.getvalue()


def thumbnail(components: Components, adapter: Path, prompt: str, seed: int) -> bytes:
    """A picture of the concept, drawn with the example's own file."""
    load_saved_adapter(components, adapter)
    try:
        (picture,) = sample(
            components, [prompt], [seed], steps=STEPS, guidance_scale=EMBEDDED_GUIDANCE
        )
    finally:
        remove_adapter(components)
    return png(picture)


def sheets(run: Path) -> dict[str, bytes]:
    """The pictures of every scoring, small enough for a checkout."""
    found = {}
    for path in sorted((run / SCORED).glob("step-*/pictures.png")):
        memory = io.BytesIO()
        load_image(path).save(memory, format="WEBP", quality=80, method=6)
        found[f"{path.parent.name}.webp"] = memory.getvalue()
    return found


def make(components: Components, concept: str, run: Path, output: Path, seed: int) -> int:
    """Write one example, whole or not at all.

    Args:
        components: the base model, without adapter.
        concept: name of its folder.
        run: folder of its training.
        output: folder of all examples.
        seed: of the thumbnail.

    Returns:
        Bytes of its files.
    """
    words = concept.replace("_", " ")
    best = json.loads((run / BEST / "best.json").read_text("utf-8"))
    adapter = open_adapter(run / BEST)
    facts = lasting_facts(adapter.facts, "tools.app_examples")
    output.mkdir(parents=True, exist_ok=True)
    draft = output / f".{concept}.safetensors"
    try:
        save_diffusers(
            *(draft, adapter.changes, {**facts, **base_facts(components.unet)}), dtype=torch.float16
        )
        trigger = facts["instance_prompt"]
        about = {
            "title": words,
            "trigger": trigger,
            "subject": words,
            "step": best["step"],
            "reason": best["reason"],
            "thumbnail": {
                "prompt": trigger,
                "seed": seed,
                "steps": STEPS,
                "chosen": "by eye among the seeds 0 to 11",
            },
            "source": f"python -m benchmarks.concepts --concepts {concept} --seeds 1",
            "made_by": "python -m tools.app_examples",
        }
        contents = {
            ADAPTER: draft.read_bytes(),
            "thumbnail.png": thumbnail(components, draft, trigger, seed),
            **sheets(run),
            "scores.jsonl": (run / "scores.jsonl").read_bytes(),
            ABOUT: (json.dumps(about, indent=2) + "\n").encode(),
        }
    finally:
        draft.unlink(missing_ok=True)
    commit_folder(output / concept, contents)
    return sum(map(len, contents.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Make the examples.

    Args:
        argv: `--runs DIR`, `--output DIR`, `--concepts NAME,NAME`.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/concepts"))
    parser.add_argument("--output", type=Path, default=EXAMPLES)
    names = ",".join(sorted(path.name for path in CONCEPTS.iterdir()))
    parser.add_argument("--concepts", default=names)
    options = parser.parse_args(argv)
    components, total = load_components(), 0
    for concept in options.concepts.split(","):
        run, seed = options.runs / f"{concept}-0", SEEDS[concept]
        size = make(components, concept, run, options.output, seed)
        total += size
        print(f"{concept}: {size / 1e3:.0f} kB, seed {seed}", flush=True)
    print(f"in all {total / 1e6:.2f} MB")
    if total > LARGEST_TOTAL:
        sys.exit(f"more than {LARGEST_TOTAL / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
