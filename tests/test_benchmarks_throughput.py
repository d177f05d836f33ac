"""Two scripts are timed by one clock: every optimizer step is noted, whatever the script."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import StableDiffusionPipeline

from benchmarks import sd2_folder, throughput, watched
from benchmarks.unet import SIZES, make_unet
from tests.contracts.sources import ROOT

# Nine steps of twenty milliseconds each; the first two take longer.
SCRIPT = """
import sys, time, torch
weight = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.SGD([weight], lr=0.1)
assert sys.argv[1:3] == ["--flag", "value"], sys.argv
for step in range(9):
    time.sleep(0.2 if step < 2 else 0.02)
    weight.grad = torch.ones(3)
    optimizer.step()
    if step == 7 and "--fail" in sys.argv:
        raise SystemExit("ended early")
"""


@pytest.mark.slow
def test_every_step_of_a_foreign_script_is_noted(tmp_path: Path) -> None:
    script, times = tmp_path / "script.py", tmp_path / "times.json"
    script.write_text(SCRIPT)
    command = [sys.executable, "-m", "benchmarks.watched", str(times), str(script)]
    subprocess.run([*command, "--flag", "value"], cwd=ROOT, check=True)
    found = json.loads(times.read_text())
    gaps = [later - earlier for earlier, later in itertools.pairwise(found["ends"])]
    assert len(gaps) == 8
    assert gaps[0] > 0.2
    assert 0.02 < sorted(gaps)[4] < 0.2
    assert found["peak_bytes"] > 100 * 2**20  # torch alone is more


@pytest.mark.slow
def test_the_median_leaves_the_first_steps_out(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    contender = throughput.Contender("theirs", script, ())
    found = throughput.measure(contender, ["--flag", "value"], tmp_path, 4)
    assert 20 < found.step_ms < 200
    assert found.pictures_per_s == pytest.approx(4e3 / found.step_ms)


@pytest.mark.slow
def test_a_script_that_fails_says_what_it_said(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("raise SystemExit('no such model')")
    contender = throughput.Contender("theirs", script, ())
    with pytest.raises(
        SystemExit, match=r"theirs ended with exit code 1 after 0 steps(?s:.)*no such"
    ):
        throughput.measure(contender, [], tmp_path, 4)


def test_ratios_refer_to_the_first_row() -> None:
    rows = [
        throughput.Result("theirs", 200.0, 20.0, 8.0, 190.0),
        throughput.Result("ours", 100.0, 40.0, 6.0, 90.0),
    ]
    last = throughput.table(rows).splitlines()[-1].split()
    assert last == ["ours", "100.0", "40.00", "2.00", "6.00", "0.75", "90.0"]


def test_the_parts_of_a_step_and_the_rest_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that is set here: 1 s of batch twice, 4 s of optimizer, 3 s of nothing."""
    clock = iter([0.0, 1.0, 2.0, 2.5, 3.5, 4.0, 8.0, 9.0, 9.0])
    monkeypatch.setattr(watched, "_spent", lambda: next(clock))
    parts = watched.Parts()
    batch, optimizer = parts.timed("batch", lambda number: number), parts.timed("optimizer", int)
    end = parts.timed(watched.PARTS[-1][0], int)
    assert [batch(7), batch(8), optimizer(), end()] == [7, 8, 0, 0]
    (step,) = parts.steps
    assert step["batch"] == 2
    assert step["optimizer"] == 4
    assert step[watched.WHOLE] == 9
    assert step[watched.REST] == 3


def test_the_fastest_of_each_part_counts() -> None:
    """What comes in some steps only is spread over all of them; the sum is the whole."""
    last = watched.PARTS[-1][0]
    first = {"batch": 0.002, "optimizer": 0.010, last: 0.0, watched.REST: 0.001}
    second = {"batch": 0.004, "optimizer": 0.006, last: 0.004, watched.REST: 0.001}
    found = throughput.fastest_parts([first, second])
    assert found == pytest.approx(
        {"batch": 2, "optimizer": 6, last: 2, watched.REST: 1, watched.WHOLE: 11}
    )
    assert list(found) == ["batch", "optimizer", last, watched.REST, watched.WHOLE]
    text = throughput.parts_table(throughput.Result("ours", 11, 1, 1, 9, found))
    assert text.splitlines()[2].split() == ["optimizer", "6.00", "ms", "54.5%"]
    assert throughput.fastest_parts([]) == {}


def test_every_part_is_something_the_loop_calls() -> None:
    """A method that is renamed would be missed in silence."""
    for name, owner, method in watched.PARTS:
        assert callable(getattr(owner, method)), name


def test_the_folder_is_a_pipeline_of_sd2(tmp_path: Path) -> None:
    folder = sd2_folder.write_folder(tmp_path / "sd2", "small", torch.device("cpu"), torch.bfloat16)
    pipe = StableDiffusionPipeline.from_pretrained(folder, dtype=torch.float32)
    assert pipe.vae_scale_factor == 8
    assert type(pipe.vae).__name__ == "AutoencoderKL"
    full = make_unet(SIZES["full"], torch.device("meta"))
    # The published size of stable-diffusion-2's U-Net.
    assert sum(weight.numel() for weight in full.parameters()) == 865_910_724
