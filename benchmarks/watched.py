"""Run a training script and note when each optimizer step ended, whatever the script and its optimizer are.

    python -m benchmarks.watched TIMES.json SCRIPT [flags of the script]

torch calls a hook after each step of each optimizer, so that two scripts are timed by the same clock.
"""

from __future__ import annotations

import json
import runpy
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook

from dreamrie.trainer.rehearsal import peak_memory


def watch(output: Path, script: Path, arguments: list[str]) -> None:
    """Run a script as `python SCRIPT arguments` would, and write when its steps ended.

    Args:
        output: JSON, written after every step: seconds of each step's end, and the largest memory so far in bytes
            (of the GPU's allocator; without a GPU, of the process).
        script: to run.
        arguments: its flags.
    """
    ends: list[float] = []

    def note(*_: Any) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        ends.append(time.perf_counter())
        output.write_text(json.dumps({"ends": ends, "peak_bytes": peak_memory()[0]}))

    register_optimizer_step_post_hook(note)
    sys.argv = [str(script), *arguments]
    runpy.run_path(str(script), run_name="__main__")


if __name__ == "__main__":
    watch(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
