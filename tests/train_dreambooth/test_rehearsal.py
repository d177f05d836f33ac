"""A dry run says what a training will take: multiplied out from a little of everything."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from dreamrie.diffusion import rehearsal
from dreamrie.optimizers import build_optimizer
from dreamrie.trainer import LoopSettings, make_accelerator
from dreamrie.trainer import rehearsal as parts
from tests.contracts.sources import ROOT
from tests.small_task import SmallTask
from tests.train_dreambooth.small_run import PROMPT, Command

pytestmark = pytest.mark.end_to_end

LINE = re.compile(
    r"# time: about (\d+) s after loading \(initialization (\d+), steps (\d+), pictures and scores (\d+)\)"
)
MEMORY = re.compile(r"# memory: about ([\d.]+) GiB of the process at its peak")


def test_parts_are_multiplied_out(
    command: Command,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Starts of 1 and 3 batches take 12 and 16 s: 2 s a batch and 10 s beside; so does drawing, 0.5 s a step."""
    clock = iter([12.0, 16.0, 9.0, 1.5, 2.5])

    def timed(action: Callable[[], object]) -> float:
        action()
        return next(clock)

    monkeypatch.setattr(parts, "timed", timed)
    monkeypatch.setattr(rehearsal, "timed", timed)
    monkeypatch.setattr(rehearsal, "step_seconds", lambda *_: 0.5)
    flags = ("--validation_prompt", PROMPT, "--validation_steps", 2, "--loi_batches", 6)
    assert command(*flags, "--num_inference_steps", 5, "--dry-run") == 0
    found = LINE.search(capsys.readouterr().out)
    assert found is not None
    # 12 + 5 * 2; 4 * 0.5; before, after 2 and after 4 steps: 3 * (1.5 + 4 * 0.5).
    assert [int(number) for number in found.groups()] == [34, 22, 2, 10]
    assert not (tmp_path / "run").exists()


def test_steps_are_timed_after_others_have_warmed_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Seven steps, of which the last four count; nothing is shown or scored on the way, whatever the settings say."""
    task, asked = SmallTask(), []
    batch = task.batch

    def noted(step: int, micro: int) -> object:
        asked.append((step, micro))
        time.sleep(0.5 if len(asked) <= 3 else 0.02)
        return batch(step, micro)

    monkeypatch.setattr(task, "batch", noted)
    optimizer = build_optimizer("riemannion", task.pairs, lr=0.01)
    settings = LoopSettings(max_steps=100, validation_steps=1, spectrum_steps=1, warmup_steps=20)
    seconds = parts.step_seconds(task, optimizer, settings, make_accelerator())
    assert asked == [(1, 0), (2, 0), (3, 0), (1, 0), (2, 0), (3, 0), (4, 0)]
    assert 0.02 < seconds < 0.4
    assert task.validated == task.saved == []


@pytest.mark.slow
def test_the_estimate_is_near_what_happens(tmp_path: Path) -> None:
    """Memory within a fifth. Time within a half on a machine that others use too; docs/performance.md has the rest."""
    flags = ["--config", "examples/demo.yaml", "--max_train_steps", "60", "--score_steps", "0"]
    flags += ["--validation_steps", "30", "--output_dir", str(tmp_path / "run")]
    script = [sys.executable, "train_dreambooth.py", *flags]
    said = subprocess.run(
        [*script, "--dry-run"], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout
    seconds, memory = LINE.search(said), MEMORY.search(said)
    assert seconds is not None
    assert memory is not None
    process = subprocess.Popen(script, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    started = 0.0
    assert process.stdout is not None
    for line in process.stdout:
        if b"start loi" in line:
            started = time.perf_counter()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == 0
    took = time.perf_counter() - started
    assert float(seconds.group(1)) == pytest.approx(took, rel=0.5)
    assert float(memory.group(1)) * 2**30 == pytest.approx(usage.ru_maxrss * 1024, rel=0.2)
