"""The benchmark of the step: its rivals are what they claim to be, and its numbers are what it says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks import step, unet
from benchmarks.contenders import MOMENTUM, LiteralRiemannion, make_pairs
from benchmarks.timing import Timing, interleaved, table
from dreamrie.riemannion import Riemannion
from tests.strategies import LAYERS, Quadratic, distance, moved, run
from tests.strategies import make_pairs as small_pairs

CPU = torch.device("cpu")


def test_the_literal_algorithm_takes_the_path_of_the_optimizer() -> None:
    """10 steps with momentum in fp64, layer by layer and batched: one path."""
    ours, theirs = small_pairs(LAYERS[:3]), small_pairs(LAYERS[:3])
    path = run(Riemannion(ours, lr=0.02, momentum=MOMENTUM), Quadratic(ours), 10)
    literal = LiteralRiemannion(theirs, lr=0.02)
    other = []
    for t in range(10):
        Quadratic(theirs).backward(t)
        literal.step()
        other.append([pair.x for pair in theirs])
    assert moved(path) > 0.01
    assert distance(other, path) < 1e-11


def test_made_up_gradients_have_the_spread_they_are_said_to_have() -> None:
    """Largest over smallest singular value of a gradient is near 100; starts are points."""
    for pair in make_pairs(((96, 64, 2),), 4, CPU):
        for factor in (pair.left, pair.right):
            assert factor.grad is not None
            values = torch.linalg.svdvals(factor.grad)
            assert 50 < float(values[0] / values[-1]) < 200
            values = torch.linalg.svdvals(factor)
            torch.testing.assert_close(values, torch.full_like(values, 0.1**0.5))


def test_actions_are_timed_in_turns() -> None:
    """Warm-ups, then A B A B; one that takes long gets the least number of rounds."""
    calls: list[str] = []
    found = interleaved(
        {"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, 0.0, CPU, least=3
    )
    assert "".join(calls) == "aabb" + "ab" * 3
    assert [len(timing.samples) for timing in found] == [3, 3]


def test_a_table_counts_in_times_of_one_row() -> None:
    """Medians, and the ratio to the row that is the unit."""
    text = table([Timing("slow", (4.0, 6.0, 50.0)), Timing("quick", (2.0, 3.0, 1.0))], "quick")
    assert text.splitlines()[1].split() == ["slow", "6.00", "4.00", "3", "3.000"]
    assert text.splitlines()[2].split()[-1] == "1.000"


def test_the_command_writes_a_row_for_each_contender(tmp_path: Path) -> None:
    """A try-out of the optimizer steps: four rows with positive times, and the machine."""
    output, threads = tmp_path / "new" / "step.json", torch.get_num_threads()
    step.main(["--quick", "--ranks", "2", "--training_ranks", "--output", str(output)])
    assert torch.get_num_threads() == threads
    content = json.loads(output.read_text("utf-8"))
    assert content["device"] == "CPU"
    assert [row["name"] for row in content["rows"]] == list(step.NAMES)
    assert all(row["median_ms"] >= row["fastest_ms"] > 0 for row in content["rows"])


def test_the_state_is_counted_and_compared_with_a_measured_peak(tmp_path: Path) -> None:
    """AdamW keeps two numbers in fp32 for each of the (m + n) r of a layer, and a count for each factor."""
    shapes = ((24, 16, 3), (8, 16, 1))
    numbers = 3 * 40 * 2 + 24 * 2
    kept = unet.state_bytes("adamw", 2, shapes)
    assert kept == 4 * (2 * numbers + 8)
    rows = [
        {"name": f"dreamrie, {name}", "peak_gib": kept * 8 / 2**30}
        for name in ("AdamW", "Riemannion + LOI")
    ]
    facts = {"rank": 4, "device": "a card", "batch_size": 4, "resolution": 512, "rows": rows}
    (tmp_path / "measured.json").write_text(json.dumps(facts))
    lines = unet.state_table([2], tmp_path / "measured.json", shapes).splitlines()
    assert "rank 4 (a card, batch 4, 512 px)" in lines[0]
    assert lines[3].split()[-3:] == ["12.50%", "6.25%", "9.38%"]
    assert lines[2].startswith("rank 2, riemannion")


@pytest.mark.slow
def test_a_small_unet_is_trained_by_each_contender(tmp_path: Path) -> None:
    """The U-Net benchmark at reduced size: both timings of three contenders, 128 layers."""
    output = tmp_path / "unet.json"
    words = ["--size", "small", "--ranks", "2", "--seconds", "0.01", "--output", str(output)]
    unet.main(words)
    rows = json.loads(output.read_text("utf-8"))["rows"]
    assert [row["what"] for row in rows] == ["optimizer step"] * 3 + ["training step"] * 3
    assert all(row["pictures_per_s"] > 0 for row in rows[3:])
    assert rows[0]["kernels"] > rows[1]["kernels"] > 0
