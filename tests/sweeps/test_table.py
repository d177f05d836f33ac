"""The table of a sweep: what stands in the run folders, means over concepts and seeds, as lines, JSON and CSV."""

from __future__ import annotations

import csv
import json
import statistics
from pathlib import Path
from typing import Any

import pytest

from dreamrie.commands import sweep as command
from dreamrie.sweeps import table
from dreamrie.sweeps.plan import Run, Sweep
from dreamrie.sweeps.record import Record, write_record
from tests.sweeps.fake import write_sweep

STEPS = 12


def fill(run: Run, code: int | None, *, steps: int = STEPS, image: float | None = None) -> None:
    """What a training leaves behind: losses 1/1, 1/2, ..., a scoring in the middle and one at the end."""
    run.folder.mkdir(parents=True, exist_ok=True)
    lines: list[dict[str, Any]] = []
    for step in range(1, steps + 1):
        loss = None if step == 3 else 1 / step
        lines.append({"step": step, "loss": loss, "steps_per_s": 2.0, "skipped": None})
        if image is not None and step in {4, steps}:
            scores = {"image": [image * step, 0.0, 1.0], "copies": 0.0, "drift": None}
            lines.append({"step": step, "scores": scores})
    text = "".join(json.dumps(line) + "\n" for line in lines) + '{"step": 99, "lo'
    (run.folder / "metrics.jsonl").write_text(text, "utf-8")
    (run.folder / "config.yaml").write_text(f"max_train_steps: {STEPS}\n", "utf-8")
    write_record(run.folder, Record(1, code))
    if code == 0:
        (run.folder / "pytorch_lora_weights.safetensors").write_bytes(b"x")


@pytest.fixture
def sweep(tmp_path: Path) -> Sweep:
    """Two concepts, two learning rates; one of each status but waiting, and two that have finished."""
    made = write_sweep(tmp_path, ["dog", "cat"], learning_rate=[0.01, 0.02])
    fill(made.runs[0], 0, image=0.05)
    fill(made.runs[1], 130, steps=5)
    fill(made.runs[2], 0, image=0.06)
    fill(made.runs[3], 2, steps=2)
    (made.runs[3].folder / "log.txt").write_text("error: no pictures\n  where: x\n", "utf-8")
    return made


def test_a_row_says_what_the_folder_says(sweep: Sweep) -> None:
    rows = table.read_rows(sweep)
    assert [row.status for row in rows] == ["finished", "stopped", "finished", "failed"]
    assert [(row.step, row.steps) for row in rows] == [(12, 12), (5, 12), (12, 12), (2, 12)]
    first = rows[0]
    # The last tenth of 12 steps are two of them.
    assert first.loss == pytest.approx((1 / 11 + 1 / 12) / 2)
    assert first.scores == {"image": pytest.approx(0.6), "copies": 0.0}
    assert (first.seconds, first.starts, first.best_step) == (6.0, 1, None)
    assert (rows[3].error, rows[1].error) == ("no pictures", "")


def test_what_was_not_begun_waits_and_what_has_no_end_has_begun(tmp_path: Path) -> None:
    made = write_sweep(tmp_path, ["dog"])
    (run,) = made.runs
    (row,) = table.read_rows(made)
    assert (row.status, row.loss, row.scores, row.starts) == ("waiting", None, {}, 0)
    fill(run, None, steps=3)
    assert table.read_rows(made)[0].status == "begun"
    write_record(run.folder, Record(4, None, "it was killed 4 times"))
    (row,) = table.read_rows(made)
    assert (row.status, row.error, row.starts) == ("failed", "it was killed 4 times", 4)
    write_record(run.folder, Record(1, 1))
    assert table.read_rows(made)[0].error == "it ended with exit code 1"


def test_a_training_is_finished_at_its_present_length_alone(sweep: Sweep) -> None:
    run = sweep.runs[0]
    assert table.is_finished(run)
    (run.folder / "config.yaml").write_text("max_train_steps: 6\n", "utf-8")
    assert not table.is_finished(run)
    (run.folder / "config.yaml").write_text("a: [", "utf-8")
    assert not table.is_finished(run)
    (run.folder / "config.yaml").write_text(f"max_train_steps: {STEPS}\n", "utf-8")
    (run.folder / "pytorch_lora_weights.safetensors").unlink()
    assert not table.is_finished(run)


def test_means_are_those_of_the_finished(sweep: Sweep) -> None:
    rows = table.read_rows(sweep)
    low, high = table.means_of(rows, sweep.varied)
    assert (dict(low.varied), low.runs, low.planned) == ({"learning_rate": 0.01}, 2, 2)
    images = [rows[0].scores["image"], rows[2].scores["image"]]
    assert low.values["image"] == (statistics.fmean(images), statistics.stdev(images))
    assert low.values["loss"][1] == 0.0
    assert (high.runs, high.planned, high.values) == (0, 2, {})


def test_seeds_are_averaged_over_and_single_ones_are_not(tmp_path: Path) -> None:
    made = write_sweep(tmp_path, ["dog"], seed=[0, 1], rank=[2, 4])
    fill(made.runs[0], 0, image=0.05)
    rows = table.read_rows(made)
    means = table.means_of(rows, made.varied)
    assert [(dict(mean.varied), mean.runs, mean.planned) for mean in means] == [
        ({"rank": 2}, 1, 2),
        ({"rank": 4}, 0, 2),
    ]
    assert means[0].values["image"][1] is None
    alone = write_sweep(tmp_path, ["dog"], rank=[2, 4])
    assert table.means_of(table.read_rows(alone), alone.varied) == []


def test_the_files_hold_what_the_table_shows(sweep: Sweep, tmp_path: Path) -> None:
    rows = table.read_rows(sweep)
    table.write_tables(rows, sweep.varied, tmp_path)
    content = json.loads((tmp_path / "table.json").read_text("utf-8"))
    assert [run["name"] for run in content["runs"]] == [run.name for run in sweep.runs]
    assert content["runs"][0]["settings"] == {"learning_rate": 0.01}
    assert content["runs"][0]["scores"]["image"] == pytest.approx(0.6)
    assert content["means"][0]["image"]["mean"] == pytest.approx(0.66)
    with (tmp_path / "table.csv").open(encoding="utf-8", newline="") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["status"] for line in lines] == [row.status for row in rows]
    assert [float(line["image"]) if line["image"] else None for line in lines] == [
        row.scores.get("image") for row in rows
    ]
    assert lines[3]["error"] == "no pictures"


def test_the_printed_table_fits_and_names_what_does_not(sweep: Sweep) -> None:
    rows = table.read_rows(sweep)
    lines = command.run_lines(rows, sweep.varied)
    assert lines[0].split() == [
        *("concept", "learning_rate", "steps", "loss", "image", "copies"),
        *("seconds", "starts", "status"),
    ]
    assert lines[1].split() == ["dog", "0.01", "12/12", "0.0871", "0.6000", "0.0000", "6", "1", "finished"]  # fmt: skip
    assert lines[-1] == "cat,learning_rate=0.02: no pictures"
    for number in range(12):
        rows[0].scores[f"another score {number}"] = 0.5  # type: ignore[index]
    lines = command.run_lines(rows, sweep.varied)
    assert max(map(len, lines)) <= command.COLUMNS
    assert any(line.startswith("too wide for this table: ") for line in lines)


def test_the_command_lists_and_tells_without_training(
    sweep: Sweep, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from dreamrie.__main__ import main

    for run in sweep.runs:  # trained with nothing but a length in their settings
        (run.folder / "config.yaml").unlink()
    words = ["--config", str(tmp_path / "sweep.yaml"), "--output_dir", str(tmp_path / "out")]
    assert main(["sweep", *words, "--dry-run", "--workers", "2"]) == 0
    said = capsys.readouterr().out
    assert "4 trainings" in said
    assert "at a time: 2" in said
    assert not (tmp_path / "out" / "table.json").exists()
    assert main(["sweep", *words, "--table"]) == 0
    said = capsys.readouterr().out
    assert "mean over concepts, +- standard deviation" in said
    assert (tmp_path / "out" / "table.json").is_file()
    assert main(["sweep", *words, "--restarts", "-1"]) == 2
    assert main(["sweep", *words[:2], "--output_dir", str(tmp_path / "sweep.yaml")]) == 2
