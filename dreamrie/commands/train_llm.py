"""Fine-tune a language model with an adapter; the result is a PEFT folder.

python -m dreamrie train-llm --model MODEL --data FILES [settings]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch.optim import Optimizer

from dreamrie.config import LlmConfig, add_settings, read_config, to_yaml
from dreamrie.llm.prepare import build_task, explain, read_request, run_facts
from dreamrie.llm.resume import checkpoint_plan
from dreamrie.llm.task import CausalLmTask
from dreamrie.loi import locally_optimal_init
from dreamrie.optimizers import build_optimizer
from dreamrie.run_folder import check_not_in_use
from dreamrie.runlog import RunLog
from dreamrie.trainer import LoopSettings, make_accelerator, sigterm_as_ctrl_c, train
from dreamrie.trainer.resuming import find_resume

HELP = "fine-tune a language model on answers; writes a PEFT adapter"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's flags.

    Args:
        parser: of the command, which has --verbose already.
    """
    add_settings(parser, LlmConfig, without=("verbose",))


def run(options: argparse.Namespace) -> int:
    """Train, or only say what training would do.

    Args:
        options: the flags that were given.

    Returns:
        0 done, 130 stopped by a signal.
    """
    given: dict[str, Any] = {
        name: value for name, value in vars(options).items() if name not in {"command", "run"}
    }
    with sigterm_as_ctrl_c():
        return 0 if train_with(read_config(LlmConfig, given), sys.argv[1:]) else 130


def start_adapter(config: LlmConfig, task: CausalLmTask) -> tuple[Optimizer, str]:
    """Move the adapters to their start.

    Args:
        config: resolved settings.
        task: with adapters attached.

    Returns:
        Their optimizer, and how the start went.
    """
    adapter, settings, summary = config.adapter, config.optimizer, str(config.adapter.init)
    if adapter.init == "loi" and not config.run.resume_from_checkpoint:
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
    return build_optimizer(
        settings.optimizer,
        task.pairs,
        lr=settings.learning_rate or 0.0,
        weight_decay=settings.weight_decay,
        momentum=settings.momentum,
    ), summary


def train_with(config: LlmConfig, command: Sequence[str]) -> bool:
    """Train with settings that were read.

    Args:
        config: resolved settings.
        command: arguments of the program, for the records.

    Returns:
        Whether it came to its end.
    """
    accelerator = make_accelerator(config.schedule.mixed_precision)
    if accelerator.is_main_process:
        check_not_in_use(config.output.output_dir)
    request = read_request(config, accelerator.device)
    resume, config = find_resume(request.config)
    task = build_task(request, accelerator.num_processes)
    if config.run.dry_run:
        sys.stdout.write(explain(request, task) + "\n")
        return True
    facts = run_facts(request, task)
    optimizer, facts["initialization"] = start_adapter(config, task)
    folder = config.output.output_dir if accelerator.is_main_process else None
    board = config.output.logging_dir if config.output.report_to == "tensorboard" else None
    records = None if resume is None else resume.state["records"]
    steps = config.schedule.max_train_steps
    plan = checkpoint_plan(config, task, accelerator.num_processes, resume)
    with RunLog(folder, steps, tensorboard_dir=board, resume=records) as log:
        log.manifest(to_yaml(config), command, {"run": config.schedule.seed}, facts)
        loop = LoopSettings(**config.loop_values())
        result = train(task, optimizer, loop, log, accelerator, None, plan)
    if folder and result.saved:
        sys.stdout.write(result.summary(folder) + "\n")
    return not result.interrupted
