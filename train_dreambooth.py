"""Train a concept from a few pictures: read the settings, build the parts, call the trainer.

    python train_dreambooth.py --instance_data_dir FOLDER --instance_prompt "a photo of a sks dog"

`--help` lists every setting; `--dry-run` checks all of them, and every file, without training.
Exit code: 0 done, 2 something given cannot work, 1 the training failed, 130 stopped by Ctrl-C or SIGTERM.
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
from dreamrie.diffusion.prepare import check_request, class_pictures, explain, run_facts
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.errors import DreamrieError
from dreamrie.loi import locally_optimal_init
from dreamrie.lora import attach_lora
from dreamrie.optimizers import build_optimizer
from dreamrie.runlog import RunLog, check_output_dir, exit_code, start_logging
from dreamrie.trainer import LoopSettings, make_accelerator, sigterm_as_ctrl_c, train

logger = logging.getLogger("dreamrie.train_dreambooth")


def build_task(config: TrainConfig, device: torch.device, processes: int) -> DreamBoothTask:
    """Check every picture and setting, load the model, put adapters on its attention layers."""
    data, prior, checks, seed = config.data, config.prior, config.validation, config.schedule.seed
    check_output_dir(config.output.output_dir, config.output.report_to == "tensorboard")
    check_images(data.instance_data_dir)
    model, name = config.model, config.model.pretrained_model_name_or_path
    components = load_components(
        name, revision=model.revision, variant=model.variant, device=device
    )
    # What can be refused is refused before the class pictures, which may take minutes.
    generator, init = torch.Generator().manual_seed(seed), config.adapter.attach_init
    rank, unet = config.adapter.rank, components.unet
    pairs = attach_lora(unet, rank, ATTENTION_TARGETS, init=init, generator=generator)
    resolution = check_request(components, config)
    concept = ConceptSet(
        data.instance_data_dir,
        data.instance_prompt,
        resolution=resolution,
        center_crop=data.center_crop,
        random_flip=data.random_flip,
        class_images=class_pictures(components, config),
        class_prompt=prior.class_prompt,
    )
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
        sample_batch_size=prior.sample_batch_size,
    )


def start_adapter(config: TrainConfig, task: DreamBoothTask) -> tuple[Optimizer, str]:
    """Move the adapters to their start; returns their optimizer, and how the start went."""
    adapter, settings, summary = config.adapter, config.optimizer, str(config.adapter.init)
    if adapter.init == "loi":
        count, size = adapter.loi_batches, config.data.train_batch_size
        logger.info("LOI: gradient of %d batches of %d pictures ...", count, size)
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


def run(config: TrainConfig, command: Sequence[str]) -> bool:
    """Train, or only say what training would do; returns whether it came to its end."""
    accelerator = make_accelerator(config.schedule.mixed_precision)
    with accelerator.main_process_first():  # it makes the class pictures that the others find
        task = build_task(config, accelerator.device, accelerator.num_processes)
    config = config.with_resolution(task.concept.resolution)
    if config.run.dry_run:
        print(explain(config, task))
        return True
    facts = run_facts(config, task)
    optimizer, facts["initialization"] = start_adapter(config, task)
    folder = config.output.output_dir if accelerator.is_main_process else None
    board = config.output.logging_dir if config.output.report_to == "tensorboard" else None
    with RunLog(folder, config.schedule.max_train_steps, tensorboard_dir=board) as log:
        log.manifest(to_yaml(config), command, {"run": config.schedule.seed}, facts)
        result = train(task, optimizer, LoopSettings(**config.loop_values()), log, accelerator)
    if folder and result.saved:
        logger.info("%d steps in %.0f s; adapter in %s", result.steps, result.seconds, folder)
    return not result.interrupted


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    start_logging(verbose := is_verbose(argv))
    try:
        with sigterm_as_ctrl_c():
            return 0 if run(parse_config(argv), argv) else 130
    except (DreamrieError, KeyboardInterrupt) as error:
        return exit_code(error, verbose)


if __name__ == "__main__":
    sys.exit(main())
