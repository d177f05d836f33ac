"""Around a step: device and precision, the learning rate's shape, random streams, stopping."""

from __future__ import annotations

import hashlib
import logging
import math
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from types import FrameType
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs

from dreamrie.errors import ConfigError
from dreamrie.team import ALONE, Team

logger = logging.getLogger(__name__)

# The other processes wait while the main one draws class pictures or scores.
_PATIENCE = timedelta(hours=6)


def make_accelerator(mixed_precision: str = "no") -> Accelerator:
    """Choose device and precision: the GPU if there is one, else the CPU; join the other processes of a launch.

    Args:
        mixed_precision: "no", "fp16" or "bf16".

    Raises:
        ConfigError: this machine cannot compute in that precision, or accelerate cannot join processes here.
    """
    launched = int(os.environ.get("WORLD_SIZE", "1"))
    # Without a GPU accelerate would let each process train for itself, into the same folder.
    cpu = launched > 1 and not torch.accelerator.is_available()
    # accelerate refuses a second precision in one process; a page that runs several jobs needs it.
    if AcceleratorState._shared_state.get("_mixed_precision", mixed_precision) != mixed_precision:
        AcceleratorState._reset_state()
    try:
        patience = InitProcessGroupKwargs(timeout=_PATIENCE)
        accelerator = Accelerator(
            cpu=cpu, mixed_precision=mixed_precision, kwargs_handlers=[patience]
        )
    except ValueError as error:
        raise ConfigError(_no_such_precision(mixed_precision, str(error))) from error
    if mixed_precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would compute in fp32 without a word.
        AcceleratorState._reset_state()
        raise ConfigError(_no_such_precision(mixed_precision, "there is no GPU"))
    if accelerator.num_processes != launched:
        raise ConfigError(
            f"{launched} processes were launched, and accelerate cannot join them on {accelerator.device}\n"
            "  where: accelerate launch\n"
            "  what to do: set the environment variable ACCELERATE_USE_CPU=true, or start one process"
        )
    return accelerator


def _no_such_precision(mixed_precision: str, reason: str) -> str:
    """Message about a precision that this machine lacks."""
    # A GPU too old for bf16 computes in fp16; without a GPU it is the reverse.
    other = "fp16" if mixed_precision == "bf16" else "bf16"
    return (
        f"{mixed_precision} cannot be used on this machine: {' '.join(reason.split())}\n"
        "  where: --mixed_precision\n"
        f"  what to do: use {other}, or no"
    )


def derive_seed(*parts: int) -> int:
    """Seed of the stream named by some integers; other integers give an unrelated stream."""
    digest = hashlib.sha256(",".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def schedule_factor(scheduler: str, done: int, max_steps: int, warmup_steps: int = 0) -> float:
    """Part of the peak learning rate that holds after `done` optimizer steps.

    Args:
        scheduler: "constant", "linear" or "cosine".
        done: optimizer steps taken so far; `max_steps` gives the end value.
        max_steps: length of the run.
        warmup_steps: the factor climbs in a line and is 1 after this many; never 0, as a step
            with learning rate 0 is a step lost.

    Raises:
        ConfigError: the name is unknown.
    """
    if done < warmup_steps:
        return (done + 1) / (warmup_steps + 1)
    progress = (done - warmup_steps) / max(1, max_steps - warmup_steps)
    if scheduler == "constant":
        return 1.0
    if scheduler == "linear":
        return 1.0 - progress
    if scheduler == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ConfigError(f"scheduler {scheduler!r} is unknown; use constant, linear or cosine")


@contextmanager
def own_random_stream(device: torch.device, seed: int) -> Iterator[None]:
    """Dropout in the model draws from its own stream; the caller's state comes back afterwards."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        yield


@contextmanager
def sigterm_as_ctrl_c() -> Iterator[None]:
    """Make SIGTERM end a command as Ctrl-C does, also while no step is running that could be finished."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


class StopRequest:
    """First Ctrl-C or SIGTERM: finish the step, save, stop. Second: stop at once.

    Args:
        team: the processes of the training. A signal reaches them at different moments, or only one of them.
        device: that they talk through.

    Attributes:
        asked: this process has received a signal.
    """

    def __init__(self, team: Team = ALONE, device: torch.device | str = "cpu") -> None:
        self.asked = False
        self._team, self._device = team, device
        self._previous: dict[int, Any] = {}

    def agreed(self) -> bool:
        """Whether any process has received a signal; every process asks at the same places, and gets one answer."""
        return self._team.total(int(self.asked), self._device) > 0

    def _note(self, number: int, frame: FrameType | None) -> None:
        """Signal handler."""
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True
        logger.warning("Stopping after this step; once more to stop at once without saving.")

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
