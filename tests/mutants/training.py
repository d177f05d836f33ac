"""Wrong training loops: a loss not divided, a schedule that counts batches, a NaN stepped on, a wrong clip."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from dreamrie.errors import NumericalError
from dreamrie.trainer import loop
from dreamrie.trainer.control import schedule_factor
from tests.mutants import Mutant, replaced
from tests.properties import test_trainer_laws as laws
from tests.properties import test_trainer_messages_laws as messages

_Loop = loop._Loop
_step = _Loop.step
_set_rate, _save, _run, _guard = _Loop.set_learning_rate, _Loop.save, _Loop.run, _Loop.guard


@contextmanager
def broken_loop(**wrong: Any) -> Iterator[Any]:
    """Yield the module of the loop with wrong methods."""
    with replaced(_Loop, **wrong):
        yield loop


@contextmanager
def broken_module(**wrong: Any) -> Iterator[Any]:
    """Yield the module of the loop with wrong functions."""
    with replaced(loop, **wrong):
        yield loop


@contextmanager
def never_unscaled_by_the_loop() -> Iterator[Any]:
    """The scaler unscales at its step, after the clipping."""
    with replaced(Accelerator, unscale_gradients=lambda self, optimizer=None: None):
        yield loop


def sum_of_micro_batches(self: Any, step: int) -> Tensor:
    count, total = self.settings.accumulation, torch.zeros((), dtype=torch.float64)
    for micro in range(count):
        loss = self.task.loss(self.task.batch(step, micro))
        self.accelerator.backward(loss)
        total = total + loss.detach() / count
    return total


def last_micro_batch_only(self: Any, step: int) -> Tensor:
    loss = self.task.loss(self.task.batch(step, self.settings.accumulation - 1))
    self.accelerator.backward(loss)
    return loss.detach()


def schedule_counts_batches(self: Any, done: int) -> None:
    _set_rate(self, min(done * self.settings.accumulation, self.settings.max_steps))


def schedule_one_step_late(self: Any, done: int) -> None:
    _set_rate(self, max(done - 1, 0))


def schedule_of_the_first_group(self: Any, done: int) -> None:
    s = self.settings
    factor = schedule_factor(s.scheduler, done, s.max_steps, s.warmup_steps)
    for group in self.optimizer.param_groups:
        group["lr"] = self.peaks[0] * factor


def warm_up_from_zero(scheduler: str, done: int, max_steps: int, warmup_steps: int = 0) -> float:
    if done < warmup_steps:
        return done / warmup_steps
    return schedule_factor(scheduler, done, max_steps, warmup_steps)


def factor_norm(self: Any) -> Tensor:
    return nn.utils.get_total_norm([p.grad for p in self.parameters])


def clip_each_factor(parameters: Any, limit: float, norm: Tensor) -> None:
    for parameter in parameters:
        nn.utils.clip_grad_norm_([parameter], limit)


def save_whatever_happens(self: Any) -> Any:
    try:
        return _run(self)
    except NumericalError:
        _save(self, 0)
        raise


def never_give_up(self: Any, step: int, skip: str | None, facts: str) -> None:
    self.progress.skips_in_a_row = 0
    _guard(self, step, skip, facts)


def count_forever(self: Any, step: int, skip: str | None, facts: str) -> None:
    kept = self.progress.skips_in_a_row
    _guard(self, step, skip, facts)
    self.progress.skips_in_a_row = max(kept, self.progress.skips_in_a_row)


NO_GUARD = SimpleNamespace(isfinite=lambda value: True, nan=math.nan)


def names_every_micro_batch(self: Any, step: int, skip: str | None, facts: str) -> None:
    self.micro_losses = torch.zeros(len(self.micro_losses))
    _guard(self, step, skip, facts)


class SteppingScaler:
    """A loss scale that lets the optimizer step where only the scale should move."""

    def __init__(self, scaler: Any, stepper: Any) -> None:
        self._scaler, self.update = scaler, stepper.step

    def __getattr__(self, name: str) -> Any:
        return getattr(self._scaler, name)


def steps_whenever_there_is_a_scale(self: Any, step: int) -> None:
    scaler = self.accelerator.scaler
    if not isinstance(scaler, SteppingScaler):
        self.accelerator.scaler = SteppingScaler(scaler, self.stepper)
    _step(self, step)


MUTANTS = [
    Mutant(
        name="every micro-batch named",
        law=messages.law_n1_a_bad_step_names_its_batch_and_layer,
        broken=lambda: broken_loop(guard=names_every_micro_batch),
        why="the user looks at the wrong pictures",
    ),
    Mutant(
        name="a bad loss stepped on under a loss scale",
        law=messages.law_n1_a_bad_loss_with_good_gradients_moves_nothing,
        broken=lambda: broken_loop(step=steps_whenever_there_is_a_scale),
        why="finite gradients of a broken loss are no gradients",
    ),
    Mutant(
        name="no layer named",
        law=messages.law_n1_a_bad_step_names_its_batch_and_layer,
        broken=lambda: broken_loop(layers_without_finite_gradient=lambda self: []),
        why="nobody finds the layer that overflows among 128",
    ),
    Mutant(
        "micro-batch losses summed, not averaged",
        laws.law_accumulation,
        lambda: broken_loop(accumulate=sum_of_micro_batches),
        why="the gradient is k times too long, so it is clipped where it should not be",
    ),
    Mutant(
        "only the last micro-batch counts",
        laws.law_accumulation,
        lambda: broken_loop(accumulate=last_micro_batch_only),
        why="accumulation would only cost time",
    ),
    Mutant(
        "learning rate moves per micro-batch",
        laws.law_schedule,
        lambda: broken_loop(set_learning_rate=schedule_counts_batches),
        why="with accumulation the run ends k times too early",
    ),
    Mutant(
        "learning rate one step late",
        laws.law_schedule,
        lambda: broken_loop(set_learning_rate=schedule_one_step_late),
        why="the end value is never reached",
    ),
    Mutant(
        "warm-up from zero",
        laws.law_schedule,
        lambda: broken_module(schedule_factor=warm_up_from_zero),
        why="the first step is lost",
    ),
    Mutant(
        "one learning rate for all groups",
        laws.law_groups_keep_their_ratio,
        lambda: broken_loop(set_learning_rate=schedule_of_the_first_group),
        why="LoRA+ would silently be AdamW",
    ),
    Mutant(
        "NaN stepped on",
        laws.law_bad_steps_are_skipped,
        lambda: broken_module(math=NO_GUARD),
        why="one bad picture would empty the adapter",
    ),
    Mutant(
        "skips counted over the whole run",
        laws.law_three_bad_steps_stop_the_run,
        lambda: broken_loop(guard=count_forever),
        why="a long run would end over three bad steps that are days apart",
        raises=(NumericalError,),
    ),
    Mutant(
        "run goes on whatever the loss",
        laws.law_three_bad_steps_stop_the_run,
        lambda: broken_loop(guard=never_give_up),
        why="a run of NaN would train to its last step",
    ),
    Mutant(
        "adapter saved after the loss was lost",
        laws.law_three_bad_steps_stop_the_run,
        lambda: broken_loop(run=save_whatever_happens),
        why="the file would look like a success",
    ),
    Mutant(
        "clipped by the norm of the factors",
        laws.law_clips_the_tangent_norm,
        lambda: broken_loop(gradient_norm=factor_norm),
        why="it depends on the factorization and counts the anchor",
    ),
    Mutant(
        "each factor clipped by itself",
        laws.law_clips_the_tangent_norm,
        lambda: broken_module(
            nn=SimpleNamespace(
                utils=SimpleNamespace(
                    clip_grads_with_norm_=clip_each_factor, get_total_norm=nn.utils.get_total_norm
                )
            )
        ),
        why="the two halves of a tangent vector are scaled differently: another direction",
    ),
    Mutant(
        "clipped before unscaling",
        laws.law_unscales_before_clipping,
        never_unscaled_by_the_loop,
        why="every gradient looks a thousand times too long and is clipped away",
    ),
    Mutant(
        "dropout from the global stream",
        laws.law_same_seed_same_bytes,
        lambda: broken_module(own_random_stream=lambda device, seed: nullcontext()),
        why="two runs with one seed differ",
    ),
]
