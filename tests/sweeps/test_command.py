"""The command from end to end: real trainings; a worker is killed, a training is killed, one cannot be trained."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from dreamrie.config import to_yaml
from dreamrie.sweeps.plan import read_sweep
from tests.contracts.sources import ROOT
from tests.small_models import make_small_pipeline, write_pictures
from tests.train_dreambooth.killing import finish, result_of, steps_in

pytestmark = pytest.mark.end_to_end

STEPS, EVERY = 400, 50
PATIENCE_S = 600.0


def write_file(folder: Path) -> Path:
    """Two concepts with two learning rates on a small model, and one concept that cannot be trained."""
    entries = []
    for number, name in enumerate(("one", "two")):
        pictures = folder / name
        pictures.mkdir()
        write_pictures(pictures, 3, seed=number)
        prompt = f"a photo of a sks {name}"
        entries.append(
            {"name": name, "instance_data_dir": str(pictures), "instance_prompt": prompt}
        )
    bad = {**entries[0], "name": "bad", "pretrained_model_name_or_path": str(folder / "no-model")}
    model = make_small_pipeline("tiny-vae", folder / "model")
    content = {
        "base": {
            "pretrained_model_name_or_path": str(model),
            "max_train_steps": STEPS,
            "checkpointing_steps": EVERY,
            "train_batch_size": 2,
            "rank": 2,
            "loi_batches": 2,
        },
        "concepts": [*entries, bad],
        "grid": {"learning_rate": [0.01, 0.02]},
    }
    path = folder / "sweep.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False), "utf-8")
    return path


def training_of(name: str) -> tuple[int, int]:
    """Process of a training, and its worker."""
    words = ["ps", "-ww", "-eo", "pid=,ppid=,args="]
    listed = subprocess.run(words, capture_output=True, text=True, check=True)
    for line in listed.stdout.splitlines():
        pid, parent, words = line.split(None, 2)
        if "dreamrie.sweeps.child" in words and name in words:
            return int(pid), int(parent)
    raise AssertionError(f"no training of {name}")


def kill(folder: Path, name: str, *, worker: bool) -> None:
    """-9 in the middle of a training, to it or to its worker."""
    deadline = time.monotonic() + PATIENCE_S
    while steps_in(folder / name) < EVERY + 1:
        assert time.monotonic() < deadline, name
        time.sleep(0.002)
    os.kill(training_of(str(folder / name))[int(worker)], signal.SIGKILL)


@pytest.mark.slow
def test_a_sweep_with_a_killed_worker_is_the_trainings_alone(tmp_path: Path) -> None:
    """Every training ends with the bytes that the ordinary command writes, and what has finished is not begun again."""
    path, out = write_file(tmp_path), tmp_path / "out"
    words = [sys.executable, "-m", "dreamrie", "sweep", "--config", str(path), "--workers", "2"]
    words += ["--output_dir", str(out)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log = tmp_path / "log"
    with (
        log.open("w") as stream,
        subprocess.Popen(words, cwd=ROOT, env=environment, stdout=stream, stderr=stream) as process,
    ):
        try:
            kill(out, "one,learning_rate=0.01", worker=True)
            kill(out, "two,learning_rate=0.01", worker=False)
            assert process.wait(PATIENCE_S) == 1, log.read_text()
        finally:
            process.kill()
    rows = {row["name"]: row for row in json.loads((out / "table.json").read_text())["runs"]}
    told = {name: (row["status"], row["starts"]) for name, row in rows.items()}
    assert told == {
        "one,learning_rate=0.01": ("finished", 2),
        "one,learning_rate=0.02": ("finished", 1),
        "two,learning_rate=0.01": ("finished", 2),
        "two,learning_rate=0.02": ("finished", 1),
        "bad,learning_rate=0.01": ("failed", 1),
        "bad,learning_rate=0.02": ("failed", 1),
    }, log.read_text()
    assert "no-model" in rows["bad,learning_rate=0.01"]["error"]
    for run in read_sweep(path, tmp_path / "alone").runs[:4]:
        settings = tmp_path / f"{run.name}.yaml"
        settings.write_text(to_yaml(run.config), "utf-8")
        run.folder.parent.mkdir(exist_ok=True)
        assert finish(["--config", str(settings)], run.folder) == 0
        assert result_of(out / run.name) == result_of(run.folder), run.name
    again = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert again.returncode == 1
    assert "finished before: 4 of 6" in again.stdout
    after = {
        row["name"]: row["starts"] for row in json.loads((out / "table.json").read_text())["runs"]
    }
    assert after == {
        name: row["starts"] + (row["status"] == "failed") for name, row in rows.items()
    }
