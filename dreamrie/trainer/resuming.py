"""Going on with a training: find its checkpoint, and say what a checkpoint depends on. The same for every task."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import torch

from dreamrie.checkpoint import Checkpoint, find_checkpoint
from dreamrie.config import check_same_settings, to_yaml, with_earlier_warmup
from dreamrie.config.reading import AnyConfig
from dreamrie.errors import CheckpointError
from dreamrie.lora.fingerprint import base_fingerprint
from dreamrie.run_folder import check_output_dir
from dreamrie.runlog import package_versions
from dreamrie.trainer.saving import SETTINGS, Checkpoints


def find_resume(config: AnyConfig) -> tuple[Checkpoint | None, AnyConfig]:
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


def plan_checkpoints(
    config: AnyConfig,
    model: torch.nn.Module,
    contents: Callable[[], dict[str, str]],
    *,
    device: torch.device,
    processes: int,
    libraries: Sequence[str],
    resume: Checkpoint | None,
) -> Checkpoints:
    """When to write checkpoints, and what they depend on.

    Args:
        config: resolved settings.
        model: with adapters; the weights of its base are fingerprinted.
        contents: digests of what is trained on, by what they are of; not asked for if there are no checkpoints.
        device: of the training.
        processes: of the training.
        libraries: whose versions count.
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
        **contents(),
        "the weights of the base model": base_fingerprint(model)[:16],
        "the number of processes": str(processes),
        "the device": device.type,
        "versions": ", ".join(f"{name} {versions[name]}" for name in libraries),
        "threads": f"{torch.get_num_threads()} on {platform.machine()}",
    }
    return Checkpoints(
        every=output.checkpointing_steps or None,
        limit=output.checkpoints_total_limit or None,
        facts=facts,
        resume=resume,
    )
