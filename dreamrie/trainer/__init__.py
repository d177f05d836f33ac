"""The one training loop over a `Task`: accumulate, clip, guard, step, log, validate, save."""

from __future__ import annotations

from dreamrie.trainer.control import (
    StopRequest,
    derive_seed,
    make_accelerator,
    own_random_stream,
    schedule_factor,
    sigterm_as_ctrl_c,
)
from dreamrie.trainer.loop import change_spectra, train
from dreamrie.trainer.task import LoopSettings, Task, TrainResult

__all__ = [
    "LoopSettings",
    "StopRequest",
    "Task",
    "TrainResult",
    "change_spectra",
    "derive_seed",
    "make_accelerator",
    "own_random_stream",
    "schedule_factor",
    "sigterm_as_ctrl_c",
    "train",
]
