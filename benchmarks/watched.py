"""Run a training script and note when each optimizer step ended, whatever the script and its optimizer are.

    python -m benchmarks.watched TIMES.json SCRIPT [flags of the script]

torch calls a hook after each step of each optimizer, so that two scripts are timed by the same clock. With --parts
before all else, the parts of each step of `train_dreambooth.py` are timed as well; without a GPU in seconds of work of
the processor, so that other programs count less than on a clock.
"""

from __future__ import annotations

import functools
import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch.optim.optimizer import register_optimizer_step_post_hook

from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.runlog import RunLog
from dreamrie.trainer.loop import _Loop
from dreamrie.trainer.rehearsal import peak_memory

WHOLE, REST = "the whole step", "all else"
# What the loop calls in a step, in its order; none of them calls another. The last one is the end of the step.
PARTS: tuple[tuple[str, Any, str], ...] = (
    ("batch", DreamBoothTask, "batch"),
    ("forward pass, loss", DreamBoothTask, "loss"),
    ("backward pass", Accelerator, "backward"),
    ("gradient norm", _Loop, "gradient_norm"),
    ("clipping", torch.nn.utils, "clip_grads_with_norm_"),
    ("optimizer", AcceleratedOptimizer, "step"),
    ("records", RunLog, "step"),
    ("spectra, pictures, checkpoints", _Loop, "after_step"),
)


class Parts:
    """Seconds of each part of each step.

    Attributes:
        steps: one entry for each step that ended: seconds by part; the first one is what comes before training.
    """

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []
        self._open: dict[str, float] = {}
        self._began = _spent()

    def watch(self) -> None:
        """Time the parts from now on, in this process."""
        for name, owner, method in PARTS:
            setattr(owner, method, self.timed(name, getattr(owner, method)))

    def timed(self, name: str, function: Any) -> Any:
        """The same function with a clock around it.

        Args:
            name: of the part.
            function: that does it.

        Returns:
            The function; the last part ends the step.
        """

        @functools.wraps(function)
        def run(*arguments: Any, **named: Any) -> Any:
            started = _spent()
            try:
                return function(*arguments, **named)
            finally:
                ended = _spent()
                self._open[name] = self._open.get(name, 0.0) + ended - started
                if name == PARTS[-1][0]:
                    self._end(ended)

        return run

    def _end(self, now: float) -> None:
        """Close a step: what no part took is the rest."""
        whole, self._began = now - self._began, now
        rest = whole - sum(self._open.values())
        self.steps.append({**self._open, REST: rest, WHOLE: whole})
        self._open = {}


def watch(output: Path, script: Path, arguments: list[str], parts: Parts | None = None) -> None:
    """Run a script as `python SCRIPT arguments` would, and write when its steps ended.

    Args:
        output: JSON, written after every step: seconds of each step's end, the largest memory so far in bytes
            (of the GPU's allocator; without a GPU, of the process), and the parts of the steps that were over.
        script: to run.
        arguments: its flags.
        parts: also time these.
    """
    ends: list[float] = []

    def note(*_: Any) -> None:
        ends.append(_now())
        found = {"ends": ends, "peak_bytes": peak_memory()[0]}
        output.write_text(json.dumps({**found, "parts": parts.steps if parts else []}))

    register_optimizer_step_post_hook(note)
    if parts is not None:
        parts.watch()
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


def _spent() -> float:
    """Seconds that count for a part: with a GPU those of a clock, else those that this process has worked."""
    return _now() if torch.cuda.is_available() else time.process_time()


def _now() -> float:
    """Seconds, once the GPU has done what it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    words = sys.argv[1:]
    wanted = Parts() if words[0] == "--parts" else None
    words = words[1:] if wanted else words
    watch(Path(words[0]), Path(words[1]), words[2:], wanted)
