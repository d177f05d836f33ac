"""Start and optimizer of a task, from its settings. The same for every task."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from dreamrie.config.reading import AnyConfig
from dreamrie.init_table import INITS
from dreamrie.lora import start_pairs
from dreamrie.lora.apart import avoided
from dreamrie.lora.inits import Data, Loi
from dreamrie.optimizers import build_optimizer
from dreamrie.team import Team
from dreamrie.trainer.task import Task

_log = logging.getLogger(__name__)


class StartingTask(Task, Protocol):
    """What a start from batches needs to know of a task, beside what the loop does."""

    def loi_batches(self, count: int) -> Iterator[Any]:
        """Batches of a stream that training never uses."""
        ...

    def model_loss(self, model: Any, batch: Any) -> Tensor:
        """The training loss for an explicit model."""
        ...

    def used_places(self, batch: Any) -> Tensor | None:
        """(rows, length) of bool, the places of the model's input that the loss depends on; None: all."""
        ...


def start_adapter(config: AnyConfig, task: StartingTask) -> tuple[Optimizer, str]:
    """Move the adapters of a task to their start.

    Args:
        config: resolved settings.
        task: with adapters of the layout that the start needs.

    Returns:
        Their optimizer, and how the start went.
    """
    said, settings = _start(config, task), config.optimizer
    return build_optimizer(settings.optimizer, task.pairs, **settings.values), said


def _start(config: AnyConfig, task: StartingTask) -> str:
    """A start without batches was written when the adapters were attached, and a training that goes on has its own."""
    adapter, name = config.adapter, str(config.adapter.init)
    if INITS[name].needs != "batches" or config.run.resume_from_checkpoint:
        return name
    count, size = adapter.batches, config.data.train_batch_size
    _log.info("start %s: from %d batches of %d ...", name, count, size)
    model: nn.Module = task.model
    return start_pairs(
        name,
        model,
        task.pairs,
        Data(task.model_loss, task.loi_batches(count), task.used_places, Team.here()),
        loi=Loi(
            adapter.start_scale,
            adapter.loi_estimator,
            config.optimizer.step_of_factors,
            avoided(task.pairs),
        ),
        generator=torch.Generator().manual_seed(config.schedule.seed),
    )
