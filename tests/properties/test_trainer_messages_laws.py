"""N1: a step that is skipped moves nothing, also under a loss scale, and the loop says what was in it."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie.errors import NumericalError
from dreamrie.trainer import loop
from tests.properties.test_trainer_laws import folder, loss_scale
from tests.small_task import SmallTask, train_small


@contextmanager
def capture(name: str) -> Iterator[list[str]]:
    """Messages of a logger."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    logger.addHandler(handler)
    try:
        yield found
    finally:
        logger.removeHandler(handler)


def law_n1_a_bad_step_names_its_batch_and_layer(impl: Any) -> None:
    """The second of three micro-batches has the broken loss; the second of two layers has the broken gradient."""

    class Noted(SmallTask):
        def describe(self, batch: tuple[int, Tensor]) -> str:
            return f"points from {float(batch[1][0, 0]):.4f}"

        def loss(self, batch: tuple[int, Tensor]) -> Tensor:
            value = super().loss(batch)
            spoilt = torch.equal(batch[1], self.batch(1, 1)[1]) and batch[0] == 1
            return value * float("nan") if spoilt else value

    with folder() as where, capture("dreamrie.trainer.loop") as said:
        task = Noted(batch_size=2, samples_per_step=6)
        train_small(impl, where, task, accumulation=3)
        names = [task.describe(task.batch(1, micro)) for micro in range(3)]
    assert len(set(names)) == 3
    assert [name in said[0] for name in names] == [False, True, False]
    with folder() as where, capture("dreamrie.trainer.loop") as said:
        task = SmallTask()
        layer = task.pairs[1]
        layer.left.register_hook(lambda gradient: gradient * float("inf"))
        with pytest.raises(NumericalError, match=f"1 of 2 layers, the first is {layer.name}"):
            train_small(impl, where, task)
    assert all(f"1 of 2 layers, the first is {layer.name}" in line for line in said)


def test_a_bad_step_names_its_batch_and_layer() -> None:
    law_n1_a_bad_step_names_its_batch_and_layer(loop)


def law_n1_a_bad_loss_with_good_gradients_moves_nothing(impl: Any) -> None:
    """Its gradients are finite, so no loss scale would notice; the scale itself stays, too."""

    def spoil(step: int, loss: Tensor) -> Tensor:
        return loss + torch.tensor(float("nan")) if step == 3 else loss

    ends = []
    for steps in (2, 3):
        task = SmallTask(spoil=spoil)
        with folder() as where, loss_scale(2.0**4) as accelerator:
            outcome = train_small(impl, where, task, accelerator=accelerator, max_steps=steps)
            assert accelerator.scaler.get_scale() == 2.0**4
        ends.append(task.factors())
    assert [record["skipped"] for record in outcome.steps] == [None, None, "loss"]
    start = SmallTask().factors()
    assert max(float((a - b).abs().max()) for a, b in zip(ends[0], start, strict=True)) > 1e-3
    assert all(torch.equal(one, other) for one, other in zip(*ends, strict=True))


def test_a_bad_loss_with_good_gradients_moves_nothing() -> None:
    law_n1_a_bad_loss_with_good_gradients_moves_nothing(loop)
