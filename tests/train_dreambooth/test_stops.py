"""How a run ends before its time: losses that are not finite, a full disk, signals."""

from __future__ import annotations

import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dreamrie.diffusion.task import DreamBoothTask
from tests.contracts.sources import ROOT
from tests.train_dreambooth.small_run import ADAPTER, PROMPT, Command, metrics, moved

pytestmark = pytest.mark.end_to_end

# ------------------------------------------------------------------------------------ failures


def test_a_loss_that_is_never_finite_ends_the_run(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = DreamBoothTask.loss
    monkeypatch.setattr(
        DreamBoothTask, "loss", lambda task, batch: real(task, batch) * float("nan")
    )
    assert command() == 1
    assert "not finite 3 times in a row" in caplog.text
    assert ".png at timestep" in caplog.text
    assert not (tmp_path / "run" / ADAPTER).exists()


def test_samples_that_cannot_be_written_cost_no_training(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file where the folder would be")
    assert command("--validation_prompt", PROMPT) == 0
    failures = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert [text.split(" could")[0] for text in failures] == [
        "Samples of step 0",
        "Samples of step 4",
    ]
    assert moved(tmp_path / "run") > 1e-3


def test_an_adapter_that_cannot_be_written_is_a_failed_training(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamrie.adapter_file.write_atomic", full)
    assert command("--max_train_steps", 1) == 1
    assert "No space left on device" in caplog.text


# ------------------------------------------------------------------------------------ signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_step_saves_nothing_and_says_so(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    real = DreamBoothTask.validate

    def stopped(task: DreamBoothTask, step: int, directory: Path) -> dict[str, float]:
        os.kill(os.getpid(), number)
        return real(task, step, directory)

    monkeypatch.setattr(DreamBoothTask, "validate", stopped)
    before = signal.getsignal(number)
    assert command("--validation_prompt", PROMPT) == 130
    assert "stopped; nothing was saved" in caplog.messages
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "adapter in" not in caplog.text
    assert not (tmp_path / "run" / ADAPTER).exists()
    assert signal.getsignal(number) == before


@pytest.fixture
def attentive() -> Iterator[None]:
    """A test run that was started in the background of a shell ignores Ctrl-C, and so would the command."""
    previous = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, previous)


@pytest.mark.usefixtures("attentive")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_training_saves_nothing_and_says_so(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """While the locally optimal start is computed."""

    def stopped(task: DreamBoothTask, count: int) -> list[object]:
        signal.raise_signal(number)
        return []

    monkeypatch.setattr(DreamBoothTask, "loi_batches", stopped)
    assert command() == 130
    assert caplog.messages[-1] == "stopped at once; what was saved before is intact"
    assert not (tmp_path / "run").exists()


def test_ctrl_c_finishes_the_step_saves_and_exits_130(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = ["--pretrained_model_name_or_path", model, "--instance_data_dir", pictures]
    flags += ["--output_dir", tmp_path / "run", "--max_train_steps", "100000"]
    flags += ["--instance_prompt", PROMPT, "--init", "orthonormal", "--train_batch_size", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_dreambooth.py"), *map(str, flags)],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "it/s" not in errors  # quiet: standard error is not a terminal
    steps = len(metrics(tmp_path / "run"))
    assert 2 <= steps < 100_000
    assert f"{steps} steps in" in errors
    assert moved(tmp_path / "run") > 1e-5
