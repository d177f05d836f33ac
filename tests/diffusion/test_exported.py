"""A look through the saved file shows what the adapter in training draws, and leaves no trace in the training."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dreamrie import adapter_file
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.diffusion import exported
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, sample
from dreamrie.errors import AdapterError, CheckpointError
from dreamrie.lora import attach_lora, lora_pairs
from tests.small_models import small_components
from tests.test_adapter_file import train_by_hand, trained, trained_plain, unet_output


def drawn(parts: Any) -> np.ndarray[Any, Any]:
    pictures = sample(parts, ["a sks dog", "snow"], [3, 4], steps=2, guidance_scale=3.0)
    return np.stack([np.asarray(picture, int) for picture in pictures])


def grey(first: Any, second: Any) -> int:
    return int(np.abs(first - second).max())


def saver(pairs: Any) -> Any:
    return lambda folder: adapter_file.save_diffusers_lora(folder, pairs, {})


@functools.cache
def of_the_base(kind: str) -> Any:
    return drawn(small_components(kind))


def trained_from_afar(kind: str) -> tuple[Any, Any]:
    """A start as large as the change, so that a file that holds it can be seen."""
    parts = small_components(kind)
    pairs = attach_lora(parts.unet, 2, ATTENTION_TARGETS, alpha=2.0)
    train_by_hand(pairs, size=0.1)
    return parts, pairs


def law_the_file_shows_what_training_draws(impl: Any) -> None:
    """Anchored or plain, any scaling: at most one grey level apart, and far from the base."""
    for build, kind in (
        (trained_from_afar, "sd2-eps"),
        (trained_plain, "sd2-eps"),
        (trained, "sd15"),
    ):
        parts, pairs = build(kind)
        wanted = drawn(parts)
        assert grey(wanted, of_the_base(kind)) > 8
        with impl.drawn_from_export(parts, saver(pairs)):
            found = drawn(parts)
        assert grey(found, wanted) <= 1, (build.__name__, kind, grey(found, wanted))


def law_training_goes_on_as_if_nobody_had_looked(impl: Any) -> None:
    """Parameters are the same objects with the same bytes and flags, one adapter acts, no random number is used up."""
    parts, pairs = trained()
    parts.unet.train()
    names = [name for name, _ in parts.unet.named_modules()]

    def state() -> list[Any]:
        return [
            [
                (name, id(parameter), parameter.requires_grad, parameter.detach().numpy().tobytes())
                for name, parameter in parts.unet.named_parameters()
            ],
            [(name, id(module)) for name, module in parts.unet.named_modules()],
            parts.unet.active_adapters(),
            [pair.module.scaling for pair in pairs],
            list(parts.unet.peft_config),
            parts.unet.training,
            torch.get_rng_state().numpy().tobytes(),
        ]

    before, output = state(), unet_output(parts.unet)
    with impl.drawn_from_export(parts, saver(pairs)):
        assert [name for name, _ in parts.unet.named_modules()] != names
        drawn(parts)
    assert state() == before
    assert torch.equal(unet_output(parts.unet), output)


LAWS = (law_the_file_shows_what_training_draws, law_training_goes_on_as_if_nobody_had_looked)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(exported)


def test_a_failure_inside_leaves_no_trace_either() -> None:
    parts, pairs = trained()
    output = unet_output(parts.unet)
    with pytest.raises(RuntimeError), exported.drawn_from_export(parts, saver(pairs)):
        raise RuntimeError
    assert torch.equal(unet_output(parts.unet), output)
    assert len(lora_pairs(parts.unet)) == len(pairs)


def test_what_cannot_be_saved_or_loaded_is_said_and_training_can_go_on(tmp_path: Path) -> None:
    """The loop goes on after a CheckpointError of a look."""
    parts = small_components("sd2-eps")
    pairs = attach_lora(parts.unet, 2, ATTENTION_TARGETS)
    flags = [parameter.requires_grad for parameter in parts.unet.parameters()]
    with (
        pytest.raises(CheckpointError, match=r"as it is saved: no layer has changed") as caught,
        exported.drawn_from_export(parts, saver(pairs)),
    ):
        raise AssertionError
    assert isinstance(caught.value.__cause__, AdapterError)
    (tmp_path / DIFFUSERS_FILE).write_bytes(b"not a file")
    with (
        pytest.raises(CheckpointError, match=r"diffusers cannot load .*pytorch_lora"),
        exported.drawn_from_file(parts, tmp_path / DIFFUSERS_FILE),
    ):
        raise AssertionError
    assert [parameter.requires_grad for parameter in parts.unet.parameters()] == flags
    assert parts.unet.active_adapters() == ["default"]


def test_the_file_inside_is_the_one_that_a_run_would_write(tmp_path: Path) -> None:
    parts, pairs = trained()
    kept: list[bytes] = []

    def save(folder: Path) -> None:
        kept.append(adapter_file.save_diffusers_lora(folder, pairs, {}).read_bytes())

    with exported.drawn_from_export(parts, save):
        inside = {pair.name: pair.delta() for pair in lora_pairs(parts.unet, exported.EXPORTED)}
    assert kept == [adapter_file.save_diffusers_lora(tmp_path, pairs, {}).read_bytes()]
    for pair in pairs:
        error = (inside[pair.name] - pair.delta()).norm() / pair.delta().norm()
        assert float(error) < 1e-6
