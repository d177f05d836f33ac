"""The command on pictures that are not square and partly transparent: what it says, refuses and learns."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.train_dreambooth.small_run import ADAPTER, Command, metrics, moved

pytestmark = pytest.mark.end_to_end

SIZES = {"a.png": (64, 64), "b.png": (120, 80), "c.png": (80, 120), "d.png": (96, 96)}


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    """Four pictures of three aspects, two of them transparent in their left halves."""
    folder = tmp_path / "mixed"
    folder.mkdir()
    for number, (name, (width, height)) in enumerate(SIZES.items()):
        pixels = np.random.default_rng(number).integers(0, 256, (height, width, 4), dtype=np.uint8)
        pixels[..., 3] = 255
        if name in {"b.png", "d.png"}:
            pixels[:, : width // 2, 3] = 0
        Image.fromarray(pixels).save(folder / name)
    return folder


def test_a_dry_run_says_the_sizes_and_what_becomes_of_transparency(
    command: Command, mixed: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--dry-run", "--instance_data_dir", mixed)
    assert command(*flags, "--aspect_buckets", "--alpha", "mask") == 0
    text = capsys.readouterr().out
    sizes = "64 x 64 px (2), 80 x 48 px (1), 48 x 80 px (1)"
    assert f"pictures: 4, all readable, used at {sizes}" in text
    assert "transparency: 2 of 4 pictures, not counted in the loss, shown as white" in text
    assert command(*flags, "--background_color", "#102030") == 0
    text = capsys.readouterr().out
    assert "pictures: 4, all readable, used at 64 px" in text
    assert "transparency: 2 of 4 pictures, learned as #102030" in text
    assert command("--dry-run") == 0
    assert "transparency: none" in capsys.readouterr().out


def test_each_setting_of_the_pictures_reaches_the_training(
    command: Command, tmp_path: Path, mixed: Path
) -> None:
    """Four runs whose first losses all differ; the same flags give the same adapter, byte for byte."""
    flags: tuple[object, ...] = ("--instance_data_dir", mixed, "--train_batch_size", 4)
    flags = (*flags, "--max_train_steps", 2)
    ways: dict[str, tuple[object, ...]] = {
        "squares": ("--center_crop",),
        "buckets": ("--aspect_buckets",),
        "mask": ("--aspect_buckets", "--alpha", "mask"),
        "black": ("--aspect_buckets", "--background_color", "black"),
        "again": ("--aspect_buckets", "--alpha", "mask"),
    }
    losses, adapters = {}, {}
    for name, way in ways.items():
        assert command(*flags, *way, out=name) == 0
        assert moved(tmp_path / name) > 1e-3
        losses[name] = metrics(tmp_path / name)[0]["loss"]
        adapters[name] = (tmp_path / name / ADAPTER).read_bytes()
    assert losses.pop("again") == losses["mask"]
    assert adapters["again"] == adapters["mask"]
    assert len(set(losses.values())) == 4
    assert "aspect_buckets: true\n" in (tmp_path / "mask" / "config.yaml").read_text()


def test_buckets_and_masks_go_with_class_pictures_and_adamw(
    command: Command, tmp_path: Path, mixed: Path
) -> None:
    flags = ("--instance_data_dir", mixed, "--aspect_buckets", "--alpha", "mask", "--random_flip")
    flags = (*flags, "--with_prior_preservation", "--class_prompt", "a disc")
    flags = (*flags, "--class_data_dir", str(tmp_path / "class"), "--num_class_images", "2")
    adamw = ("--optimizer", "adamw", "--learning_rate", 1e-2, "--loi_batches", None)
    assert command(*flags, *adamw, "--gradient_accumulation_steps", 2) == 0
    assert moved(tmp_path / "run") > 1e-3
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["pictures"]["concept"] == list(SIZES)
    assert len(record["pictures"]["class"]) == 2


def test_a_picture_that_shows_nothing_stops_a_masked_run_before_it_starts(
    command: Command, tmp_path: Path, mixed: Path, caplog: pytest.LogCaptureFixture
) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(mixed / "nothing.png")
    flags = ("--instance_data_dir", mixed, "--alpha", "mask")
    prior = ("--with_prior_preservation", "--class_prompt", "a disc")
    prior = (*prior, "--class_data_dir", str(tmp_path / "class"))
    for more in ((), ("--aspect_buckets",), ("--dry-run",), prior):
        assert command(*flags, *more) == 2
        assert "1 of 5 files cannot be used" in caplog.text
        assert "nothing.png: transparent everywhere" in caplog.text
        caplog.clear()
    assert not (tmp_path / "run" / ADAPTER).exists()
    assert not (tmp_path / "class").exists()  # minutes of sampling with a larger model
