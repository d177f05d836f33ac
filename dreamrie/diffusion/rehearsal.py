"""Time and memory of a training of a concept, for its dry run."""

from __future__ import annotations

from typing import Any

from torch.optim import Optimizer

from dreamrie.config import TrainConfig
from dreamrie.diffusion.pipeline import sample
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.errors import DreamrieError
from dreamrie.init_table import INITS
from dreamrie.trainer import LoopSettings
from dreamrie.trainer.compiling import compile_network
from dreamrie.trainer.rehearsal import Estimate, peak_memory, quietly, step_seconds, timed
from dreamrie.trainer.starting import start_adapter

# Batches of the two short initializations: their difference is the price of a batch, the rest that of all SVDs.
FEW, MORE = 1, 3


def rehearse(config: TrainConfig, task: DreamBoothTask, accelerator: Any) -> str:
    """Do a little of everything that takes long: initialization, steps, pictures.

    Args:
        config: settings of the run.
        task: made from them; its adapter is not what it was afterwards.
        accelerator: from `make_accelerator`.

    Returns:
        Lines for the end of `explain`.
    """
    try:
        with quietly():
            found = _estimate(config, task, accelerator)
    except DreamrieError as error:
        reason = str(error).splitlines()[0]
        return f"# time and memory: not estimated, because a short try failed: {reason}"
    return "\n".join(f"# {line}" for line in found.describe())


def _estimate(config: TrainConfig, task: DreamBoothTask, accelerator: Any) -> Estimate:
    """Try each part and multiply out."""
    optimizers: list[Optimizer] = []

    def start(count: int) -> float:
        adapter = config.adapter.model_copy(update={"loi_batches": count})
        short = config.model_copy(update={"adapter": adapter})
        return timed(lambda: optimizers.append(start_adapter(short, task)[0]))

    prepare, few = 0.0, start(FEW)
    if INITS[str(config.adapter.init)].needs == "batches" and not config.run.resume_from_checkpoint:
        each = max(0.0, start(MORE) - few) / (MORE - FEW)
        prepare = few + (config.adapter.loi_batches - FEW) * each
    settings = LoopSettings(**config.loop_values())
    gain = None
    if config.model.torch_compile:
        gain = compile_network(task, accelerator, **config.compile_values(0))
    steps = step_seconds(task, optimizers[-1], settings, accelerator) * settings.max_steps
    compiling = gain.compiling if gain else 0.0
    return Estimate(prepare, steps, _looks(config, task), *peak_memory(), compiling)


def _looks(config: TrainConfig, task: DreamBoothTask) -> float:
    """Seconds for pictures: one batch is drawn with two numbers of steps, the rest is multiplied out."""
    steps, shown, scored = config.schedule.max_train_steps, config.validation, config.scores
    drawings = []
    if shown.validation_prompt:
        pictures = len(shown.validation_prompt) * shown.num_validation_images
        drawings.append(
            (pictures, shown.num_inference_steps, _times(steps, shown.validation_steps))
        )
    if scored.score_steps:
        drawings.append(
            (
                scored.score_images,
                int(scored.score_inference_steps or 0),
                _times(steps, scored.score_steps),
            )
        )
    if not drawings:
        return 0.0
    return sum(
        times * _drawing(config, task, count, inference) for count, inference, times in drawings
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


def _times(steps: int, every: int) -> int:
    """How often something happens that happens before training, every so many steps, and at the end."""
    return 1 + steps // every + (1 if steps % every else 0)
