"""The command on a small random pipeline and three pictures, in this process."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import train_dreambooth
from tests.small_models import make_small_pipeline
from tests.train_dreambooth.small_run import PROMPT, Command


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_pipeline("tiny-vae", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concept with blanks, ümläut")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (70, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def command(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Run the program in this process, on small settings that flags can override (None: leave it out)."""
    level = logging.getLogger("dreamrie").level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*flags: object, out: str = "run") -> int:
        settings = {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": pictures,
            "instance_prompt": PROMPT,
            "output_dir": tmp_path / out,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "rank": 2,
            "loi_batches": 2,
            "num_inference_steps": 2,
            "num_validation_images": 1,
            "spectrum_steps": 2,
        }
        without = [flag for flag, value in pairwise(flags) if value is None]
        given = [str(word) for word in flags if word is not None and word not in without]
        base = [
            word
            for name, value in settings.items()
            if f"--{name}" not in [*given, *without]
            for word in (f"--{name}", str(value))
        ]
        return train_dreambooth.main([*base, *given])

    yield run
    logging.getLogger("dreamrie").setLevel(level)


@pytest.fixture(autouse=True)
def _no_rehearsal(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Dry runs here are asked what they check, not how long a training takes; its own test aside, that is seconds."""
    if request.node.path.stem != "test_rehearsal":
        monkeypatch.setattr(train_dreambooth, "rehearse", lambda *_: "# time: not asked for here")
