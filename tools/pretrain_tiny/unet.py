"""The U-Net: epsilon prediction on cached latents, conditioned by the frozen text tower of the tiny CLIP."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, UNet2DConditionModel
from diffusers.models.attention_processor import AttnProcessor
from torch import Tensor, nn

from tools.pretrain_tiny import autoencoder, clip, stages, text, unet_start

log = logging.getLogger("pretrain_tiny")

BATCH = 64
STEPS = 9_400
DECAY_STEPS = 4_700
UNIFORM_STEPS = 3_000
PEAK_LR = 1e-3
EMA_DECAY = 0.999
EMA_EVERY = 4
CAPTION_DROP = 0.1
GROUPS = 1
TIMESTEPS = 880


def build(groups: int = GROUPS) -> UNet2DConditionModel:
    """SD2 layout (cross-attention, linear projections, 32-wide heads) on 8 x 8 latents.

    Args:
        groups: of every normalization; `unet_start` says why not the usual 32.
    """
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
        norm_num_groups=groups,
    )


def scheduler() -> DDIMScheduler:
    """SD2's kind of schedule, cut where 0.5 % of signal is left, as in SD2: beyond, copying the noise is all there is."""
    betas = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.0165, beta_schedule="scaled_linear"
    ).betas[:TIMESTEPS]
    return DDIMScheduler(
        num_train_timesteps=TIMESTEPS,
        trained_betas=betas.tolist(),
        prediction_type="epsilon",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
        timestep_spacing="trailing",
    )


def cached_latents(work: Path, raw: Path) -> np.ndarray:
    """Scaled latents of all pictures of the steady world, fp16 (n, 32, 8, 8), memory-mapped; computed once."""
    path = work / "latents-steady.npy"
    if not path.exists():
        pixels, _ = stages.rendered(work, raw, "steady")
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


def loss_weights(alphas: Tensor) -> Tensor:
    """Loss weights (t,) for products of alphas (t,): those of a velocity loss, 1 / alpha, of mean 1.

    With equal weights errors in copying the noise of the last steps cost nothing, and drown what the prompt says there. The
    velocity weights ask for the picture in the noise, at every noise level.
    """
    return (1 / alphas) / (1 / alphas).mean()


def draw_timesteps(step: int, generator: torch.Generator) -> Tensor:
    """Noise levels (BATCH,) of a training step: the larger of two, since captions tell little below the middle.

    The first UNIFORM_STEPS draw one, as the run began.
    """
    draws = torch.randint(0, TIMESTEPS, (2, BATCH), generator=generator)
    return draws[0] if step < UNIFORM_STEPS else draws.amax(0)


class Average:
    """Exponential mean of a model's weights, short at first."""

    def __init__(self, model: nn.Module, mean: nn.Module) -> None:
        self._model, self._mean = model, mean

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after `step` steps, every EMA_EVERY of them."""
        if step % EMA_EVERY:
            return
        decay = min(EMA_DECAY, step / (step + 9)) ** EMA_EVERY
        for mean, value in zip(self._mean.parameters(), self._model.parameters(), strict=True):
            mean.lerp_(value, 1 - decay)


def train(work: Path, raw: Path, steps: int = STEPS) -> None:
    """Train and write `unet.pt` with raw and averaged weights (resumable)."""
    torch.manual_seed(0)
    model, mean = build(), build()
    unet_start.write_copy(model)
    model.set_attn_processor(AttnProcessor())  # on a CPU the fused attention has a slow backward
    mean.load_state_dict(model.state_dict())
    mean.requires_grad_(False)
    average = Average(model, mean)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True
    )
    progress = stages.Progress(work / "unet.pt", model=model, average=mean, optimizer=optimizer)
    compiled = torch.compile(model)  # 1.4 times as fast on two cores; needs a C++ compiler
    latents = cached_latents(work, raw)
    conditions = Conditions(work, stages.rendered(work, raw, "steady")[1])
    alphas = scheduler().alphas_cumprod
    weights = loss_weights(alphas)
    started, running = time.time(), 0.0
    for step in range(progress.step, steps):
        generator = torch.Generator().manual_seed(1_000_000 + step)
        for group in optimizer.param_groups:
            group["lr"] = stages.trapezoid(step, steps, PEAK_LR, DECAY_STEPS)
        rows = torch.randint(len(latents), (BATCH,), generator=generator)
        clean = torch.from_numpy(latents[rows.numpy()]).float()
        noise = torch.randn(clean.shape, generator=generator)
        timesteps = draw_timesteps(step, generator)
        alpha = alphas[timesteps].view(-1, 1, 1, 1)
        noisy = alpha.sqrt() * clean + (1 - alpha).sqrt() * noise
        dropped = torch.rand(BATCH, generator=generator) < CAPTION_DROP
        condition = conditions.rows(torch.where(dropped, conditions.empty_row, rows))
        with torch.autocast("cpu", torch.bfloat16):
            predicted = compiled(noisy, timesteps, condition).sample
        error = F.mse_loss(predicted.float(), noise, reduction="none").mean((1, 2, 3))
        loss = (error * weights[timesteps]).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        average.update(step + 1)
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
