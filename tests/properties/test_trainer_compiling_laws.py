"""torch.compile: only the loss goes through it, nothing else is changed by it, and what it gains is said as it is.

Compiled here for torch's backend "eager", which traces as every backend does and then computes to the same bytes as the
model itself; the test with a real compiler is in tests/train_dreambooth/test_compiling.py.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.diffusion import task as task_module
from dreamrie.errors import ConfigError
from dreamrie.trainer import compiling, loop, make_accelerator
from tests.diffusion.test_buckets import mixed_task
from tests.small_task import SmallTask, train_small


class CompilableTask(SmallTask):
    """Its loss calls `network`."""

    def __init__(self, **options: Any) -> None:
        super().__init__(dropout=0.3, **options)
        self.network: Any = self.model

    def loss(self, batch: Any) -> torch.Tensor:
        step, points = batch
        error = self.network(points) - (points @ self.teacher).sin()
        return self.spoil(step, error.square().mean())

    def trial_batches(self) -> list[Any]:
        return [self.batch(1, 0)]


def compile_it(impl: Any, task: CompilableTask, **options: Any) -> Any:
    options = {"backend": "eager", "steps": 100, **options}
    return impl.compile_network(task, make_accelerator(), **options)


def law_compiling_leaves_no_trace(impl: Any) -> None:
    """Modes, gradients, weights, names and random numbers are as before; the loss alone is compiled."""
    task = CompilableTask()
    model, names = task.model, list(task.model.state_dict())
    model.eval()
    given = task.pairs[0].left.grad = torch.ones_like(task.pairs[0].left)
    weights = [value.clone() for value in model.state_dict().values()]
    torch.manual_seed(11)
    state = torch.get_rng_state()
    compile_it(impl, task)
    assert torch.equal(torch.get_rng_state(), state)
    assert task.model is model
    assert task.network is not model
    assert not any(module.training for module in model.modules())
    assert list(model.state_dict()) == names
    assert all(map(torch.equal, weights, model.state_dict().values()))
    gradients = [factor.grad for pair in task.pairs for factor in (pair.left, pair.right)]
    assert gradients[0] is given
    assert torch.equal(given, torch.ones_like(given))
    assert gradients[1:] == [None] * 3


def test_compiling_leaves_no_trace() -> None:
    law_compiling_leaves_no_trace(compiling)


def test_a_compiled_training_is_the_training(tmp_path: Path) -> None:
    """Dropout included: for a backend that computes to the same bytes, so does the run."""
    plain, compiled = CompilableTask(), CompilableTask()
    compile_it(compiling, compiled)
    for number, task in enumerate((plain, compiled)):
        train_small(loop, tmp_path / str(number), task, max_steps=4)
    assert all(map(torch.equal, plain.factors(), compiled.factors()))
    start = CompilableTask().factors()
    assert all(float((a - b).norm()) > 1e-3 for a, b in zip(start, plain.factors(), strict=True))


def law_the_gain_is_said_as_it_is(impl: Any) -> None:
    """2 micro-batches save 0.25 s a step, so 75 s of compiling are back after 300 steps, not in a shorter training."""
    gain = impl.Gain(plain=0.25, compiled=0.125, compiling=75.0)
    assert gain.pays_after(2) == 300
    assert gain.pays_after(1) == 600
    # 0.47 s are saved in 8 steps of 0.0625 s, and not in 7.
    assert impl.Gain(0.1875, 0.125, 0.47).pays_after(1) == 8
    text, shorter = gain.describe(400, 2)
    assert shorter
    assert "take 250.0 ms, without it 500.0 ms: it pays after 300 of 400 steps, 25 s in all" in text
    text, shorter = gain.describe(299, 2)
    assert not shorter
    assert "would pay after 300 steps, and 299 are to be taken" in text
    for other in (0.10, 0.11):
        text, shorter = impl.Gain(0.10, other, 30.0).describe(10**9, 1)
        assert not shorter
        assert "no gain here, leave --torch_compile out" in text


def test_the_gain_is_said_as_it_is() -> None:
    law_the_gain_is_said_as_it_is(compiling)


def test_what_was_measured_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    """A training too short to pay is told so by a warning; one without a step left is not compiled at all."""
    caplog.set_level(logging.INFO, "dreamrie")
    task = CompilableTask()
    assert compile_it(compiling, task, steps=0) is None
    assert task.network is task.model
    gain = compile_it(compiling, task, steps=1)
    assert gain.compiling > 0 < gain.plain
    assert caplog.records[-1].levelno == logging.WARNING
    assert caplog.records[-1].getMessage() == gain.describe(1, 1)[0]


def test_a_machine_that_cannot_compile_is_told_what_it_lacks() -> None:
    """The message is one for people, and the task is as it was."""

    def refusing(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin a place")

    task = CompilableTask()
    with pytest.raises(
        ConfigError, match=r"No working C\+\+ compiler(?s:.)*--torch_compile"
    ) as error:
        compile_it(compiling, task, backend=refusing)
    assert "what to do: install a C++ compiler" in str(error.value)
    assert task.network is task.model


def shapes_of(batch: Any) -> set[tuple[int, int, int]]:
    """Rows (more than two are alike to the compiler), height and width of each pass through the U-Net."""
    groups = [(len(rows), batch.latents[rows[0]].shape) for rows in batch.rows_by_shape()]
    return {(min(rows, 3), shape[-2], shape[-1]) for rows, shape in groups}


def law_trial_batches_have_the_shapes_of_training(impl: Any) -> None:
    """No step of a training with pictures of several sizes meets a program that is not there yet."""
    for size, counts in ((5, {1, 2}), (9, {2, 3})):  # the four pictures take turns
        task = mixed_task(impl, kind="tiny-vae", prior=False, batch_size=size)
        batches = task.trial_batches()
        tried = {shape for batch in batches for shape in shapes_of(batch)}
        met = {shape for step in range(1, 9) for shape in shapes_of(task.batch(step, 0))}
        assert {rows for rows, *_ in met} >= counts
        assert len({shape[1:] for shape in met}) == 4
        assert met <= tried
        # Always the same order, whatever was asked for before: resumed runs get the same programs.
        again = [batch.latents[0].shape for batch in task.trial_batches()]
        assert again == [batch.latents[0].shape for batch in batches]
        text = task.batch(1, 0).text
        assert all(batch.text.shape[1:] == text.shape[1:] for batch in batches)


def test_trial_batches_have_the_shapes_of_training() -> None:
    law_trial_batches_have_the_shapes_of_training(task_module)


def test_one_size_is_one_program() -> None:
    """Squares with class pictures: as many rows as a micro-batch has."""
    task = mixed_task(pictures={"bucket_unit": None}, prior=True, batch_size=3)
    (batch,) = task.trial_batches()
    assert shapes_of(batch) == shapes_of(task.batch(1, 0))
    assert len(batch.latents) == len(task.batch(1, 0).latents) == 6
