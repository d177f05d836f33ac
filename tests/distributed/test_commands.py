"""The commands on several processes: what they write, how they stop and go on, and what they refuse."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch

from dreamrie.commands import train_llm
from dreamrie.config import LlmConfig, config_of
from dreamrie.errors import ConfigError
from dreamrie.llm.task import CausalLmTask
from dreamrie.runlog import start_logging
from dreamrie.trainer import make_accelerator
from tests.contracts.sources import ROOT
from tests.distributed.gloo import on_processes
from tests.distributed.test_training import watch_writes
from tests.llm import small
from tests.llm.test_train_llm import SHORT

pytestmark = pytest.mark.end_to_end

SETTINGS: dict[str, Any] = {
    "rank": 2,
    "loi_batches": 3,
    "max_train_steps": 5,
    "train_batch_size": 1,
    "learning_rate": 0.005,
    "start_scale": 0.1,
    "dropout": 0.1,
    "max_length": 200,
    "checkpointing_steps": 2,
    "spectrum_steps": 2,
}


def settings_in(folder: Path) -> dict[str, Any]:
    """A model, rows, and settings that name them."""
    rows = str(small.write_rows(folder / "rows.jsonl", SHORT))
    return {**SETTINGS, "model": str(small.save_model(folder / "model")), "data": [rows]}


def trained(values: dict[str, Any], killed_in: int | None) -> tuple[bool, list[str]]:
    """The command in one process; the second one receives a signal in a step. Returns what the second one wrote."""
    start_logging(verbose=False)
    second = os.environ["RANK"] == "1"
    written = watch_writes(Path(values["output_dir"])) if second else []
    batch = CausalLmTask.batch

    def watched(self: Any, step: int, micro: int) -> Any:
        if step == killed_in and second:
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step, micro)

    with mock.patch.object(CausalLmTask, "batch", watched):
        return train_llm.train_with(config_of(LlmConfig, values), []), written


def result_of(folder: Path) -> tuple[bytes, bytes, list[dict[str, Any]]]:
    """Adapter, last checkpoint, records without times."""
    lines = (folder / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [{k: v for k, v in json.loads(row).items() if k != "steps_per_s"} for row in lines]
    adapter = (folder / "adapter_model.safetensors").read_bytes()
    return adapter, (folder / "checkpoint-5" / "tensors.safetensors").read_bytes(), records


def test_a_stopped_training_goes_on_to_the_same_bytes(tmp_path: Path) -> None:
    """Two processes; a signal reaches the second: one checkpoint, both leave, only the first has written."""
    values = settings_in(tmp_path)
    straight, parted = tmp_path / "straight", tmp_path / "parted"
    assert (
        on_processes(2, trained, {**values, "output_dir": str(straight)}, None) == [(True, [])] * 2
    )
    values["output_dir"] = str(parted)
    assert on_processes(2, trained, values, 3) == [(False, [])] * 2
    assert sorted(path.name for path in parted.glob("checkpoint-*")) == [
        "checkpoint-2",
        "checkpoint-3",
    ]
    again = {**values, "resume_from_checkpoint": "latest"}
    assert on_processes(2, trained, again, None) == [(True, [])] * 2
    assert result_of(parted) == result_of(straight)
    assert len(result_of(straight)[2]) == 5


def count() -> int:
    return make_accelerator().num_processes


def test_processes_that_do_not_find_each_other_do_not_train(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Each would train for itself, and all would write into the same folder."""
    assert on_processes(2, count) == [2, 2]
    # A device that accelerate does not join processes on, such as an Apple GPU.
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        ConfigError, match="2 processes were launched, and accelerate cannot join them"
    ):
        make_accelerator()


def test_other_processes_speak_up_only_when_something_goes_wrong(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import logging

    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    logger = logging.getLogger("dreamrie")
    monkeypatch.setattr(logger, "level", logger.level)
    for rank, verbose, level in (("0", False, "INFO"), ("0", True, "DEBUG"), ("1", True, "ERROR")):
        monkeypatch.setenv("RANK", rank)
        start_logging(verbose)
        assert logging.getLevelName(logger.level) == level


# ------------------------------------------------------------------------------------- accelerate launch


def launch(config: str, *words: str) -> subprocess.Popen[str]:
    """`accelerate launch`, as a user types it, on the CPU."""
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = ["-m", "accelerate.commands.launch", "--config_file", f"examples/accelerate/{config}"]
    port = ["--main_process_port", "0"]
    return subprocess.Popen(
        [sys.executable, *command, *port, "-m", "dreamrie", "train-llm", *words],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def flags(values: dict[str, Any]) -> list[str]:
    """Settings as words."""
    words = []
    for name, value in values.items():
        words += [f"--{name}", *(value if isinstance(value, list) else [str(value)])]
    return words


def steps_in(folder: Path) -> int:
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves_one_checkpoint_and_ends_all_processes(
    tmp_path: Path,
) -> None:
    """As a scheduler stops a job: SIGTERM to `accelerate launch` alone."""
    run = tmp_path / "run"
    values = settings_in(tmp_path) | {"max_train_steps": 10_000, "checkpointing_steps": 10_000}
    process = launch("ddp.yaml", *flags(values | {"output_dir": run}))
    deadline = time.monotonic() + 240
    while steps_in(run) < 3:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    steps = steps_in(run)
    assert [path.name for path in run.glob("checkpoint-*")] == [f"checkpoint-{steps}"]
    assert said.count("Stopping after this step") == 1
    assert said.count(f"{steps} steps in") == 1
    assert (run / "adapter_model.safetensors").is_file()
