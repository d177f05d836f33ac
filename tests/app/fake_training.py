"""A training without a model: a program in the place of train_dreambooth.py that leaves what that one leaves.

Its subject says how it goes: "deaf" does not stop, "refused" and "broken" fail as the real one does, "memory" too.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from app import running
from app.asked import Train
from app.jobs import Device
from app.storage import Owner, Storage
from app.training import Trainings
from tests.contracts.sources import ROOT
from tests.mutants import replaced

LONG_S = 30.0

PROGRAM = r"""
import json, os, signal, sys, time
from pathlib import Path

settings = {}
for line in Path(sys.argv[sys.argv.index("--config") + 1]).read_text("utf-8").splitlines():
    name, colon, value = line.partition(": ")
    if colon:
        settings[name] = value.strip("'\"")
folder, steps = Path(settings["output_dir"]), int(settings["max_train_steps"])
how = settings["instance_prompt"].split()[-1]
stop = []
signal.signal(signal.SIGTERM, lambda *_: stop.append(1) if how != "deaf" else None)
if how == "refused":
    sys.exit("error: " + str(folder / "a.png") + " is no picture\n  where: x\n  what to do: give another")
if how == "broken":
    sys.exit("error: unexpected KeyError: 'unet' in /srv/x\n  run again with -v to see where")
if how == "memory":
    sys.exit("error: unexpected OutOfMemoryError: CUDA out of memory. Tried to allocate")
done = 0
if "--resume_from_checkpoint" in sys.argv:
    done = max(int(p.name.split("-")[1]) for p in folder.glob("checkpoint-*"))
    print("Going on from step", done, flush=True)
def commit(step):
    (folder / f"checkpoint-{step}").mkdir(exist_ok=True)
    (folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")
def lines():
    path = folder / "metrics.jsonl"
    kept = path.read_bytes().splitlines(keepends=True)[:done] if done else []
    path.write_bytes(b"".join(kept))
    return path.open("ab", buffering=0)
with lines() as log:
    for step in range(done + 1, steps + 1):
        time.sleep(0.02)
        row = {"step": step, "loss": 1 / step, "steps_per_s": 50.0, "skipped": None}
        log.write((json.dumps(row) + "\n").encode())
        if stop:
            commit(step)
            sys.exit(130)
        if step % 20 == 0 or step == steps:
            commit(step)
"""


def put_program(folder: Path) -> Path:
    """A checkout that holds this training only."""
    folder.mkdir(exist_ok=True)
    (folder / "train_dreambooth.py").write_text(PROGRAM, "utf-8")
    return folder


class Server:
    """Storage, device and trainings over one data folder, as the app has them."""

    def __init__(self, root: Path, **options: Any) -> None:
        self.storage = Storage(root)
        self.device = Device()
        self.trainings = Trainings(self.storage, self.device, None, None, None, **options)

    def ask(self, owner: Owner, subject: str = "dog", steps: int = 200) -> str:
        """Upload two photos and start a training."""
        photos = self.storage.create(owner, "photos", "photos")
        for number in range(2):
            path = self.storage.file(owner, "photos", photos, f"{number}.png")
            Image.new("RGB", (64, 64), (200, 40 * number, 30)).save(path)
        train = Train(
            title="My Dog", subject=subject, living=True, photos=photos, steps=steps, rank=2,
            learning_rate=2e-2, seed=0,
        )  # fmt: skip
        return self.trainings.start(owner, train)

    def until(
        self, owner: Owner, name: str, *statuses: str, step: int = 0, seconds: float = LONG_S
    ) -> Any:
        """The state, once it has one of these statuses and so many steps."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            state = self.trainings.state(owner, name)
            if state.status in statuses and state.step >= step:
                return state
            if state.status in {"finished", "failed", "stopped"}:
                break
            time.sleep(0.02)
        raise AssertionError(f"{name} is {state.status}, {state.doing}, {state.error}")


@contextmanager
def server(folder: Path, **options: Any) -> Iterator[Server]:
    """A server whose trainings are fake ones."""
    with replaced(running, CHECKOUT=put_program(folder / "checkout")):
        made = Server(folder / "data", **options)
        try:
            yield made
        finally:
            made.device.close(LONG_S)


ORPHAN = """
import os, sys, time
import tests.app.light
from pathlib import Path
from app import running
running.CHECKOUT = Path(sys.argv[1])
running.launch(Path(sys.argv[2]), sys.argv[3:])
os.kill(os.getpid(), 9)
"""


def left_behind(folder: Path, run: Path, *arguments: str) -> int:
    """A training whose server was killed with -9 right after it had started it; returns its number."""
    command = [sys.executable, "-c", ORPHAN, str(folder / "checkout"), str(run)]
    given = arguments or ("--config", str(run / "config.yaml"))
    subprocess.run([*command, *given], cwd=ROOT, check=False, env={**os.environ})
    pid = running.read_record(run)["pid"]
    assert isinstance(pid, int)
    return pid
