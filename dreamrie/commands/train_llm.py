"""Fine-tune a language model with an adapter; the result is a PEFT folder.

python -m dreamrie train-llm --model MODEL --data FILES [settings]
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from dreamrie.config import LlmConfig, add_settings, read_config, to_yaml
from dreamrie.llm.card import hand_over
from dreamrie.llm.prepare import build_task, explain, read_request, run_facts
from dreamrie.llm.rehearsal import rehearse
from dreamrie.llm.resume import checkpoint_plan
from dreamrie.llm.scorer import AccuracyScorer
from dreamrie.run_folder import check_not_in_use
from dreamrie.runlog import RunLog
from dreamrie.trainer import LoopSettings, make_accelerator, sigterm_as_ctrl_c, train
from dreamrie.trainer.resuming import find_resume
from dreamrie.trainer.spreading import spread_base
from dreamrie.trainer.starting import start_adapter

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
    facts = run_facts(request, task)
    said = explain(request, task) if config.run.dry_run else ""
    spread_base(accelerator, task, config)
    if config.run.dry_run:
        found = rehearse(config, request, task, accelerator, resume.step if resume else 0)
        if accelerator.is_main_process:
            sys.stdout.write(f"{said}\n{found}\n")
        return True
    optimizer, facts["initialization"] = start_adapter(config, task)
    folder = config.output.output_dir if accelerator.is_main_process else None
    board = config.output.logging_dir if config.output.report_to == "tensorboard" else None
    records = None if resume is None else resume.state["records"]
    steps = config.schedule.max_train_steps
    plan = checkpoint_plan(config, task, accelerator.num_processes, resume, request.held_out)
    scorer = None
    if folder and request.held_out:
        scorer = AccuracyScorer(task.model, request.encoder, request.held_out)
    with RunLog(folder, steps, tensorboard_dir=board, resume=records) as log:
        log.manifest(to_yaml(config), command, {"run": config.schedule.seed}, facts)
        loop = LoopSettings(**config.loop_values())
        result = train(task, optimizer, loop, log, accelerator, scorer, plan)
    if folder and result.saved:
        sys.stdout.write(result.summary(folder) + "\n")
        hand_over(folder, config.output, complete=not result.interrupted)
    return not result.interrupted
