"""The recipe of the embedded model: the written-down autoencoder, the world, the judge of backgrounds."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from eval import palette
from tools.pretrain_tiny import (
    autoencoder,
    backgrounds,
    decoder_start,
    objects,
    stages,
    unet,
    unet_start,
    world,
)


def _code(seed: int) -> dict[str, Tensor]:
    """A patch code whose quarter patches span 24 dimensions, as many as the decoder keeps of them."""
    generator = torch.Generator().manual_seed(seed)

    def frame(rows: int, columns: int) -> Tensor:
        square = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
        return torch.linalg.qr(square).Q

    kept = decoder_start.CODES[1]
    inside = frame(4 * kept, autoencoder.CHANNELS).reshape(4, kept, -1)
    quarters = torch.einsum("fc,pck->pfk", frame(48, kept), inside)
    grid = quarters.reshape(2, 2, 3, 4, 4, -1).permute(2, 0, 3, 1, 4, 5)
    std = torch.logspace(0.6, -0.7, autoencoder.CHANNELS, dtype=torch.float64)
    mean = torch.full((192,), 0.1, dtype=torch.float64)
    return {"mean": mean, "basis": grid.reshape(192, -1), "std": std}


def _written(code: dict[str, Tensor]) -> torch.nn.Module:
    model = autoencoder.build()
    autoencoder.write_encoder(model, code)
    gain = autoencoder.latent_gain(code["std"])
    decoder_start.write_decoder(model, code["mean"], code["basis"], code["std"], gain)
    return model.double().eval()


def _pictures(code: dict[str, Tensor], count: int) -> tuple[Tensor, Tensor]:
    """Pictures that the code can express, and their scaled latents, both exact."""
    generator = torch.Generator().manual_seed(9)
    shape = (count, 8, 8, autoencoder.CHANNELS)
    coordinates = 0.25 * torch.randn(shape, generator=generator, dtype=torch.float64) * code["std"]
    patches = coordinates @ code["basis"].T + code["mean"]
    latents = coordinates * autoencoder.latent_gain(code["std"])
    images = F.pixel_shuffle(patches.permute(0, 3, 1, 2), autoencoder.FACTOR)
    return images, latents.permute(0, 3, 1, 2)


def test_the_encoder_is_the_patch_code() -> None:
    """Latents are the PCA coordinates times the gain, at every place, to rounding of the fp32 weights."""
    code = _code(0)
    images, latents = _pictures(code, 3)
    assert latents.abs().max() > 0.05
    with torch.no_grad():
        found = _written(code).encode(images).latents
    torch.testing.assert_close(found, latents, rtol=0, atol=1e-6)


def test_the_decoder_inverts_the_patch_code() -> None:
    """A decoder of convolutions after nearest upsampling reproduces an 8 x 8 patch code."""
    code = _code(1)
    images, latents = _pictures(code, 3)
    # The decoder squashes with 3 tanh(z / 3); undo that here to see its linear part alone.
    with torch.no_grad():
        found = _written(code).decode(3 * torch.atanh(latents / 3)).sample
    assert images.std() > 0.05
    assert float((found - images).abs().max()) < 1e-4


def _drop_parity(model: torch.nn.Module) -> None:
    """The tempting decoder: no even/odd channels, so all four quarters of a cell come out alike."""
    for layer in model.decoder.layers:
        if isinstance(layer, torch.nn.Conv2d) and layer.out_channels == autoencoder.WIDTH:
            layer.weight.data[list(decoder_start.EVEN)] = 0.0


def _drop_ramps(model: torch.nn.Module) -> None:
    """No ramp from the border: only the first row and column know their parity."""
    for layer in model.decoder.layers:
        if hasattr(layer, "fuse"):
            for conv in (layer.conv[0], layer.conv[2], layer.conv[4]):
                conv.weight.data[list(decoder_start.RAMP)] = 0.0


@pytest.mark.parametrize("fault", [_drop_parity, _drop_ramps])
def test_a_decoder_that_cannot_tell_parity_fails(fault: Callable[[torch.nn.Module], None]) -> None:
    """The law above can fail: without positions the same weights are far off."""
    code = _code(1)
    images, latents = _pictures(code, 3)
    model = _written(code)
    fault(model)
    with torch.no_grad():
        found = model.decode(latents).sample
    assert float((found - images).abs().mean()) > 0.05


def _copy_error(groups: int) -> float:
    """Relative error of the written copy on fresh noise, with so many groups in every normalization."""
    torch.manual_seed(0)
    model = unet.build(groups)
    unet_start.write_copy(model)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(16, autoencoder.CHANNELS, 8, 8, generator=generator)
    words = torch.randn(16, 5, model.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        copied = model(noise, torch.full((16,), 700), words).sample
    return float((copied - noise).norm() / noise.norm())


def test_the_network_starts_by_copying_its_input() -> None:
    """Whatever the prompt and the noise level: to 1.6 % (measured), far below the 7 % of signal in the last step."""
    assert _copy_error(unet.GROUPS) < 0.03


def test_a_copy_through_small_groups_fails() -> None:
    """The usual 32 groups divide by a deviation of few numbers: the law above can fail (measured 11 %)."""
    assert _copy_error(32) > 0.07


def test_the_loss_asks_for_the_velocity() -> None:
    """With v = sqrt(a) eps - sqrt(1 - a) x0, an error d of eps at fixed input is an error d / sqrt(a) of v."""
    alphas = unet.scheduler().alphas_cumprod.double()
    weights = unet.loss_weights(alphas)
    assert float(weights.mean()) == pytest.approx(1)
    clean, noise, wrong = torch.tensor([0.3, -1.2, 0.5], dtype=torch.float64)
    for step in (0, 300, 879):
        a = alphas[step]
        noisy = a.sqrt() * clean + (1 - a).sqrt() * noise
        guess = (noisy - (1 - a).sqrt() * wrong) / a.sqrt()  # the picture that goes with `wrong`
        v_error = a.sqrt() * (wrong - noise) - (1 - a).sqrt() * (guess - clean)
        ratio = (wrong - noise).square() * weights[step] / v_error.square()
        assert float(ratio) == pytest.approx(float(1 / (1 / alphas).mean()))


def _toy_world() -> world.World:
    art = Image.new("RGBA", (40, 40), (255, 0, 0, 255)).convert("RGBa")
    sprites = [
        world.Sprite(name, style, art) for name in ("owl", "cat") for style in world.TRAIN_STYLES
    ]
    return world.World(sprites)


def test_the_world_is_a_function_of_its_seed() -> None:
    """Equal seeds give equal pictures and captions, other seeds others; captions name what is drawn."""
    first, captions = world.render(_toy_world(), 40, 5)
    again, same = world.render(_toy_world(), 40, 5)
    other, _ = world.render(_toy_world(), 40, 6)
    assert captions == same
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
    words = ("owl", "owls", "cat", "cats")
    assert all(any(word in caption.split() for word in words) for caption in captions)
    assert any("two " in caption for caption in captions)


@pytest.mark.parametrize(
    ("noun", "one", "many"),
    [
        ("owl", "an owl", "owls"),
        ("box of popcorn", "a box of popcorn", "boxes of popcorn"),
        ("strawberry", "a strawberry", "strawberries"),
        ("monkey", "a monkey", "monkeys"),
        ("loaf of bread", "a loaf of bread", "loaves of bread"),
        ("wolf", "a wolf", "wolves"),
    ],
)
def test_captions_are_english(noun: str, one: str, many: str) -> None:
    """Articles and plurals."""
    assert world.with_article(noun) == one
    assert world.plural(noun) == many


def test_concepts_are_held_back() -> None:
    """No noun is both trained on and held back, no two nouns share a name, and there are enough of both."""
    assert len(objects.TRAIN) >= 300
    assert len(objects.HELD_BACK) >= 20
    names = [*objects.TRAIN.values(), *objects.HELD_BACK.values()]
    assert len(set(names)) == len(names)
    assert not set(objects.TRAIN) & set(objects.HELD_BACK)


@pytest.mark.parametrize("background", backgrounds.PLAIN, ids=lambda b: b.name)
def test_the_border_tells_the_color(background: backgrounds.Background) -> None:
    """The judge of backgrounds reads the prompted color off plain backgrounds nearly always."""
    rng = np.random.default_rng(0)
    pixels = np.stack([np.asarray(background.paint(rng)) for _ in range(20)])
    images = stages.to_tensor(pixels)
    right = [palette.nearest_color(image) == background.name for image in images]
    assert sum(right) >= 19
