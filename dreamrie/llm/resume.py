"""Going on with the training of a language model: find its checkpoint, and say what a checkpoint depends on."""

from __future__ import annotations

import hashlib
import json
import platform

import torch

from dreamrie.checkpoint import Checkpoint, find_checkpoint
from dreamrie.config import LlmConfig, check_same_settings, to_yaml, with_earlier_warmup
from dreamrie.errors import CheckpointError
from dreamrie.llm.task import CausalLmTask
from dreamrie.lora.fingerprint import base_fingerprint
from dreamrie.run_folder import check_output_dir
from dreamrie.runlog import package_versions
from dreamrie.trainer import Checkpoints
from dreamrie.trainer.saving import SETTINGS


def find_resume(config: LlmConfig) -> tuple[Checkpoint | None, LlmConfig]:
    """Read the checkpoint that a command names, and compare its settings with those of the command.

    Args:
        config: resolved settings, those that wait for the model filled in.

    Returns:
        The checkpoint, None if the training starts from the beginning; and the settings, see `with_earlier_warmup`.

    Raises:
        CheckpointError: there is none, or none that can be read, or it is longer than the training.
        ConfigError: a setting differs that would make another training of it.
    """
    wanted = config.run.resume_from_checkpoint
    if wanted is None:
        return None, config
    check_output_dir(config.output.output_dir)
    found = find_checkpoint(config.output.output_dir, wanted)
    saved, where = str(found.state["facts"][SETTINGS]), str(found.path)
    config = with_earlier_warmup(saved, config, where)
    check_same_settings(saved, config, where)
    if found.step > config.schedule.max_train_steps:
        raise CheckpointError(
            f"{found.path.name} is beyond the end of the training, which has {config.schedule.max_train_steps} steps\n"
            f"  where: {found.path}\n"
            "  what to do: raise --max_train_steps, or give an earlier checkpoint"
        )
    return found, config


def checkpoint_plan(
    config: LlmConfig, task: CausalLmTask, processes: int, resume: Checkpoint | None
) -> Checkpoints:
    """When to write checkpoints, and what they depend on.

    Args:
        config: resolved settings.
        task: ready to train.
        processes: of this training.
        resume: from `find_resume`.

    Returns:
        For `dreamrie.trainer.train`.
    """
    output = config.output
    if not output.checkpointing_steps and resume is None:
        return Checkpoints(every=None)
    versions = package_versions()
    facts = {
        SETTINGS: to_yaml(config),
        "the content of the examples": examples_fingerprint(task),
        "the weights of the base model": base_fingerprint(task.model)[:16],
        "the number of processes": str(processes),
        "the device": task.device.type,
        "versions": ", ".join(
            f"{name} {versions[name]}" for name in ("torch", "transformers", "peft")
        ),
        "threads": f"{torch.get_num_threads()} on {platform.machine()}",
    }
    return Checkpoints(
        every=output.checkpointing_steps or None,
        limit=output.checkpoints_total_limit or None,
        facts=facts,
        resume=resume,
    )


def examples_fingerprint(task: CausalLmTask) -> str:
    """Digest of what is trained on, wherever it lies: the tokens of prompts and answers.

    Args:
        task: any.

    Returns:
        The number of examples and 16 hexadecimal digits.
    """
    digest = hashlib.sha256()
    for example in task.examples:
        digest.update(json.dumps([example.prompt, example.answer]).encode())
    return f"{len(task.examples)} rows, {digest.hexdigest()[:16]}"
