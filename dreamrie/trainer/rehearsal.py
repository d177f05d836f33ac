"""What a training will take, found by doing a little of it: for a dry run, whose model is thrown away."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from dreamrie.config.reading import AnyConfig
from dreamrie.errors import ConfigError, DreamrieError
from dreamrie.init_table import INITS
from dreamrie.runlog import RunLog
from dreamrie.team import Team
from dreamrie.trainer.loop import train
from dreamrie.trainer.starting import StartingTask, start_adapter
from dreamrie.trainer.task import LoopSettings, Task

T = TypeVar("T")

# Batches of the two short initializations: their difference is the price of a batch, the rest that of all SVDs.
FEW, MORE = 1, 3
# The first steps choose kernels and allocate; the second part is timed.
WARM_UP_STEPS, TIMED_STEPS = 3, 4


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part of a training, and its peak memory.

    Attributes:
        start: locally optimal initialization, 0 without it.
        steps: all optimizer steps.
        looks: everything that is looked at on the way, such as scores.
        peak_bytes: of the GPU's allocator; without a GPU, of the whole process.
        on_gpu: which of the two.
        compiling: seconds of torch.compile, 0 without it.
        looks_name: what is looked at, for people.
        one_in: of so many batches one was looked at, so that the largest may not be among them.
    """

    start: float
    steps: float
    looks: float
    peak_bytes: int
    on_gpu: bool
    compiling: float = 0.0
    looks_name: str = "pictures and scores"
    one_in: int = 1

    def describe(self) -> list[str]:
        """Two lines for a person: time by parts, and memory."""
        total = self.start + self.compiling + self.steps + self.looks
        parts = f"initialization {self.start:.0f}, steps {self.steps:.0f}, {self.looks_name} {self.looks:.0f}"
        if self.compiling:
            parts += f", torch.compile {self.compiling:.0f}"
        place = "on the GPU" if self.on_gpu else "of the process"
        seen = f", by the largest of one batch in {self.one_in}" if self.one_in > 1 else ""
        return [
            f"time: about {total:.0f} s after loading ({parts}), from steps done here",
            f"memory: about {self.peak_bytes / 2**30:.2f} GiB {place} at its peak{seen}",
        ]


def told(estimate: Callable[[], Estimate]) -> str:
    """Try, and say what was found.

    Args:
        estimate: does a little of everything that takes long.

    Returns:
        Lines for the end of a dry run; a try that fails is told as well.

    Raises:
        ConfigError: it failed in one of several processes: the others would wait for it.
    """
    try:
        with _quietly():
            found = estimate()
    except (DreamrieError, torch.OutOfMemoryError) as error:
        said = f"not estimated, because a short try failed: {str(error).splitlines()[0]}"
        if Team.here().size > 1:
            raise ConfigError(f"time and memory: {said}") from error
        return f"# time and memory: {said}"
    return "\n".join(f"# {line}" for line in found.describe())


@contextmanager
def _quietly() -> Iterator[None]:
    """No words about starts and steps that are no part of a training."""
    logging.disable(logging.INFO)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def timed(action: Callable[[], object]) -> float:
    """Seconds from the call until the device has finished, the GPU's queue included."""
    _wait()
    started = time.perf_counter()
    action()
    _wait()
    return time.perf_counter() - started


def evenly(items: Sequence[T], count: int) -> list[T]:
    """Some of many, such that they stand for all.

    Args:
        items: at least one, in the order of what matters about them.
        count: how many are wanted; more than there are: some come twice.

    Returns:
        Those in the middles of `count` equal parts.
    """
    return [items[(2 * part + 1) * len(items) // (2 * count)] for part in range(count)]


def times(steps: int, every: int, done: int = 0) -> int:
    """How often something happens that happens before training, every so many steps, and at the end.

    Args:
        steps: of the whole training.
        every: so many steps.
        done: steps of the checkpoint to go on from, which has what came before it.

    Returns:
        That number.
    """
    return (not done) + steps // every - done // every + bool(steps % every and done < steps)


def start_seconds(
    config: AnyConfig, task: StartingTask, tried: Sequence[float], whole: float
) -> tuple[float, Optimizer]:
    """Seconds of the start, from two short ones.

    Args:
        config: resolved settings.
        task: its adapter is at a start afterwards.
        tried: work of the first `MORE` batches that each process gets from the task, in any unit.
        whole: work of all batches, those of all processes, in the same unit.

    Returns:
        Seconds, 0 for a start without batches; and an optimizer.
    """
    optimizers: list[Optimizer] = []
    processes = Team.here().size

    def start(count: int) -> float:
        adapter = config.adapter.model_copy(update={"loi_batches": count * processes})
        short = config.model_copy(update={"adapter": adapter})
        return timed(lambda: optimizers.append(start_adapter(short, task)[0]))

    seconds, few = 0.0, start(FEW)
    if INITS[str(config.adapter.init)].needs == "batches" and not config.run.resume_from_checkpoint:
        each = max(0.0, start(MORE) - few) / sum(tried[FEW:MORE])
        seconds = few + (whole / processes - sum(tried[:FEW])) * each
    return seconds, optimizers[-1]


def step_seconds(
    task: Task,
    optimizer: Optimizer,
    settings: LoopSettings,
    accelerator: Accelerator,
    warm_up: Task | None = None,
) -> float:
    """Mean seconds of an optimizer step, by taking a few; the adapter is not what it was afterwards.

    Args:
        task: ready to train.
        optimizer: over its pairs.
        settings: of the training; nothing is validated, scored or written.
        accelerator: of the training.
        warm_up: the task of the steps that are not timed; default the same.

    Returns:
        Seconds.

    Raises:
        KeyboardInterrupt: a signal asked the steps to stop.
    """
    silent = dataclasses.replace(
        settings, validation_steps=None, score_steps=None, spectrum_steps=None, warmup_steps=0
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    for steps, batches in ((WARM_UP_STEPS, warm_up or task), (TIMED_STEPS, task)):
        # A schedule leaves the rate of its end behind.
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
        with RunLog(None, steps) as log:
            short = dataclasses.replace(silent, max_steps=steps)
            result = train(batches, optimizer, short, log, accelerator)
        if result.interrupted:
            raise KeyboardInterrupt
    return result.seconds / TIMED_STEPS


def peak_memory() -> tuple[int, bool]:
    """Largest memory so far in bytes, and whether it is the GPU's."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(), True
    # Kilobytes, on a Mac bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit, False


def _wait() -> None:
    """Let the GPU finish."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
