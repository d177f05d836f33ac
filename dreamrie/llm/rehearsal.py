"""Time and memory of a training of a language model, for its dry run.

Texts differ in length, and with them what a batch takes. So all batches of the training are looked at first. Tried are
some of every length, for the time, and the largest ones, for the memory; what they took is multiplied out by the
tokens, padding included.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from dreamrie.config import LlmConfig
from dreamrie.llm.prepare import Request
from dreamrie.llm.scorer import AccuracyScorer
from dreamrie.llm.task import CausalLmTask, TextBatch
from dreamrie.trainer import LoopSettings
from dreamrie.trainer.rehearsal import (
    TIMED_STEPS,
    WARM_UP_STEPS,
    Estimate,
    evenly,
    peak_memory,
    start_seconds,
    step_seconds,
    timed,
    times,
    told,
)

# Of a longer training every second, third, ... batch is looked at: a few seconds.
LOOKED_AT = 4_000
# Forward passes of a scoring that are timed.
TIMED_PASSES = 6


@dataclass(frozen=True)
class Size:
    """What a forward pass takes.

    Attributes:
        tokens: rows times length, padding included; time goes with it, and the memory of the layers.
        logits: rows times places that are predicted from; the memory of the output.
        key: which pass it is.
    """

    tokens: int
    logits: int
    key: Any


def rehearse(
    config: LlmConfig, request: Request, task: CausalLmTask, accelerator: Any, done: int = 0
) -> str:
    """Do a little of everything that takes long: initialization, steps, accuracy. Every process calls it.

    Args:
        config: settings of the run.
        request: as read.
        task: made from it; its adapter is not what it was afterwards.
        accelerator: from `make_accelerator`.
        done: steps of the checkpoint to go on from.

    Returns:
        Lines for the end of `explain`.
    """
    return told(lambda: _estimate(config, request, task, accelerator, done))


def _estimate(
    config: LlmConfig, request: Request, task: CausalLmTask, accelerator: Any, done: int
) -> Estimate:
    """Try each part and multiply out."""
    settings, processes = LoopSettings(**config.loop_values()), accelerator.num_processes
    starts = sizes(task, [(0, micro) for micro in range(config.adapter.batches or 1)])
    tried = tried_starts(starts)
    start, optimizer = start_seconds(
        config,
        Only(task, tried, 1, processes),
        [size.tokens for size in tried],
        sum(size.tokens for size in starts),
    )
    left, steps = settings.max_steps - done, 0.0
    micros = settings.accumulation * processes
    stride = stride_of(left * micros, micros)
    if left:
        found = sizes(task, every_batch(done + 1, settings.max_steps, micros, stride))
        timed_ones = evenly(_by_tokens(found), TIMED_STEPS * settings.accumulation)
        first_ones = largest_last(found, WARM_UP_STEPS * settings.accumulation)
        each = step_seconds(
            Only(task, timed_ones, settings.accumulation, processes),
            optimizer,
            settings,
            accelerator,
            warm_up=Only(task, first_ones, settings.accumulation, processes),
        )
        steps = left * each * _mean_tokens(found) / _mean_tokens(timed_ones)
    looks = 0.0
    if settings.score_steps and accelerator.is_main_process:
        often = times(settings.max_steps, settings.score_steps, done)
        looks = often * scoring_seconds(request, task.model)
    return Estimate(start, steps, looks, *peak_memory(), looks_name="scores", one_in=stride)


# ---------------------------------------------------------------------------- which batches


def stride_of(count: int, micros: int) -> int:
    """How many batches lie between two that are looked at.

    Args:
        count: of all batches.
        micros: of a step.

    Returns:
        1 up to `LOOKED_AT` batches; else a number without a common divisor with `micros`, so that every place of a step
        is looked at.
    """
    stride = max(1, -(-count // LOOKED_AT))
    while math.gcd(stride, micros) > 1:
        stride += 1
    return stride


def every_batch(first: int, last: int, micros: int, stride: int) -> list[tuple[int, int]]:
    """Micro-batches of a training, or evenly spaced ones.

    Args:
        first: step.
        last: step.
        micros: micro-batches of a step, those of all processes.
        stride: every how many of them.

    Returns:
        (step, micro) of each.
    """
    count = (last - first + 1) * micros
    return [(first + place // micros, place % micros) for place in range(0, count, stride)]


def sizes(task: CausalLmTask, batches: Sequence[tuple[int, int]]) -> list[Size]:
    """Look at batches.

    Args:
        task: that they are of.
        batches: (step, micro) of each.

    Returns:
        What each takes; its key is (step, micro).
    """
    return [_size(task.batch(*key), key) for key in batches]


def _size(batch: TextBatch, key: Any) -> Size:
    """What a batch takes."""
    return Size(batch.tokens.numel(), len(batch.tokens) * len(batch.columns), key)


def tried_starts(found: Sequence[Size]) -> list[Size]:
    """Three batches of a start: the first one is of usual size, the others are the largest and the smallest."""
    ordered, mean = _by_tokens(found), _mean_tokens(found)
    usual = min(ordered, key=lambda size: abs(size.tokens - mean))
    return [usual, ordered[-1], ordered[0]]


def largest_last(found: Sequence[Size], count: int) -> list[Size]:
    """Usual batches, and last the two that take the most memory: gradients and the optimizer's state are there then."""
    ordered = _by_tokens(found)
    longest = max(found, key=lambda size: (size.tokens, size.logits))
    widest = max(found, key=lambda size: (size.logits, size.tokens))
    return [*evenly(ordered, count - 2), widest, longest]


def _by_tokens(found: Sequence[Size]) -> list[Size]:
    return sorted(found, key=lambda size: size.tokens)


def _mean_tokens(found: Sequence[Size]) -> float:
    return sum(size.tokens for size in found) / len(found)


class Only:
    """A task whose batches are certain ones in turn, the same on every process.

    Args:
        task: everything else is its.
        chosen: batches of one process, in the order in which they are asked for.
        accumulation: micro-batches of a step, those of one process.
        processes: of the training.
    """

    def __init__(
        self, task: CausalLmTask, chosen: Sequence[Size], accumulation: int, processes: int
    ) -> None:
        self._task, self._chosen = task, list(chosen)
        self._accumulation, self._processes = accumulation, processes

    def __getattr__(self, name: str) -> Any:
        return getattr(self._task, name)

    def batch(self, step: int, micro: int) -> TextBatch:
        """As of a task.

        Args:
            step: from 1.
            micro: number inside the step, over all processes.

        Returns:
            One of the batches.
        """
        place = (step - 1) * self._accumulation + micro // self._processes
        return self._task.batch(*self._chosen[place].key)

    def loi_batches(self, count: int) -> Iterator[TextBatch]:
        """As of a task.

        Args:
            count: how many, over all processes.

        Yields:
            The batches.
        """
        for number in range(count):
            yield self.batch(1, number)


# ---------------------------------------------------------------------------- accuracy


def scoring_seconds(request: Request, model: Any) -> float:
    """Seconds of one scoring: all of it without the network, and some of the forward passes.

    Args:
        request: with held-out rows.
        model: with the adapter.

    Returns:
        Seconds; the passes that take the most memory were made, too.
    """
    silent = Partly(model, ())
    beside = timed(lambda: AccuracyScorer(silent, request.encoder, request.held_out)(0))
    chosen = evenly(_by_tokens(silent.asked), TIMED_PASSES)
    tried = [*chosen, *largest_last(silent.asked, 2)]
    partly = Partly(model, [size.key for size in tried])
    AccuracyScorer(partly, request.encoder, request.held_out)(0)
    passes = [partly.seconds[size.key] for size in chosen]
    each = sum(passes) / len(passes) / _mean_tokens(chosen)
    return beside + each * sum(size.tokens for size in silent.asked)


class Partly:
    """Stands in for a model: notes what it is asked, and makes some of the forward passes.

    Args:
        model: that makes them.
        made: which; all others are answered at once, every token being as likely as any other.

    Attributes:
        asked: what each pass takes; its key is its number.
        seconds: of the passes that were made, by number.
    """

    def __init__(self, model: Any, made: Sequence[int]) -> None:
        self._model, self._made = model, frozenset(made)
        self.asked: list[Size] = []
        self.seconds: dict[int, float] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def __call__(self, **asked: Any) -> Any:
        """A forward pass.

        Args:
            asked: as of a language model of transformers.

        Returns:
            What has `logits`.
        """
        tokens, number = asked["input_ids"], len(self.asked)
        columns = len(asked["logits_to_keep"])
        self.asked.append(Size(tokens.numel(), len(tokens) * columns, number))
        if number not in self._made:
            flat = torch.zeros(1, device=tokens.device)
            shape = (len(tokens), columns, int(self._model.config.vocab_size))
            return SimpleNamespace(logits=flat.expand(shape))
        answers: list[Any] = []
        self.seconds[number] = timed(lambda: answers.append(self._model(**asked)))
        return answers[0]
