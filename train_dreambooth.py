"""Train a concept from a few pictures: read the settings, build the parts, call the trainer.

    python train_dreambooth.py --instance_data_dir FOLDER --instance_prompt "a photo of a sks dog"

`--help` lists every setting; `--dry-run` checks all of them, and every file, without training.
Exit code: 0 done, 2 something given cannot work, 1 the training failed, 130 stopped by Ctrl-C.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

import torch
from torch.optim import Optimizer

from dreamrie.config import TrainConfig, is_verbose, parse_config, to_yaml
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.images import check_images
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.diffusion.prior import ensure_class_images, own_class_images
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.errors import DreamrieError
from dreamrie.loi import locally_optimal_init
from dreamrie.lora import attach_lora
from dreamrie.optimizers import build_optimizer, describe_optimizer, trained_numbers
from dreamrie.runlog import RunLog, check_output_dir, exit_code, start_logging
from dreamrie.trainer import LoopSettings, make_accelerator, train

logger = logging.getLogger("dreamrie.train_dreambooth")


def build_task(config: TrainConfig, device: torch.device, processes: int) -> DreamBoothTask:
    """Check every picture, load the model, put adapters on its attention layers."""
    data, prior, checks, seed = config.data, config.prior, config.validation, config.schedule.seed
    check_output_dir(config.output.output_dir, config.output.report_to == "tensorboard")
    check_images(data.instance_data_dir)
    model, name = config.model, config.model.pretrained_model_name_or_path
    components = load_components(
        name, revision=model.revision, variant=model.variant, device=device
    )
    class_images, folder, count = [], prior.class_data_dir, prior.num_class_images
    if prior.with_prior_preservation and config.run.dry_run:
        class_images = own_class_images(folder)[:count]
    elif prior.with_prior_preservation:
        size = prior.sample_batch_size
        class_images = ensure_class_images(
            components, prior.class_prompt, folder, count, seed=seed, batch_size=size
        )
    concept = ConceptSet(
        data.instance_data_dir,
        data.instance_prompt,
        resolution=data.resolution or components.resolution,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        class_images=class_images,
        class_prompt=prior.class_prompt,
    )
    generator, init = torch.Generator().manual_seed(seed), config.adapter.attach_init
    rank, unet = config.adapter.rank, components.unet
    pairs = attach_lora(unet, rank, ATTENTION_TARGETS, init=init, generator=generator)
    return DreamBoothTask(
        components,
        pairs,
        concept,
        batch_size=data.train_batch_size,
        seed=seed,
        samples_per_step=config.samples_per_step(processes),
        prior_loss_weight=prior.prior_loss_weight,
        gradient_checkpointing=config.schedule.gradient_checkpointing,
        validation_prompts=checks.validation_prompt,
        num_validation_images=checks.num_validation_images,
        inference_steps=checks.num_inference_steps,
        guidance_scale=checks.guidance_scale,
    )


def start_adapter(config: TrainConfig, task: DreamBoothTask) -> tuple[Optimizer, str]:
    """Move the adapters to their start; returns their optimizer, and how the start went."""
    adapter, settings, summary = config.adapter, config.optimizer, config.adapter.init
    if adapter.init == "loi":
        summary = locally_optimal_init(
            task.model,
            task.pairs,
            task.model_loss,
            task.loi_batches(adapter.loi_batches),
            alpha=adapter.start_scale,
            estimator=adapter.loi_estimator,
            lr=settings.spectral_step,
            generator=torch.Generator().manual_seed(config.schedule.seed),
        ).summary()
    lr, decay, beta = settings.learning_rate, settings.weight_decay, settings.momentum
    name = settings.optimizer
    return build_optimizer(name, task.pairs, lr=lr, weight_decay=decay, momentum=beta), summary


def explain(config: TrainConfig, task: DreamBoothTask) -> str:
    """What a run with these settings would do, as YAML with remarks."""
    components, pictures = task.components, len(task.concept.instance)
    steps, samples = config.schedule.max_train_steps, config.samples_per_step()
    name = config.optimizer.optimizer
    lines = [f"  {pair.name} ({pair.out} x {pair.in_}), rank {pair.rank}" for pair in task.pairs]
    lines += [
        f"base model: {components.source.resolved}, {components.prediction_type}",
        f"adapters: {len(task.pairs)} layers, {trained_numbers(name, task.pairs):,} trainable parameters",
        f"optimizer: {describe_optimizer(name, task.pairs)}",
        f"pictures: {pictures}, all readable, used at {task.concept.resolution} px",
        f"length: {steps} steps of {samples} pictures = {steps * samples / pictures:.1f} epochs",
    ]
    return to_yaml(config) + "\n" + "\n".join(f"# {line}" for line in lines)


def run(config: TrainConfig, command: Sequence[str]) -> bool:
    """Train, or only say what training would do; returns whether it came to its end."""
    accelerator = make_accelerator(config.schedule.mixed_precision)
    with accelerator.main_process_first():  # it makes the class pictures that the others find
        task = build_task(config, accelerator.device, accelerator.num_processes)
    if config.run.dry_run:
        print(explain(config, task))
        return True
    method = describe_optimizer(config.optimizer.optimizer, task.pairs)
    facts = {"base_model": vars(task.components.source), "optimizer": method}
    optimizer, facts["initialization"] = start_adapter(config, task)
    folder = config.output.output_dir if accelerator.is_main_process else None
    board = config.output.logging_dir if config.output.report_to == "tensorboard" else None
    with RunLog(folder, config.schedule.max_train_steps, tensorboard_dir=board) as log:
        log.manifest(to_yaml(config), command, {"run": config.schedule.seed}, facts)
        result = train(task, optimizer, LoopSettings(**config.loop_values()), log, accelerator)
    if folder:
        logger.info("%d steps in %.0f s; adapter in %s", result.steps, result.seconds, folder)
    return not result.interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    start_logging(verbose := is_verbose(argv))
    try:
        return 0 if run(parse_config(argv), argv) else 130
    except (DreamrieError, KeyboardInterrupt) as error:
        return exit_code(error, verbose)


if __name__ == "__main__":
    sys.exit(main())
