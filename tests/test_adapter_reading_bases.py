"""A6: an adapter belongs to the base weights that it was trained on, in whatever precision they are loaded."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie.adapter_file import BASE_KEY, content_digest, save_diffusers_lora
from dreamrie.adapter_reading import load_adapter
from dreamrie.diffusion.adapters import load_saved_adapter, read_metadata, remove_adapter
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import attach_lora, lora_pairs
from dreamrie.lora.fingerprint import rounded_fingerprints
from tests.small_adapters import FACTS, TARGETS, Small, output, rewrite, save_small, state_of
from tests.small_models import small_components, small_folder
from tests.test_adapter_file import relative, stock_pipeline, train_by_hand, trained, unet_output

PRECISIONS = {
    "fp32": torch.float32,
    "fp16": torch.float16,
    "bf16": torch.bfloat16,
    "fp64": torch.float64,
}


def save_trained_in(folder: Path, dtype: torch.dtype) -> Path:
    """A file of an adapter in fp32 on a base that was loaded in some precision."""
    model = Small().to(dtype)
    pairs = attach_lora(model, 2, TARGETS)
    train_by_hand(pairs)
    return save_diffusers_lora(folder, pairs, FACTS, base=model)


@pytest.mark.parametrize("there", PRECISIONS)
@pytest.mark.parametrize("here", PRECISIONS)
def test_loads_in_each_precision_that_can_be_compared(
    here: str, there: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """All pairs but fp16 with bf16, which have lost different bits: there the override is needed, and logged."""
    path = save_trained_in(tmp_path, PRECISIONS[there])
    model = Small().to(PRECISIONS[here])
    base, before = output(model), state_of(model)
    if {here, there} == {"fp16", "bf16"}:
        with pytest.raises(
            AdapterError, match=r"cannot be compared \(a model loaded in float32 can be\)"
        ):
            load_adapter(model, path)
        assert state_of(model) == before
        with caplog.at_level(logging.WARNING):
            loaded = load_adapter(model, path, other_base=True)
        assert "loaded because other_base=True" in caplog.text
        assert len(loaded.unchecked) == 1
    else:
        loaded = load_adapter(model, path)
        assert loaded.unchecked == ()
    assert {pair.left.dtype for pair in loaded.pairs} == {PRECISIONS[here]}
    assert float((output(model) - base).abs().max()) > 0.1
    reference = Small()
    wanted = load_adapter(reference, path, other_base=True)
    for mine, right in zip(loaded.pairs, wanted.pairs, strict=True):
        assert torch.equal(mine.left, right.left.to(mine.left.dtype)), mine.name


def test_a_file_without_fingerprint_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Whole and unchanged, but of which base?"""
    model = Small()
    pairs = attach_lora(model, 2, TARGETS)
    train_by_hand(pairs)
    path = save_diffusers_lora(tmp_path, pairs, FACTS)
    with caplog.at_level(logging.WARNING):
        loaded = load_adapter(Small(seed=1), path)
    assert loaded.unchecked == (
        "whether the model has the base weights that it was trained on (it names none)",
    )
    assert loaded.unchecked[0] in caplog.text


def test_values_that_overflow_the_model_are_refused(tmp_path: Path) -> None:
    """Finite in fp32, not in fp16: in bf16 they load."""

    def large(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        tensors["unet.mix.lora_B.weight"][2, 1] = 1e5

    path = rewrite(save_small(tmp_path), large, digest=content_digest)
    model = Small().half()
    before = state_of(model)
    with pytest.raises(AdapterError, match=r"mix\.lora_B\.weight overflows torch.float16.*bf16"):
        load_adapter(model, path)
    assert state_of(model) == before
    (pair, *_) = load_adapter(Small().bfloat16(), path).pairs
    assert float(pair.left.detach()[2, 1]) == pytest.approx(1e5, rel=4e-3)


def test_modes_of_the_layers_stay(tmp_path: Path) -> None:
    """PEFT builds its layers in train mode."""
    model = Small()
    model.mix.eval()
    loaded = load_adapter(model, save_small(tmp_path))
    assert {pair.name: pair.module.training for pair in loaded.pairs} == {
        "mix": False, "deep.cut": True, "deep.narrow": True,
    }  # fmt: skip
    assert model.training
    assert not model.deep["norm"].training


@pytest.mark.parametrize("name", ["", "a.b"])
def test_a_name_that_cannot_be_one(name: str, tmp_path: Path) -> None:
    model = Small()
    before = state_of(model)
    with pytest.raises(ConfigError, match="word without dots"):
        load_adapter(model, save_small(tmp_path), adapter_name=name)
    assert state_of(model) == before


def saved_by_a_run(folder: Path, parts: Any, pairs: Any) -> Path:
    """The file as the DreamBooth task writes it."""
    task = SimpleNamespace(
        components=parts,
        model=parts.unet,
        pairs=pairs,
        concept=SimpleNamespace(instance=SimpleNamespace(prompt="a sks dog"), resolution=64),
        _facts={},
    )
    DreamBoothTask.save(task, folder, {"steps": "7"})  # type: ignore[arg-type]
    return folder / "pytorch_lora_weights.safetensors"


def test_a_run_names_its_base(tmp_path: Path) -> None:
    """The U-Net's fingerprint without the adapter; the file loads on a fresh copy with nothing unchecked."""
    parts, pairs = trained("sd2-eps")
    path = saved_by_a_run(tmp_path, parts, pairs)
    fresh = small_components("sd2-eps").unet
    named = {
        k.removeprefix(BASE_KEY): v
        for k, v in read_metadata(path).items()
        if k.startswith(BASE_KEY)
    }
    assert named == rounded_fingerprints(fresh)
    base, wanted = unet_output(fresh), unet_output(parts.unet)
    assert load_adapter(fresh, path).unchecked == ()
    assert relative(base, wanted) > 1e-3
    assert relative(unet_output(fresh), wanted) < 2e-6


def test_diffusers_and_load_adapter_agree(tmp_path: Path) -> None:
    """One file on one U-Net: equal outputs to the bit, convolutions among the layers."""
    parts = small_components("sd15")
    pairs = attach_lora(parts.unet, 2, ["proj_in", "conv2", "to_q"])
    train_by_hand(pairs, size=0.1)
    path = saved_by_a_run(tmp_path, parts, pairs)
    pipe = stock_pipeline("sd15")
    base = unet_output(pipe.unet)
    pipe.load_lora_weights(tmp_path)
    mine = small_components("sd15").unet
    load_adapter(mine, path)
    assert not torch.allclose(unet_output(mine), base, atol=1e-2)
    assert torch.equal(unet_output(mine), unet_output(pipe.unet))


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_the_loader_of_pictures_in_half_precision(precision: str, tmp_path: Path) -> None:
    """Trained in fp32, drawn in half: the fingerprint fits, and what diffusers rounds is what was read."""
    parts, pairs = trained("sd2-eps")
    path = saved_by_a_run(tmp_path, parts, pairs)
    parts = load_components(small_folder("sd2-eps"), dtype=PRECISIONS[precision])
    load_saved_adapter(parts, path)
    direct = small_components("sd2-eps").unet.to(PRECISIONS[precision])
    wanted = {pair.name: pair for pair in load_adapter(direct, path).pairs}
    found = lora_pairs(parts.unet)
    assert {pair.name for pair in found} == set(wanted)
    for pair in found:
        assert pair.left.dtype == PRECISIONS[precision]
        assert float(pair.delta().norm()) > 1e-2
        assert torch.equal(pair.delta(), wanted[pair.name].delta())


def flip_a_bit(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    raw[-2] ^= 1
    path.write_bytes(raw)


def test_the_loader_of_pictures_is_as_strict(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Digest and fingerprint are errors there too; a model that the user named on purpose is a warning."""
    parts, pairs = trained("sd2-eps")
    path = saved_by_a_run(tmp_path, parts, pairs)
    parts = small_components("sd2-eps")
    before = state_of(parts.unet)
    load_saved_adapter(parts, path)
    remove_adapter(parts)
    flip_a_bit(path)
    parts = small_components("sd2-eps")
    before = state_of(parts.unet)
    with pytest.raises(AdapterError, match="digest differs"):
        load_saved_adapter(parts, path)
    assert state_of(parts.unet) == before
    flip_a_bit(path)
    with torch.no_grad():
        parts.unet.conv_in.weight *= 1.01
    before = state_of(parts.unet)
    with pytest.raises(AdapterError, match="fingerprint differs"):
        load_saved_adapter(parts, path)
    assert state_of(parts.unet) == before
    with caplog.at_level(logging.WARNING):
        load_saved_adapter(parts, path, other_base=True)
    assert "loaded because other_base=True" in caplog.text
    remove_adapter(parts)
    named = dataclasses.replace(parts.source, requested="mine", resolved="/somewhere/mine")
    load_saved_adapter(dataclasses.replace(parts, source=named), path)
    assert "as was asked for" in caplog.text


def test_what_diffusers_puts_elsewhere_is_taken_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A loader that drops a layer, or another scaling, does not pass; the U-Net is its base again."""
    parts, pairs = trained("sd2-eps")
    path = saved_by_a_run(tmp_path, parts, pairs)
    parts = small_components("sd2-eps")
    before = state_of(parts.unet)

    def weaker(pipe: Any, *args: Any, **options: Any) -> None:
        load_adapter(pipe.unet, path, adapter_name=options["adapter_name"])
        pipe.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.scaling["saved"] = 0.5

    monkeypatch.setattr(
        "dreamrie.diffusion.adapters.StableDiffusionPipeline.load_lora_weights", weaker
    )
    with pytest.raises(AdapterError, match=r"1 of \d+ layers did not arrive.*mid_block.*to_q"):
        load_saved_adapter(parts, path)
    assert state_of(parts.unet) == before


def test_the_small_file_names_the_small_model(tmp_path: Path) -> None:
    """The precondition of the laws on `Small`."""
    facts = read_metadata(save_small(tmp_path))
    assert {key for key in facts if key.startswith(BASE_KEY)} == {
        f"{BASE_KEY}float16",
        f"{BASE_KEY}bfloat16",
    }
    assert facts["base_model"] != str(small_folder("sd2-eps"))
