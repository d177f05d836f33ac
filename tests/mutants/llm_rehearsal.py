"""Faults of the dry run of a language model: batches that stand for nothing, sums that forget something."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from dreamrie.llm import rehearsal
from tests.llm import test_rehearsal as laws
from tests.mutants import Mutant, replaced

_TIME = laws.law_ll21_the_time_is_that_of_all_batches
_MEMORY = laws.law_ll22_the_largest_batches_are_tried
_start, _step, _times = rehearsal.start_seconds, rehearsal.step_seconds, rehearsal.times
_starts, _last = rehearsal.tried_starts, rehearsal.largest_last


def with_(**wrong: Any) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: replaced(rehearsal, **wrong)


def one_micro(task: Any, optimizer: Any, settings: Any, accelerator: Any, warm_up: Any) -> float:
    """Steps without accumulation."""
    once = dataclasses.replace(settings, accumulation=1)
    return _step(task, optimizer, once, accelerator, warm_up)


def shortest(items: Any, count: int) -> Any:
    """The first ones in the order of their length."""
    return [items[0]] * count


def usual_ones(found: Any, count: int) -> Any:
    """Batches of middle length."""
    return [sorted(found, key=lambda size: size.tokens)[len(found) // 2]] * count


def as_many_as_tried(config: Any, task: Any, tried: Any, _: float) -> Any:
    """The start is as short as the longer of the two tries."""
    return _start(config, task, tried, sum(tried))


def of_the_first_size(config: Any, task: Any, tried: Any, whole: float) -> Any:
    """Every batch that was tried counts like the first."""
    return _start(config, task, [tried[0]] * len(tried), whole)


def twice_first(found: Any) -> Any:
    usual, _, smallest = _starts(found)
    return [usual, usual, smallest]


def without_widest(found: Any, count: int) -> Any:
    return [*_last(found, count)[:-2], *[_last(found, count)[-1]] * 2]


MUTANTS = [
    Mutant(
        "a dry run forgets gradient accumulation",
        _TIME,
        with_(step_seconds=one_micro),
        "a step is all of its micro-batches",
    ),
    Mutant(
        "a dry run times the shortest texts",
        _TIME,
        with_(evenly=shortest),
        "what a batch takes beside its tokens is counted too often then",
    ),
    Mutant(
        "a dry run takes all batches of a start for those it tried",
        _TIME,
        with_(start_seconds=as_many_as_tried),
        "the start looks at --loi_batches batches",
    ),
    Mutant(
        "a dry run takes all batches of a start for equally long",
        _TIME,
        with_(start_seconds=of_the_first_size),
        "the largest one is among those that were tried",
    ),
    Mutant(
        "a dry run forgets the scores before training",
        _TIME,
        with_(times=lambda *arguments: _times(*arguments) - 1),
        "step 0 is scored, too",
    ),
    Mutant(
        "a dry run starts from usual batches only",
        _MEMORY,
        with_(tried_starts=twice_first),
        "the longest batch decides the memory of a start",
    ),
    Mutant(
        "a dry run steps on usual batches only",
        _MEMORY,
        with_(largest_last=usual_ones),
        "the longest batch decides the memory of a step",
    ),
    Mutant(
        "a dry run forgets the widest output",
        _MEMORY,
        with_(largest_last=without_widest),
        "many answers in short texts have more logits than the longest text",
    ),
]
