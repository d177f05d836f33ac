"""What a Stable Diffusion model is used for: encode pictures and prompts, draw pictures."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from PIL import Image
from torch import Tensor

from dreamrie.config.train_config import usual_guidance
from dreamrie.diffusion.components import Components, load_components
from dreamrie.diffusion.source import EMBEDDED, resolve_model
from dreamrie.errors import ConfigError, NumericalError

__all__ = [
    "ATTENTION_TARGETS",
    "Components",
    "DrawRequest",
    "Posterior",
    "check_prompt",
    "draw",
    "encode_latents",
    "encode_posterior",
    "encode_prompts",
    "load_components",
    "resolve_model",
    "sample",
]

_log = logging.getLogger(__name__)

# q, k, v and the output projection of every attention layer of the U-Net.
ATTENTION_TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]

_PROMPT_BATCH = 16


class Posterior(NamedTuple):
    """What the VAE says about pictures: scaled latents are mean + std * noise.

    Attributes:
        mean: (batch, channels, height, width), times the VAE's scaling factor.
        std: same shape; zero for an autoencoder without a posterior.
    """

    mean: Tensor
    std: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """Latents for standard normal `noise` of the same shape."""
        return self.mean + self.std * noise


def encode_posterior(vae: Any, pixels: Tensor) -> Posterior:
    """Encode pictures to the distribution of their latents.

    Args:
        vae: AutoencoderKL or AutoencoderTiny.
        pixels: (batch, 3, height, width) in [-1, 1].

    Returns:
        Mean and standard deviation, fp32, times the scaling factor.
    """
    with torch.no_grad():
        output = vae.encode(pixels.to(device=vae.device, dtype=vae.dtype))
    factor = float(vae.config.scaling_factor)
    if hasattr(output, "latent_dist"):
        distribution = output.latent_dist
        return Posterior(distribution.mean.float() * factor, distribution.std.float() * factor)
    mean = output.latents.float() * factor
    return Posterior(mean, torch.zeros_like(mean))


def encode_latents(vae: Any, pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Draw latents of pictures.

    Args:
        vae: AutoencoderKL or AutoencoderTiny.
        pixels: (batch, 3, height, width) in [-1, 1].
        generator: of the CPU; the draw is the same on every device.

    Returns:
        (batch, channels, height / scale, width / scale), fp32, scaled.
    """
    posterior = encode_posterior(vae, pixels)
    noise = torch.randn(posterior.mean.shape, generator=generator)
    return posterior.sample(noise.to(posterior.mean.device))


def check_prompt(tokenizer: Any, prompt: str, what: str) -> None:
    """Refuse a prompt that says nothing; warn when the end of it will not be read.

    Args:
        tokenizer: CLIP's tokenizer.
        prompt: text.
        what: the flag it came from, for the message.

    Raises:
        ConfigError: the prompt is blank or cannot be encoded.
    """
    if not prompt.strip():
        raise ConfigError(f'{what} is empty. Describe the picture, such as "a photo of a sks dog".')
    try:
        prompt.encode("utf-8")
    except UnicodeEncodeError as error:
        raise ConfigError(f"{what}: {prompt!r} is not valid Unicode text ({error}).") from error
    limit = int(tokenizer.model_max_length)
    length = len(tokenizer(prompt, truncation=False, verbose=False).input_ids)
    if length > limit:
        _log.warning("%s has %d tokens; only the first %d are read", what, length, limit)


def encode_prompts(components: Components, prompts: Sequence[str]) -> Tensor:
    """Text embeddings as StableDiffusionPipeline makes them.

    Args:
        components: the model.
        prompts: texts; the end of a long one is cut.

    Returns:
        (len(prompts), tokens, width) on the text encoder's device, in its precision.
    """
    encoder, tokenizer = components.text_encoder, components.tokenizer
    parts: list[Tensor] = []
    for start in range(0, len(prompts), _PROMPT_BATCH):
        tokens = tokenizer(
            list(prompts[start : start + _PROMPT_BATCH]),
            padding="max_length",
            max_length=tokenizer.model_max_length,
            truncation=True,
            return_tensors="pt",
        )
        masked = bool(getattr(encoder.config, "use_attention_mask", False))
        mask = tokens.attention_mask.to(encoder.device) if masked else None
        with torch.no_grad():
            parts.append(encoder(tokens.input_ids.to(encoder.device), attention_mask=mask)[0])
    return torch.cat(parts)


@dataclass(frozen=True)
class DrawRequest:
    """What to draw.

    Attributes:
        prompts: one for each picture.
        seeds: one for each picture.
        negative_prompt: what the pictures are led away from; does nothing at a guidance of 1 or less.
        steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; 1 turns it off; None: the model's usual one.
        width: in pixels; None: the model's own.
        height: in pixels; None: the model's own.
        batch_size: pictures at a time.
    """

    prompts: tuple[str, ...]
    seeds: tuple[int, ...]
    negative_prompt: str = ""
    steps: int = 25
    guidance_scale: float | None = None
    width: int | None = None
    height: int | None = None
    batch_size: int = 4


def draw(
    components: Components,
    request: DrawRequest,
    *,
    on_step: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """Draw one picture for each prompt with plain diffusers and the model's own noise schedule (DDIM).

    A picture depends on its prompt and seed alone, not on its neighbours: each has a generator of its own, on
    the CPU, so that every device starts from the same noise.

    Args:
        components: the model, with whatever adapters it carries at the moment.
        request: what to draw; sizes are such that the U-Net can halve their latents.
        on_step: called with (done, total) after every denoising step of all batches together. What it raises ends
            the drawing and goes through; the model is then as it was.

    Returns:
        RGB pictures.

    Raises:
        NumericalError: a picture is not finite.
    """
    count, size = len(request.prompts), request.batch_size
    guidance = request.guidance_scale
    if guidance is None:
        guidance = usual_guidance(components.source.resolved == EMBEDDED)
    starts = range(0, count, size)
    total, done = request.steps * len(starts), 0

    def stepped(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        if on_step is not None:
            on_step(done, total)
        return values

    pictures: list[Image.Image] = []
    with _ready_to_sample(components) as pipe, torch.no_grad():
        for start in starts:
            prompts = list(request.prompts[start : start + size])
            seeds = request.seeds[start : start + size]
            latents = pipe(
                prompt=prompts,
                negative_prompt=[request.negative_prompt] * len(prompts),
                num_inference_steps=request.steps,
                guidance_scale=guidance,
                width=request.width,
                height=request.height,
                generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
                output_type="latent",
                callback_on_step_end=stepped,
            ).images
            if not bool(torch.isfinite(latents).all()):
                raise NumericalError(
                    f"the model drew a picture that is not finite (prompts {prompts}). "
                    "Training has diverged, or fp16 overflowed: lower --learning_rate or use bf16."
                )
            scaled = latents.to(components.vae.dtype) / components.vae.config.scaling_factor
            pixels = components.vae.decode(scaled, return_dict=False)[0]
            pictures += pipe.image_processor.postprocess(pixels, output_type="pil")
    return pictures


def sample(
    components: Components,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 30,
    guidance_scale: float = 7.5,
    batch_size: int = 8,
) -> list[Image.Image]:
    """Draw squares of the model's own size, see `draw`.

    Args:
        components: the model, with whatever adapters it carries at the moment.
        prompts: one for each picture.
        seeds: one for each picture.
        steps: denoising steps.
        guidance_scale: weight of classifier-free guidance; 1 turns it off.
        batch_size: pictures at a time.

    Returns:
        RGB pictures of the model's own resolution. A picture that is not finite is a `NumericalError`.
    """
    return draw(
        components,
        DrawRequest(
            tuple(prompts),
            tuple(seeds),
            steps=steps,
            guidance_scale=guidance_scale,
            batch_size=batch_size,
        ),
    )


@contextmanager
def _ready_to_sample(components: Components) -> Iterator[Any]:
    """A pipeline over the same parts, on one device and in evaluation mode; restored afterwards."""
    unet, helpers = components.unet, (components.vae, components.text_encoder)
    was_training = unet.training
    homes = [module.device for module in helpers]
    pipe = StableDiffusionPipeline(
        vae=components.vae,
        text_encoder=components.text_encoder,
        tokenizer=components.tokenizer,
        unet=unet,
        scheduler=DDIMScheduler.from_config(components.scheduler_config),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.set_progress_bar_config(disable=True)
    try:
        unet.eval()
        for module in helpers:
            module.to(components.device)
        yield pipe
    finally:
        unet.train(was_training)
        for module, home in zip(helpers, homes, strict=True):
            module.to(home)
