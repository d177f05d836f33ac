"""Adapters to stay orthogonal to are read as strictly as loaded ones, and known by their content."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from dreamrie.adapter_file import DIFFUSERS_FILE, save_diffusers
from dreamrie.diffusion.apart import others_fingerprint, read_others
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.errors import AdapterError
from dreamrie.lora import attach_lora, export_factors, resolve_targets
from tests.lora.test_apart import change


def other_file(folder: Path, seed: int) -> Path:
    """An adapter of the embedded model with random changes."""
    unet = load_components(None).unet
    layers = resolve_targets(unet, ATTENTION_TARGETS)
    changes = {
        name: change(layer.out_features, layer.in_features, 2, seed + 2 * number)
        for number, (name, layer) in enumerate(layers.items())
    }
    save_diffusers(folder, changes, {})
    return folder


def test_each_file_is_read_for_every_layer(tmp_path: Path) -> None:
    """A folder of a training and the file itself are the same; the model is not touched."""
    folder = other_file(tmp_path / "one", 0)
    components = load_components(None)
    before = [parameter.requires_grad for parameter in components.unet.parameters()]
    first, second = read_others(components, [folder, folder / DIFFUSERS_FILE])
    layers = resolve_targets(components.unet, ATTENTION_TARGETS)
    assert set(first) == set(second) == set(layers)
    for name, layer in layers.items():
        assert first[name].right.shape == (2, layer.in_features)
        assert first[name].right.equal(second[name].right)
    assert [parameter.requires_grad for parameter in components.unet.parameters()] == before
    assert read_others(components, []) == []


def test_a_missing_or_damaged_file_is_refused(tmp_path: Path) -> None:
    components = load_components(None)
    with pytest.raises(AdapterError, match="there is no adapter"):
        read_others(components, [tmp_path / "nothing"])
    with pytest.raises(AdapterError, match="there is no adapter"):
        others_fingerprint([tmp_path / "nothing"])
    path = other_file(tmp_path / "one", 0) / DIFFUSERS_FILE
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(AdapterError, match="damaged"):
        read_others(components, [path])


def test_a_model_with_an_adapter_is_refused(tmp_path: Path) -> None:
    """It must be asked before the training's own adapter is attached."""
    folder = other_file(tmp_path / "one", 0)
    components = load_components(None)
    pairs = attach_lora(components.unet, 2, ATTENTION_TARGETS)
    assert export_factors(pairs)
    with pytest.raises(AdapterError, match="carries an adapter already"):
        read_others(components, [folder])


def test_the_fingerprint_is_that_of_content_and_order(tmp_path: Path) -> None:
    """A copy elsewhere is the same; other values, another order or another number are not."""
    one, two = other_file(tmp_path / "one", 0), other_file(tmp_path / "two", 1)
    moved = tmp_path / "moved.safetensors"
    shutil.copy(one / DIFFUSERS_FILE, moved)
    found = others_fingerprint([one, two])
    assert found.startswith("2 files, ")
    assert others_fingerprint([moved, two]) == found
    assert len({found, others_fingerprint([two, one]), others_fingerprint([one, one])}) == 3
    assert others_fingerprint([one]) != others_fingerprint([two])
