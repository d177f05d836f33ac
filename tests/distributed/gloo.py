"""Processes of this machine that talk through gloo: forked, so that nothing is imported again and mutants are kept."""

from __future__ import annotations

import gc
import multiprocessing
import os
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState

_CONTEXT = multiprocessing.get_context("fork")
LIMIT_S = 60


def _process(
    rank: int, count: int, folder: Path, work: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    """One of them: what `work` returns, or how it failed, goes into a file."""
    os.environ |= {
        "OMP_NUM_THREADS": "1",  # accelerate warns about a choice of its own otherwise
        "WORLD_SIZE": str(count),
        "LOCAL_WORLD_SIZE": str(count),
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "ACCELERATE_USE_CPU": "true",
    }
    # A collection would copy every page that is shared with the parent.
    gc.freeze()
    try:
        AcceleratorState._reset_state(reset_partial_state=True)
        store = dist.FileStore(str(folder / "store"), count)
        limit = timedelta(seconds=LIMIT_S)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=count, timeout=limit)
        torch.save(work(*arguments), folder / f"{rank}.pt")
    except BaseException:
        (folder / f"{rank}.txt").write_text(traceback.format_exc(), "utf-8")
        os._exit(1)
    # Not the interpreter's own way out, which would wait for the others: who still talks to this one is in error.
    os._exit(0)


def on_processes(count: int, work: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Call `work(*arguments)` on several processes at once; returns what each of them returned.

    An error of one of them is an AssertionError here; no process outlives the call.
    """
    with tempfile.TemporaryDirectory() as name, warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*fork.*", DeprecationWarning)
        folder = Path(name)
        processes = [
            _CONTEXT.Process(target=_process, args=(rank, count, folder, work, arguments))
            for rank in range(count)
        ]
        for process in processes:
            process.start()
        try:
            _wait(processes)
        finally:
            for process in processes:
                process.kill()
                process.join()
        errors = [path.read_text("utf-8") for path in sorted(folder.glob("*.txt"))]
        assert not errors, errors[0]
        codes = [process.exitcode for process in processes]
        assert codes == [0] * count, f"exit codes {codes}"
        return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(count)]


def _wait(processes: list[Any]) -> None:
    """Until all have ended, or one has failed."""
    deadline = time.monotonic() + LIMIT_S
    while any(process.is_alive() for process in processes):
        assert time.monotonic() < deadline, "the processes wait for each other"
        if any(process.exitcode for process in processes):
            return
        time.sleep(0.005)
