"""A sweep without models: a training that only counts, in forked processes, which start in a blink and keep mutants.

The last word of its prompt says how a training goes: "killed" is killed with -9 at its sixth step, the first time;
"orphaned" kills its worker there; "patient" waits at its third step to be stopped; "refused" and "broken" fail as a
real one does; "doomed" is killed every time.
"""

from __future__ import annotations

import multiprocessing
import multiprocessing.connection
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import yaml

from dreamrie.sweeps import child, plan, running
from tests.small_models import write_pictures

MODULE, STEPS, EVERY = "fake_training", 12, 4
_FORK = multiprocessing.get_context("fork")

PROGRAM = f"""
import json, os, signal, sys, time
from pathlib import Path
from dreamrie.errors import ConfigError
from dreamrie.run_folder import lock_folder

text = Path(sys.argv[sys.argv.index("--config") + 1]).read_text("utf-8")
settings = dict(line.split(": ", 1) for line in text.splitlines() if ": " in line)
folder, steps = Path(settings["output_dir"]), int(settings["max_train_steps"])
how = settings["instance_prompt"].split()[-1]
if how == "refused":
    sys.stderr.write("error: no such picture\\n  where: here\\n")
    sys.exit(2)
if how == "broken":
    raise KeyError("unet")
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1))

def attack(step):
    once = folder / "attacked"
    if step == 6 and how in ("killed", "orphaned", "doomed") and (how == "doomed" or not once.exists()):
        once.touch()
        os.kill(os.getppid() if how == "orphaned" else os.getpid(), signal.SIGKILL)
        wait_to_be_stopped()
    if step == 3 and how == "patient":
        wait_to_be_stopped()

def wait_to_be_stopped():
    deadline = time.monotonic() + 2
    while not stop and time.monotonic() < deadline:
        time.sleep(0.01)

def commit(step, value):
    place = folder / f"checkpoint-{{step}}"
    place.mkdir(exist_ok=True)
    (place / "value").write_text(str(value), "utf-8")

try:
    with lock_folder(folder):
        done, value, kept = 0, 1, b""
        if "--resume_from_checkpoint" in sys.argv:
            done = max(int(path.name.split("-")[1]) for path in folder.glob("checkpoint-*"))
            value = int((folder / f"checkpoint-{{done}}" / "value").read_text("utf-8"))
            lines = (folder / "metrics.jsonl").read_bytes().splitlines(keepends=True)
            kept = b"".join(lines[:done])
        (folder / "config.yaml").write_text(text, "utf-8")
        (folder / "metrics.jsonl").write_bytes(kept)
        for step in range(done + 1, steps + 1):
            value = value * 31 % 1009 + step
            row = {{"step": step, "loss": value / 1009, "steps_per_s": 50.0, "skipped": None}}
            with (folder / "metrics.jsonl").open("ab") as stream:
                stream.write((json.dumps(row) + "\\n").encode())
            with (folder / "trace").open("a") as stream:
                stream.write(f"{{step}}\\n")
            attack(step)
            time.sleep(0.5 if stop else 0.002)  # a step may take its time
            if stop or step % {EVERY} == 0 or step == steps:
                commit(step, value)
            if stop:
                sys.exit(130)
        (folder / "pytorch_lora_weights.safetensors").write_text(str(value), "utf-8")
except ConfigError as error:
    sys.stderr.write(f"error: {{error}}\\n")
    sys.exit(2)
"""


def put_program(folder: Path) -> Path:
    """A folder to import the training from."""
    folder.mkdir(exist_ok=True)
    (folder / f"{MODULE}.py").write_text(PROGRAM, "utf-8")
    return folder


def trace(folder: Path) -> list[int]:
    """Steps in the order in which they were taken, by whatever process."""
    path = folder / "trace"
    return [int(line) for line in path.read_text().split()] if path.exists() else []


def adapter(folder: Path) -> str:
    return (folder / "pytorch_lora_weights.safetensors").read_text("utf-8")


def write_sweep(folder: Path, hows: Sequence[str], **grid: Any) -> plan.Sweep:
    """A sweep of counting trainings, one concept for each way to go."""
    pictures = folder / "pictures"
    if not pictures.exists():
        pictures.mkdir(parents=True)
        write_pictures(pictures, 1)
    content = {
        "base": {"max_train_steps": STEPS, "checkpointing_steps": EVERY},
        "concepts": [
            {"name": how, "instance_data_dir": str(pictures), "instance_prompt": f"a sks {how}"}
            for how in hows
        ],
        **({"grid": grid} if grid else {}),
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content), "utf-8")
    return plan.read_sweep(path, folder / "out")


class Started:
    """A forked training, and the worker's end of its pipe."""

    def __init__(self, folder: Path, program: Path) -> None:
        reading, self._writing = os.pipe()
        self.process: BaseProcess = _FORK.Process(
            target=_child, args=(reading, self._writing, folder, program)
        )
        self.process.start()
        os.close(reading)

    def let_go(self) -> None:
        """As when its worker is killed."""
        os.close(self._writing)

    def code(self) -> int | None:
        """Exit code, once it has ended."""
        self.process.join(20)
        code = self.process.exitcode
        self.process.close()
        return code


def _child(reading: int, writing: int, folder: Path, program: Path) -> None:
    """What `python -m dreamrie.sweeps.child` does."""
    os.close(writing)
    os.dup2(reading, 0)
    # The test's own stream is one of pytest.
    sys.stderr = open(2, "w", encoding="utf-8", buffering=1, closefd=False)
    sys.path.insert(0, str(program))
    child.main([str(folder), MODULE])


class Forked:
    """Implements `dreamrie.sweeps.engine.Engine` without an engine."""

    def __init__(self, program: Path) -> None:
        self._program = program
        self._started: dict[int, Started] = {}
        self.given: list[str] = []

    def give(self, slot: int, words: Sequence[str]) -> None:
        assert slot not in self._started, "a worker has one training at a time"
        folder = Path(words[len(running.CHILD)])
        self.given.append(folder.name)
        self._started[slot] = Started(folder, self._program)

    def wait(self) -> tuple[int, int | None]:
        sentinels = {one.process.sentinel: slot for slot, one in self._started.items()}
        ready = multiprocessing.connection.wait(list(sentinels), 20)
        assert ready, "a training does not end"
        slot = sentinels[ready[0]]  # type: ignore[index]
        one = self._started.pop(slot)
        one.let_go()
        return slot, one.code()


@contextmanager
def forked_engine(program: Path, engines: list[Forked]) -> Iterator[Any]:
    """Put forked processes in the place of the engine."""

    @contextmanager
    def start(environments: Sequence[Mapping[str, str]], scratch: Path, restarts: int) -> Any:
        engines.append(Forked(program))
        yield engines[-1]

    yield start
