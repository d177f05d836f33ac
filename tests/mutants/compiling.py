"""Wrong ways to compile: random numbers used up, gradients left behind, names changed, a gain that is none."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

from dreamrie.diffusion import task as task_module
from dreamrie.trainer import compiling
from tests.mutants import Mutant, replaced
from tests.properties import test_trainer_compiling_laws as laws

_compile_network = compiling.compile_network


@contextmanager
def gradients_stay(task: Any, accelerator: Any) -> Iterator[None]:
    modes = [(module, module.training) for module in task.model.modules()]
    task.model.train()
    with compiling.own_random_stream(accelerator.device, 0):
        yield
    for module, mode in modes:
        module.training = mode


@contextmanager
def mode_stays(task: Any, accelerator: Any) -> Iterator[None]:
    kept = [(parameter, parameter.grad) for parameter in task.model.parameters()]
    for parameter, _ in kept:
        parameter.grad = None
    task.model.train()
    with compiling.own_random_stream(accelerator.device, 0):
        yield
    for parameter, gradient in kept:
        parameter.grad = gradient


def wrapped_for_all(task: Any, accelerator: Any, **options: Any) -> Any:
    found = _compile_network(task, accelerator, **options)
    task.model = task.network
    return found


def counts_passes(self: Any, micros: int) -> int | None:
    saved = self.plain - self.compiled
    return math.ceil(self.compiling / saved) if saved > 0 else None


def one_step_early(self: Any, micros: int) -> int | None:
    saved = micros * (self.plain - self.compiled)
    return int(self.compiling / saved + 1e-9) if saved > 0 else None


def always_pays(self: Any, micros: int) -> int | None:
    return 0


def first_size_alone(self: Any) -> Any:
    sizes = sorted({size for pictures in self.concept.sets for size in pictures.sizes()})
    return [self._blank(sizes[0], rows) for rows in (self._batch_size, 2, 1)]


def whole_batches_alone(self: Any) -> Any:
    sizes = sorted({size for pictures in self.concept.sets for size in pictures.sizes()})
    return [self._blank(size, self._batch_size) for size in sizes]


@contextmanager
def wrong_gain(pays_after: Any) -> Iterator[Any]:
    with replaced(compiling.Gain, pays_after=pays_after):
        yield compiling


@contextmanager
def wrong_task(trial_batches: Any) -> Iterator[Any]:
    with replaced(task_module.DreamBoothTask, trial_batches=trial_batches):
        yield task_module


TRACE, GAIN = laws.law_compiling_leaves_no_trace, laws.law_the_gain_is_said_as_it_is
SHAPES = laws.law_trial_batches_have_the_shapes_of_training
MUTANTS = [
    Mutant(
        "trial passes draw from the global stream",
        TRACE,
        lambda: replaced(compiling, own_random_stream=lambda device, seed: nullcontext()),
        why="what is drawn afterwards depends on a flag about speed",
    ),
    Mutant(
        "trial passes leave gradients",
        TRACE,
        lambda: replaced(compiling, _without_trace=gradients_stay),
        why="the first step would sum them up",
    ),
    Mutant(
        "trial passes leave the mode of training",
        TRACE,
        lambda: replaced(compiling, _without_trace=mode_stays),
        why="dropout would act in samples",
    ),
    Mutant(
        "the model is wrapped for all",
        TRACE,
        lambda: replaced(compiling, compile_network=wrapped_for_all),
        why="names of weights begin with _orig_mod",
    ),
    Mutant(
        "gain of a pass, not of a step",
        GAIN,
        lambda: wrong_gain(counts_passes),
        why="with accumulation it pays sooner",
    ),
    Mutant("gain said one step early", GAIN, lambda: wrong_gain(one_step_early), why="not yet"),
    Mutant("compiling always pays", GAIN, lambda: wrong_gain(always_pays), why="it may not"),
    Mutant(
        "compiled for the first size alone",
        SHAPES,
        lambda: wrong_task(first_size_alone),
        why="other sizes would be compiled for in the midst of training",
    ),
    Mutant(
        "compiled for whole batches alone",
        SHAPES,
        lambda: wrong_task(whole_batches_alone),
        why="a single row is another program, and would come in an order that a resumed run has not",
    ),
]
