"""What a training will take, found by doing a little of it: for a dry run, whose model is thrown away."""

from __future__ import annotations

import dataclasses
import logging
import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch.optim import Optimizer

from dreamrie.runlog import RunLog
from dreamrie.trainer.loop import train
from dreamrie.trainer.task import LoopSettings, Task

# The first steps choose kernels and allocate; the second part is timed.
WARM_UP_STEPS, TIMED_STEPS = 2, 4


@dataclass(frozen=True)
class Estimate:
    """Seconds of each part of a training, and its peak memory.

    Attributes:
        start: locally optimal initialization, 0 without it.
        steps: all optimizer steps.
        looks: pictures and scores on the way.
        peak_bytes: of the GPU's allocator; without a GPU, of the whole process.
        on_gpu: which of the two.
        compiling: seconds of torch.compile, 0 without it.
    """

    start: float
    steps: float
    looks: float
    peak_bytes: int
    on_gpu: bool
    compiling: float = 0.0

    def describe(self) -> list[str]:
        """Two lines for a person: time by parts, and memory."""
        total = self.start + self.compiling + self.steps + self.looks
        parts = f"initialization {self.start:.0f}, steps {self.steps:.0f}, pictures and scores {self.looks:.0f}"
        if self.compiling:
            parts += f", torch.compile {self.compiling:.0f}"
        place = "on the GPU" if self.on_gpu else "of the process"
        return [
            f"time: about {total:.0f} s after loading ({parts}), from steps done here",
            f"memory: about {self.peak_bytes / 2**30:.2f} GiB {place} at its peak",
        ]


@contextmanager
def quietly() -> Iterator[None]:
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


def step_seconds(
    task: Task, optimizer: Optimizer, settings: LoopSettings, accelerator: Accelerator
) -> float:
    """Mean seconds of an optimizer step, by taking a few; the adapter is not what it was afterwards.

    Args:
        task: ready to train.
        optimizer: over its pairs.
        settings: of the training; nothing is validated, scored or written.
        accelerator: of the training.

    Returns:
        Seconds.

    Raises:
        KeyboardInterrupt: a signal asked the steps to stop.
    """
    silent = dataclasses.replace(
        settings, validation_steps=None, score_steps=None, spectrum_steps=None, warmup_steps=0
    )
    peaks = [group["lr"] for group in optimizer.param_groups]
    for steps in (WARM_UP_STEPS, TIMED_STEPS):
        # A schedule leaves the rate of its end behind.
        for group, peak in zip(optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak
        with RunLog(None, steps) as log:
            short = dataclasses.replace(silent, max_steps=steps)
            result = train(task, optimizer, short, log, accelerator)
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
