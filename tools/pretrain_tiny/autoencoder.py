"""The autoencoder: a linear patch code (PCA of 8 x 8 patches) as encoder, fixed from the first minute, and a trained decoder.

The encoder of `AutoencoderTiny` without blocks is a chain of linear convolutions, so it can hold a PCA exactly; latents are
final before anything is trained, and the U-Net never waits. `decoder_start.py` writes the matching linear decoder.
"""

from __future__ import annotations

import logging
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from tools.pretrain_tiny import decoder_start, stages

log = logging.getLogger("pretrain_tiny")

FACTOR = 8
CHANNELS = 32
WIDTH = 64
PCA_PICTURES = 20_000
LATENT_STD = 0.1  # the decoder squashes with 3 tanh(z / 3): small latents pass it almost unchanged
LATENT_NOISE = 0.05 * LATENT_STD  # sampled latents are not exact
BATCH = 24
STEPS = 1_500
PEAK_LR = 4e-4


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
        pixels, _ = stages.rendered(work, raw)
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


def start(work: Path, raw: Path) -> AutoencoderTiny:
    """The autoencoder before training: exact patch code and its linear decoder."""
    torch.manual_seed(0)
    code = patch_code(work, raw)
    model = build()
    write_encoder(model, code)
    gain = latent_gain(code["std"])
    decoder_start.write_decoder(model, code["mean"], code["basis"], code["std"], gain)
    model.encoder.requires_grad_(False)
    return model


@torch.no_grad()
def psnr(model: AutoencoderTiny, images: Tensor) -> float:
    """Peak signal-to-noise ratio (dB, peak 2) over pictures in [-1, 1] (n, 3, h, w), as a mean over all pixels."""
    error, count = 0.0, 0
    for batch in images.split(64):
        output = model.decode(model.encode(batch).latents).sample.clamp(-1, 1)
        error += float((output - batch).square().sum())
        count += batch.numel()
    return float(10 * torch.log10(torch.tensor(4.0 * count / error)))


def train(work: Path, raw: Path, steps: int = STEPS) -> None:
    """Train the decoder on mean absolute and squared error, write `autoencoder.pt` (resumable)."""
    model = start(work, raw)
    pixels, _ = stages.rendered(work, raw)
    probe, _ = stages.held_out(raw)
    parameters = list(model.decoder.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.0)
    progress = stages.Progress(work / "autoencoder.pt", model=model, optimizer=optimizer)
    log.info("autoencoder starts at %.2f dB", psnr(model, probe[:128]))
    started = time.time()
    for step in range(progress.step, steps):
        for group in optimizer.param_groups:
            group["lr"] = stages.cosine(step, steps, PEAK_LR, 50)
        rows = torch.randint(len(pixels), (BATCH,), generator=torch.Generator().manual_seed(step))
        images = stages.to_tensor(pixels[rows.numpy()])
        with torch.no_grad():
            latents = model.encode(images).latents
        latents = latents + LATENT_NOISE * torch.randn(latents.shape)
        difference = model.decode(latents).sample - images
        loss = difference.square().mean() + 0.05 * difference.abs().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 0.5)
        optimizer.step()
        if (step + 1) % 100 == 0 or step + 1 == steps:
            progress.save(step + 1)
            quality = psnr(model, probe[:128])
            log.info(
                "autoencoder %d/%d  %.2f dB  %.0f s",
                step + 1,
                steps,
                quality,
                time.time() - started,
            )


def load(work: Path) -> AutoencoderTiny:
    """The trained autoencoder."""
    model = build()
    model.load_state_dict(torch.load(work / "autoencoder.pt", weights_only=True)["model"])
    return model.eval()
