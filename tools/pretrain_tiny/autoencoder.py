"""The autoencoder: a linear patch code (PCA of 8 x 8 patches) and its decoder, written down, not trained.

The encoder of `AutoencoderTiny` without blocks is a chain of linear convolutions, so it can hold a PCA exactly; latents are
final before anything is trained, and the U-Net never waits. `decoder_start.py` writes the matching linear decoder.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from tools.pretrain_tiny import decoder_start, stages

FACTOR = 8
CHANNELS = 32
WIDTH = 64
PCA_PICTURES = 20_000
LATENT_STD = 0.1  # the decoder squashes with 3 tanh(z / 3): small latents pass it almost unchanged


def build() -> AutoencoderTiny:
    """An untrained autoencoder with linear encoder."""
    return AutoencoderTiny(
        encoder_block_out_channels=(48, 48, 48, 48),
        decoder_block_out_channels=(WIDTH,) * 4,
        latent_channels=CHANNELS,
        num_encoder_blocks=(0, 0, 0, 0),
        num_decoder_blocks=(3, 2, 1, 1),
        scaling_factor=1.0 / LATENT_STD,
    )


def patch_code(work: Path, raw: Path) -> dict[str, Tensor]:
    """Mean (192,), basis (192, k), std (k,) of 8 x 8 patches in [-1, 1], order of `pixel_unshuffle`; cached."""
    path = work / "pca.pt"
    if not path.exists():
        pixels, _ = stages.rendered(work, raw, "wide")
        total = torch.zeros(192, dtype=torch.float64)
        square = torch.zeros(192, 192, dtype=torch.float64)
        count = 0
        for start in range(0, PCA_PICTURES, 2000):
            patches = F.pixel_unshuffle(stages.to_tensor(pixels[start : start + 2000]), FACTOR)
            rows = patches.permute(0, 2, 3, 1).reshape(-1, 192).double()
            total += rows.sum(0)
            square += rows.T @ rows
            count += len(rows)
        mean = total / count
        values, vectors = torch.linalg.eigh(square / count - torch.outer(mean, mean))
        basis = vectors.flip(1)[:, :CHANNELS]
        basis = basis * torch.sign(basis[basis.abs().argmax(0), torch.arange(CHANNELS)])
        code = {"mean": mean, "basis": basis, "std": values.flip(0)[:CHANNELS].sqrt()}
        stages.save_atomic(path, lambda p: torch.save(code, p))
    return torch.load(path, weights_only=True)


def latent_gain(std: Tensor) -> Tensor:
    """Per-channel factor from PCA coordinates to raw latents: half-whitened, mean variance LATENT_STD ** 2."""
    gain = std.rsqrt()
    return gain * LATENT_STD / ((gain * std).square().mean().sqrt())


@torch.no_grad()
def write_encoder(model: AutoencoderTiny, code: dict[str, Tensor]) -> None:
    """Put the patch code into the chain of convolutions: two exact unshuffles, then the projection on the basis."""
    first, second, third, fourth, last = (layer for layer in model.encoder.layers)
    for layer in (first, second, third, fourth, last):
        layer.weight.zero_()
        if layer.bias is not None:
            layer.bias.zero_()
    for channel in range(3):
        first.weight[channel, channel, 1, 1] = 1.0
    for layer, count in ((second, 3), (third, 12)):
        for channel in range(count):
            for offset in range(4):  # taps 1 and 2 of a stride-2 kernel see pixels 2 i and 2 i + 1
                layer.weight[4 * channel + offset, channel, 1 + offset // 2, 1 + offset % 2] = 1.0
    gain = latent_gain(code["std"])
    # The encoder sees (x + 1) / 2, hence the factor 2 here and the bias below.
    projection = (2 * code["basis"] * gain).T.float()
    for channel in range(48):
        color, inner, outer = channel // 16, channel // 4 % 4, channel % 4
        for offset in range(4):
            # pixel_unshuffle(8) index of the pixel that two unshuffles by 2 and this tap lead to
            row = 4 * (offset // 2) + 2 * (outer // 2) + inner // 2
            column = 4 * (offset % 2) + 2 * (outer % 2) + inner % 2
            source = projection[:, color * 64 + row * 8 + column]
            fourth.weight[:CHANNELS, channel, 1 + offset // 2, 1 + offset % 2] = source
    for channel in range(CHANNELS):
        last.weight[channel, channel, 1, 1] = 1.0
    offset_mean = (code["mean"] + 1.0) @ (code["basis"] * gain)
    last.bias.copy_(-offset_mean.float())


def written(work: Path, raw: Path) -> AutoencoderTiny:
    """The autoencoder: exact patch code and its linear decoder."""
    code = patch_code(work, raw)
    model = build()
    write_encoder(model, code)
    gain = latent_gain(code["std"])
    decoder_start.write_decoder(model, code["mean"], code["basis"], code["std"], gain)
    return model.eval()


@torch.no_grad()
def psnr(model: AutoencoderTiny, images: Tensor) -> float:
    """Peak signal-to-noise ratio (dB, peak 2) over pictures in [-1, 1] (n, 3, h, w), as a mean over all pixels."""
    error, count = 0.0, 0
    for batch in images.split(64):
        output = model.decode(model.encode(batch).latents).sample.clamp(-1, 1)
        error += float((output - batch).square().sum())
        count += batch.numel()
    return float(10 * torch.log10(torch.tensor(4.0 * count / error)))
