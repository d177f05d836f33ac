"""DreamBooth as the training loop sees it: batches, the denoising loss, samples, the adapter file."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dreamrie.adapter_file import save_diffusers_lora
from dreamrie.diffusion.adapters import adapter_off
from dreamrie.diffusion.batch import Batch, latent_mask, picture_errors
from dreamrie.diffusion.cache import LatentCache
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.exported import drawn_from_export
from dreamrie.diffusion.images import contact_sheet, save_png
from dreamrie.diffusion.lean import copy_less
from dreamrie.diffusion.pipeline import (
    Components,
    check_prompt,
    encode_prompts,
    sample,
)
from dreamrie.errors import ConfigError
from dreamrie.lora import LoraPair
from dreamrie.streams import derive_seed, stream_generator

_log = logging.getLogger(__name__)


class DreamBoothTask:
    """Fine-tune a U-Net on the pictures of a concept; implements `dreamrie.trainer.Task`.

    Loss of a micro-batch: mean over the concept's pictures plus `prior_loss_weight` times the mean over the class
    pictures, each the mean squared error of the U-Net against epsilon or v, as its scheduler says, over the whole
    picture or over what its mask shows.

    Everything random about a picture is drawn from (seed, stream, position), where position counts pictures since the
    start. Four micro-batches of one picture are therefore the same as one micro-batch of four, and class pictures
    never disturb what the concept's pictures draw.

    Args:
        components: the model; its U-Net carries the adapters.
        pairs: the adapted layers.
        concept: the pictures.
        batch_size: pictures of the concept in a micro-batch; as many class pictures are added to it.
        seed: of the run.
        samples_per_step: pictures of the concept in one optimizer step, all micro-batches together; default one
            micro-batch. It places the steps one after the other in the stream.
        prior_loss_weight: weight of the class pictures.
        gradient_checkpointing: recompute activations of the U-Net in the backward pass.
        validation_prompts: what to draw while training.
        num_validation_images: pictures for each of them; the seeds are the same at every step.
        inference_steps: denoising steps of a sample.
        guidance_scale: classifier-free guidance of a sample.
        sample_batch_size: samples drawn at a time.
        preview_from_export: draw samples with the adapter as it is saved, loaded by diffusers.
        facts: about the settings, for the header of the file.

    Attributes:
        name: "dreambooth".
        model: the U-Net.
        network: what `loss` calls: the U-Net, or its compiled form.
        pairs: as given.
    """

    def __init__(
        self,
        components: Components,
        pairs: Sequence[LoraPair],
        concept: ConceptSet,
        *,
        batch_size: int,
        seed: int,
        samples_per_step: int | None = None,
        prior_loss_weight: float = 1.0,
        gradient_checkpointing: bool = False,
        validation_prompts: Sequence[str] = (),
        num_validation_images: int = 4,
        inference_steps: int = 25,
        guidance_scale: float = 7.5,
        sample_batch_size: int = 4,
        preview_from_export: bool = False,
        facts: Mapping[str, str] | None = None,
    ) -> None:
        if batch_size < 1:
            raise ConfigError(f"--train_batch_size must be at least 1, got {batch_size}.")
        check_resolution(components, concept.resolution)
        for flag, prompts in (
            ("--instance_prompt", [concept.instance.prompt]),
            ("--class_prompt", [concept.prior.prompt] if concept.prior else []),
            ("a caption", [p for p in concept.instance.prompts if p != concept.instance.prompt]),
            ("--validation_prompt", validation_prompts),
        ):
            for prompt in prompts:
                check_prompt(components.tokenizer, prompt, flag)
        self.name = "dreambooth"
        self.model = components.unet
        self.network: Any = components.unet
        self.pairs = list(pairs)
        self.components = components
        self.concept = concept
        self._batch_size = batch_size
        self._seed = seed
        self._samples_per_step = samples_per_step or batch_size
        self._prior_loss_weight = prior_loss_weight
        self._validation_prompts = list(validation_prompts)
        self._num_validation_images = num_validation_images
        self._inference_steps = inference_steps
        self._guidance_scale = guidance_scale
        self._sample_batch_size = sample_batch_size
        self._preview_from_export = preview_from_export
        self._facts = dict(facts or {})
        copy_less(components.unet)
        if gradient_checkpointing:
            components.unet.enable_gradient_checkpointing()
        self._caches = [LatentCache(components.vae, pictures) for pictures in concept.sets]
        texts = [text for pictures in concept.sets for text in pictures.prompts]
        self._prompts = list(dict.fromkeys(texts))
        self._text = encode_prompts(components, self._prompts)
        self._free_encoders()

    def batch(self, step: int, micro: int) -> Batch:
        """Micro-batch `micro` (0, 1, ...) of optimizer step `step` (1, 2, ...).

        Args:
            step: optimizer step; 0 is a stream of its own, for locally optimal initialization.
            micro: number inside the step.

        Returns:
            The same tensors for the same arguments, on the U-Net's device.
        """
        stream = "initialization" if step == 0 else "training"
        start = max(step - 1, 0) * self._samples_per_step + micro * self._batch_size
        rows = [
            self._row(stream, kind, start + place)
            for kind in range(len(self._caches))
            for place in range(self._batch_size)
        ]
        latents, noise, timesteps, kinds, prompts, names, masks = zip(*rows, strict=True)
        # An instance row counts 1 / batch, a class row w / batch: mean + w * mean.
        share = torch.tensor([1.0, self._prior_loss_weight]) / self._batch_size
        device = self.components.device
        return Batch(
            latents=tuple(row.to(device) for row in latents),
            noise=tuple(row.to(device) for row in noise),
            timesteps=torch.tensor(timesteps, device=device),
            text=self._text[list(prompts)].to(device),
            weights=share[list(kinds)].to(device),
            names=names,
            masks=tuple(None if mask is None else mask.to(device) for mask in masks),
        )

    def loi_batches(self, count: int) -> Iterator[Batch]:
        """Batches for locally optimal initialization, from a stream that training never uses.

        Args:
            count: how many.

        Yields:
            `batch(0, 0)`, `batch(0, 1)`, ...
        """
        for micro in range(count):
            yield self.batch(0, micro)

    def loss(self, batch: Batch) -> Tensor:
        """Weighted denoising error of one micro-batch.

        Args:
            batch: from `batch`.

        Returns:
            Scalar, fp32, differentiable.
        """
        return self.model_loss(self.network, batch)

    def model_loss(self, model: Any, batch: Batch) -> Tensor:
        """The same loss for an explicit U-Net, as `locally_optimal_init` wants it.

        Args:
            model: U-Net, bare or wrapped.
            batch: from `batch`.

        Returns:
            Scalar, fp32 (fp64 for an fp64 model), differentiable.
        """
        # Pictures of one size share a forward pass; the weights make the mean the same however they are grouped.
        parts = [self._group_loss(model, batch, rows) for rows in batch.rows_by_shape()]
        return torch.stack(parts).sum()

    def trial_batches(self) -> list[Batch]:
        """Batches of every shape that the U-Net can meet in training, to compile it for; they mean nothing else.

        Returns:
            One batch where all pictures have one size; else one of as many rows as a micro-batch, one of two rows and
            one of a single row for each size, which a compiler takes for different programs.
        """
        whole = len(self._caches) * self._batch_size
        sizes = sorted({size for pictures in self.concept.sets for size in pictures.sizes()})
        counts = sorted({whole, min(whole, 2), 1}, reverse=True) if len(sizes) > 1 else [whole]
        return [self._blank(size, rows) for rows in counts for size in sizes]

    def used_places(self, batch: Batch) -> None:
        """All that the U-Net sees counts as its input."""

    def describe(self, batch: Batch) -> str:
        """Name the files and timesteps of a batch, for a message about its loss."""
        pieces = zip(batch.names, batch.timesteps.tolist(), strict=True)
        return ", ".join(f"{name} at timestep {timestep}" for name, timestep in pieces)

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        """Draw the validation prompts with the model as it is now.

        Args:
            step: optimizer step, for the file names; 0 shows the base model.
            directory: gets `step-000000-0.png`, `step-000000-1.png`, ... and `step-000000.png`, a sheet with one
                row for each prompt.

        Returns:
            No scores.
        """
        prompts = [p for p in self._validation_prompts for _ in range(self._num_validation_images)]
        if not prompts:
            return {}
        seeds = [derive_seed(self._seed, "sample", i) for i in range(self._num_validation_images)]
        with self._as_shown(step):
            pictures = sample(
                self.components,
                prompts,
                seeds * len(self._validation_prompts),
                steps=self._inference_steps,
                guidance_scale=self._guidance_scale,
                batch_size=self._sample_batch_size,
            )
        directory.mkdir(parents=True, exist_ok=True)
        for number, picture in enumerate(pictures):
            save_png(picture, directory / f"step-{step:06d}-{number}.png")
        sheet = contact_sheet(pictures, columns=self._num_validation_images)
        save_png(sheet, directory / f"step-{step:06d}.png")
        return {}

    def _as_shown(self, step: int) -> AbstractContextManager[None]:
        """The model for samples: as it is in memory, or as a user of its file will have it."""
        if not self._preview_from_export:
            return nullcontext()
        if step == 0:  # nothing has changed, so there is nothing to save
            return adapter_off(self.components)
        facts = {"steps": str(step)}
        return drawn_from_export(self.components, lambda folder: self.save(folder, facts))

    def save(self, directory: Path, metadata: Mapping[str, str]) -> None:
        """Write the adapter for plain diffusers.

        Args:
            directory: gets `pytorch_lora_weights.safetensors`.
            metadata: added to the task's own facts in the header.
        """
        source = self.components.source
        own = {
            "dreamrie_version": _version(),
            "base_model": source.resolved,
            "base_model_requested": source.requested,
            "base_model_commit": source.commit or "",
            "prediction_type": self.components.prediction_type,
            "instance_prompt": self.concept.instance.prompt,
            "resolution": str(self.concept.resolution),
        }
        known = {**own, **self._facts, **metadata}
        save_diffusers_lora(directory, self.pairs, known, base=self.model)

    def _group_loss(self, model: Any, batch: Batch, rows: list[int]) -> Tensor:
        """What the rows of one size add to the loss of a micro-batch."""
        dtype, timesteps = self.components.dtype, batch.timesteps[rows]
        latents = torch.stack([batch.latents[row] for row in rows])
        noise = torch.stack([batch.noise[row] for row in rows])
        noisy = self.components.noise_scheduler.add_noise(latents, noise, timesteps)
        target = denoising_target(self.components, latents, noise, timesteps)
        output = model(
            noisy.to(dtype), timesteps, encoder_hidden_states=batch.text[rows].to(dtype)
        ).sample
        # Half-precision squares underflow, so the error is taken in fp32.
        error = output.to(torch.promote_types(output.dtype, torch.float32)) - target
        errors = picture_errors(error.square(), [batch.masks[row] for row in rows])
        return (errors * batch.weights[rows]).sum()

    def _blank(self, size: tuple[int, int], rows: int) -> Batch:
        """Empty pictures of one size."""
        device, scale = self.components.device, self.components.scale_factor
        channels = int(self.components.vae.config.latent_channels)
        latents = torch.zeros(rows, channels, size[0] // scale, size[1] // scale, device=device)
        return Batch(
            latents=tuple(latents),
            noise=tuple(latents),
            timesteps=torch.zeros(rows, dtype=torch.int64, device=device),
            text=self._text[[0] * rows].to(device),
            weights=torch.ones(rows, device=device),
            names=("blank",) * rows,
            masks=(None,) * rows,
        )

    def _row(
        self, stream: str, kind: int, position: int
    ) -> tuple[Tensor, Tensor, int, int, int, str, Tensor | None]:
        """One picture: latents, noise, timestep, kind (0 concept, 1 class), number of its prompt, name, mask."""
        pictures = self.concept.sets[kind]
        label = f"{stream}/{'concept' if kind == 0 else 'class'}"
        view = pictures.view_at(self._seed, label, position)
        posterior = self._caches[kind].posterior(view)
        generator = stream_generator(self._seed, f"{label}/noise", position)
        horizon = int(self.components.noise_scheduler.config.num_train_timesteps)
        timestep = int(torch.randint(horizon, (), generator=generator))
        noise = torch.randn(posterior.mean.shape, generator=generator)
        latents = posterior.sample(torch.randn(posterior.mean.shape, generator=generator))
        prompt = self._prompts.index(pictures.prompts[view.picture])
        mask = latent_mask(pictures.alpha(view), self.components.scale_factor)
        return latents, noise, timestep, kind, prompt, pictures.paths[view.picture].name, mask

    def _free_encoders(self) -> None:
        """Move what training no longer needs off the accelerator; sampling brings it back for a moment."""
        self.components.text_encoder.to("cpu")
        uncounted = [name for cache in self._caches for name in cache.uncounted]
        if not uncounted:
            self.components.vae.to("cpu")
            return
        _log.info(
            "random crops of pictures that are not square (%d, such as %s) cannot be cached, so the VAE stays and "
            "encodes them at every step: --center_crop or --aspect_buckets would free it",
            len(uncounted),
            uncounted[0],
        )


def denoising_target(
    components: Components, latents: Tensor, noise: Tensor, timesteps: Tensor
) -> Tensor:
    """What the U-Net has to predict: epsilon, or v = sqrt(a) * epsilon - sqrt(1 - a) * x0.

    Source: Salimans & Ho, arXiv:2202.00512, appendix D; a is the scheduler's `alphas_cumprod`.

    Args:
        components: say which of the two.
        latents: x0, (batch, channels, height, width).
        noise: epsilon, same shape.
        timesteps: (batch,).

    Returns:
        The target, same shape.
    """
    if components.prediction_type == "v_prediction":
        target: Tensor = components.noise_scheduler.get_velocity(latents, noise, timesteps)
        return target
    return noise


def picture_unit(components: Components) -> int:
    """Pixels that the sides of a training picture must be multiples of, so that the U-Net can halve its latents."""
    return int(components.scale_factor * 2 ** (len(components.unet.config.block_out_channels) - 1))


def check_resolution(components: Components, resolution: int) -> None:
    """Refuse a side that the U-Net cannot halve as often as it does; it would fail deep inside.

    Args:
        components: the model.
        resolution: side of the training squares, in pixels.

    Raises:
        ConfigError: it does not divide.
    """
    unit = picture_unit(components)
    if resolution % unit:
        raise ConfigError(
            f"--resolution {resolution} is not a multiple of {unit}, which this model needs. "
            f"It was trained on {components.resolution}."
        )


def _version() -> str:
    """Version of dreamrie, or "unknown" when run from a checkout that is not installed."""
    try:
        return version("dreamrie")
    except PackageNotFoundError:
        return "unknown"
