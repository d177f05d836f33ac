"""Training on two gloo processes is training on one with the joint batch: pictures and texts."""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.riemannion import Riemannion
from dreamrie.runlog import RunLog
from dreamrie.team import Team
from dreamrie.trainer import LoopSettings, TrainResult, joint, make_accelerator
from dreamrie.trainer import loop as real
from tests.diffusion.test_task import make_task
from tests.distributed.gloo import on_processes
from tests.llm.small_task import LanguageTask
from tests.small_task import SmallTask, distance
from tests.strategies import noise

Build = Callable[..., Any]


def pictures(**settings: Any) -> Any:
    """A small U-Net in fp64, with class pictures."""
    task = make_task(kind="tiny-vae", **settings)
    task.model.double()
    return task


TASKS: dict[str, Build] = {"pictures": pictures, "texts": LanguageTask}


@dataclass
class Left:
    """What one process has in the end."""

    result: TrainResult
    changes: list[Tensor]
    factors: list[Tensor]
    written: list[str]


def watch_writes(folder: Path) -> list[str]:
    """From now on, files and folders that this process makes or moves in a folder."""
    found: list[str] = []

    def seen(event: str, arguments: tuple[Any, ...]) -> None:
        writes = event in ("os.mkdir", "os.rename", "os.remove")
        if event == "open" and isinstance(arguments[2], int):
            writes = bool(arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
        if writes and str(arguments[0]).startswith(str(folder)):
            found.append(f"{event} {arguments[0]}")

    sys.addaudithook(seen)
    return found


def train(impl: Any, task: Any, folder: Path, **settings: Any) -> Left:
    """A short training; all processes but the first are watched for what they write."""
    accelerator = make_accelerator()
    written = [] if accelerator.is_main_process else watch_writes(folder)
    optimizer = Riemannion(task.pairs, lr=0.02, weight_decay=0.1)
    settings = {"max_steps": 3, "scheduler": "constant", "spectrum_steps": 2} | settings
    main = folder if accelerator.is_main_process else None
    with RunLog(main, settings["max_steps"], quiet=True) as log:
        result = impl.train(task, optimizer, LoopSettings(**settings), log, accelerator)
    halves = [half.detach() for pair in task.pairs for half in (pair.left, pair.right)]
    return Left(result, [pair.delta() for pair in task.pairs], halves, written)


def built(impl: Any, name: str, folder: Path, count: int) -> Left:
    """Four samples a step, whatever the number of processes."""
    return train(impl, TASKS[name](batch_size=4 // count, samples_per_step=4), folder)


def records(folder: Path) -> list[dict[str, Any]]:
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    return [json.loads(line) for line in lines]


def law_dd1_two_processes_are_one(impl: Any, name: str) -> None:
    """Loss, gradient norm and path are those of one process with the joint batch, to 1e-10 in fp64.

    Both processes hold the same bytes; only the first one writes.
    """
    with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
        alone = built(impl, name, Path(first), 1)
        both = on_processes(2, built, impl, name, Path(second), 2)
        for found, wanted in zip(records(Path(second)), records(Path(first)), strict=True):
            assert found["loss"] == pytest.approx(wanted["loss"], rel=1e-10)
            assert found["grad_norm"] == pytest.approx(wanted["grad_norm"], rel=1e-10)
        assert (Path(second) / "spectrum.jsonl").read_text("utf-8").count("\n") == 3
    assert min(float(change.norm()) for change in alone.changes) > 1e-2
    for left in both:
        assert left.result.steps == 3
        assert distance(left.changes, alone.changes) < 1e-10  # measured 1e-13
        assert left.written == []
    for one, two in zip(both[0].factors, both[1].factors, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_dd1(name: str) -> None:
    law_dd1_two_processes_are_one(real, name)


def stopped(impl: Any, folder: Path, who: int) -> tuple[int, bool]:
    """One process receives a signal in its second step."""
    task = SmallTask(batch_size=3, samples_per_step=6)
    batch = task.batch

    def killed(step: int, micro: int) -> Any:
        if step == 2 and Team.here().rank == who:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(step, micro)

    task.batch = killed  # type: ignore[method-assign]
    left = train(impl, task, folder, max_steps=6)
    return left.result.steps, left.result.interrupted


def law_dd2_all_stop_together(impl: Any) -> None:
    """A signal that reaches one process, whichever, ends the training of all of them after the same step."""
    for who in (0, 1):
        with tempfile.TemporaryDirectory() as folder:
            assert on_processes(2, stopped, impl, Path(folder), who) == [(2, True)] * 2


def test_dd2() -> None:
    law_dd2_all_stop_together(real)


def spoiled(impl: Any, folder: Path) -> tuple[str, str]:
    """The batches of the second process are bad, three times in a row."""
    rank = Team.here().rank
    task = LanguageTask(
        batch_size=1,
        samples_per_step=2,
        spoil=lambda step, loss: loss * torch.nan if rank and step > 1 else loss,
    )
    with pytest.raises(NumericalError) as caught:
        train(impl, task, folder, max_steps=6)
    return str(caught.value), task.describe(task.batch(4, 1))


def law_dd3_a_bad_batch_is_named_wherever_it_is(impl: Any) -> None:
    """All processes give up at the same step, and name the rows of the process whose loss was bad, and no others."""
    with tempfile.TemporaryDirectory() as folder:
        for said, rows in on_processes(2, spoiled, impl, Path(folder)):
            assert "step 4" in said
            assert f"batch: {rows}\n" in said


def test_dd3() -> None:
    law_dd3_a_bad_batch_is_named_wherever_it_is(real)


def halves(rank: int) -> list[nn.Parameter]:
    """Three parameters: both processes have a gradient of the first, the second process alone one of the second."""
    made = [nn.Parameter(torch.zeros(2, 3)) for _ in range(3)]
    made[0].grad = noise(rank, 2, 3, dtype=torch.float32)
    if rank == 1:
        made[1].grad = torch.full((2, 3), 8.0)
    return made


def averaged(impl: Any) -> tuple[float, list[Tensor | None]]:
    team = Team.here()
    parameters = halves(team.rank)
    loss = impl.joint_mean_(team, torch.tensor(3.0 + team.rank), parameters)
    return float(loss), [parameter.grad for parameter in parameters]


def law_dd4_a_gradient_that_one_process_lacks_counts_as_zero(impl: Any) -> None:
    """The mean of the loss and of each gradient, on every process; what no process has stays without."""
    mean = (halves(0)[0].grad + halves(1)[0].grad) / 2  # type: ignore[operator]
    for loss, (first, second, third) in on_processes(2, averaged, impl):
        assert loss == 3.5
        assert torch.allclose(first, mean)
        assert second is not None
        assert torch.equal(second, torch.full((2, 3), 4.0))
        assert third is None


def test_dd4() -> None:
    law_dd4_a_gradient_that_one_process_lacks_counts_as_zero(joint)


def started(apart: float) -> tuple[bool, str, list[Tensor]]:
    """Adapters that differ between the processes by a relative size."""
    team = Team.here()
    task = SmallTask(dtype=torch.float32)
    with torch.no_grad():
        for pair in task.pairs:
            pair.left.mul_(1 + apart * team.rank)
    try:
        joint.share_start_(team, task.pairs)
    except ConfigError as error:
        return False, str(error), []
    return True, "", task.factors()


def test_different_starts_are_levelled_or_refused() -> None:
    """A rounding error is taken away; another seed is refused by every process."""
    (_, _, wanted), (good, _, found) = on_processes(2, started, 1e-6)
    assert good
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    assert all(
        torch.equal(a, b)
        for a, b in zip(wanted, SmallTask(dtype=torch.float32).factors(), strict=True)
    )
    for good, said, _ in on_processes(2, started, 0.1):
        assert not good
        assert "2 processes start from different adapters" in said
