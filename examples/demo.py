"""Train the example concept on the embedded model and draw what it learned, in one picture.

    python -m examples.demo

Trains with `train_dreambooth.py --config examples/demo.yaml`, as anyone would. Then it loads the
file that the scores chose into a stock diffusers pipeline on the untouched base, so the picture shows
what the file does, not what the trainer had in memory. Base model and file are then scored.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import diffusers
import torch
from diffusers.utils import logging as diffusers_logging
from PIL import Image

from dreamrie.config import TrainConfig, parse_config
from dreamrie.diffusion.images import check_images, load_image
from dreamrie.diffusion.source import quiet_libraries, resolve_model
from dreamrie.trainer import BEST
from eval.prompts import load_prompts
from eval.training import encoder_pair
from examples import demo_pictures
from examples.demo_scores import score_table

ROOT = Path(__file__).resolve().parent.parent
BATCH, FIRST_SEED = 11, 1000
FRESH = "prompts and seeds that neither training nor the choice of the step has used together"


class Stopwatch:
    """Seconds of each phase, in order."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self._since = time.perf_counter()

    def lap(self, phase: str) -> None:
        """Book the time since the last lap under the name of a phase."""
        now = time.perf_counter()
        self.phases[phase] = now - self._since
        self._since = now

    def report(self) -> str:
        """One line: `training 95 s, pictures 20 s; 115 s in all`."""
        parts = ", ".join(f"{phase} {spent:.0f} s" for phase, spent in self.phases.items())
        return f"{parts}; {sum(self.phases.values()):.0f} s in all"


def train(flags: Sequence[str]) -> None:
    """Run the training script in a process of its own.

    Args:
        flags: its command line.

    Raises:
        SystemExit: training failed; it has said why, and its exit code is passed on.
    """
    script = ROOT / "train_dreambooth.py"
    print(f"$ python {script.name} {' '.join(flags)}", flush=True)
    code = subprocess.run([sys.executable, str(script), *flags], check=False).returncode
    if code:
        raise SystemExit(code)


def load_base(config: TrainConfig) -> diffusers.StableDiffusionPipeline:
    """Load the stock pipeline that was the base of the training, in fp32."""
    source = resolve_model(config.model.pretrained_model_name_or_path, config.model.revision)
    with quiet_libraries():
        pipe = diffusers.StableDiffusionPipeline.from_pretrained(
            source.directory, dtype=torch.float32, safety_checker=None
        )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(
    pipe: diffusers.StableDiffusionPipeline,
    config: TrainConfig,
    prompts: Sequence[str],
    seeds: Sequence[int],
) -> list[Image.Image]:
    """Draw one picture for each prompt and seed.

    Args:
        pipe: with or without an adapter.
        config: sampling steps and guidance.
        prompts: what to draw.
        seeds: one for each prompt.

    Returns:
        The pictures.
    """
    settings, pictures = config.validation, []
    for start in range(0, len(prompts), BATCH):
        part = slice(start, start + BATCH)
        pictures += pipe(
            prompt=list(prompts[part]),
            generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
            num_inference_steps=settings.num_inference_steps,
            guidance_scale=settings.guidance_scale,
        ).images
    return pictures


def chosen_adapter(folder: Path) -> tuple[Path, str]:
    """The adapter that the scores prefer and its name in the grid; without scores the last one.

    Args:
        folder: of the run.

    Returns:
        Folder of the adapter, and words for it.
    """
    record = folder / BEST / "best.json"
    if not record.is_file():
        return folder, "with the adapter"
    step = json.loads(record.read_text("utf-8"))["step"]
    return folder / BEST, f"with the adapter of step {step}, chosen by its scores"


def compare(config: TrainConfig) -> tuple[list[demo_pictures.Row], str]:
    """Draw the rows of the picture, and score base model and adapter.

    Args:
        config: of the run whose adapter lies in its output folder.

    Returns:
        Labelled rows, top to bottom: references, the base model, the base model with the file; and the scores, "" when
        the run had none.
    """
    references = [load_image(path) for path in check_images(config.data.instance_data_dir)]
    grid, settings = list(config.validation.validation_prompt), config.scores
    rounds = config.validation.num_validation_images
    seeds = [config.schedule.seed + number for number in range(rounds) for _ in grid]
    scored, texts = [], []
    if settings.score_steps:
        chosen = load_prompts(str(settings.score_prompts)).prompts
        scored = [prompt.text(f"{settings.token} {settings.subject_class}") for prompt in chosen]
        texts = [prompt.text(str(settings.subject_class)) for prompt in chosen]
    # Scores while training use hashed seeds, so these are new to the choice of the step.
    fresh = [FIRST_SEED + number for number in range(len(scored))]
    pipe = load_base(config)
    adapter, label = chosen_adapter(config.output.output_dir)
    before = draw(pipe, config, grid * rounds + scored, seeds + fresh)
    pipe.load_lora_weights(adapter)
    after = draw(pipe, config, grid * rounds + scored, seeds + fresh)
    names = [f'"{config.data.instance_prompt}"'] + [""] * (len(references) - 1)
    rows = [demo_pictures.Row("the pictures it was trained on", references, names)]
    width = len(grid)
    for words, pictures in (("base model", before), (label, after)):
        rows += [
            demo_pictures.Row(words, pictures[start : start + width], grid)
            for start in range(0, width * rounds, width)
        ]
    if not scored:
        return rows, ""
    encoders, new = encoder_pair(settings.score_encoders or []), len(seeds)
    return rows, score_table(before[new:], after[new:], references, texts, encoders)


def main(argv: Sequence[str] | None = None) -> None:
    """Train, draw, and say where the pictures are and how long each phase took.

    Args:
        argv: `--config FILE`, and any flag of `train_dreambooth.py` to override it.
    """
    parser = argparse.ArgumentParser(description=__doc__.split("\n", maxsplit=1)[0])
    parser.add_argument("--config", default=os.path.relpath(ROOT / "examples" / "demo.yaml"))
    options, overrides = parser.parse_known_args(argv)
    flags = ["--config", options.config, *overrides]
    config = parse_config(flags)
    folder = config.output.output_dir
    diffusers_logging.disable_progress_bar()
    diffusers_logging.set_verbosity_error()  # else it remarks that the file has no text encoder

    watch = Stopwatch()
    train(flags)
    watch.lap("training")
    rows, scores = compare(config)
    watch.lap("drawing")
    pictures = {
        "loss": folder / "loss.png",
        "singular values": folder / "spectrum.png",
        "what it learned": folder / "grid.png",
    }
    demo_pictures.plot_loss(folder / "metrics.jsonl", pictures["loss"])
    demo_pictures.plot_spectrum(folder / "spectrum.jsonl", pictures["singular values"])
    demo_pictures.make_grid(rows).save(pictures["what it learned"])
    watch.lap("plots")
    print(watch.report())
    for name, path in pictures.items():
        print(f"{name}: {path}")
    if scores:
        print(f"scores on {FRESH}:\n{scores}")


if __name__ == "__main__":
    main()
