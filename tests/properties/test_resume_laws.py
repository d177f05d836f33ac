"""C1: a training that was interrupted and went on is the training that was not, to the bit.

Each law takes the module of the loop as an argument, so that a faulty one can be tried.
"""

from __future__ import annotations

import json
import os
import signal
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie.checkpoint import find_checkpoint, list_checkpoints
from dreamrie.errors import CheckpointError
from dreamrie.optimizers import OPTIMIZERS, build_optimizer
from dreamrie.runlog import RunLog
from dreamrie.trainer import Checkpoints, LoopSettings, TrainResult, Verdict, loop, saving
from dreamrie.trainer.saving import Progress
from tests.properties.test_trainer_laws import loss_scale
from tests.small_task import SmallTask

STEPS = 9
FACTS = {"settings": "lr: 0.05", "the pictures": "a"}


class Memory:
    """A scorer whose verdict depends on everything it has seen, with its own random stream."""

    def __init__(self) -> None:
        self.seen: list[float] = []

    def __call__(self, step: int) -> Verdict:
        noise = float(torch.rand((), generator=torch.Generator().manual_seed(step)))
        self.seen.append(noise + 0.5 * sum(self.seen))
        best = max(range(len(self.seen)), key=self.seen.__getitem__)
        return Verdict({"mean": (self.seen[-1], 0.0, 1.0)}, None, f"{best}", f"seen {self.seen}")

    def state(self) -> str:
        return json.dumps(self.seen)

    def restore(self, state: str) -> None:
        self.seen = json.loads(state)


@dataclass
class Leg:
    """What one process left in memory; what it left on the disk is in the folder."""

    task: Any
    optimizer: torch.optim.Optimizer
    result: TrainResult
    scorer: Memory = field(default_factory=Memory)

    def tensors(self) -> list[Tensor]:
        """Factors, then the state of the optimizer, in order."""
        state = self.optimizer.state_dict()["state"]
        inside = [v for key in sorted(state) for _, v in sorted(state[key].items())]
        return [*self.task.factors(), *(torch.as_tensor(value) for value in inside)]


def spoil_fourth(step: int, loss: Tensor) -> Tensor:
    """Step 4 is not finite, and is skipped."""
    return loss * float("nan") if step == 4 else loss


def leg(
    impl: Any,
    folder: Path,
    name: str,
    stop_after: int | None = None,
    resume: str | None = None,
    facts: dict[str, str] | None = None,
    signal_in: int | None = None,
    kind: Any = SmallTask,
) -> Leg:
    """Train in a world made from nothing, as a new process would; with `stop_after` it is killed there.

    In step `signal_in` it is asked to stop.
    """

    def batch(step: int, micro: int) -> Any:
        if step == signal_in and micro == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        if stop_after is not None and step > stop_after and micro == 1:
            raise InterruptedError  # in the middle of an accumulation
        return kind.batch(task, step, micro)

    task = kind(batch_size=3, dropout=0.3, spoil=spoil_fourth)
    task.batch = batch
    optimizer = build_optimizer(
        name, task.pairs, lr=0.05, weight_decay=0.01 if name != "riemannion" else 0.2
    )
    scorer, found = Memory(), None if resume is None else find_checkpoint(folder, resume)
    settings = LoopSettings(
        max_steps=STEPS,
        accumulation=2,
        scheduler="cosine",
        warmup_steps=2,
        max_grad_norm=0.5,
        score_steps=4,
        spectrum_steps=2,
    )
    # Whatever the process did before must not matter.
    torch.rand(17)
    plan = Checkpoints(2, limit=2, facts=FACTS if facts is None else facts, resume=found)
    records = None if found is None else found.state["records"]
    with RunLog(folder, STEPS, quiet=True, resume=records) as log:
        result = impl.train(task, optimizer, settings, log, None, scorer, plan)
    return Leg(task, optimizer, result, scorer)


def records_of(folder: Path) -> dict[str, list[Any]]:
    """Metrics without their times, and spectra."""
    found = {}
    for name in ("metrics.jsonl", "spectrum.jsonl"):
        rows = [json.loads(line) for line in (folder / name).read_text().splitlines()]
        found[name] = [{k: v for k, v in row.items() if k != "steps_per_s"} for row in rows]
    return found


@contextmanager
def folders() -> Iterator[tuple[Path, Path]]:
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "a").mkdir()
        (Path(name) / "b").mkdir()
        yield Path(name) / "a", Path(name) / "b"


def law_c1_straight_equals_resumed(
    impl: Any, name: str = "riemannion", kind: Any = SmallTask
) -> None:
    """Killed after each step in turn, in the middle of an accumulation: factors, state, records, scores to the bit."""
    with folders() as (straight, _):
        whole = leg(impl, straight, name, kind=kind)
        wanted, records = whole.tensors(), records_of(straight)
        assert [row["step"] for row in records["metrics.jsonl"] if row.get("skipped")] == [4]
        assert whole.result.skipped_steps == 1
    start = kind(batch_size=3, dropout=0.3).factors()
    assert max(float((a - b).norm() / b.norm()) for a, b in zip(wanted, start, strict=False)) > 0.1
    for killed_after in (2, 3, 4, 5, 7, 8) if kind is SmallTask else (3, 7):
        with folders() as (_, folder):
            with pytest.raises(InterruptedError):
                leg(impl, folder, name, stop_after=killed_after, kind=kind)
            last = max(2, killed_after - killed_after % 2)
            # Step 4 is skipped; its checkpoint is one all the same.
            assert list_checkpoints(folder)[-1].name == f"checkpoint-{last}"
            again = leg(impl, folder, name, resume="latest", kind=kind)
            for one, other in zip(again.tensors(), wanted, strict=True):
                assert torch.equal(one, other)
            assert records_of(folder) == records
            assert again.scorer.seen == whole.scorer.seen
            assert again.result.skipped_steps == 1
            assert again.result.last_loss == whole.result.last_loss
            assert again.result.verdict == whole.result.verdict
            assert [path.name for path in list_checkpoints(folder)] == [
                "checkpoint-8",
                "checkpoint-9",
            ]
    with folders() as (_, folder):
        leg(impl, folder, name, kind=kind)
        # Nothing is left to do, so nothing is scored again.
        assert (
            leg(impl, folder, name, resume="latest", kind=kind).result.verdict
            == whole.result.verdict
        )


def law_c8_a_stop_loses_no_scoring(impl: Any) -> None:
    """Asked to stop in a step that is to be scored, and in the last one: who goes on makes the scoring first."""
    with folders() as (straight, _):
        whole = leg(impl, straight, "riemannion")
        wanted, records = whole.tensors(), records_of(straight)
        last = find_checkpoint(straight, "latest").state
    for step in (3, 8, 9):
        with folders() as (_, folder):
            stopped = leg(impl, folder, "riemannion", signal_in=step)
            assert stopped.result.interrupted
            assert stopped.result.steps == step
            again = leg(impl, folder, "riemannion", resume="latest")
            assert all(map(torch.equal, again.tensors(), wanted))
            assert records_of(folder) == records
            assert again.scorer.seen == whole.scorer.seen
            assert again.result.verdict == whole.result.verdict
            kept = find_checkpoint(folder, "latest").state
            for name in ("owes_look", "scored_until", "step", "skipped"):
                assert kept["progress"][name] == last["progress"][name]
            assert kept["scorer"] == last["scorer"]


def test_a_stop_loses_no_scoring() -> None:
    law_c8_a_stop_loses_no_scoring(loop)


# One of each kind of state; the others take their turn in `make end-to-end`.
OFTEN = {"riemannion", "adamw", "muon", "loraplus", "rprec_adamw", "lora_rite"}
ANCHORED = sorted(name for name, entry in OPTIMIZERS.items() if entry.anchor != "refused")


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in OFTEN else pytest.mark.end_to_end)
        for name in ANCHORED
    ],
)
def test_straight_equals_resumed(name: str) -> None:
    law_c1_straight_equals_resumed(loop, name)


def test_resumed_twice_and_from_an_earlier_one(tmp_path: Path) -> None:
    """Killed, resumed, killed, and set back by name: still the same training."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    wanted = leg(loop, tmp_path / "a", "riemannion").tensors()
    for killed_after, resume in ((5, None), (7, "latest"), (8, "checkpoint-4")):
        with pytest.raises(InterruptedError):
            leg(loop, tmp_path / "b", "riemannion", killed_after, resume)
    again = leg(loop, tmp_path / "b", "riemannion", resume="latest")
    assert all(map(torch.equal, again.tensors(), wanted))
    assert records_of(tmp_path / "b") == records_of(tmp_path / "a")


def test_a_finished_training_has_nothing_left_to_do(tmp_path: Path) -> None:
    first = leg(loop, tmp_path, "riemannion")
    before = records_of(tmp_path)
    again = leg(loop, tmp_path, "riemannion", resume="latest")
    assert all(map(torch.equal, again.tensors(), first.tensors()))
    assert records_of(tmp_path) == before
    assert again.result.steps == STEPS


def law_c7_another_run_is_refused(impl: Any) -> None:
    """Other pictures, or a fact that was not recorded: an error that names it, and the model as it was."""
    with folders() as (folder, _):
        with pytest.raises(InterruptedError):
            leg(impl, folder, "riemannion", stop_after=5)
        for facts in (FACTS | {"the pictures": "b"}, FACTS | {"the weights": "x"}):
            with pytest.raises(
                CheckpointError, match=r"the run cannot go on: the (pictures|weights)"
            ):
                leg(impl, folder, "riemannion", resume="latest", facts=facts)


def test_another_run_is_refused() -> None:
    law_c7_another_run_is_refused(loop)


def test_other_versions_are_only_warned_about(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(InterruptedError):
        leg(loop, tmp_path, "riemannion", 5, facts=FACTS | {"versions": "torch 1"})
    leg(loop, tmp_path, "riemannion", resume="latest", facts=FACTS | {"versions": "torch 2"})
    assert "versions: was torch 1, is torch 2; the last bits of a step may differ" in caplog.text


def test_another_optimizer_or_rank_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InterruptedError):
        leg(loop, tmp_path, "adamw", stop_after=5)
    with pytest.raises(CheckpointError, match="checkpoint-4 is of another optimizer"):
        leg(loop, tmp_path, "riemannion", resume="latest")


def test_a_disk_that_is_full_for_a_while_costs_no_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Checkpoint 4 cannot be written; 6 can. The message says what the newest is."""
    from dreamrie import checkpoint

    real = checkpoint.commit_folder

    def full(path: Path, contents: Any) -> None:
        if path.name == "checkpoint-4":
            raise OSError(28, "No space left on device")
        real(path, contents)

    monkeypatch.setattr(checkpoint, "commit_folder", full)
    leg(loop, tmp_path, "riemannion")
    assert "checkpoint-4 cannot be written" in caplog.text
    assert "training goes on; the newest checkpoint is checkpoint-2" in caplog.text
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-8", "checkpoint-9"]


def law_c1_the_loss_scale_comes_back(impl: Any) -> None:
    """fp16 finds its scale by overflowing; a run that goes on must not begin to look for it again."""
    with folders() as (folder, _):
        scales = []
        for initial, resume in ((2.0**20, None), (2.0**4, "latest")):
            task = SmallTask(batch_size=3)
            optimizer = build_optimizer("riemannion", task.pairs, lr=0.05)
            found = None if resume is None else find_checkpoint(folder, resume)
            records = None if found is None else found.state["records"]
            with loss_scale(initial) as accelerator, RunLog(folder, 4, resume=records) as log:
                saver = impl.Saver(task, optimizer, accelerator, log, None, Checkpoints(1))
                if found is None:
                    accelerator.scaler.scale(torch.ones(()))  # a scale is only made when it is used
                    saver.write(Progress(step=1), None)
                else:
                    saver.restore(found)
                scales.append(accelerator.scaler.state_dict()["scale"])
        assert scales == [2.0**20, 2.0**20]


def test_the_loss_scale_comes_back() -> None:
    law_c1_the_loss_scale_comes_back(saving)
