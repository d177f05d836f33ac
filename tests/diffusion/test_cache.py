"""Cached latents are those that the VAE would give, and still vary as its posterior does."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamrie.diffusion.pipeline import encode_posterior
from tests.diffusion.test_task import make_task
from tests.small_models import write_pictures


@pytest.mark.parametrize("flip", [False, True])
def test_cached_latents_are_fresh_draws_of_the_posterior(flip: bool) -> None:
    """The cache keeps mean and spread, not one draw: the same picture differs from step to step."""
    task = make_task(prior=False, flip=flip, batch_size=1)
    pictures, vae = task.concept.instance, task.components.vae
    draws: dict[Any, list[Tensor]] = {}
    for step in range(1, 31):
        view = pictures.view_at(5, "training/concept", step - 1)
        draws.setdefault(view, []).append(task.batch(step, 0).latents[0])
    assert len(draws) == len(pictures.views()) == (10 if flip else 5)
    for view, found in draws.items():
        posterior = encode_posterior(vae, pictures.pixels(view)[None])
        standard = (torch.stack(found) - posterior.mean) / posterior.std
        assert abs(float(standard.mean())) < 0.2
        assert 0.85 < float(standard.std()) < 1.15
        if len(found) > 1:
            assert float((found[0] - found[1]).abs().max()) > 1e-3


def test_random_crops_are_encoded_on_demand(tmp_path: Path) -> None:
    """Where crops cannot be counted, latents are those of the crop that was drawn."""
    noise = np.random.default_rng(3).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "wide.png")
    task = make_task(kind="tiny-vae", prior=False, folder=tmp_path, batch_size=1)
    pictures = task.concept.instance
    assert pictures.views() is None
    lefts = set()
    for step in range(1, 6):
        view = pictures.view_at(5, "training/concept", step - 1)
        lefts.add(view.left)
        wanted = encode_posterior(task.components.vae, pictures.pixels(view)[None]).mean
        assert float((task.batch(step, 0).latents[0] - wanted[0]).abs().max()) < 1e-5
    assert len(lefts) > 1


def test_one_wide_photo_does_not_disable_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Square pictures are encoded once; the wide one at every step, and the log names it and the remedy."""
    write_pictures(tmp_path, 3, 64)
    Image.new("RGB", (96, 64)).save(tmp_path / "wide.png")
    encoded: list[int] = []

    def counted(vae: Any, pixels: Tensor) -> Any:
        encoded.append(len(pixels))
        return encode_posterior(vae, pixels)

    monkeypatch.setattr("dreamrie.diffusion.cache.encode_posterior", counted)
    with caplog.at_level(logging.INFO, "dreamrie"):
        task = make_task(kind="tiny-vae", prior=False, folder=tmp_path, batch_size=1)
    assert encoded == [3]
    assert "random crops of pictures that are not square (1, such as wide.png)" in caplog.text
    assert "--center_crop" in caplog.text
    names = [task.batch(step, 0).names[0] for step in range(1, 9)]
    assert names.count("wide.png") == 2
    assert encoded == [3, 1, 1]


def test_the_vae_is_asked_once_when_views_can_be_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """5 + 3 pictures are 8 encodings, however long the training; then the VAE is not needed."""
    encoded: list[int] = []

    def counted(vae: Any, pixels: Tensor) -> Any:
        encoded.append(len(pixels))
        return encode_posterior(vae, pixels)

    monkeypatch.setattr("dreamrie.diffusion.cache.encode_posterior", counted)
    task = make_task()
    assert sum(encoded) == 8
    for step in range(1, 10):
        task.batch(step, 0)
    assert sum(encoded) == 8
