"""Encoding and drawing agree with plain diffusers, and leave no trace."""

from __future__ import annotations

import functools
import logging
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreamrie.diffusion import pipeline
from dreamrie.diffusion.source import quiet_libraries
from dreamrie.errors import ConfigError, NumericalError
from tests.small_models import KINDS, small_components, small_folder


@functools.cache
def plain_pipeline(folder: Path) -> Any:
    """What any user of diffusers would write."""
    with quiet_libraries():
        pipe = StableDiffusionPipeline.from_pretrained(folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, clip_sample=False)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def as_array(picture: Any) -> np.ndarray:
    return np.asarray(picture, dtype=np.int64)


@pytest.mark.parametrize("kind", KINDS)
def test_a_sample_is_what_plain_diffusers_draws(
    kind: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Same prompt, seed, steps: the same picture within 1/255, alone or in company, in silence."""
    parts = small_components(kind)
    prompts, seeds = ["a red cat", "a photo of a sks dog", "snow"], [11, 12, 13]
    ours = pipeline.sample(parts, prompts, seeds, steps=3, guidance_scale=5.0, batch_size=2)
    assert capfd.readouterr() == ("", "")
    pipe = plain_pipeline(small_folder(kind))
    capfd.readouterr()
    assert np.abs(as_array(ours[0]) - as_array(ours[1])).max() > 20
    for picture, prompt, seed in zip(ours, prompts, seeds, strict=True):
        generator = torch.Generator("cpu").manual_seed(seed)
        theirs = pipe(prompt, num_inference_steps=3, guidance_scale=5.0, generator=generator)
        assert np.abs(as_array(picture) - as_array(theirs.images[0])).max() <= 1
        assert picture.size == (64, 64)


def test_sampling_restores_mode_and_global_randomness() -> None:
    parts = small_components("sd2-eps")
    parts.unet.train()
    before = torch.random.get_rng_state()
    pipeline.sample(parts, ["x"], [0], steps=2)
    assert parts.unet.training
    assert torch.equal(torch.random.get_rng_state(), before)


def test_half_precision_model_draws(tmp_path: Path) -> None:
    parts = pipeline.load_components(small_folder("tiny-vae"), dtype=torch.bfloat16)
    exact = pipeline.sample(small_components("tiny-vae"), ["a cat"], [4], steps=2)[0]
    rough = pipeline.sample(parts, ["a cat"], [4], steps=2)[0]
    difference = np.abs(as_array(exact) - as_array(rough))
    assert 0 < difference.max()
    assert difference.mean() < 8


def test_a_picture_that_is_not_finite_is_an_error() -> None:
    parts = small_components("sd2-eps")
    with torch.no_grad():
        parts.unet.conv_out.bias.fill_(float("nan"))
    with pytest.raises(NumericalError, match="not finite"):
        pipeline.sample(parts, ["x"], [0], steps=2)


@pytest.mark.parametrize("kind", KINDS)
def test_prompts_are_embedded_as_the_pipeline_does(kind: str) -> None:
    parts = small_components(kind)
    prompts = [f"a photo of number {n}" for n in range(18)]
    ours = pipeline.encode_prompts(parts, prompts)
    pipe = plain_pipeline(small_folder(kind))
    with torch.no_grad():
        theirs, _ = pipe.encode_prompt(prompts, torch.device("cpu"), 1, False)
    assert ours.shape == (18, 77, 16)
    assert float((ours - theirs).abs().max()) < 1e-6


@pytest.mark.parametrize("kind", ["sd2-eps", "tiny-vae"])
def test_latents_are_scaled_and_decode_where_they_came_from(kind: str) -> None:
    """The pipeline divides by the scaling factor, so encoding must multiply by it."""
    parts = small_components(kind)
    pixels = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    posterior = pipeline.encode_posterior(parts.vae, pixels)
    factor = parts.vae.config.scaling_factor
    with torch.no_grad():
        raw = parts.vae.encode(pixels)
    if kind == "tiny-vae":
        assert torch.allclose(posterior.mean, raw.latents * factor)
        assert not posterior.std.any()
    else:
        assert torch.allclose(posterior.mean, raw.latent_dist.mean * factor)
        assert torch.allclose(posterior.std, raw.latent_dist.std * factor)
        assert bool((posterior.std > 0).all())


def test_latent_draws_follow_their_generator() -> None:
    parts = small_components("sd2-eps")
    pixels = torch.zeros(3, 3, 64, 64)
    draws = [
        pipeline.encode_latents(parts.vae, pixels, torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    assert torch.equal(draws[0], draws[1])
    assert float((draws[0] - draws[2]).abs().max()) > 1e-3
    posterior = pipeline.encode_posterior(parts.vae, pixels)
    standard = (draws[0] - posterior.mean) / posterior.std
    assert abs(float(standard.mean())) < 0.15
    assert abs(float(standard.std()) - 1) < 0.1


@pytest.mark.parametrize("prompt", ["", "  ", "\n\t", "dog \ud800"])
def test_prompts_that_say_nothing_are_refused(prompt: str) -> None:
    with pytest.raises(ConfigError, match="--instance_prompt"):
        pipeline.check_prompt(small_components("sd2-eps").tokenizer, prompt, "--instance_prompt")


def test_the_unread_end_of_a_prompt_is_said(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = small_components("sd2-eps").tokenizer
    with warnings.catch_warnings(), caplog.at_level(logging.WARNING):
        pipeline.check_prompt(tokenizer, "dog " * 75, "--class_prompt")
        assert not caplog.records
        pipeline.check_prompt(tokenizer, "dog " * 76, "--class_prompt")
    assert "--class_prompt has 78 tokens; only the first 77 are read" in caplog.text
