"""Samples and scores made from the saved file, and pictures of `generate`, are those of the adapter in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from diffusers import StableDiffusionPipeline
from PIL import Image

from dreamrie import __main__ as tools
from dreamrie.diffusion.exported import EXPORTED
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.streams import derive_seed
from tests.train_dreambooth.small_run import ADAPTER, PROMPT, Command
from tests.train_dreambooth.test_scores import SCORES

pytestmark = pytest.mark.end_to_end

LOOKS = ("--validation_prompt", PROMPT, "--validation_steps", 2, "--guidance_scale", 3)
# Steps that can be seen.
VISIBLE = ("--learning_rate", 0.05, "--start_scale", 1)


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as picture:
        return np.asarray(picture, int)


def test_a_look_through_the_file_changes_no_byte_of_the_training(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Adapter, checkpoint and spectra are equal; pictures within a grey level, scores within rounding.

    The public loader is asked once for each look after step 0: two at samples, two at scores.
    """
    real, asked = StableDiffusionPipeline.load_lora_weights, []

    def noted(self: Any, *words: Any, **options: Any) -> None:
        asked.append(options["adapter_name"])
        real(self, *words, **options)

    monkeypatch.setattr(StableDiffusionPipeline, "load_lora_weights", noted)
    flags = (*LOOKS, *SCORES, "--score_inference_steps", 2, *VISIBLE)
    assert command(*flags, out="plain") == 0
    assert asked == []
    assert command(*flags, "--preview_from_export", out="export") == 0
    assert asked == [EXPORTED] * 4
    plain, export = tmp_path / "plain", tmp_path / "export"
    for name in (ADAPTER, "spectrum.jsonl", "checkpoint-4/tensors.safetensors", f"best/{ADAPTER}"):
        assert (plain / name).read_bytes() == (export / name).read_bytes(), name
    for picture in ("samples/step-{:06d}-0.png", "scored/step-{:06d}/pictures.png"):
        ours, theirs = (
            [pixels(run / picture.format(step)) for step in (0, 2, 4)] for run in (plain, export)
        )
        assert np.abs(ours[2] - ours[0]).max() >= 5
        for one, other in zip(ours, theirs, strict=True):
            assert np.abs(one - other).max() <= 1, picture
    rows = [
        [json.loads(line) for line in (run / "scores.jsonl").read_text("utf-8").splitlines()]
        for run in (plain, export)
    ]
    assert [facts.pop("from_export") for facts, *_ in rows] == [False, True]
    assert rows[0][0] == rows[1][0]
    for one, other in zip(rows[0][1:], rows[1][1:], strict=True):
        assert np.allclose(one["image"], other["image"], atol=2e-3)


def test_a_run_goes_on_with_the_way_of_looking_it_began_with(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    """Scores of both ways differ in their last digits, and those of a run are of one kind."""
    flags = (*LOOKS, "--checkpointing_steps", 2)
    assert command(*flags, "--preview_from_export") == 0
    assert command(*flags, "--resume_from_checkpoint", "checkpoint-2") == 2
    assert "preview_from_export was True and is now False" in caplog.text
    again = (*flags, "--preview_from_export", "--resume_from_checkpoint", "checkpoint-2")
    assert command(*again) == 0


def test_a_training_that_has_not_moved_shows_no_file_and_goes_on(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """fp16 finds its scale by skipping steps: there is nothing to save at a look in between."""
    real, calls = DreamBoothTask.loss, iter(range(100))

    def spoiled(task: DreamBoothTask, batch: Any) -> Any:
        return real(task, batch) * (float("nan") if next(calls) < 2 else 1.0)

    monkeypatch.setattr(DreamBoothTask, "loss", spoiled)
    assert command(*LOOKS, "--preview_from_export") == 0
    assert "Samples of step 2 could not be written, training goes on" in caplog.text
    assert "no layer has changed" in caplog.text
    assert "Samples of step 4" not in caplog.text


def test_generate_draws_what_the_training_showed(command: Command, tmp_path: Path) -> None:
    """Same prompt and seed: from the saved adapter, in a command of its own, within a grey level."""
    assert command(*LOOKS, *VISIBLE) == 0
    samples = tmp_path / "run" / "samples"
    seed = derive_seed(0, "sample", 0)
    words = ["generate", "--adapter", str(tmp_path / "run"), "--prompt", PROMPT]
    words += ["--seed", str(seed), "--steps", "2", "--guidance_scale", "3"]
    assert tools.main([*words, "--output", str(tmp_path / "drawn")]) == 0
    drawn = pixels(tmp_path / "drawn" / "000.png")
    assert np.abs(drawn - pixels(samples / "step-000004-0.png")).max() <= 1
    assert np.abs(drawn - pixels(samples / "step-000000-0.png")).max() >= 5
