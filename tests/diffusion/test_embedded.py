"""The model that ships with the package: a whole pipeline, in small, for this library and for diffusers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline

from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, Components, load_components, sample
from dreamrie.diffusion.source import EMBEDDED, embedded_directory, quiet_libraries
from dreamrie.lora import attach_lora

LIMIT_BYTES = 36_000_000


@pytest.fixture(scope="module")
def embedded() -> Components:
    return load_components()


def test_nothing_given_means_the_embedded_model(embedded: Components) -> None:
    assert embedded.source.resolved == EMBEDDED
    assert embedded.source.requested == ""
    assert embedded.dtype == embedded.text_encoder.dtype == torch.float32
    assert embedded.prediction_type == "epsilon"
    assert embedded.unet.config.use_linear_projection is True
    assert embedded.resolution in (64, 128)
    assert embedded.tokenizer("sks").input_ids == [49_406, 48_136, 49_407]


def test_it_is_small_and_without_pickles() -> None:
    files = [path for path in embedded_directory().rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) < LIMIT_BYTES
    assert not [path for path in files if path.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_its_settings_need_no_correction(embedded: Components) -> None:
    """What StableDiffusionPipeline would change with a warning is right in the file."""
    saved = DDIMScheduler.load_config(embedded_directory(), subfolder="scheduler")
    assert saved["_class_name"] == "DDIMScheduler"
    assert (saved["clip_sample"], saved["steps_offset"]) == (False, 1)


def test_plain_diffusers_draws_the_same_picture(embedded: Components) -> None:
    """Loaded by `from_pretrained` without a word about dreamrie."""
    prompt, seed = "a red apple on a blue background", 3
    ours = np.asarray(sample(embedded, [prompt], [seed], steps=4)[0], dtype=int)
    with quiet_libraries():
        pipe: Any = StableDiffusionPipeline.from_pretrained(embedded_directory())
    pipe.to(torch.float32)
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator("cpu").manual_seed(seed)
    theirs = pipe(prompt, num_inference_steps=4, generator=generator).images[0]
    assert ours.std() > 10
    assert np.abs(ours - np.asarray(theirs, dtype=int)).max() <= 1


def test_every_attention_layer_takes_an_adapter_of_rank_16() -> None:
    pairs = attach_lora(load_components().unet, 16, ATTENTION_TARGETS, init="orthonormal")
    assert len(pairs) == 8 * sum(pair.name.endswith("attn1.to_q") for pair in pairs) > 0
