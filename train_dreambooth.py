"""Train a concept from a few pictures: read the settings, build the parts, call the trainer.

    python train_dreambooth.py --instance_data_dir examples/concepts/NAME --instance_prompt "a photo of a sks NAME"

`--help` lists every setting, `--dry-run` checks them without training.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import torch

from dreamrie import config as settings
from dreamrie import runlog, trainer
from dreamrie.config import TrainConfig
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, Components, load_components
from dreamrie.diffusion.prior import ensure_class_images
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.lora import attach_lora
from dreamrie.optimizers import build_optimizer


def build_concept(config: TrainConfig, components: Components) -> ConceptSet:
    """Open and check every picture; make missing class pictures (not in a dry run)."""
    data, prior = config.data, config.prior
    if prior.with_prior_preservation and not config.dry_run:
        ensure_class_images(
            components,
            prior.class_prompt,
            prior.class_data_dir,
            prior.num_class_images,
            seed=config.seed,
            batch_size=prior.sample_batch_size,
        )
    return ConceptSet(
        data.instance_data_dir,
        data.instance_prompt,
        resolution=data.resolution or components.resolution,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        class_dir=prior.class_data_dir if prior.with_prior_preservation else None,
        class_prompt=prior.class_prompt,
    )


def build_task(config: TrainConfig, components: Components, concept: ConceptSet) -> DreamBoothTask:
    """Attach the adapters to the U-Net and put it together with the pictures."""
    generator = torch.Generator().manual_seed(config.seed)
    pairs = attach_lora(
        components.unet, config.adapter.rank, ATTENTION_TARGETS, init=config.adapter.attach_init, generator=generator
    )
    return DreamBoothTask(
        components,
        pairs,
        concept,
        batch_size=config.data.train_batch_size,
        seed=config.seed,
        prior_loss_weight=config.prior.prior_loss_weight,
        gradient_checkpointing=config.schedule.gradient_checkpointing,
        validation_prompts=config.validation.validation_prompt,
        num_validation_images=config.validation.num_validation_images,
        inference_steps=config.validation.num_inference_steps,
        guidance_scale=config.validation.guidance_scale,
    )
