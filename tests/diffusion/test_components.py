"""The parts of a model: read from the folder, never assumed, checked against each other."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from dreamrie.diffusion import components
from dreamrie.errors import ConfigError
from tests.small_models import KINDS, VOCABULARY, small_components, small_folder


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder of the SD2 layout that a test may spoil."""
    folder = tmp_path / "model"
    shutil.copytree(small_folder("sd2-eps"), folder)
    return folder


def _edit(path: Path, **changes: Any) -> None:
    """Change settings of a JSON file; None removes one."""
    settings = {**json.loads(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in settings.items() if value is not None}
    path.write_text(json.dumps(kept), encoding="utf-8")


@pytest.mark.parametrize("kind", KINDS)
def test_every_layout_loads_frozen_and_silent(
    kind: str, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """All parts in fp32, frozen, in evaluation mode, with nothing printed and nothing warned."""
    with caplog.at_level(logging.WARNING):
        parts = components.load_components(small_folder(kind))
    assert parts.prediction_type == ("v_prediction" if kind == "sd2-v" else "epsilon")
    assert parts.resolution == 64
    assert parts.unet.config.upcast_attention is (kind == "sd2-v")
    assert len(parts.tokenizer) == VOCABULARY
    assert parts.tokenizer("sks").input_ids == [49_406, 48_136, 49_407]
    for module in (parts.unet, parts.vae, parts.text_encoder):
        assert not module.training
        assert all(p.dtype == torch.float32 for p in module.parameters())
        assert not any(p.requires_grad for p in module.parameters())
    assert not caplog.records
    captured = capfd.readouterr()
    assert captured.out + captured.err == ""


def test_precision_is_asked_for_everywhere_but_the_vae() -> None:
    parts = components.load_components(small_folder("sd2-eps"), dtype=torch.bfloat16)
    assert parts.dtype == parts.text_encoder.dtype == torch.bfloat16
    assert parts.vae.dtype == torch.float32


def test_half_precision_files_load_in_fp32(tmp_path: Path) -> None:
    """transformers keeps the dtype of the file unless told; the embedded model's files are fp16."""
    parts = small_components("tiny-vae")
    folder = tmp_path / "half"
    shutil.copytree(small_folder("tiny-vae"), folder)
    parts.unet.half().save_pretrained(folder / "unet")
    parts.text_encoder.half().save_pretrained(folder / "text_encoder")
    loaded = components.load_components(folder)
    assert loaded.dtype == loaded.text_encoder.dtype == torch.float32


@pytest.mark.parametrize("linear", [True, False])
@pytest.mark.parametrize("found", ["epsilon", "v_prediction"])
def test_prediction_type_is_the_models(found: str, linear: bool) -> None:
    """D8: what the scheduler says holds, a contradiction is an error in both directions."""
    config = {"prediction_type": found}
    other = {"epsilon": "v_prediction", "v_prediction": "epsilon"}[found]
    read = components.read_prediction_type
    assert read(config, linear_projection=linear) == found
    assert read(config, linear_projection=linear, stated=found) == found
    with pytest.raises(ConfigError, match=f"{other}.*{found}"):
        read(config, linear_projection=linear, stated=other)


def test_absent_prediction_type_is_an_error_where_it_is_ambiguous() -> None:
    read = components.read_prediction_type
    with pytest.raises(ConfigError, match="epsilon or v_prediction"):
        read({}, linear_projection=True)
    assert read({}, linear_projection=True, stated="v_prediction") == "v_prediction"
    # SD1 was saved before the setting existed.
    assert read({}, linear_projection=False) == "epsilon"


@pytest.mark.parametrize("config", [{"prediction_type": "sample"}, {"prediction_type": 3}])
def test_other_prediction_types_cannot_be_trained(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match="cannot be trained"):
        components.read_prediction_type(config, linear_projection=True)
    with pytest.raises(ConfigError, match="unknown"):
        components.read_prediction_type({}, linear_projection=True, stated="x0")


def test_absent_prediction_type_in_the_file_stops_loading(copied: Path) -> None:
    """Loading through diffusers would fill in epsilon without a word."""
    _edit(copied / "scheduler" / "scheduler_config.json", prediction_type=None)
    with pytest.raises(ConfigError, match="prediction_type"):
        components.load_components(copied)


def test_files_of_2022_load_unchanged(tmp_path: Path) -> None:
    """The published SD files have older names: `text_model.`, position ids, `query` in the VAE."""
    folder = tmp_path / "model"
    shutil.copytree(small_folder("sd15"), folder)
    path = folder / "text_encoder" / "model.safetensors"
    text = {f"text_model.{k.removeprefix('text_model.')}": v for k, v in load_file(path).items()}
    text["text_model.embeddings.position_ids"] = torch.arange(77)[None]
    save_file(text, path, metadata={"format": "pt"})
    path = folder / "vae" / "diffusion_pytorch_model.safetensors"
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    weights = {}
    for name, tensor in load_file(path).items():
        for new, old in older.items():
            name = name.replace(f".{new}.", f".{old}.")
        weights[name] = tensor
    assert sum(".proj_attn." in name for name in weights) == 4
    save_file(weights, path, metadata={"format": "pt"})
    found, wanted = components.load_components(folder), small_components("sd15")
    for part in ("text_encoder", "vae"):
        ours, theirs = (getattr(parts, part).state_dict() for parts in (found, wanted))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_damaged_weights_are_named(copied: Path) -> None:
    weights = copied / "unet" / "diffusion_pytorch_model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ConfigError, match="unet cannot be loaded"):
        components.load_components(copied)


@pytest.mark.parametrize("part", ["unet", "text_encoder"])
def test_missing_tensors_are_never_made_up(copied: Path, part: str) -> None:
    """Both libraries fill gaps with random numbers and a warning."""
    key = {"unet": "down_block_types", "text_encoder": "num_hidden_layers"}[part]
    path = copied / part / "config.json"
    if part == "unet":
        _edit(path, layers_per_block=2)
    else:
        _edit(path, **{key: 3})
    with pytest.raises(ConfigError, match=f"{part}.*(missing|cannot be loaded)"):
        components.load_components(copied)


def test_parts_of_different_models_do_not_mix(tmp_path: Path, copied: Path) -> None:
    shutil.rmtree(copied / "vae")
    shutil.copytree(small_folder("tiny-vae") / "vae", copied / "vae")
    with pytest.raises(ConfigError, match="takes 4 channels, the VAE gives 32"):
        components.load_components(copied)


def test_a_tokenizer_of_two_tokens_is_refused(copied: Path) -> None:
    """transformers 5 builds one silently from files that it does not find."""
    for path in (copied / "tokenizer").glob("*"):
        if path.name != "tokenizer_config.json":
            path.unlink()
    with pytest.raises(ConfigError, match="tokenizer"):
        components.load_components(copied)


def test_other_autoencoders_are_refused(copied: Path) -> None:
    _edit(copied / "vae" / "config.json", _class_name="VQModel")
    with pytest.raises(ConfigError, match="VQModel is not supported"):
        components.load_components(copied)
