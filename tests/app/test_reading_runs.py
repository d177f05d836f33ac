"""W5: a run folder is read at any moment of being written, and what is read is what stands there."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app import watching
from app.watching import RunFacts, RunReader, phase_of
from dreamrie.run_folder import ADAPTER


def rows_of(steps: int) -> list[dict[str, Any]]:
    """Lines of a training with scores at 0 and at every fourth step."""
    found: list[dict[str, Any]] = []
    for step in range(steps + 1):
        if step:
            found.append(
                {"step": step, "loss": 0.1 + 1 / step, "steps_per_s": 4.0, "skipped": None}
            )
        if step % 4 == 0:
            scores = {"image": [0.3, 0.2, 0.4], "text": None, "copies": 0.0, "drift": None}
            found.append({"step": step, "scores": scores})
    return found


def as_lines(rows: list[dict[str, Any]]) -> bytes:
    """As they stand in the file."""
    return b"".join(json.dumps(row).encode() + b"\n" for row in rows)


# ----------------------------------------------------------------------------------------------------- laws


def law_half_a_line_is_no_line(impl: Any, folder: Path) -> None:
    """Cut at any byte, the records say what their whole lines say, and the last one counts with its line end."""
    rows, path = rows_of(9), folder / "metrics.jsonl"
    content = as_lines(rows)
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        whole = rows[: content[:length].count(b"\n")]
        steps = [row["step"] for row in whole if "loss" in row]
        facts = impl.RunReader().read(folder, 9)
        assert facts.step == (steps[-1] if steps else 0)
        assert [step for step, _ in facts.losses] == steps
        assert [row["step"] for row in facts.scorings] == [
            row["step"] for row in whole if "scores" in row
        ]


STRANGE = [
    b"",
    b"\n\n",
    b"null\n[]\n7\n",
    b"\xff\xfe\n",
    b'{"step": 3}\n',
    b'{"step": "3", "loss": 1.0}\n',
    b'{"step": -3, "loss": 1.0}\n',
    b'{"step": true, "loss": 1.0}\n',
    b'{"step": 3, "loss": null, "steps_per_s": 0}\n',
    b'{"step": 3, "loss": NaN, "steps_per_s": "x"}\n',
    b'{"step": 3, "scores": [1]}\n',
    b'{"step": 3, "scores": {"text": [1]}}\n',
    b'{"step": 3, "change": {"a": 1}}\n',
    b'{"step": 3, "change": {"a": [null], "b": []}}\n',
    b'{"step": 3, "reason": "x"}\n',
    b"[" * 100_000 + b"\n",
]


def law_damage_is_left_out(impl: Any, folder: Path) -> None:
    """Whatever stands in a file, reading it raises nothing and gives no number that is none."""
    for content in STRANGE:
        for name in ("metrics.jsonl", "spectrum.jsonl", "scores.jsonl", "best/best.json"):
            path = folder / name
            path.parent.mkdir(exist_ok=True)
            path.write_bytes(content)
        facts = impl.RunReader().read(folder, 9)
        assert facts.losses == []
        assert facts.scorings == []
        assert (facts.best_step, facts.message, facts.seconds_per_step) == (None, "", None)
        assert facts.spectrum[0] in ([], [3])


def law_losses_are_thinned_evenly(impl: Any, folder: Path) -> None:
    """At most 400 points, the first and the last among them, no gap larger than twice the mean one."""
    for count in (1, 399, 400, 401, 799, 1000, 5000):
        rows = [{"step": n, "loss": float(n)} for n in range(1, count + 1)]
        (folder / "metrics.jsonl").write_bytes(as_lines(rows))
        found = impl.RunReader().read(folder, count).losses
        steps = [step for step, _ in found]
        assert len(found) <= 400
        assert len(found) >= min(count, 190)
        assert (steps[0], steps[-1]) == (1, count)
        assert all(loss == step for step, loss in found)
        assert max(np.diff(steps), default=1) <= max(1, 2 * count / len(found))


def law_the_spectrum_is_the_mean_over_layers(impl: Any, folder: Path) -> None:
    """For each place k; a layer with fewer values counts as zero there, a step taken again as it was the last time."""
    chance = np.random.default_rng(0)
    steps, expected, rows = [0, 10, 20], [], []
    for step in steps:
        table = -np.sort(-chance.random((5, 4)), axis=1)
        table[3, 2:] = 0
        layers = {f"layer{n}": row.tolist() for n, row in enumerate(table)}
        layers["layer3"] = layers["layer3"][:2]
        rows += [
            {"step": step, "change": {"layer0": [9.0] * 4}, "point": {}},
            {"step": step, "change": layers, "point": {"layer0": [7.0]}},
        ]
        expected.append(table.mean(axis=0))
    (folder / "spectrum.jsonl").write_bytes(as_lines(rows))
    found_steps, values = impl.RunReader().read(folder, 20).spectrum
    assert found_steps == steps
    np.testing.assert_allclose(values, expected, rtol=1e-12)


ENDS = [
    # exit code, adapter, newest checkpoint, how it ended; the run has 100 steps
    (0, True, 100, "finished"),
    (130, True, 60, "stopped"),
    (130, False, None, "stopped"),
    (-15, False, None, "stopped"),
    (-9, True, 60, "failed"),
    (1, False, None, "failed"),
    (2, True, 100, "failed"),
    (None, True, 100, "finished"),
    (None, True, 60, "stopped"),
    (None, False, 100, "stopped"),
    (None, False, None, "stopped"),
]


def law_the_end_is_told_from_what_is_there(impl: Any, folder: Path) -> None:
    """The exit code decides; without one only a last checkpoint with its adapter is an end: a stop leaves one too."""
    for code, adapter, checkpoint, expected in ENDS:
        facts = RunFacts(has_adapter=adapter, checkpoint=checkpoint)
        assert impl.how_it_ended({"exit": code, "launched": True}, facts, 100) == expected, code
    assert impl.how_it_ended({}, RunFacts(), 0) == "failed"


def law_a_choice_counts_with_its_scores(impl: Any, folder: Path) -> None:
    """A run that was set back to a checkpoint keeps best/ for a while; the step is shown when it is scored again."""
    (folder / "best").mkdir(exist_ok=True)
    (folder / "best" / "best.json").write_text('{"step": 8, "scored_until": 8, "reason": "best"}')
    for steps, best in ((4, None), (9, 8)):
        (folder / "metrics.jsonl").write_bytes(as_lines(rows_of(steps)))
        assert impl.RunReader().read(folder, 9).best_step == best


def law_what_was_written_since_is_read(impl: Any, folder: Path) -> None:
    """A reader that remembers gives, after every change of a file, what a fresh one gives; also after a cut."""
    chance, reader = random.Random(0), impl.RunReader()
    rows, path = rows_of(40), folder / "metrics.jsonl"
    for count in [chance.randrange(len(rows)) for _ in range(30)]:
        path.write_bytes(as_lines(rows[:count]))
        assert reader.read(folder, 40) == impl.RunReader().read(folder, 40)


LAWS = [
    law_half_a_line_is_no_line,
    law_damage_is_left_out,
    law_losses_are_thinned_evenly,
    law_the_spectrum_is_the_mean_over_layers,
    law_the_end_is_told_from_what_is_there,
    law_a_choice_counts_with_its_scores,
    law_what_was_written_since_is_read,
]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_run_folders_are_read_by_their_laws(
    law: Callable[[Any, Path], None], tmp_path: Path
) -> None:
    """Each law on the real reader."""
    law(watching, tmp_path)


# ---------------------------------------------------------------------------------------------------- tests


def test_a_folder_with_nothing_in_it_says_nothing(tmp_path: Path) -> None:
    """Before the first step, and when it is gone."""
    assert RunReader().read(tmp_path, 5) == RunFacts()
    assert RunReader().read(tmp_path / "gone", 5) == RunFacts()


def test_scorings_hold_intervals_and_sheets_are_in_order(tmp_path: Path) -> None:
    """As the page draws them; single pictures and half-written files are no sheets."""
    (tmp_path / "metrics.jsonl").write_bytes(as_lines(rows_of(4)))
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("step-000400.png", "step-000000.png", "step-000000-1.png", ".step-000100.png.x"):
        (samples / name).touch()
    (tmp_path / ADAPTER).touch()
    for name in ("checkpoint-9", "checkpoint-40", ".checkpoint-50.x"):
        (tmp_path / name).mkdir()
    facts = RunReader().read(tmp_path, 4)
    assert facts.scorings[-1]["image"] == (0.3, 0.2, 0.4)
    assert facts.scorings[-1]["text"] is None
    assert facts.sheets == [(n, samples / f"step-{n:06d}.png") for n in (0, 400)]
    assert (facts.checkpoint, facts.has_adapter) == (40, True)
    assert facts.seconds_per_step == pytest.approx(0.25)


def test_the_verdict_is_that_of_the_scores(tmp_path: Path) -> None:
    """Judged by the same code as while training: before training there is nothing to be alarmed about."""
    head = {"prompts": ["a", "a", "b", "b"], "ceiling": 0.8, "nearest_real": [0.7, 0.7]}
    values = {"image": [0.3, 0.4, 0.3, 0.4], "nearest": [0.2] * 4, "margin": None, "drift": None}
    row = {"step": 0, **values, "text": None}
    better = {**row, "step": 5, "image": [0.6, 0.7, 0.6, 0.7], "drift": [0.1]}
    blank = {"step": 9, "blank": ["one.png"]}
    path = tmp_path / "scores.jsonl"
    reader = RunReader()
    for rows, words, alarm in (
        ([row], "before training", False),
        ([row, better], "still improving", False),
        ([row, better, blank], "broken: blank pictures at step 9", True),
    ):
        path.write_bytes(as_lines([head, *rows]))
        facts = reader.read(tmp_path, 10)
        assert words in facts.message
        assert facts.is_alarm is alarm


PHASES = [
    ("", RunFacts(), {}, "loading the model"),
    ("making 4 of 4 class pictures in x", RunFacts(), {}, "drawing pictures of the class"),
    ("LOI: gradient of 32 batches", RunFacts(), {}, "finding the start (LOI)"),
    (
        "LOI: gradient of 32\nLOI (...) step 0 unchanged",
        RunFacts(),
        {},
        "looking at the base model: samples and scores before training",
    ),
    ("", RunFacts(step=7), {}, "step 7 of 100"),
    ("", RunFacts(step=50), {"settings": {"score_steps": 50}}, "scoring step 50"),
    (
        "",
        RunFacts(step=50, scorings=[{"step": 50, "image": 1}]),
        {"settings": {"score_steps": 50}},
        "step 50 of 100",
    ),
    ("", RunFacts(step=100), {"settings": {"score_steps": 70}}, "scoring step 100"),
    ("", RunFacts(step=100), {"settings": "damaged"}, "step 100 of 100"),
    ("", RunFacts(step=60), {"resumed": True}, "loading the model, to go on"),
    ("Going on from step 60", RunFacts(step=60), {"resumed": True}, "step 60 of 100"),
]


@pytest.mark.parametrize(("log", "facts", "record", "words"), PHASES)
def test_what_it_does_is_told_in_words(
    log: str, facts: RunFacts, record: dict[str, Any], words: str
) -> None:
    """From the log until the first step, then from the records."""
    assert phase_of(log, facts, record, 100) == words
