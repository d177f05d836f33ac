"""Train the example concept on the embedded model and draw what it learned, in one picture.

    python -m examples.demo

Trains with `train_dreambooth.py --config examples/demo.yaml`, as anyone would. Then it loads the
saved file into a stock diffusers pipeline on the untouched base, so the picture shows what the file
does, not what the trainer had in memory.
"""

from __future__ import annotations

import argparse
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
from examples import demo_pictures

ROOT = Path(__file__).resolve().parent.parent


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


def draw(pipe: diffusers.StableDiffusionPipeline, config: TrainConfig) -> list[list[Image.Image]]:
    """Draw every prompt of the configuration.

    Args:
        pipe: with or without an adapter.
        config: prompts, steps, guidance and the number of rows.

    Returns:
        Rows of pictures; row k has seed + k, one picture for each prompt.
    """
    settings = config.validation
    rows = []
    for row in range(settings.num_validation_images):
        seed = config.schedule.seed + row
        generators = [torch.Generator().manual_seed(seed) for _ in settings.validation_prompt]
        rows.append(
            pipe(
                prompt=list(settings.validation_prompt),
                generator=generators,
                num_inference_steps=settings.num_inference_steps,
                guidance_scale=settings.guidance_scale,
            ).images
        )
    return rows


def compare(config: TrainConfig) -> list[demo_pictures.Row]:
    """Draw the rows of the picture: references, the base model, the base model with the file.

    Args:
        config: of the run whose adapter lies in its output folder.

    Returns:
        Labelled rows, top to bottom.
    """
    references = [load_image(path) for path in check_images(config.data.instance_data_dir)]
    pipe = load_base(config)
    before = draw(pipe, config)
    pipe.load_lora_weights(config.output.output_dir)
    after = draw(pipe, config)
    prompts = list(config.validation.validation_prompt)
    names = [f'"{config.data.instance_prompt}"'] + [""] * (len(references) - 1)
    rows = [demo_pictures.Row("the pictures it was trained on", references, names)]
    rows += [demo_pictures.Row("base model", pictures, prompts) for pictures in before]
    rows += [demo_pictures.Row("with the adapter", pictures, prompts) for pictures in after]
    return rows


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
    rows = compare(config)
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


if __name__ == "__main__":
    main()
