"""The U-Net: epsilon prediction on cached latents, conditioned by the frozen text tower of the tiny CLIP."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from torch import Tensor

from tools.pretrain_tiny import autoencoder, clip, stages, text

log = logging.getLogger("pretrain_tiny")

BATCH = 32
STEPS = 7_250
ROUGH_STEPS = 1_500
PHASES = (("wide", 0), ("calm", 2_500), ("aligned", 3_750))  # world, first step
DECAY_STEPS = 1_500
PEAK_LR = 1e-3
EMA_DECAY = 0.999
EMA_EVERY = 4
CAPTION_DROP = 0.1
SNR_GAMMA = 5.0
MIN_SNR_STEPS = 5_000
CUT_STEPS = 5_500
MAX_WEIGHT = 400.0
TIMESTEPS = 880


def build() -> UNet2DConditionModel:
    """SD2 layout (cross-attention, linear projections, 32-wide heads) on 8 x 8 latents."""
    return UNet2DConditionModel(
        sample_size=8,
        in_channels=autoencoder.CHANNELS,
        out_channels=autoencoder.CHANNELS,
        block_out_channels=(96, 192),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=clip.TEXT["width"],
        attention_head_dim=(3, 6),
        use_linear_projection=True,
    )


def _full_schedule() -> DDIMScheduler:
    return DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.0165, beta_schedule="scaled_linear"
    )


def scheduler() -> DDIMScheduler:
    """SD2's kind of schedule, cut where 0.5 % of signal is left, as in SD2: beyond, copying the noise is all there is."""
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=_full_schedule().betas[:TIMESTEPS].tolist(),
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def _alphas(step: int, final: Tensor) -> Tensor:
    """Products of alphas (1000,) for a training step; the first ROUGH_STEPS use linear betas from 1e-4 to 0.02.

    Sampling multiplies an error of the predicted noise by 1 / sqrt(alpha product), which linear betas make far too large
    at the end; `scheduler` stops before that.
    """
    if step >= ROUGH_STEPS:
        return final
    return torch.cumprod(1.0 - torch.linspace(1e-4, 0.02, 1000), 0)


def cached_latents(work: Path, raw: Path, name: str) -> np.ndarray:
    """Scaled latents of all pictures of a world, fp16 (n, 32, 8, 8), memory-mapped; computed once."""
    path = work / f"latents-{name}.npy"
    if not path.exists():
        pixels, _ = stages.rendered(work, raw, name)
        model = autoencoder.build()
        autoencoder.write_encoder(model, autoencoder.patch_code(work, raw))
        latents = np.empty((len(pixels), autoencoder.CHANNELS, 8, 8), dtype=np.float16)
        with torch.no_grad():
            for at in range(0, len(pixels), 500):
                batch = model.encode(stages.to_tensor(pixels[at : at + 500])).latents
                latents[at : at + 500] = (batch * model.config.scaling_factor).half().numpy()

        def write(target: Path) -> None:
            with target.open("wb") as handle:
                np.save(handle, latents)

        stages.save_atomic(path, write)
    return np.load(path, mmap_mode="r")


class Conditions:
    """Text embeddings by caption: computed when first asked for, kept as fp16 rows."""

    def __init__(self, work: Path, captions: list[str]) -> None:
        self._encoder, tokenizer = text.load(work)
        self._ids = text.token_ids(tokenizer, [*captions, ""])
        self._cache: Tensor | None = None
        self._known = torch.zeros(len(captions) + 1, dtype=torch.bool)

    @property
    def empty_row(self) -> int:
        """Row of the empty caption."""
        return len(self._ids) - 1

    @torch.no_grad()
    def rows(self, index: Tensor) -> Tensor:
        """fp32 (b, 77, width) for caption numbers (b,)."""
        if self._cache is None:
            width = self._encoder.config.hidden_size
            self._cache = torch.empty(
                (len(self._ids), self._ids.shape[1], width), dtype=torch.float16
            )
        missing = index[~self._known[index]].unique()
        if len(missing):
            with torch.autocast("cpu", torch.bfloat16):
                states = self._encoder(self._ids[missing]).last_hidden_state
            self._cache[missing] = states.half()
            self._known[missing] = True
        return self._cache[index].float()


def _weights(step: int, timesteps: Tensor, alphas: Tensor) -> Tensor:
    """Loss weights (b,): Min-SNR at first, then those of a velocity loss, 1 / alpha, cut at MAX_WEIGHT and of mean 1.

    With equal weights errors in copying the noise of the last steps cost nothing, and drown what the prompt says there. The velocity weights ask for the picture in the noise, at every noise level.
    """
    if step < MIN_SNR_STEPS:
        snr = alphas / (1 - alphas)
        return torch.clamp(SNR_GAMMA / snr, max=1.0)[timesteps]
    weights = torch.clamp(1 / alphas, max=MAX_WEIGHT)
    return (weights / weights.mean())[timesteps]


def train(work: Path, raw: Path, steps: int = STEPS) -> None:
    """Train and write `unet.pt` with raw and averaged weights (resumable)."""
    torch.manual_seed(0)
    model, average = build(), build()
    average.load_state_dict(model.state_dict())
    average.requires_grad_(False)
    final_alphas = _full_schedule().alphas_cumprod
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    progress = stages.Progress(work / "unet.pt", model=model, average=average, optimizer=optimizer)
    started, running = time.time(), 0.0
    for step in range(progress.step, steps):
        if step == progress.step or step in dict(PHASES).values():
            name = [world_name for world_name, first in PHASES if first <= step][-1]
            latents = cached_latents(work, raw, name)
            conditions = Conditions(work, stages.rendered(work, raw, name)[1])
        generator = torch.Generator().manual_seed(1_000_000 + step)
        for group in optimizer.param_groups:
            group["lr"] = stages.trapezoid(step, steps, PEAK_LR, DECAY_STEPS)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = torch.from_numpy(latents[rows.numpy()]).float()
        noise = torch.randn(clean.shape, generator=generator)
        limit = 1000 if step < CUT_STEPS else TIMESTEPS
        timesteps = torch.randint(0, limit, (BATCH,), generator=generator)
        alphas = _alphas(step, final_alphas)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROP
        condition = conditions.rows(torch.where(dropped, conditions.empty_row, rows))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = model(noisy, timesteps, condition).sample
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        loss = (error * _weights(step, timesteps, alphas)).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % EMA_EVERY == 0:
            decay = min(EMA_DECAY, (step + 1) / (step + 10)) ** EMA_EVERY
            with torch.no_grad():
                for mean, value in zip(average.parameters(), model.parameters(), strict=True):
                    mean.lerp_(value, 1 - decay)
        running = 0.98 * running + 0.02 * loss.item() if running else loss.item()
        if (step + 1) % 100 == 0:
            rate = (step + 1 - progress.step) * BATCH / (time.time() - started)
            log.info("unet %d/%d  loss %.4f  %.0f pictures/s", step + 1, steps, running, rate)
        if (step + 1) % 250 == 0 or step + 1 == steps:
            started, _ = time.time(), progress.save(step + 1)


def load(work: Path) -> UNet2DConditionModel:
    """The trained U-Net with averaged weights."""
    model = build()
    model.load_state_dict(torch.load(work / "unet.pt", weights_only=True)["average"])
    return model.eval()
