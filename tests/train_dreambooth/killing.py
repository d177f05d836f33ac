"""A training in a process of its own, which can be killed at any moment; what it left, without its times."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from dreamrie.checkpoint import list_checkpoints, read_checkpoint

# Forked from a server that has imported everything, a new process starts in a blink; it shares nothing with this one.
multiprocessing.set_forkserver_preload(["train_dreambooth"])
_CONTEXT = multiprocessing.get_context("forkserver")


def _train(argv: list[str], log: str) -> None:
    """The command in a new process."""
    import sys

    import torch

    import train_dreambooth

    torch.set_num_threads(1)
    sys.stderr = Path(log).open("a", encoding="utf-8")
    os._exit(train_dreambooth.main(argv))


def start(argv: Sequence[str], folder: Path) -> BaseProcess:
    """Start the command; its messages go to a file beside the folder."""
    process = _CONTEXT.Process(target=_train, args=(list(argv), f"{folder}.log"))
    process.start()
    return process


def finish(argv: Sequence[str], folder: Path) -> int | None:
    """Run the command to its end; returns its exit code."""
    process = start(argv, folder)
    process.join(300)
    return process.exitcode


def steps_in(folder: Path) -> int:
    """Steps recorded so far."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_at_random(process: BaseProcess, folder: Path, chance: random.Random, span_s: float) -> int:
    """SIGKILL at a random moment after the first step; returns the steps that were recorded then."""
    while process.is_alive() and steps_in(folder) == 0:
        time.sleep(0.005)
    time.sleep(chance.uniform(0, span_s))
    if process.is_alive() and process.pid is not None:
        os.kill(process.pid, signal.SIGKILL)
    process.join()
    return steps_in(folder)


def result_of(folder: Path) -> dict[str, Any]:
    """Adapter bytes, the whole last checkpoint, and the logged steps without their times."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    last = list_checkpoints(folder)[-1]
    state = read_checkpoint(last).state
    return {
        "adapter": (folder / "pytorch_lora_weights.safetensors").read_bytes(),
        "tensors": (last / "tensors.safetensors").read_bytes(),
        "progress": {k: v for k, v in state["progress"].items() if "seconds" not in k},
        "losses": [{k: v for k, v in row.items() if k != "steps_per_s"} for row in rows],
        "spectrum": (folder / "spectrum.jsonl").read_bytes(),
    }
