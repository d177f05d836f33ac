"""Time and memory of a training of a concept, for its dry run."""

from __future__ import annotations

from typing import Any

from dreamrie.config import TrainConfig
from dreamrie.diffusion.pipeline import sample
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.trainer import LoopSettings
from dreamrie.trainer.compiling import compile_network
from dreamrie.trainer.rehearsal import (
    MORE,
    Estimate,
    peak_memory,
    start_seconds,
    step_seconds,
    timed,
    times,
    told,
)


def rehearse(config: TrainConfig, task: DreamBoothTask, accelerator: Any, done: int = 0) -> str:
    """Do a little of everything that takes long: initialization, steps, pictures.

    Args:
        config: settings of the run.
        task: made from them; its adapter is not what it was afterwards.
        accelerator: from `make_accelerator`.
        done: steps of the checkpoint to go on from.

    Returns:
        Lines for the end of `explain`.
    """
    return told(lambda: _estimate(config, task, accelerator, done))


def _estimate(config: TrainConfig, task: DreamBoothTask, accelerator: Any, done: int) -> Estimate:
    """Try each part and multiply out."""
    prepare, optimizer = start_seconds(config, task, [1.0] * MORE, config.adapter.batches)
    settings = LoopSettings(**config.loop_values())
    gain = None
    if config.model.torch_compile:
        gain = compile_network(task, accelerator, **config.compile_values(done))
    steps = (settings.max_steps - done) * step_seconds(task, optimizer, settings, accelerator)
    compiling = gain.compiling if gain else 0.0
    return Estimate(prepare, steps, _looks(config, task, done), *peak_memory(), compiling)


def _looks(config: TrainConfig, task: DreamBoothTask, done: int) -> float:
    """Seconds for pictures: one batch is drawn with two numbers of steps, the rest is multiplied out."""
    steps, shown, scored = config.schedule.max_train_steps, config.validation, config.scores
    drawings = []
    if shown.validation_prompt:
        pictures = len(shown.validation_prompt) * shown.num_validation_images
        drawings.append(
            (pictures, shown.num_inference_steps, times(steps, shown.validation_steps, done))
        )
    if scored.score_steps:
        drawings.append(
            (
                scored.score_images,
                int(scored.score_inference_steps or 0),
                times(steps, scored.score_steps, done),
            )
        )
    if not drawings:
        return 0.0
    return sum(
        often * _drawing(config, task, count, inference) for count, inference, often in drawings
    )


def _drawing(config: TrainConfig, task: DreamBoothTask, count: int, inference: int) -> float:
    """Seconds for `count` pictures of `inference` steps."""
    batch = min(count, config.task_values(1)["sample_batch_size"])
    prompts = [config.data.instance_prompt] * batch
    guidance = float(config.validation.guidance_scale or 1.0)

    def seconds(steps: int) -> float:
        return timed(
            lambda: sample(
                task.components,
                prompts,
                range(batch),
                steps=steps,
                guidance_scale=guidance,
                batch_size=batch,
            )
        )

    seconds(1)
    short, long = seconds(1), seconds(3)
    each = max(0.0, long - short) / 2
    return (short + (inference - 1) * each) * count / batch
