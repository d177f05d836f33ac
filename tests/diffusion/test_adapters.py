"""A saved adapter arrives whole on the base it was trained on, and can be switched off without a trace."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from dreamrie import adapter_file
from dreamrie.adapter_file import save_diffusers_lora
from dreamrie.adapter_open import open_adapter
from dreamrie.adapter_peft import save_peft
from dreamrie.diffusion import adapters
from dreamrie.diffusion.adapters import adapter_off, load_saved_adapter, remove_adapter
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.pipeline import sample
from dreamrie.diffusion.source import EMBEDDED
from dreamrie.errors import AdapterError, ConfigError
from tests.small_models import small_components, small_folder
from tests.test_adapter_file import stock_pipeline, trained, unet_output

TEXT_LAYER = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of an adapter, as a training leaves it."""
    _, pairs = trained("sd2-eps")
    folder = tmp_path_factory.mktemp("adapter")
    facts = {"base_model": str(small_folder("sd2-eps").resolve()), "steps": "7"}
    save_diffusers_lora(folder, pairs, facts)
    return folder


def draw(components: Components) -> list[Image.Image]:
    return sample(components, ["a sks dog"], [3], steps=2, guidance_scale=3.0)


def test_pictures_are_those_of_plain_diffusers(saved: Path) -> None:
    """What `load_lora_weights` of a stock pipeline draws; and not what the base draws."""
    parts = small_components("sd2-eps")
    base = draw(parts)[0]
    facts = load_saved_adapter(parts, saved)
    assert facts["steps"] == "7"
    pipe = stock_pipeline("sd2-eps")
    pipe.load_lora_weights(saved)
    wanted = draw(dataclasses.replace(parts, unet=pipe.unet))[0]
    found = draw(parts)[0]
    assert found.tobytes() == wanted.tobytes()
    assert np.abs(np.asarray(found, int) - np.asarray(base, int)).max() > 8


def test_the_adapter_is_the_trained_model_and_frozen(saved: Path) -> None:
    """By its file too; nothing asks for gradients."""
    parts = small_components("sd2-eps")
    load_saved_adapter(parts, saved / adapter_file.DIFFUSERS_FILE)
    wanted = unet_output(trained("sd2-eps")[0].unet)
    assert torch.allclose(unet_output(parts.unet), wanted, atol=1e-5)
    with adapter_off(parts):
        pass
    assert not any(parameter.requires_grad for parameter in parts.unet.parameters())


def test_a_peft_folder_is_the_same_adapter(saved: Path, tmp_path: Path) -> None:
    """Diffusers does not read PEFT's folders; the pictures are those of its own file all the same."""
    opened = open_adapter(saved)
    save_peft(tmp_path / "peft", opened.changes, opened.facts)
    pictures = []
    for source in (saved, tmp_path / "peft"):
        parts = small_components("sd2-eps")
        assert load_saved_adapter(parts, source)["steps"] == "7"
        assert not any(parameter.requires_grad for parameter in parts.unet.parameters())
        pictures.append(np.asarray(draw(parts)[0], int))
    base = np.asarray(draw(small_components("sd2-eps"))[0], int)
    assert np.abs(pictures[0] - base).max() > 8
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_switched_off_or_removed_the_model_is_its_base_to_the_bit(saved: Path) -> None:
    """Precondition: switched on it is not."""
    parts = small_components("sd2-eps")
    base, picture = unet_output(parts.unet), draw(parts)[0].tobytes()
    with adapter_off(parts):
        assert torch.equal(unet_output(parts.unet), base)
    load_saved_adapter(parts, saved)
    adapted = unet_output(parts.unet)
    assert not torch.allclose(adapted, base, atol=1e-2)
    with adapter_off(parts):
        assert torch.equal(unet_output(parts.unet), base)
        assert draw(parts)[0].tobytes() == picture
    assert torch.equal(unet_output(parts.unet), adapted)
    remove_adapter(parts)
    assert torch.equal(unet_output(parts.unet), base)
    remove_adapter(parts)


def test_an_adapter_in_training_is_switched_off_too() -> None:
    """And on again after a failure inside, with the flags of its parameters as they were."""
    parts, _ = trained("sd2-eps")
    base, on = unet_output(small_components("sd2-eps").unet), unet_output(parts.unet)
    flags = [parameter.requires_grad for parameter in parts.unet.parameters()]
    assert any(flags)
    with pytest.raises(RuntimeError), adapter_off(parts):
        assert torch.equal(unet_output(parts.unet), base)
        raise RuntimeError
    assert torch.equal(unet_output(parts.unet), on)
    assert [parameter.requires_grad for parameter in parts.unet.parameters()] == flags


def _text_encoder(tensors: dict[str, Tensor]) -> None:
    tensors[f"{TEXT_LAYER}.lora_A.weight"] = torch.ones(4, 16)
    tensors[f"{TEXT_LAYER}.lora_B.weight"] = torch.ones(16, 4)


def _no_such_layer(tensors: dict[str, Tensor]) -> None:
    tensors["unet.mid_block.attentions.7.to_q.lora_A.weight"] = torch.ones(4, 16)
    tensors["unet.mid_block.attentions.7.to_q.lora_B.weight"] = torch.ones(16, 4)


def _wider(tensors: dict[str, Tensor]) -> None:
    name = min(name for name in tensors if "lora_A" in name)
    tensors[name] = torch.ones(4, 5)


def _stray(tensors: dict[str, Tensor]) -> None:
    tensors["unet.conv_in.lora_magnitude"] = torch.ones(3)


def _none(tensors: dict[str, Tensor]) -> None:
    tensors.clear()


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (_text_encoder, "2 of .* of a text encoder, the first is text_encoder"),
        (_no_such_layer, r"no place in the model .*attentions\.7"),
        (_wider, "does not fit .*size mismatch"),
        (_stray, "no place in the model .*lora_magnitude"),
        (_none, "is empty"),
    ],
)
def test_foreign_contents_are_refused_and_leave_no_trace(
    saved: Path, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], said: str
) -> None:
    """Each key of the file is used, or nothing is loaded."""
    tensors = load_file(saved / adapter_file.DIFFUSERS_FILE)
    change(tensors)
    save_file(tensors, tmp_path / "foreign.safetensors")
    parts = small_components("sd2-eps")
    base = unet_output(parts.unet)
    with pytest.raises(AdapterError, match=said):
        load_saved_adapter(parts, tmp_path / "foreign.safetensors")
    assert torch.equal(unet_output(parts.unet), base)
    load_saved_adapter(parts, saved)


def test_a_missing_or_damaged_file_is_named(saved: Path, tmp_path: Path) -> None:
    """Cut anywhere: in the table, in the weights, to nothing."""
    parts = small_components("sd2-eps")
    with pytest.raises(AdapterError, match=r"there is no adapter .*nowhere"):
        load_saved_adapter(parts, tmp_path / "nowhere")
    with pytest.raises(AdapterError, match="pytorch_lora_weights"):
        load_saved_adapter(parts, tmp_path)
    whole = (saved / adapter_file.DIFFUSERS_FILE).read_bytes()
    path = tmp_path / adapter_file.DIFFUSERS_FILE
    for damaged in (b"", whole[:5], whole[:200], whole[:-4], b"\xff" * 64, b"not a file at all"):
        path.write_bytes(damaged)
        with pytest.raises(AdapterError, match=r"cannot be read|is damaged"):
            load_saved_adapter(parts, tmp_path)
    path.write_bytes(whole)
    load_saved_adapter(parts, tmp_path)
    with pytest.raises(AdapterError, match="carries an adapter already"):
        load_saved_adapter(parts, tmp_path)


def test_another_base_is_an_error_unless_it_was_named(
    saved: Path, caplog: pytest.LogCaptureFixture
) -> None:
    parts = small_components("sd2-eps")
    here = dataclasses.replace(parts.source, requested="", resolved=EMBEDDED)
    with pytest.raises(ConfigError, match=f"the model is {EMBEDDED}. Name the base model"):
        load_saved_adapter(dataclasses.replace(parts, source=here), saved)
    named = dataclasses.replace(parts.source, requested="mine", resolved="/somewhere/mine")
    with caplog.at_level(logging.WARNING):
        load_saved_adapter(dataclasses.replace(parts, source=named), saved)
    assert "as was asked for" in caplog.text


def test_the_header_is_read_without_weights(saved: Path) -> None:
    facts = adapters.read_metadata(saved)
    assert facts["base_model"] == str(small_folder("sd2-eps").resolve())
    assert facts["rank_trained"] == "2"
