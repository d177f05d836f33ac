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
from dreamrie.trainer.loop import train
from dreamrie.trainer.saving import Checkpoints
from dreamrie.trainer.scoring import (
    BEST,
    SCORED,
    Scorer,
    Verdict,
    scored_folder,
)
from dreamrie.trainer.spectra import change_spectra
from dreamrie.trainer.task import LoopSettings, Task, TrainResult

__all__ = [
    "BEST",
    "SCORED",
    "Checkpoints",
    "LoopSettings",
    "Scorer",
    "StopRequest",
    "Task",
    "TrainResult",
    "Verdict",
    "change_spectra",
    "derive_seed",
    "make_accelerator",
    "own_random_stream",
    "schedule_factor",
    "scored_folder",
    "sigterm_as_ctrl_c",
    "train",
]
