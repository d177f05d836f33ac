"""The shared streams are those that the pictures always had."""

from __future__ import annotations

import torch

from dreamrie import streams
from dreamrie.diffusion import streams as of_pictures


def test_the_pictures_have_the_same_streams() -> None:
    assert of_pictures.derive_seed is streams.derive_seed
    assert of_pictures.stream_generator is streams.stream_generator


def test_a_stream_of_texts_is_frozen() -> None:
    """A changed derivation would silently change every run; this value was fixed when texts came."""
    assert streams.derive_seed(7, "training/order", 3) == 7_238_311_565_011_637_919


def test_a_generator_is_made_anew() -> None:
    drawn = [torch.rand(3, generator=streams.stream_generator(0, "x", 1)) for _ in range(2)]
    assert torch.equal(*drawn)
