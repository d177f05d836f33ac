"""A sweep on its engine: one worker for each device, and one training at a time for each worker.

The engine starts a killed worker again and hands it the same training; a killed training is started again here. Both
go on from the last checkpoint (`child`).
"""

from __future__ import annotations

import importlib.util
import os
import shutil
import sys
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dreamrie.config import to_yaml
from dreamrie.errors import ConfigError
from dreamrie.run_folder import lock_folder, write_atomic
from dreamrie.sweeps.child import wait_until_free
from dreamrie.sweeps.engine import Engine, check_engine, start_engine
from dreamrie.sweeps.plan import COMMANDS, Run, Sweep
from dreamrie.sweeps.record import SETTINGS, Record, read_record, write_record
from dreamrie.sweeps.table import is_finished

CHILD: tuple[str, ...] = (sys.executable, "-m", "dreamrie.sweeps.child")
RESTARTS = 3
_SCRATCH = ".engine-"


@dataclass(frozen=True)
class Slot:
    """A device that a worker has for itself.

    Attributes:
        name: for people.
        environment: of the worker and its trainings.
    """

    name: str
    environment: Mapping[str, str]


def find_slots(workers: int | None) -> list[Slot]:
    """Devices of this machine.

    Args:
        workers: how many trainings at a time; None: one for each GPU, or one on the CPU.

    Returns:
        One slot for each worker: on GPUs in turn, or on the CPU with an equal share of its threads, unless
        OMP_NUM_THREADS says how many.

    Raises:
        ConfigError: no worker is wanted.
    """
    if workers is not None and workers < 1:
        raise ConfigError(f"--workers {workers} cannot train anything; give 1 or more")
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    count = torch.cuda.device_count()
    names = [part.strip() for part in visible.split(",") if part.strip()][:count]
    devices = names or [str(number) for number in range(count)]
    if devices:
        pinned = [devices[number % len(devices)] for number in range(workers or len(devices))]
        return [Slot(f"GPU {device}", {"CUDA_VISIBLE_DEVICES": device}) for device in pinned]
    wanted = workers or 1
    # Trainings that fight for threads take longer than one after the other.
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, torch.get_num_threads() // wanted))
    share = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS"), threads)
    return [Slot(f"CPU {number}, threads: {threads}", share) for number in range(wanted)]


def run_sweep(
    sweep: Sweep,
    output_dir: Path,
    slots: Sequence[Slot],
    restarts: int,
    tell: Callable[[str, Run], None],
) -> None:
    """Train what is not finished yet; a training that fails does not stop the others.

    Ctrl-C ends it when the trainings have stopped, each with a checkpoint.

    Args:
        sweep: its folders have been checked.
        output_dir: of the sweep.
        slots: at least one.
        restarts: how often a training is started again whose process or worker was killed.
        tell: is called with what happens to a training: "ended" when that is over, whatever its end.
    """
    check_engine()
    output_dir.mkdir(parents=True, exist_ok=True)
    with lock_folder(output_dir):
        waiting = [run for run in sweep.runs if not is_finished(run)]
        for left in output_dir.glob(f"{_SCRATCH}*"):
            shutil.rmtree(left, ignore_errors=True)
        for run in waiting:
            run.folder.mkdir(exist_ok=True)
            write_atomic(run.folder / SETTINGS, to_yaml(run.config).encode())
        used = slots[: len(waiting)]
        if not used:
            return
        scratch = output_dir / f"{_SCRATCH}{os.getpid()}"
        environments = [{**_python_path(), **slot.environment} for slot in used]
        try:
            with start_engine(environments, scratch, restarts) as engine:
                _train_all(engine, COMMANDS[sweep.task], used, deque(waiting), restarts, tell)
        finally:
            # Their workers are gone, so those that still run are stopping.
            for run in waiting:
                wait_until_free(run.folder)
            shutil.rmtree(scratch, ignore_errors=True)


def _train_all(
    engine: Engine,
    command: Sequence[str],
    slots: Sequence[Slot],
    waiting: deque[Run],
    restarts: int,
    tell: Callable[[str, Run], None],
) -> None:
    """Hand each worker its next training when it has ended one, until nothing waits and nothing runs."""
    busy: dict[int, Run] = {}
    kills: Counter[str] = Counter()

    def give(slot: int, run: Run) -> None:
        busy[slot] = run
        engine.give(slot, [*CHILD, str(run.folder.absolute()), *command])

    while waiting or busy:
        for slot in range(len(slots)):
            if waiting and slot not in busy:
                tell(f"begins on {slots[slot].name}", waiting[0])
                give(slot, waiting.popleft())
        slot, code = engine.wait()
        run = busy.pop(slot)
        if code is not None and code < 0 and kills[run.name] < restarts:
            kills[run.name] += 1
            tell("was killed, and goes on", run)
            give(slot, run)
            continue
        if code is None:
            _give_up(run, f"its worker was killed {restarts + 1} times")
        elif code < 0:
            _give_up(run, f"it was killed {restarts + 1} times, perhaps for want of memory")
        tell("ended", run)


def _give_up(run: Run, why: str) -> None:
    """Note why a training is not started again."""
    write_record(run.folder, Record(read_record(run.folder).starts, None, why))


def _python_path() -> dict[str, str]:
    """Where trainings find what `python train_dreambooth.py` finds beside itself, such as scores."""
    script = importlib.util.find_spec("train_dreambooth")
    beside = [str(Path(script.origin).parent)] if script and script.origin else []
    given = os.environ.get("PYTHONPATH", "")
    return {"PYTHONPATH": os.pathsep.join([*beside, *([given] if given else [])])}
