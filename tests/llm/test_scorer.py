"""Scores of a language model in training: what they are, which step is the best, when to worry."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from dreamrie.adapter_reading import load_adapter
from dreamrie.errors import CheckpointError
from dreamrie.llm import scorer as real
from dreamrie.llm import task
from dreamrie.llm.evaluate import Accuracy
from tests.llm import small
from tests.llm.test_train_llm import SHORT, KilledError, leg, refused, world

CURVE = {0: (50, 30), 2: (52, 35), 4: (55, 40), 6: (55, 40), 8: (50, 38), 10: (20, 10)}
"""Right answers of 80 and of 50 questions, by step; the mean over tasks does not go by questions."""


class Silent:
    """A model that only notes its mode."""

    def eval(self) -> None:
        self.training = False


def scored(impl: Any, steps: list[int], state: str | None = None) -> tuple[Any, list[Any]]:
    """A scorer that was asked at these steps, and what it said."""
    model: Any = Silent()
    made = impl.AccuracyScorer(model, None, [])
    if state is not None:
        made.restore(state)
    verdicts = []
    for step in steps:
        model.training = True
        found = {"a": Accuracy(CURVE[step][0], 80), "b": Accuracy(CURVE[step][1], 50)}
        with mock.patch.object(impl, "measure", lambda *_, found=found: found):
            verdicts.append(made(step))
        assert model.training is False
    return made, verdicts


def law_ll16_the_best_step_is_the_earliest_of_the_most_accurate(impl: Any) -> None:
    """By the mean over tasks; never the model before training, which needs no adapter."""
    _, verdicts = scored(impl, list(CURVE))
    assert [verdict.best_step for verdict in verdicts] == [None, 2, 4, 4, 4, 4]
    assert verdicts[2].scores == {
        "accuracy/a": 55 / 80,
        "accuracy/b": 40 / 50,
        "accuracy": (55 / 80 + 40 / 50) / 2,
    }
    assert "74.4%" in verdicts[2].reason
    assert [verdict.best_step for verdict in scored(impl, [0, 10])[1]] == [None, 10]


def test_ll16() -> None:
    law_ll16_the_best_step_is_the_earliest_of_the_most_accurate(real)


def law_ll17_an_alarm_is_more_than_luck(impl: Any) -> None:
    """Below the first scoring by more than the interval allows: 30 of 130 is, 78 is not."""
    _, verdicts = scored(impl, list(CURVE))
    assert [verdict.is_alarm for verdict in verdicts] == [False] * 5 + [True]
    assert "lower --learning_rate" in verdicts[5].message
    assert not scored(impl, [2, 0])[1][1].is_alarm
    assert "at step 4" in scored(impl, [4, 10])[1][1].message


def test_ll17() -> None:
    law_ll17_an_alarm_is_more_than_luck(real)


def law_ll18_scores_go_on_as_they_were(impl: Any) -> None:
    """Stopped after any scoring and restored: the same verdicts and the same state."""
    whole, verdicts = scored(impl, list(CURVE))
    for cut in range(1, len(CURVE)):
        steps = list(CURVE)
        first, _ = scored(impl, steps[:cut])
        again, rest = scored(impl, steps[cut:], first.state())
        assert rest == verdicts[cut:]
        assert again.state() == whole.state()


def test_ll18() -> None:
    law_ll18_scores_go_on_as_they_were(real)


PLAN = {"max_train_steps": 6, "score_steps": 2, "learning_rate": 0.05, "dropout": 0.0}


def test_best_is_the_adapter_of_the_best_step() -> None:
    """Both files of the PEFT folder, as they were saved at that step; a run killed and resumed has the same."""
    with world() as values:
        _, records = leg(task, values, **PLAN)
        folder = Path(values["output_dir"])
        accuracies = {row["step"]: row["scores"]["accuracy"] for row in records if "scores" in row}
        assert list(accuracies) == [0, 2, 4, 6]
        record = json.loads((folder / "best" / "best.json").read_text("utf-8"))
        assert record["step"] == max((2, 4, 6), key=accuracies.__getitem__)
        step = folder / "scored" / f"step-{record['step']:06d}"
        names = {"adapter_config.json", "adapter_model.safetensors"}
        assert {path.name for path in step.iterdir()} == names
        best = {name: (folder / "best" / name).read_bytes() for name in names}
        assert best == {name: (step / name).read_bytes() for name in names}
        assert load_adapter(small.model(), folder / "best").facts["steps"] == str(record["step"])
        values["output_dir"] += "-again"
        with pytest.raises(KilledError):
            leg(task, values, kill_in=5, **PLAN)
        assert leg(task, values, resume_from_checkpoint="latest", **PLAN)[1] == records
        again = Path(values["output_dir"]) / "best"
        assert best == {name: (again / name).read_bytes() for name in names}


def test_other_held_out_rows_are_another_run() -> None:
    with world() as values:
        leg(task, values, max_train_steps=2, score_steps=2)
        plan = {"max_train_steps": 2, "score_steps": 2, "resume_from_checkpoint": "latest"}
        place = Path(values["output_dir"]).parent / "elsewhere" / "rows.jsonl"
        place.parent.mkdir()
        moved = small.write_rows(place, SHORT)
        leg(task, {**values, "validation_data": [str(moved)]}, **plan)
        small.write_rows(moved, SHORT[:4])
        with pytest.raises(CheckpointError, match="the content of the held-out rows was 5 rows"):
            leg(task, {**values, "validation_data": [str(moved)]}, **plan)


def test_rows_without_choices_are_refused_at_once(
    caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    """Before the model is loaded, not at the first scoring."""
    rows = str(small.write_rows(tmp_path / "a.jsonl", [{"instruction": "a", "output": "b"}]))
    words = ["--model", "none", "--data", rows, "--validation_data", rows]
    assert "accuracy needs choices, and this row has none" in refused(words, caplog)
