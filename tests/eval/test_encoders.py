"""Preprocessing and wiring of the encoders, shown without their weights; the offline ones with theirs."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from dreamrie.diffusion.images import check_images, load_image
from dreamrie.diffusion.source import embedded_directory, quiet_libraries
from dreamrie.errors import ConfigError
from eval.encoders import load_encoder, preprocessing, registry, tiny_clip
from eval.encoders.base import weights_sha256
from tests.contracts.sources import ROOT
from tests.eval import transformers_twins as twins

ARCHITECTURE = "vit_small_patch16_224.dino"
GOLDEN = [[0.1426, 0.1426, 0.1426], [-1.2654, 0.1702, 1.6057], [-0.7936, -0.1487, 0.4962]]


def picture(width: int, height: int) -> Image.Image:
    """A smooth ramp with a coarse grid: any other resize, crop or order of axes gives other numbers."""
    y, x = np.mgrid[0:height, 0:width]
    grid = 60 * ((x // 37 + y // 23) % 2)
    channels = [
        x * 150 // width + grid,
        y * 190 // height + grid // 2,
        (x + y) * 200 // (width + height),
    ]
    return Image.fromarray(np.stack(channels, axis=-1).astype(np.uint8))


def by_hand(image: Image.Image, resize_px: int, crop_px: int) -> torch.Tensor:
    """The protocol in Pillow and numpy alone, ImageNet statistics."""
    width, height = image.size
    short = min(width, height)
    size = (int(resize_px * width / short), int(resize_px * height / short))
    resized = image.resize(size, Image.Resampling.BICUBIC)
    left, top = round((size[0] - crop_px) / 2), round((size[1] - crop_px) / 2)
    values = (
        np.asarray(resized.crop((left, top, left + crop_px, top + crop_px)), dtype=np.float64) / 255
    )
    mean, std = (np.array(part) for part in preprocessing.IMAGENET)
    return torch.from_numpy((values - mean) / std).permute(2, 0, 1)


@pytest.mark.parametrize("size", [(400, 300), (300, 400), (90, 64)])
def test_the_dino_protocol_is_resize_256_crop_224(size: tuple[int, int]) -> None:
    """Equal to the protocol by hand to 1e-6; timm's default, resize 248, is far off."""
    image = picture(*size)
    found = preprocessing.DINO(image)
    assert found.shape == (3, 224, 224)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), by_hand(image, 256, 224), rtol=0, atol=1e-6)
    assert float((found - by_hand(image, 248, 224)).abs().mean()) > 0.01


def test_the_golden_vector_of_the_dino_protocol() -> None:
    """Nine numbers of the transformed picture, kept: a library that changes its resize is noticed."""
    found = preprocessing.DINO(picture(400, 300))[:, ::111, 100][:, :3]
    golden = torch.tensor(GOLDEN)
    torch.testing.assert_close(found, golden, rtol=0, atol=1e-3)


def test_timm_and_transformers_agree_on_vit_s_16(tmp_path: Path) -> None:
    """Random weights, 1e-5; weights from a file of either format give the same encoder and the same hash."""
    model = twins.randomized(twins.vision_transformer(ARCHITECTURE), 1)
    state = model.state_dict()
    save_file(state, tmp_path / "w.safetensors")
    torch.save(state, tmp_path / "w.pth")
    encoders = [load_encoder("dino", tmp_path / f"w.{end}") for end in ("safetensors", "pth")]
    assert encoders[0].weights_sha256 == encoders[1].weights_sha256 == weights_sha256(state)
    assert encoders[0].image_score == "DINO"

    images = [picture(300, 260), picture(224, 500)]
    pixels = torch.stack([preprocessing.DINO(image) for image in images])
    with torch.no_grad():
        theirs = twins.vision_transformer_twin(model)(pixels).last_hidden_state[:, 0]
    theirs = torch.nn.functional.normalize(theirs, dim=1)
    assert float((theirs[0] - theirs[1]).norm()) > 1e-3
    for encoder in encoders:
        ours = encoder.embed_images(images)
        assert ours.shape == (2, 384)
        torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)


def test_dinov2_sees_224_pixels() -> None:
    """Its own default is 518; at 224 there are 16 x 16 patches and a class token."""
    model = twins.vision_transformer("vit_small_patch14_dinov2.lvd142m")
    assert model.pos_embed.shape == (1, 257, 384)
    assert model(torch.zeros(1, 3, 224, 224)).shape == (1, 384)


@pytest.mark.slow
def test_open_clip_and_transformers_agree_on_vit_b_32() -> None:
    """Random weights, pictures and texts, 1e-5; the same weights without QuickGELU differ."""
    model = twins.randomized(open_clip.create_model("ViT-B-32-quickgelu", pretrained=None), 2)
    twin = twins.clip_twin(model)
    tokenizer = open_clip.get_tokenizer("ViT-B-32-quickgelu")
    encoder = registry.text_image_encoder(
        "clip", ("CLIP-I", "CLIP-T"), model, lambda texts: tokenizer(texts), preprocessing.CLIP
    )
    images, texts = (
        [picture(300, 260), picture(224, 500)],
        ["a photo of a dog", "two bells in snow"],
    )
    pixels = torch.stack([preprocessing.CLIP(image) for image in images])
    with torch.no_grad():
        pooled = twin.vision_model(pixels).pooler_output
        image = torch.nn.functional.normalize(twin.visual_projection(pooled), dim=1)
        # CLIPModel pools at the largest id, the end-of-text token.
        pooled = twin.text_model(tokenizer(texts)).pooler_output
        text = torch.nn.functional.normalize(twin.text_projection(pooled), dim=1)
    torch.testing.assert_close(encoder.embed_images(images), image, rtol=0, atol=1e-5)
    torch.testing.assert_close(encoder.embed_texts(texts), text, rtol=0, atol=1e-5)

    plain = open_clip.create_model("ViT-B-32", pretrained=None).eval()
    plain.load_state_dict(model.state_dict())
    with torch.no_grad():
        other = torch.nn.functional.normalize(plain.encode_image(pixels), dim=1)
    assert float((other - image).norm(dim=1).min()) > 1e-3
    for name, value in twins.round_trip(twin).items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_a_quickgelu_warning_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """open_clip only warns when OpenAI's weights meet the wrong activation."""

    def warn(*_: Any, **__: Any) -> None:
        warnings.warn("QuickGELU mismatch between final model config and tag", stacklevel=1)

    monkeypatch.setattr(open_clip, "create_model", warn)
    with pytest.raises(ConfigError, match="QuickGELU mismatch"):
        load_encoder("clip")


@pytest.mark.parametrize("name", ["dino", "dinov2", "clip"])
def test_weights_of_another_architecture_are_refused(name: str, tmp_path: Path) -> None:
    """The message names the file, and what is needed."""
    save_file({"head.weight": torch.ones(3, 4)}, tmp_path / "other.safetensors")
    with pytest.raises(ConfigError, match=r"other\.safetensors does not hold .* timm/vit_"):
        load_encoder(name, tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", ["dino", "clip"])
@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
def test_damaged_weights_are_refused(name: str, suffix: str, tmp_path: Path) -> None:
    """No traceback of a library: the message names the file."""
    (tmp_path / f"w.{suffix}").write_bytes(b"not weights at all")
    with pytest.raises(ConfigError, match=rf"w\.{suffix} does not hold"):
        load_encoder(name, tmp_path / f"w.{suffix}")


@pytest.mark.parametrize("name", ["dino", "clip"])
def test_without_a_hub_the_message_says_what_to_do(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Which file, from where, how to hand it over, and which encoders need none."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ConfigError, match=f"timm/vit_.*--weights {name}=FILE.*effnet-lite2"):
        load_encoder(name)


@pytest.mark.parametrize("name", ["effnet-lite2", "tiny-clip"])
def test_offline_encoders_bring_their_weights(name: str, tmp_path: Path) -> None:
    (tmp_path / "w.pth").write_bytes(b"")
    with pytest.raises(ConfigError, match="brings its own weights"):
        load_encoder(name, tmp_path / "w.pth")


def test_effnet_finds_the_concept_of_a_picture() -> None:
    """Of 50 pictures of 10 concepts, the nearest other picture shows the same one in 90 % or more."""
    folders = sorted((ROOT / "examples" / "concepts").iterdir())
    images = [load_image(path) for folder in folders for path in check_images(folder)]
    labels = torch.arange(len(folders)).repeat_interleave(5)
    features = load_encoder("effnet-lite2").embed_images(images)
    cosines = features @ features.T
    cosines.fill_diagonal_(-1)
    assert float((labels[cosines.argmax(1)] == labels).float().mean()) >= 0.9


def test_the_batch_does_not_matter() -> None:
    """E2: alone, in a batch of 3 or of 40, in any order: the same embedding to 1e-5."""
    encoder = load_encoder("tiny-clip")
    images = [picture(60 + index, 64) for index in range(40)]
    whole = encoder.embed_images(images)
    assert float((whole[0] - whole[1]).norm()) > 1e-4
    torch.testing.assert_close(encoder.embed_images(images[:3]), whole[:3], rtol=0, atol=1e-5)
    alone = torch.cat([encoder.embed_images([image]) for image in images[::-1]])
    torch.testing.assert_close(alone.flip(0), whole, rtol=0, atol=1e-5)
    assert float((whole.norm(dim=1) - 1).abs().max()) < 1e-6


def test_the_tiny_clip_is_the_text_encoder_of_the_pipeline() -> None:
    """Pooled output of the pipeline's CLIPTextModel through the projection, to 1e-5."""
    from transformers import CLIPTextModel, CLIPTokenizer

    folder = embedded_directory()
    with quiet_libraries():
        tower = CLIPTextModel.from_pretrained(folder / "text_encoder", dtype=torch.float32).eval()
        tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")
    texts = ["a red apple on a blue background", "two bells"]
    ids = tokenizer(texts, padding="max_length", max_length=77, return_tensors="pt").input_ids
    with torch.no_grad():
        pooled = tower(ids).pooler_output @ tiny_clip.load().text_projection
    expected = torch.nn.functional.normalize(pooled, dim=1)
    ours = load_encoder("tiny-clip").embed_texts(texts)
    torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)


def test_nothing_to_embed_is_said() -> None:
    encoder = load_encoder("effnet-lite2")
    with pytest.raises(ConfigError, match="no pictures"):
        encoder.embed_images([])
    with pytest.raises(ConfigError, match="reads pictures only"):
        encoder.embed_texts(["a dog"])


def test_the_hash_sees_names_shapes_and_bytes() -> None:
    """Another name, shape, dtype or value is another hash; the order is not."""
    state = {"a": torch.arange(4.0), "b": torch.ones(2)}
    same = {"b": torch.ones(2), "a": torch.arange(4.0)}
    others = [
        {"a": torch.arange(4.0), "c": torch.ones(2)},
        {"a": torch.arange(4.0).view(2, 2), "b": torch.ones(2)},
        {"a": torch.arange(4.0), "b": torch.ones(2).half()},
        {"a": torch.arange(4.0).flip(0), "b": torch.ones(2)},
    ]
    assert weights_sha256(same) == weights_sha256(state)
    assert len({weights_sha256(other) for other in [state, *others]}) == 5
