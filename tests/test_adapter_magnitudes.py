"""A DoRA adapter arrives with its magnitudes, whoever reads it, or is refused with a reason."""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamrie import adapter_file, adapter_open, adapter_peft, adapter_reading
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.adapter_magnitudes import MAGNITUDE, magnitudes_of, named_magnitudes
from dreamrie.adapter_peft import PEFT_FILE, PEFT_SETTINGS
from dreamrie.commands import convert, info, merge, truncate
from dreamrie.diffusion import merging
from dreamrie.diffusion.adapters import load_saved_adapter
from dreamrie.diffusion.generating import AdapterUse, Drawer
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.diffusion.verifying import with_magnitudes
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import LoraPair, attach_lora, change_of
from dreamrie.lora.dora import dora_weight
from tests.reference.dora_readers import READERS
from tests.small_adapters import Small, output
from tests.small_models import small_components
from tests.strategies import noise
from tests.test_adapter_file import train_by_hand

LAYERS = ["mix", "deep.narrow"]
FACTS = {"base_model": "small", "prediction_type": "epsilon"}
FP32 = 2e-6
REAL = SimpleNamespace(
    save_diffusers_lora=lambda *a, **k: adapter_file.save_diffusers_lora(*a, **k),
    save_peft=lambda *a, **k: adapter_peft.save_peft(*a, **k),
)
"""Looked up at each call, so that a mutant of the module is seen."""


def options_of(command: Any, *words: object) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    command.add_arguments(parser)
    return parser.parse_args([str(word) for word in words])


def trained(model: nn.Module, layers: list[str]) -> list[LoraPair]:
    """A model with DoRA away from its start."""
    pairs = attach_lora(model, 2, layers, init="default", use_dora=True, use_rslora=True)
    train_by_hand(pairs)
    with torch.no_grad():
        for number, pair in enumerate(pairs):
            assert pair.magnitude is not None
            pair.magnitude *= 1.0 + 0.2 * noise(number, pair.out, dtype=torch.float32)
    return pairs


def weights(pairs: list[LoraPair]) -> dict[str, Tensor]:
    """What each layer computes with."""
    return {
        pair.name: dora_weight(pair.base_weight.detach(), pair.delta(), pair.parameters[2].detach())
        for pair in pairs
    }


def apart(one: Tensor, other: Tensor) -> float:
    return float((one - other).norm() / other.norm())


def saved(folder: Path, impl: Any = REAL) -> tuple[Path, Path, Tensor]:
    """diffusers' file, PEFT's folder, and the output of the model that they are of."""
    model = Small()
    pairs = trained(model, LAYERS)
    file = impl.save_diffusers_lora(folder, pairs, FACTS, base=model)
    changes = {pair.name: change_of(pair) for pair in pairs}
    peft = impl.save_peft(folder / "peft", changes, FACTS, magnitudes=magnitudes_of(pairs))
    return file, peft, output(model)


def law_the_file_is_the_trained_weight(impl: Any) -> None:
    """dreamrie and PEFT put the trained function on a fresh base; a file without all magnitudes is not that."""
    with tempfile.TemporaryDirectory() as name:
        file, folder, wanted = saved(Path(name), impl)
        assert apart(output(Small()), wanted) > 0.1
        for path in (file, folder):
            model = Small()
            found = adapter_reading.load_adapter(model, path)
            assert apart(output(model), wanted) < FP32  # measured 1e-7
            assert all(pair.magnitude is not None for pair in found.pairs)
        by_peft = PeftModel.from_pretrained(Small(), str(folder))
        assert apart(output(by_peft), wanted) < FP32


def test_the_file_is_the_trained_weight() -> None:
    law_the_file_is_the_trained_weight(REAL)


def test_diffusers_draws_what_was_trained(tmp_path: Path) -> None:
    """Its own loader, names as it writes them itself; read strictly, and by the drawer, the same."""
    parts = small_components("sd2-eps")
    picture, text = noise(1, 2, 4, 8, 8).float(), noise(2, 2, 5, 16).float()

    def seen(unet: Any) -> Tensor:
        with torch.no_grad():
            found: Tensor = unet(picture, torch.tensor([3, 700]), text).sample
        return found

    before = seen(parts.unet)
    file = adapter_file.save_diffusers_lora(tmp_path, trained(parts.unet, ATTENTION_TARGETS), FACTS)
    wanted = seen(parts.unet)
    assert apart(before, wanted) > 0.05
    names = [name for name in load_file(file) if name.endswith(MAGNITUDE)]
    assert len(names) * 3 == len(load_file(file))
    fresh = small_components("sd2-eps")
    load_saved_adapter(fresh, file)
    assert apart(seen(fresh.unet), wanted) < 1e-5
    fresh = small_components("sd2-eps")
    with Drawer(fresh) as drawer:
        with drawer.using([AdapterUse(file)]):
            assert apart(seen(fresh.unet), wanted) < 1e-5
        assert torch.equal(seen(fresh.unet), before)
        for uses in ([AdapterUse(file, 0.5)], [AdapterUse(file, rank=1)]):
            with (
                pytest.raises(ConfigError, match=r"is DoRA.*alone, at scale 1"),
                drawer.using(uses),
            ):
                pass


def law_merged_weights_are_those_of_the_layer(impl: Any) -> None:
    """In full strength W' itself; in half, half-way from W to it."""
    with tempfile.TemporaryDirectory() as name:
        model = Small()
        pairs = trained(model, LAYERS)
        file = adapter_file.save_diffusers_lora(Path(name), pairs, FACTS)
        wanted = weights(pairs)
        for scale in (1.0, 0.5):
            fresh = Small().requires_grad_(False)
            before = {layer: fresh.get_submodule(layer).weight.double() for layer in LAYERS}
            contents = adapter_reading.read_adapter(fresh, file, use_dora=True)
            impl.add_to_weights_(fresh, contents, scale, torch.float32)
            for layer in LAYERS:
                found = fresh.get_submodule(layer).weight.double()
                exact = before[layer] + scale * (wanted[layer] - before[layer])
                assert apart(found, exact) < FP32


def test_merged_weights_are_those_of_the_layer() -> None:
    law_merged_weights_are_those_of_the_layer(merging)


# ---------------------------------------------------------------------------------------------------- other programs


def test_no_file_with_magnitudes_of_kohya_is_the_same_everywhere() -> None:
    """Why there is no universal file: four readers, at most one of which computes with the trained weight."""
    weight, product = noise(1, 6, 9), 0.3 * noise(2, 6, 9)
    magnitude = weight.norm(dim=1) * (1 + 0.2 * noise(3, 6))
    wanted = dora_weight(weight, product, magnitude)
    found = {
        name: apart(reader(weight, product, magnitude[:, None]), wanted)
        for name, reader in READERS.items()
    }
    assert all(found[name] > 0.02 for name in ("diffusers", "A1111", "ComfyUI", "Forge")), found
    assert found["LyCORIS"] < 1e-14


def test_convert_keeps_magnitudes_and_refuses_the_universal_file(tmp_path: Path) -> None:
    file, _, wanted = saved(tmp_path)
    for to, place, dtype in (("diffusers", "d", "fp32"), ("peft", "p", "fp16")):
        options = options_of(
            convert, file, "--to", to, "--output", tmp_path / place, "--dtype", dtype
        )
        assert convert.run(options) == 0
        model = Small()
        adapter_reading.load_adapter(model, tmp_path / place)
        assert apart(output(model), wanted) < (FP32 if dtype == "fp32" else 1e-3)
        name = PEFT_FILE if to == "peft" else DIFFUSERS_FILE
        stored = load_file(tmp_path / place / name)
        kinds = {tensor.dtype for key, tensor in stored.items() if key.endswith(MAGNITUDE)}
        assert kinds == {torch.float32}
    assert (tmp_path / "d" / DIFFUSERS_FILE).stat().st_size > 0
    universal = tmp_path / "u.safetensors"
    with pytest.raises(AdapterError, match=r"A1111 takes norms of columns.*merge-into-base"):
        convert.run(options_of(convert, file, "--to", "universal", "--output", universal))
    assert not universal.exists()


def test_what_needs_a_low_rank_change_refuses(tmp_path: Path) -> None:
    """Without being asked to, nobody gets the product alone."""
    file, folder, _ = saved(tmp_path)
    out = ["--output", tmp_path / "new"]
    for path in (file, folder):
        for command, words in (
            (truncate, [path, "--rank", "1", *out]),
            (merge, [path, path, *out]),
        ):
            with pytest.raises(AdapterError, match=r"not a plain LoRA but DoRA.*no low rank"):
                command.run(options_of(command, *words))
        with pytest.raises(AdapterError, match=r"not a plain LoRA but DoRA.*low-rank changes only"):
            adapter_reading.read_adapter(Small(), path)
    assert not (tmp_path / "new").exists()


def test_info_tells_the_kind(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, _, _ = saved(tmp_path)
    assert info.run(options_of(info, file)) == 0
    said = capsys.readouterr().out
    assert "kind       DoRA: a magnitude for each row of every layer" in said
    assert "merge-into-base" in said
    assert "universal" not in said
    assert info.describe(adapter_open.open_adapter(file, use_dora=True))["kind"] == "DoRA"


# ------------------------------------------------------------------------------------------------------ damaged files


def test_some_magnitudes_are_none(tmp_path: Path) -> None:
    """Lost, of another shape, not finite, or not asked for in PEFT's settings."""
    file, folder, _ = saved(tmp_path)
    name = f"unet.mix{MAGNITUDE}"
    tensors = load_file(file)

    def refused(change: dict[str, Any], said: str) -> None:
        found = {key: value for key, value in {**tensors, **change}.items() if value is not None}
        save_file(found, tmp_path / "x.safetensors")
        for read in (
            lambda path: adapter_reading.load_adapter(Small(), path),
            lambda path: adapter_open.open_adapter(path, use_dora=True),
        ):
            with pytest.raises(AdapterError, match=said):
                read(tmp_path / "x.safetensors")

    refused({name: None}, "1 of 2 layers have no magnitude, such as mix")
    refused({name: torch.ones(7)}, r"has shape \(7,\); needed is \(6,\)")
    refused({name: torch.full((6,), float("nan"))}, "not finite")
    text = (folder / PEFT_SETTINGS).read_text()
    (folder / PEFT_SETTINGS).write_text(text.replace('"use_dora": true', '"use_dora": false'))
    plain = load_file(folder / PEFT_FILE)
    save_file(plain, folder / PEFT_FILE)  # without a digest, which would tell first
    with pytest.raises(AdapterError, match=r"use_dora in its adapter_config.json is False"):
        adapter_reading.load_adapter(Small(), folder)


def test_a_file_has_magnitudes_for_all_layers_or_for_none() -> None:
    m = torch.ones(3)
    assert named_magnitudes({}, ["a"], str) == {}
    assert list(named_magnitudes({"b": m, "a": m.double()}, ["a", "b"], "x.".__add__)) == [
        f"x.a{MAGNITUDE}",
        f"x.b{MAGNITUDE}",
    ]
    with pytest.raises(AdapterError, match="for every layer or for none; b"):
        named_magnitudes({"a": m}, ["a", "b"], str)
    with pytest.raises(AdapterError, match="not finite"):
        named_magnitudes({"a": m / 0}, ["a"], str)


def test_verify_sees_another_magnitude() -> None:
    """The larger of the two distances counts, and a lost one is a lost layer."""
    one, other = {"a": torch.tensor([3.0, 4.0])}, {"a": torch.tensor([3.0, 4.5])}
    assert with_magnitudes({"a": 1e-9}, one, one) == {"a": 1e-9}
    found = with_magnitudes({"a": 1e-9}, one, other)["a"]
    assert found is not None
    assert abs(found - 0.5 / (9 + 4.5**2) ** 0.5) < 1e-12
    assert with_magnitudes({"a": 1e-9}, one, {}) == {"a": None}
    assert with_magnitudes({"a": None}, one, other) == {"a": None}
