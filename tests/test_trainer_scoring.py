"""What the loop does with a scorer: when it asks, what it keeps, what it says, and that training does not notice."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch

from dreamrie.optimizers import build_optimizer
from dreamrie.run_folder import ADAPTER
from dreamrie.runlog import RunLog
from dreamrie.trainer import (
    BEST,
    LoopSettings,
    StopRequest,
    TrainResult,
    Verdict,
    scored_folder,
    train,
)
from tests.small_task import SmallTask


class SavingTask(SmallTask):
    """Saves the change of its layers under the name of an adapter."""

    def save(self, directory: Path, metadata: dict[str, str]) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        changes = [delta.numpy().tobytes() for delta in self.deltas()]
        (directory / ADAPTER).write_bytes(b"".join(changes))


class Judge:
    """A scorer that prefers the step it was told to, and remembers when it was asked."""

    def __init__(self, best: dict[int, int | None], alarm_at: int = -1) -> None:
        self.best, self.alarm_at = best, alarm_at
        self.fails_at = -1
        self.asked: list[int] = []
        self.gradients: list[bool] = []

    def state(self) -> str:
        return ",".join(map(str, self.asked))

    def restore(self, state: str) -> None:
        self.asked = [int(step) for step in state.split(",") if step]

    def __call__(self, step: int) -> Verdict:
        self.asked.append(step)
        self.gradients.append(torch.is_grad_enabled())
        best = self.best.get(step)
        if step == self.fails_at:
            raise OSError("No space left on device")
        return Verdict(
            {"image": 0.1 * step}, best, f"reason {best}", f"message {step}", step == self.alarm_at
        )


def run(
    folder: Path, scorer: Judge | None, task: SavingTask | None = None, **settings: Any
) -> TrainResult:
    """Six steps of the small task."""
    task = task or SavingTask()
    optimizer = build_optimizer("riemannion", task.pairs, lr=0.01, weight_decay=0.0, momentum=0.9)
    with RunLog(folder, 6) as log:
        return train(task, optimizer, LoopSettings(max_steps=6, **settings), log, scorer=scorer)


def test_the_scorer_is_asked_before_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    judge = Judge({})
    result = run(tmp_path / "a", judge, score_steps=4)
    assert judge.asked == [0, 4, 6]
    assert judge.gradients == [False, False, False]
    assert result.verdict is not None
    assert result.verdict.message == "message 6"
    assert 0 < result.scoring_seconds < 60
    lines = (tmp_path / "a" / "metrics.jsonl").read_text("utf-8").splitlines()
    records = [json.loads(line) for line in lines]
    assert [r["step"] for r in records if "scores" in r] == [0, 4, 6]
    assert [r["scores"]["image"] for r in records if "scores" in r] == pytest.approx([0, 0.4, 0.6])


def test_best_holds_the_adapter_of_the_chosen_step_and_the_reason(tmp_path: Path) -> None:
    """The choice moves to a step that was scored earlier, whose adapter has been kept."""
    folder = tmp_path / "a"
    run(folder, Judge({2: 2, 4: 4, 6: 4}), score_steps=2)
    kept = {step: (scored_folder(folder, step) / ADAPTER).read_bytes() for step in (2, 4, 6)}
    assert len(set(kept.values())) == 3
    assert (folder / BEST / ADAPTER).read_bytes() == kept[4]
    assert kept[6] == (folder / ADAPTER).read_bytes()
    record = json.loads((folder / BEST / "best.json").read_text("utf-8"))
    assert record == {"step": 4, "scored_until": 6, "reason": "reason 4"}


def test_nothing_is_kept_while_no_step_is_the_best(tmp_path: Path) -> None:
    run(tmp_path / "a", Judge({}), score_steps=2)
    assert not (tmp_path / "a" / BEST).exists()


def test_an_alarm_is_a_warning_and_all_else_is_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dreamrie")
    run(tmp_path / "a", Judge({}, alarm_at=4), score_steps=2)
    said = {r.getMessage(): r.levelno for r in caplog.records if "message" in r.getMessage()}
    assert said["Step 4: message 4"] == logging.WARNING
    assert said["Step 2: message 2"] == logging.INFO


def test_training_does_not_notice_its_scorer(tmp_path: Path) -> None:
    """Same adapter and same losses to the bit, with dropout in the model, scored or not."""
    outcomes = []
    for name, scorer in (("a", Judge({2: 2, 4: 2, 6: 2})), ("b", None)):
        run(tmp_path / name, scorer, SavingTask(dropout=0.3), score_steps=2)
        lines = (tmp_path / name / "metrics.jsonl").read_text("utf-8").splitlines()
        losses = [json.loads(line)["loss"] for line in lines if "loss" in line]
        outcomes.append((losses, (tmp_path / name / ADAPTER).read_bytes()))
    assert len(outcomes[0][0]) == 6
    assert outcomes[0] == outcomes[1]


def test_a_run_that_never_moved_is_not_scored_again(tmp_path: Path) -> None:
    """Its adapter is that of step 0: skipped steps before the first scoring leave nothing to score."""
    bad = SavingTask(spoil=lambda step, loss: loss * float("nan") if step <= 2 else loss)
    judge = Judge({})
    run(tmp_path / "a", judge, bad, score_steps=2)
    assert judge.asked == [0, 4, 6]


def test_ctrl_c_does_not_wait_for_scores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A request to stop saves the adapter; scoring might take minutes."""
    judge = Judge({})
    task = SavingTask()
    request: list[StopRequest] = []
    enter = StopRequest.__enter__

    def remember(self: StopRequest) -> StopRequest:
        request.append(enter(self))
        return request[0]

    def loss(batch: Any) -> Any:
        request[0].asked = batch[0] >= 3
        return SmallTask.loss(task, batch)

    monkeypatch.setattr(StopRequest, "__enter__", remember)
    monkeypatch.setattr(task, "loss", loss)
    result = run(tmp_path / "a", judge, task, score_steps=3)
    assert result.interrupted
    assert judge.asked == [0]
    assert (tmp_path / "a" / ADAPTER).is_file()


@pytest.mark.parametrize("trouble", ["folder", "scorer"])
def test_a_scoring_that_fails_is_said_and_training_goes_on(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, trouble: str
) -> None:
    """A file where best/ should be, or a disk that takes no plot: the adapter of six steps is not thrown away."""
    folder, judge = tmp_path / "a", Judge({2: 2})
    folder.mkdir()
    if trouble == "folder":
        (folder / BEST).write_text("a file where the folder should be", "utf-8")
    else:
        judge.fails_at = 2
    result = run(folder, judge, score_steps=2)
    assert result.steps == 6
    assert (folder / ADAPTER).is_file()
    assert judge.asked == [0, 2, 4, 6]
    assert "Scores of step 2 could not be made, training goes on: " in caplog.text


def test_the_summary_says_which_step_is_the_best_and_what_it_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "x" / "best").mkdir(parents=True)
    adapter = tmp_path / "runs" / "x" / "best" / ADAPTER
    adapter.write_bytes(b"")
    verdict = Verdict({}, 200, "image similarity 0.5", "settled")
    result = TrainResult(300, 0, False, True, 0.1, 60.0, 6.0, verdict)
    assert result.summary(Path("runs/x")).splitlines() == [
        "300 steps in 60 s; adapter in runs/x",
        f"{Path('runs/x/best')} holds step 200: image similarity 0.5; scoring took 6 s, 10% of the training time",
    ]
    adapter.unlink()
    assert "step 200 is the best, but" in result.summary(Path("runs/x"))
    nothing = TrainResult(3, 0, False, True, 0.1, 1.0, 1.0, Verdict({}, None, "", ""))
    assert "no step could be scored" in nothing.summary(Path("runs/x"))
