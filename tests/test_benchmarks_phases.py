"""The parts of a watched step: together they are the step of the training loop, and the table counts as it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import phases
from dreamrie.config import parse_config
from dreamrie.optimizers import build_optimizer
from dreamrie.trainer import loop
from tests.small_task import SmallTask, distance, train_small

CPU = torch.device("cpu")


@pytest.mark.parametrize(("kind", "limit"), [("riemannion", 0.0), ("adamw", 0.35)])
def test_a_watched_step_is_a_step_of_the_loop(kind: str, limit: float, tmp_path: Path) -> None:
    """Eight steps, clipped and not, end at the adapter of a training, and every part has a time."""
    settings: dict[str, Any] = {"max_grad_norm": limit} if limit else {}
    trained = train_small(loop, tmp_path, SmallTask(), name=kind, **settings)
    start, task = SmallTask(), SmallTask()
    training = phases.Training(task, build_optimizer(kind, task.pairs, lr=0.05), limit)
    found = phases.measure({kind: training}, 6, CPU, warmups=2)[kind]
    assert distance(start.deltas(), task.deltas()) > 1e-2
    assert distance(trained.task.deltas(), task.deltas()) < 1e-12
    if limit:
        sizes = [step["grad_norm"] for step in trained.steps]
        assert min(sizes) < limit < max(sizes)
    assert [len(values) for values in found.values()] == [6] * (len(phases.PARTS) + 1)
    for number, whole in enumerate(found["all"]):
        assert whole == pytest.approx(sum(found[part][number] for part in phases.PARTS))


@pytest.mark.parametrize("flags", phases.CONTENDERS.values(), ids=phases.CONTENDERS)
def test_every_contender_takes_the_settings_of_the_demo(
    flags: tuple[str, ...], tmp_path: Path
) -> None:
    words = ["--config", str(Path(__file__).parents[1] / "examples" / "demo.yaml"), *flags]
    config = parse_config([*words, "--output_dir", str(tmp_path)])
    assert (config.optimizer.optimizer, config.adapter.init) == (flags[1], flags[3])


def test_ratios_are_those_of_sums_and_medians() -> None:
    """Fastest rounds of the parts may come from different steps; their sum is what is compared."""

    def spent(step: list[float]) -> dict[str, list[float]]:
        others = {part: [0.0] * 3 for part in phases.PARTS}
        return (
            others
            | {"forward": [2.0, 4.0, 8.0], "optimizer": step}
            | {"all": [a + b for a, b in zip([2.0, 4.0, 8.0], step, strict=True)]}
        )

    rows = phases.summary(
        {"riemannion": spent([6.0, 2.0, 3.0]), phases.PLAIN: spent([1.0, 1.0, 0.0])}
    )
    assert [row["sum_of_fastest_ms"] for row in rows] == [4.0, 2.0]
    assert [row["fastest_ms"]["all"] for row in rows] == [6.0, 3.0]
    assert [row["median_ms"]["all"] for row in rows] == [8.0, 5.0]
    lines = phases.table(rows).splitlines()
    assert lines[-2].split()[-2:] == ["2.000", "1.000"]
    assert lines[-1].split()[-2:] == ["1.600", "1.000"]


@pytest.mark.slow
def test_the_embedded_model_is_watched(tmp_path: Path) -> None:
    output = tmp_path / "phases.json"
    phases.main(["--rounds", "1", "--train_batch_size", "1", "--output", str(output)])
    rows = json.loads(output.read_text("utf-8"))["rows"]
    assert [row["name"] for row in rows] == list(phases.CONTENDERS)
    assert all(row["fastest_ms"]["backward"] > 0 for row in rows)
