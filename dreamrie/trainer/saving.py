"""What a checkpoint of a training holds, when it is written, and how a training goes on from it.

Batches, noise and dropout are pure functions of (seed, step, micro-batch), and the learning rate one of the step: the
number of steps is the whole state of sampler, schedule and random streams. The rest is the adapter with its anchor, the
optimizer, the loss scale of fp16, the scorer, counters, and how long the records were.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from dreamrie.checkpoint import (
    Checkpoint,
    check_space,
    list_checkpoints,
    remove_old_checkpoints,
    write_checkpoint,
)
from dreamrie.errors import CheckpointError, ConfigError, NumericalError
from dreamrie.runlog import RunLog
from dreamrie.team import Team
from dreamrie.trainer.scoring import Scorer, Verdict
from dreamrie.trainer.task import Task

logger = logging.getLogger(__name__)

# Facts that change no step on their own, but may change its last bits.
_MERELY_WARNED = frozenset({"versions", "threads"})
# A text of its own, compared setting by setting before the model is loaded.
SETTINGS = "settings"


@dataclass
class Progress:
    """Counters of a training.

    Attributes:
        step: steps taken, skipped ones included. skipped: those left out; skips_in_a_row: at this moment.
        last_loss: mean loss of the last step, NaN if there was none.
        seconds, scoring_seconds: spent in steps, and in scorings.
        scored_until: step of the last scoring.
        owes_look: a stop left out the samples or scores that belong behind this step; who goes on makes them first.
    """

    step: int = 0
    skipped: int = 0
    skips_in_a_row: int = 0
    last_loss: float = math.nan
    seconds: float = 0.0
    scoring_seconds: float = 0.0
    scored_until: int = 0
    owes_look: bool = False

    @property
    def moved(self) -> bool:
        """Whether at least one step was not skipped."""
        return self.step > self.skipped


@dataclass(frozen=True)
class Checkpoints:
    """When to write, and where to go on.

    Attributes:
        every: steps between two; one more is written when stopped and at the end.
        limit: how many to keep; None: all.
        facts: what the run depends on beside the loop's own state: settings, examples, base model. Going on needs the
            same, except for "versions" and "threads", which are warned about.
        resume: checkpoint to go on from, of a run with the same settings.
    """

    every: int | None
    limit: int | None = None
    facts: Mapping[str, str] = field(default_factory=dict)
    resume: Checkpoint | None = None


class Saver:
    """Puts the state of a training into checkpoints, and back.

    Args:
        task, optimizer, accelerator, log, scorer: of the training.
        plan: see there.
    """

    def __init__(
        self,
        task: Task,
        optimizer: Optimizer,
        accelerator: Accelerator,
        log: RunLog,
        scorer: Scorer | None,
        plan: Checkpoints,
    ) -> None:
        self.task, self.optimizer, self.accelerator = task, optimizer, accelerator
        self.log, self.scorer, self.plan = log, scorer, plan

    def is_due(self, step: int, last: bool) -> bool:
        """Whether a checkpoint belongs after this step."""
        return self.plan.every is not None and step > 0 and (step % self.plan.every == 0 or last)

    def state(self, progress: Progress, verdict: Verdict | None) -> dict[str, Any]:
        """Everything that the next step depends on."""
        scaler, loss = self.accelerator.scaler, progress.last_loss
        counters = dataclasses.asdict(progress)
        # JSON has no NaN.
        counters["last_loss"] = loss if math.isfinite(loss) else None
        return {
            "progress": counters,
            "adapter": {pair.name: list(pair.parameters) for pair in self.task.pairs},
            "optimizer": self.optimizer.state_dict(),
            "loss_scale": None if scaler is None else scaler.state_dict(),
            "scorer": None if self.scorer is None else self.scorer.state(),
            "verdict": None if verdict is None else dataclasses.asdict(verdict),
            "records": self.log.positions(),
            "facts": dict(self.plan.facts),
        }

    def check_space(self) -> None:
        """Refuse a disk without room for all checkpoints before the first step, not after hours."""
        if self.plan.every is not None and self.log.output_dir is not None:
            # The newest is there before the oldest goes.
            copies = 1 + (self.plan.limit or 2)
            check_space(self.log.output_dir, self.state(Progress(), None), copies)

    def write(self, progress: Progress, verdict: Verdict | None) -> bool:
        """Write a checkpoint; a disk that is full now may have room at the next one, so training goes on.

        Args:
            progress: counters after the step.
            verdict: of the last scoring.

        Returns:
            Whether it is there, the same on all processes.
        """
        folder, written = self.log.output_dir, True
        if folder is not None:
            try:
                write_checkpoint(folder, progress.step, self.state(progress, verdict))
                remove_old_checkpoints(folder, progress.step, self.plan.limit)
            except (CheckpointError, NumericalError) as error:
                written, known = False, list_checkpoints(folder)
                kept = (
                    f"the newest checkpoint is {known[-1].name}"
                    if known
                    else "without a checkpoint so far"
                )
                failure = f"{error}\n  training goes on; {kept}"
                logger.error(failure)  # noqa: TRY400  as every message
        # All must know, or one of them writes once more at a stop while the others do not.
        return Team.here().total(int(not written), self.accelerator.device) == 0

    def restore(self, checkpoint: Checkpoint) -> tuple[Progress, Verdict | None]:
        """Put adapter, optimizer, loss scale and scorer into the state of a checkpoint.

        Args:
            checkpoint: of a run with the same settings.

        Returns:
            Counters, and the verdict of the last scoring.

        Raises:
            CheckpointError: it is of other examples, another base model or other layers; nothing was changed.
        """
        state = checkpoint.state
        self._check_facts(checkpoint)
        saved = state["adapter"]
        shapes = {pair.name: [part.shape for part in pair.parameters] for pair in self.task.pairs}
        if shapes != {name: [part.shape for part in parts] for name, parts in saved.items()}:
            raise CheckpointError(
                f"{checkpoint.path.name} is of an adapter with other layers or ranks."
            )
        try:
            self.optimizer.load_state_dict(state["optimizer"])
        except (ConfigError, ValueError, KeyError) as error:
            raise CheckpointError(
                f"{checkpoint.path.name} is of another optimizer: {error}"
            ) from error
        with torch.no_grad():
            for pair in self.task.pairs:
                for parameter, values in zip(pair.parameters, saved[pair.name], strict=True):
                    parameter.copy_(values)
        if self.accelerator.scaler is not None and state["loss_scale"]:
            self.accelerator.scaler.load_state_dict(state["loss_scale"])
        if self.scorer is not None and state["scorer"] is not None:
            self.scorer.restore(state["scorer"])
        counters = dict(state["progress"])
        if counters["last_loss"] is None:
            counters["last_loss"] = math.nan
        verdict = state["verdict"]
        logger.info("Going on from step %d, %s", checkpoint.step, checkpoint.path)
        return Progress(**counters), None if verdict is None else Verdict(**verdict)

    def _check_facts(self, checkpoint: Checkpoint) -> None:
        """Compare what the run depends on."""
        before, now = checkpoint.state["facts"], dict(self.plan.facts)
        for name in sorted((set(before) | set(now)) - {SETTINGS}):
            old, new = before.get(name, "not recorded"), now.get(name, "not known")
            if old == new:
                continue
            if name in _MERELY_WARNED:
                logger.warning(
                    "%s: was %s, is %s; the last bits of a step may differ", name, old, new
                )
                continue
            raise CheckpointError(
                f"the run cannot go on: {name} was {old} and is {new}\n"
                f"  where: {checkpoint.path}\n"
                "  what to do: give what the run began with, or train from the start in another --output_dir"
            )
