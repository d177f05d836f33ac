"""Faults of the language task that the laws of the loop must notice when they run on it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from dreamrie.llm import task
from dreamrie.trainer import loop
from tests.llm.small_task import LanguageTask
from tests.mutants import Mutant, each, replaced
from tests.mutants.llm import by_tokens
from tests.properties.test_trainer_laws import law_accumulation

_collate = task.collate
_ADDS_UP = each(law_accumulation, [LanguageTask])


def in_batches(wrong: Callable[..., Any]) -> Any:
    """The loop, while the batches of the task are wrong."""

    @contextmanager
    def broken() -> Iterator[Any]:
        with replaced(task, collate=wrong):
            yield loop

    return broken


def rounded_weights(examples: Any, **options: Any) -> Any:
    batch = _collate(examples, **options)
    return dataclasses.replace(batch, weights=batch.weights.float().double())


MUTANTS = [
    Mutant(
        name="llm: weights rounded to fp32",
        law=_ADDS_UP,
        broken=in_batches(rounded_weights),
        why="a third and a third of a half would not be a sixth",
    ),
    Mutant(
        name="llm: long answers count more in their micro-batch",
        law=_ADDS_UP,
        broken=in_batches(by_tokens),
        why="then what an example counts depends on what it stands beside",
    ),
]
