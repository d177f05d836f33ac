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

from dreamrie.config import TrainConfig, is_verbose, parse_config, to_yaml
from dreamrie.diffusion.apart import read_others
from dreamrie.diffusion.components import PRECISIONS, load_components
from dreamrie.diffusion.data import ConceptSet
from dreamrie.diffusion.hub import hand_over
from dreamrie.diffusion.images import check_images
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.diffusion.prepare import (
    check_request,
    class_pictures,
    explain,
    missing_for_scores,
    run_facts,
)
from dreamrie.diffusion.rehearsal import rehearse
from dreamrie.diffusion.resume import checkpoint_plan
from dreamrie.diffusion.task import DreamBoothTask, picture_unit
from dreamrie.errors import ConfigError, DreamrieError
from dreamrie.lora import attach_lora
from dreamrie.lora.apart import keep_apart
from dreamrie.run_folder import check_not_in_use, check_output_dir
from dreamrie.runlog import RunLog, check_records, exit_code, start_logging
from dreamrie.trainer import LoopSettings, Scorer, make_accelerator, sigterm_as_ctrl_c, train
from dreamrie.trainer.compiling import compile_network
from dreamrie.trainer.resuming import find_resume
from dreamrie.trainer.spreading import spread_base
from dreamrie.trainer.starting import start_adapter

logger = logging.getLogger("dreamrie.train_dreambooth")


def build_task(config: TrainConfig, device: torch.device, processes: int) -> DreamBoothTask:
    """Check every picture and setting, load the model, put adapters on its attention layers."""
    data, prior, seed = config.data, config.prior, config.schedule.seed
    check_output_dir(config.output.output_dir)
    check_records(config.output.report_to == "tensorboard")
    check_images(data.instance_data_dir)
    model, name = config.model, config.model.pretrained_model_name_or_path
    dtype, origin = PRECISIONS[model.base_precision], (model.revision, model.variant)
    components = load_components(name, *origin, dtype=dtype, device=device)
    # What can be refused is refused before the class pictures, which may take minutes.
    generator, unet = torch.Generator().manual_seed(seed), components.unet
    others = read_others(components, config.adapter.other_adapters)
    layout = config.adapter.layout
    pairs = attach_lora(unet, target_modules=ATTENTION_TARGETS, generator=generator, **layout)
    keep_apart(pairs, others)
    resolution = check_request(components, config)
    concept = ConceptSet(
        data.instance_data_dir,
        data.instance_prompt,
        resolution=resolution,
        class_images=lambda: class_pictures(components, config),
        class_prompt=prior.class_prompt,
        **config.picture_values(picture_unit(components)),
    )
    return DreamBoothTask(components, pairs, concept, **config.task_values(processes))


def make_scorer(config: TrainConfig, task: DreamBoothTask, is_main: bool) -> Scorer | None:
    """Scores on the way, if they are wanted; their networks belong to the checkout, not to the package."""
    if not (config.scores.score_steps and is_main):
        return None
    try:
        from eval.training import make_scorer as make
    except ModuleNotFoundError as error:
        raise ConfigError(missing_for_scores(str(error.name))) from error
    return make(config, task.components, config.output.output_dir)


def run(config: TrainConfig, command: Sequence[str]) -> bool:
    """Train, or only say what training would do; returns whether it came to its end."""
    resume, config = find_resume(config)
    accelerator = make_accelerator(config.schedule.mixed_precision)
    if accelerator.is_main_process:
        check_not_in_use(config.output.output_dir)
    with accelerator.main_process_first():  # it makes the class pictures that the others find
        task = build_task(config, accelerator.device, accelerator.num_processes)
    config = config.with_resolution(task.concept.resolution)
    done = resume.step if resume else 0
    if config.run.dry_run:
        make_scorer(config, task, is_main=True)
        said = explain(config, task)
        spread_base(accelerator, task, config)
        accelerator.print(said, rehearse(config, task, accelerator, done), sep="\n")
        return True
    scorer, facts = make_scorer(config, task, accelerator.is_main_process), run_facts(config, task)
    spread_base(accelerator, task, config)
    optimizer, facts["initialization"] = start_adapter(config, task)
    if config.model.torch_compile:
        compile_network(task, accelerator, **config.compile_values(done))
    folder = config.output.output_dir if accelerator.is_main_process else None
    board = config.output.logging_dir if config.output.report_to == "tensorboard" else None
    records, steps = resume and resume.state["records"], config.schedule.max_train_steps
    plan = checkpoint_plan(config, task, accelerator.num_processes, resume)
    with RunLog(folder, steps, tensorboard_dir=board, resume=records) as log:
        log.manifest(to_yaml(config), command, {"run": config.schedule.seed}, facts)
        loop = LoopSettings(**config.loop_values())
        result = train(task, optimizer, loop, log, accelerator, scorer, plan)
    if folder and result.saved:
        logger.info("%s", result.summary(folder))
        hand_over(folder, config.output, complete=not result.interrupted)
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
