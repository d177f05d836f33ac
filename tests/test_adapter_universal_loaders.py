"""Why the universal file is as it is: what four loaders make of other files (facts D1 to D10 of their models)."""

from __future__ import annotations

import contextlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from safetensors.torch import save_file
from torch import Tensor

from dreamrie import adapter_file, adapter_universal
from dreamrie.diffusion.pipeline import sample
from dreamrie.lora import LowRank, lora_pairs
from tests.reference.loader_models import LOADERS, TEXT, Arrived
from tests.sd2_layout import TEXT_LAYER, sd2_changes, sd2_shapes
from tests.small_models import small_components
from tests.test_adapter_file import relative, stock_pipeline, trained
from tests.test_adapter_universal import FACTS, error, halves, stored

SD2 = {"ss_v2": "True"}
ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
UNET = {layer: shape for layer, shape in sd2_shapes().items() if not layer.startswith(TEXT)}


def kohya(
    changes: dict[str, LowRank], alpha: float | None = 1.0, text: str = "te_text_model"
) -> dict[str, Tensor]:
    """A file of kohya's trainer: factors and ranks as they are, alpha so many times the rank."""
    tensors = {}
    for layer, (left, right) in changes.items():
        name = f"lora_unet_{layer}"
        if layer.startswith(TEXT):
            name = f"lora_{text}_{layer.removeprefix(TEXT)}"
        name = name.replace(".", "_")
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = right, left
        if alpha is not None:
            tensors[f"{name}.alpha"] = torch.tensor(alpha * right.shape[0])
    return tensors


def even(rank: int = 4) -> dict[str, LowRank]:
    """The changes with one rank for all layers."""
    found = {}
    for layer, change in sd2_changes().items():
        short = rank - change.left.shape[1]
        found[layer] = LowRank(
            torch.nn.functional.pad(change.left, (0, short)),
            torch.nn.functional.pad(change.right, (0, 0, 0, short)),
        )
    return found


def strengths(arrived: Arrived, wanted: dict[str, LowRank]) -> dict[str, float]:
    """How many times the wanted change lies on each layer."""
    assert arrived.failed is None
    assert arrived.hidden is None
    found = {}
    for layer, change in arrived.changes.items():
        dense = wanted[layer].dense().double()
        factor = float((change * dense).sum() / dense.square().sum())
        assert error(change, factor * dense) < 1e-6, layer
        found[layer] = round(factor, 5)
    return found


@pytest.mark.parametrize("alpha", [None, 1.0, 0.5])
@pytest.mark.parametrize("loader", LOADERS)
def test_all_loaders_agree_about_an_even_kohya_file(loader: str, alpha: float | None) -> None:
    """Control: alpha / rank counts, here a half, and no alpha counts 1."""
    arrived = LOADERS[loader](kohya(even(), alpha), SD2, sd2_shapes())
    assert arrived.usable
    found = strengths(arrived, even())
    assert set(found) == set(sd2_shapes())
    assert set(found.values()) == {1.0 if alpha is None else alpha}


def test_d1_todays_diffusers_file_loses_all_attention(tmp_path: Path) -> None:
    """The plain file of a trained U-Net: whole in diffusers; a third of it in ComfyUI; hidden elsewhere."""
    changes = {layer: change for layer, change in even().items() if layer in UNET}
    tensors, header = stored(adapter_file.save_diffusers(tmp_path, changes, FACTS))
    found = {name: loader(tensors, header, UNET) for name, loader in LOADERS.items()}
    assert found["diffusers"].usable
    assert strengths(found["diffusers"], changes) == dict.fromkeys(UNET, 1.0)
    lost = {layer for layer in UNET if layer.endswith(ATTENTION)}
    assert len(lost) == 128
    comfy = found["ComfyUI"]
    assert strengths(comfy, changes) == dict.fromkeys(set(UNET) - lost, 1.0)
    assert comfy.unmatched == sorted(f"unet.{n}.lora_{part}.weight" for n in lost for part in "AB")
    assert found["A1111"].hidden == "taken for SD1"
    assert found["Forge"].hidden == "taken for Unknown"
    # With the right header, A1111 shows the file, and knows not one name of it (D2).
    shown = LOADERS["A1111"](tensors, SD2, UNET)
    assert shown.changes == {}
    assert len(shown.unmatched) == len(tensors)


def test_d1_files_of_the_oldest_diffusers_were_read() -> None:
    """Control: the names that ComfyUI knows load there."""
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_out.0"
    change = even()[layer]
    name = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.processor.to_out"
    tensors = {f"{name}.lora_A.weight": change.right, f"{name}.lora_B.weight": change.left}
    assert strengths(LOADERS["ComfyUI"](tensors, {}, UNET), even()) == {layer: 1.0}


@pytest.mark.parametrize(
    "header",
    [{}, {"ss_v2": "true"}, {"ss_v2": "1"}, {"ss_v2": "False"}, {"ss_v2": '{"a": 1}'}],
)
def test_d5_only_one_spelling_of_the_version_shows_the_file(header: dict[str, str]) -> None:
    for name in ("A1111", "Forge"):
        assert LOADERS[name](kohya(even()), header, sd2_shapes()).hidden is not None
    assert LOADERS["ComfyUI"](kohya(even()), header, sd2_shapes()).usable


def test_d7_mixed_ranks_have_wrong_strengths_in_diffusers() -> None:
    """Attention is 4/3 or 2/3 of what was trained, with a warning about patterns at most; without alpha it is right."""
    mixed = sd2_changes()
    ranks = {layer: change.right.shape[0] for layer, change in mixed.items()}
    assert set(ranks.values()) == {2, 3, 4}
    arrived = LOADERS["diffusers"](kohya(mixed, 0.5), SD2, sd2_shapes())
    assert arrived.usable
    found = strengths(arrived, mixed)
    common = max(set(ranks.values()), key=list(ranks.values()).count)
    wrong = {n: round(0.5 * common / rank, 5) for n, rank in ranks.items() if n.endswith(ATTENTION)}
    assert found == {**dict.fromkeys(ranks, 0.5), **wrong}
    assert len(set(found.values())) == 3
    bare = LOADERS["diffusers"](kohya(mixed, None), SD2, sd2_shapes())
    assert set(strengths(bare, mixed).values()) == {1.0}
    for name in ("ComfyUI", "A1111", "Forge"):
        arrived = LOADERS[name](kohya(mixed, 0.5), SD2, sd2_shapes())
        assert set(strengths(arrived, mixed).values()) == {0.5}, name


def test_d8_d9_alpha_in_the_header() -> None:
    """Half strength said in the header alone is full strength in ComfyUI; said beside alphas, diffusers stops."""
    changes = {n: c for n, c in even().items() if n in UNET and not n.endswith(ATTENTION)}
    shapes = {layer: UNET[layer] for layer in changes}
    tensors = {}
    for layer, (left, right) in changes.items():
        tensors[f"unet.{layer}.lora_A.weight"], tensors[f"unet.{layer}.lora_B.weight"] = right, left
    settings = {"lora_adapter_metadata": json.dumps({"unet.r": 4, "unet.lora_alpha": 2})}
    halved = strengths(LOADERS["diffusers"](tensors, settings, shapes), changes)
    assert set(halved.values()) == {0.5}
    whole = strengths(LOADERS["ComfyUI"](tensors, settings, shapes), changes)
    assert set(whole.values()) == {1.0}
    both = LOADERS["diffusers"](kohya(changes, 0.5), {**SD2, **settings}, shapes)
    assert both.failed == "both alphas and settings"


def test_d4_d10_names_of_text_encoders() -> None:
    """te1, no text_model, or an attention adapted in part: each is lost, or stops, somewhere."""
    text = {layer: change for layer, change in even().items() if layer.startswith(TEXT)}
    shapes = {layer: sd2_shapes()[layer] for layer in text}
    for spelling in ("te1_text_model", "te_", "te1_"):
        tensors = kohya(text, text=spelling.rstrip("_"))
        assert LOADERS["diffusers"](tensors, SD2, shapes).usable, spelling
        for name in ("A1111", "ComfyUI", "Forge"):
            assert len(LOADERS[name](tensors, SD2, shapes).unmatched) == len(tensors), name
    part = {layer: change for layer, change in text.items() if not layer.endswith("v_proj")}
    assert (
        LOADERS["A1111"](kohya(part), SD2, shapes).failed
        == "encoder.layers.1.self_attn is adapted in part"
    )
    flattened = {}
    for layer, (left, right) in text.items():
        name = layer.replace("text_model.", "")
        flattened[f"{name}.lora_A.weight"], flattened[f"{name}.lora_B.weight"] = right, left
    assert LOADERS["diffusers"](flattened, SD2, shapes).usable
    assert len(LOADERS["ComfyUI"](flattened, SD2, shapes).unmatched) == len(flattened)


def test_transformers_own_names_of_text_encoders_are_made_canonical(tmp_path: Path) -> None:
    """Whatever transformers is installed: `text_model` is in every file."""
    changes = {n.replace("text_model.", ""): c for n, c in even().items() if n.startswith(TEXT)}
    shapes = {layer: shape for layer, shape in sd2_shapes().items() if layer.startswith(TEXT)}
    path = adapter_universal.save_universal(tmp_path / "x.safetensors", changes, FACTS)
    for name, loader in LOADERS.items():
        arrived = loader(*stored(path), shapes)
        assert arrived.usable, name
        assert set(arrived.changes) == set(shapes)
    tensors, _ = stored(adapter_file.save_diffusers(tmp_path, changes, FACTS))
    assert f"{TEXT_LAYER}.mlp.fc1.lora_A.weight" in tensors


# ------------------------------------------------------------------------------------- the real loader as its model


def small_shapes(unet: Any) -> dict[str, tuple[int, int]]:
    return {
        name: (module.out_features, module.in_features)
        for name, module in unet.named_modules()
        if isinstance(module, torch.nn.Linear) and ".attentions." in name
    }


@pytest.mark.parametrize(("ranks", "alpha"), [((3,), 0.5), ((3,), None), ((3, 3, 3, 2, 1), 0.5)])
def test_the_model_of_diffusers_is_diffusers(
    ranks: tuple[int, ...], alpha: float | None, tmp_path: Path
) -> None:
    """The installed version puts on the layers what the model says, right or wrong (D7)."""
    pipe = stock_pipeline("sd2-eps")
    shapes = small_shapes(pipe.unet)
    generator = torch.Generator().manual_seed(0)
    changes = {}
    for number, (layer, (out, in_)) in enumerate(shapes.items()):
        rank = ranks[number % len(ranks)]
        left = torch.randn(out, rank, generator=generator)
        changes[layer] = LowRank(left, torch.randn(rank, in_, generator=generator))
    tensors = kohya(changes, alpha)
    save_file(tensors, tmp_path / "x.safetensors")
    # All that is said: PEFT's warning that names of layers match none.
    said = pytest.warns(RuntimeWarning, match="alpha_pattern keys did not match")
    with said if len(set(ranks)) > 1 else contextlib.nullcontext():
        pipe.load_lora_weights(tmp_path, weight_name="x.safetensors", use_safetensors=True)
    told = LOADERS["diffusers"](tensors, {}, shapes)
    real = {pair.name: pair.delta() for pair in lora_pairs(pipe.unet)}
    assert set(real) == set(told.changes) == set(shapes)
    assert max(error(real[layer], told.changes[layer]) for layer in shapes) < 1e-6
    right = max(abs(strength - 1) for strength in strengths(told, changes).values())
    assert right == {(3,): 0.5 if alpha else 0.0}.get(ranks, 0.5)


def test_the_real_loader_reads_the_text_encoder_too(tmp_path: Path) -> None:
    """U-Net and text encoder from one universal file; the text embedding is that of the base plus the change."""
    pipe = stock_pipeline("sd2-eps")
    encoder, generator = small_components("sd2-eps").text_encoder, torch.Generator().manual_seed(1)
    layers = {n: m for n, m in encoder.named_modules() if isinstance(m, torch.nn.Linear)}
    changes = {}
    for name, module in layers.items():
        left = torch.randn(module.out_features, 2, generator=generator)
        change = LowRank(left, torch.randn(2, module.in_features, generator=generator))
        changes[f"text_encoder.{name}"] = change
        with torch.no_grad():
            module.weight += change.dense()
    layer, (out, in_) = next(iter(small_shapes(pipe.unet).items()))
    changes[layer] = LowRank(torch.ones(out, 1), torch.ones(1, in_))
    tokens = torch.arange(77)[None]
    with torch.no_grad():
        base, wanted = pipe.text_encoder(tokens)[0], encoder(tokens)[0]
    assert relative(base, wanted) > 0.1
    path = adapter_universal.save_universal(tmp_path / "x.safetensors", changes, FACTS)
    pipe.load_lora_weights(tmp_path, weight_name=path.name, use_safetensors=True)
    with torch.no_grad():
        found = pipe.text_encoder(tokens)[0]
    assert relative(found, wanted) < 1e-5
    assert [pair.name for pair in lora_pairs(pipe.unet)] == [layer]


@pytest.mark.parametrize("kind", ["sd2-v", "tiny-vae"])
def test_the_universal_file_draws_the_trained_models_picture(kind: str, tmp_path: Path) -> None:
    """Same seed, same picture: ours with the adapter in memory, theirs with the file on the base."""
    parts, pairs = trained(kind)
    changes = {pair.name: halves(pair) for pair in pairs}
    path = adapter_universal.save_universal(tmp_path / "x.safetensors", changes, FACTS)
    pipe = stock_pipeline(kind)

    def drawn() -> Any:
        generator = torch.Generator("cpu").manual_seed(3)
        images = pipe("a cat", num_inference_steps=3, generator=generator).images
        return np.asarray(images[0], dtype=int)

    base = drawn()
    pipe.load_lora_weights(tmp_path, weight_name=path.name, use_safetensors=True)
    ours = np.asarray(sample(parts, ["a cat"], [3], steps=3)[0], dtype=int)
    assert np.abs(ours - base).max() > 10
    assert np.abs(ours - drawn()).max() <= 1


def test_d3_the_stock_converter_is_no_way_to_kohya() -> None:
    """diffusers' own converter forgets the strength and calls the only text encoder the first of two."""
    layer = "down_blocks.0.attentions.0.proj_in"
    tensors = {
        f"unet.{layer}.lora_A.weight": torch.ones(4, 3),
        f"unet.{layer}.lora_B.weight": torch.ones(2, 4),
    }
    found = convert_state_dict_to_kohya(tensors)
    assert float(found["lora_unet_down_blocks_0_attentions_0_proj_in.alpha"]) == 4.0
    text = {n.replace(f"unet.{layer}", f"{TEXT_LAYER}.mlp.fc1"): t for n, t in tensors.items()}
    assert all(name.startswith("lora_te1_") for name in convert_state_dict_to_kohya(text))


def test_d8_the_real_loader_stops_at_both(tmp_path: Path) -> None:
    layer, (out, in_) = next(iter(small_shapes(small_components("sd2-eps").unet).items()))
    tensors = kohya({layer: LowRank(torch.ones(out, 1), torch.ones(1, in_))}, 0.5)
    settings = json.dumps({"unet.r": 1, "unet.lora_alpha": 1})
    save_file(tensors, tmp_path / "x.safetensors", metadata={"lora_adapter_metadata": settings})
    pipe: StableDiffusionPipeline = stock_pipeline("sd2-eps")
    with pytest.raises(ValueError, match="cannot be specified"):
        pipe.load_lora_weights(tmp_path, weight_name="x.safetensors", use_safetensors=True)
