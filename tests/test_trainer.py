"""The loop by example: what it calls and when, what it writes, how it stops."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dreamrie.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ImageError,
    NumericalError,
)
from dreamrie.lora import attach_lora
from dreamrie.optimizers import build_optimizer
from dreamrie.runlog import RunLog
from dreamrie.trainer import (
    LoopSettings,
    StopRequest,
    change_spectra,
    derive_seed,
    loop,
    make_accelerator,
    own_random_stream,
    schedule_factor,
    sigterm_as_ctrl_c,
    train,
)
from dreamrie.trainer.spectra import as_lists
from tests.small_task import RANK, SmallTask, train_small


def test_training_moves_the_model_towards_its_goal(tmp_path: Path) -> None:
    """The loss on points never trained on falls by a stated amount, for both kinds of optimizer."""
    for name, init, lr in (("riemannion", "orthonormal", 0.05), ("adamw", "default", 0.03)):
        task = SmallTask(init=init, dtype=torch.float32)
        unseen = task.batch(10_000, 0)[1].repeat(1, 1), task.batch(10_001, 0)[1]
        held = (0, torch.cat(unseen))
        with torch.no_grad():
            before = float(task.loss(held))
        settings: dict[str, Any] = {"max_steps": 60, "scheduler": "cosine"}
        outcome = train_small(loop, tmp_path, task, name=name, lr=lr, **settings)
        task.model.eval()
        with torch.no_grad():
            after = float(task.loss(held))
        assert after < 0.85 * before, name
        assert outcome.result.steps == len(outcome.steps) == 60
        assert outcome.result.skipped_steps == 0
        assert outcome.result.last_loss == pytest.approx(outcome.steps[-1]["loss"])


def test_every_step_is_recorded(tmp_path: Path) -> None:
    outcome = train_small(loop, tmp_path, SmallTask(), max_steps=3)
    assert [record["step"] for record in outcome.steps] == [1, 2, 3]
    for record in outcome.steps:
        assert set(record) == {"step", "loss", "lr", "grad_norm", "steps_per_s", "skipped"}
        assert record["loss"] > 0
        assert record["grad_norm"] > 0
        assert record["steps_per_s"] > 0
    assert outcome.result.seconds > 0


def test_the_recorded_norm_is_the_global_one_for_plain_optimizers(tmp_path: Path) -> None:
    task, twin = SmallTask(init="default"), SmallTask(init="default")
    outcome = train_small(loop, tmp_path, task, name="adamw", max_steps=1)
    twin.loss(twin.batch(1, 0)).backward()
    squares = [p.grad.square().sum() for pair in twin.pairs for p in (pair.left, pair.right)]
    assert outcome.steps[0]["grad_norm"] == pytest.approx(float(sum(squares)) ** 0.5, rel=1e-9)


def test_validation_at_the_start_on_the_way_and_at_the_end(tmp_path: Path) -> None:
    for every, steps in ((3, [0, 3, 6, 8]), (4, [0, 4, 8]), (100, [0, 8]), (None, [])):
        task = SmallTask()
        outcome = train_small(loop, tmp_path, task, validation_steps=every)
        assert task.validated == steps
        scores = [record for record in outcome.records if "scores" in record]
        assert [record["step"] for record in scores] == steps
        if steps:
            assert scores[0]["scores"]["size"] == pytest.approx(0, abs=1e-12)
            assert scores[-1]["scores"]["size"] > 1e-3
        assert task.model.training  # the task had switched to evaluation


def test_validation_changes_nothing(tmp_path: Path) -> None:
    with_pictures = train_small(loop, tmp_path, SmallTask(), validation_steps=2)
    without = train_small(loop, tmp_path, SmallTask())
    for one, other in zip(with_pictures.task.factors(), without.task.factors(), strict=True):
        assert torch.equal(one, other)


def test_spectra_are_those_of_the_dense_matrices(tmp_path: Path) -> None:
    task = SmallTask()
    train_small(loop, tmp_path, task, spectrum_steps=3)
    records = [json.loads(line) for line in (tmp_path / "spectrum.jsonl").read_text().splitlines()]
    assert [record["step"] for record in records] == [0, 3, 6, 8]
    for pair in task.pairs:
        dense = torch.linalg.svdvals(pair.delta().double())[: 2 * RANK]
        assert records[-1]["change"][pair.name] == pytest.approx(dense.tolist(), rel=1e-4)
        assert max(records[0]["change"][pair.name]) < 1e-6
        point = pair.point().s
        assert records[-1]["point"][pair.name] == pytest.approx(point.tolist(), rel=1e-6)


def test_spectra_of_plain_adapters_and_convolutions() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(5, 9, 3), torch.nn.Linear(8, 11))
    pairs = attach_lora(model, 2, ["0", "1"], init="default")
    assert change_spectra(pairs) == {"0": [0.0, 0.0], "1": [0.0, 0.0]}
    with torch.no_grad():
        for pair in pairs:
            pair.left.normal_(generator=torch.Generator().manual_seed(1))
    for name, values in change_spectra(pairs).items():
        dense = next(pair for pair in pairs if pair.name == name).delta()
        assert values == pytest.approx(torch.linalg.svdvals(dense)[:2].tolist(), rel=1e-5)
        assert values[0] > 0.1


def test_spectra_of_broken_factors_are_refused() -> None:
    pairs = attach_lora(torch.nn.Sequential(torch.nn.Linear(8, 11)), 2, ["0"])
    with torch.no_grad():
        pairs[0].right[1, 3] = float("inf")
    with pytest.raises(NumericalError, match="not finite"):
        change_spectra(pairs)


def test_vectors_of_all_lengths_are_read_together() -> None:
    given = {"a": torch.rand(3), "b": torch.rand(1, dtype=torch.float64), "c": torch.rand(2)}
    assert as_lists(given) == {name: vector.tolist() for name, vector in given.items()}
    assert as_lists({}) == {}


def test_the_adapter_is_saved_once_at_the_end(tmp_path: Path) -> None:
    task = SmallTask()
    train_small(loop, tmp_path, task)
    assert task.saved == [{"steps": "8", "optimizer": "riemannion"}]
    saved = torch.load(tmp_path / "small.pt")
    assert all(torch.equal(a, b) for a, b in zip(saved, task.deltas(), strict=True))


def test_without_a_folder_nothing_is_saved_or_validated() -> None:
    task = SmallTask()
    optimizer = build_optimizer("riemannion", task.pairs, lr=0.1)
    with RunLog(None, 2) as log:
        train(task, optimizer, LoopSettings(max_steps=2, validation_steps=1), log)
    assert not task.saved
    assert not task.validated


class FailingTask(SmallTask):
    """Its samples fail at step 3, its save at the end, as told."""

    def __init__(self, samples: Exception | None = None, save: Exception | None = None) -> None:
        super().__init__()
        self.failures = (samples, save)

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        if step == 3 and self.failures[0] is not None:
            raise self.failures[0]
        return super().validate(step, directory)

    def save(self, directory: Path, metadata: dict[str, str]) -> None:
        if self.failures[1] is not None:
            raise self.failures[1]
        super().save(directory, metadata)


@pytest.mark.parametrize(
    "error", [OSError(28, "full"), ImageError("full"), CheckpointError("full")]
)
def test_samples_that_cannot_be_written_do_not_end_the_training(
    tmp_path: Path, error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    task = FailingTask(samples=error)
    outcome = train_small(loop, tmp_path, task, validation_steps=3)
    assert (task.validated, outcome.result.steps) == ([0, 6, 8], 8)
    messages = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(messages) == 1
    assert "step 3" in messages[0]
    assert "full" in messages[0]
    plain = train_small(loop, tmp_path / "plain", SmallTask()).task
    assert all(torch.equal(a, b) for a, b in zip(task.factors(), plain.factors(), strict=True))


def test_samples_of_a_broken_model_end_the_training(tmp_path: Path) -> None:
    with pytest.raises(NumericalError):
        train_small(loop, tmp_path, FailingTask(samples=NumericalError("x")), validation_steps=3)


@pytest.mark.parametrize("error", [OSError(28, "full"), AdapterError("full")])
def test_an_adapter_that_cannot_be_saved_is_a_failed_training(
    tmp_path: Path, error: Exception
) -> None:
    with pytest.raises(CheckpointError, match="full"):
        train_small(loop, tmp_path, FailingTask(save=error))


# ---------------------------------------------------------------------------------- stopping


def send(number: int, at_step: int) -> Any:
    def spoil(step: int, loss: Tensor) -> Tensor:
        if step == at_step:
            os.kill(os.getpid(), number)
        return loss

    return spoil


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_finishes_the_step_and_saves(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    handlers = [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)]
    task = SmallTask(spoil=send(number, 3))
    with caplog.at_level(logging.WARNING, "dreamrie"):
        outcome = train_small(loop, tmp_path, task, validation_steps=3)
    assert outcome.result.interrupted
    assert outcome.result.saved
    assert outcome.result.steps == len(outcome.steps) == 3
    assert task.validated == [0]  # no time is spent on pictures after the signal
    assert "once more" in caplog.text
    three = train_small(loop, tmp_path, SmallTask(), max_steps=3).task
    assert all(torch.equal(a, b) for a, b in zip(task.factors(), three.factors(), strict=True))
    assert task.saved[0]["steps"] == "3"
    assert [signal.getsignal(n) for n in (signal.SIGINT, signal.SIGTERM)] == handlers


class StoppedAtOnce(SmallTask):
    """The signal comes while the samples before training are drawn."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def validate(self, step: int, directory: Path) -> dict[str, float]:
        os.kill(os.getpid(), self.number)
        return super().validate(step, directory)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_before_the_first_step_saves_nothing(
    tmp_path: Path, number: int, caplog: pytest.LogCaptureFixture
) -> None:
    task = StoppedAtOnce(number)
    outcome = train_small(loop, tmp_path, task, validation_steps=3)
    assert (outcome.result.interrupted, outcome.result.saved) == (True, False)
    assert (outcome.result.steps, task.validated, task.saved) == (0, [0], [])
    assert "stopped; nothing was saved" in caplog.messages


def test_a_signal_after_skipped_steps_alone_saves_nothing(tmp_path: Path) -> None:
    def spoil(step: int, loss: Tensor) -> Tensor:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
        return loss * float("nan")

    task = SmallTask(spoil=spoil)
    result = train_small(loop, tmp_path, task).result
    assert (result.steps, result.skipped_steps) == (2, 2)
    assert (result.interrupted, result.saved, task.saved) == (True, False, [])


def test_a_run_of_skipped_steps_alone_is_a_failed_training(tmp_path: Path) -> None:
    task = SmallTask(spoil=lambda step, loss: loss * float("nan"))
    with pytest.raises(NumericalError, match="every one of the 2 steps"):
        train_small(loop, tmp_path, task, max_steps=2)
    assert not task.saved


def test_sigterm_ends_a_command_as_ctrl_c_does() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), sigterm_as_ctrl_c():
        signal.raise_signal(signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_signal_stops_at_once(tmp_path: Path) -> None:
    def twice(step: int, loss: Tensor) -> Tensor:
        if step == 2:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)
        return loss

    task = SmallTask(spoil=twice)
    with pytest.raises(KeyboardInterrupt):
        train_small(loop, tmp_path, task)
    assert not task.saved


def test_a_thread_trains_without_touching_signals(tmp_path: Path) -> None:
    """As in the web page's worker: only the main thread may set handlers."""
    outcomes = []
    task = SmallTask()
    worker = threading.Thread(target=lambda: outcomes.append(train_small(loop, tmp_path, task)))
    worker.start()
    worker.join()
    assert outcomes[0].result.steps == 8
    with StopRequest() as stop:
        assert not stop.asked


# ---------------------------------------------------------------------------------- pieces


def test_streams_differ_and_repeat() -> None:
    seeds = [derive_seed(0, step, micro) for step in range(40) for micro in range(25)]
    assert len(set(seeds)) == 1000
    assert seeds == [derive_seed(0, step, micro) for step in range(40) for micro in range(25)]
    assert derive_seed(1, 12) != derive_seed(11, 2)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_own_random_stream_gives_back_the_callers() -> None:
    before = torch.get_rng_state()
    with own_random_stream(torch.device("cpu"), 5):
        first = torch.rand(3)
    assert torch.equal(torch.get_rng_state(), before)
    with own_random_stream(torch.device("cpu"), 5):
        assert torch.equal(torch.rand(3), first)


def test_the_schedule_is_monotone_after_the_warm_up_and_never_wastes_a_step() -> None:
    for name in ("linear", "cosine"):
        factors = [schedule_factor(name, done, 50, 5) for done in range(51)]
        assert factors[:6] == sorted(set(factors[:6]))
        assert factors[5:] == sorted(set(factors[5:]), reverse=True)
        assert factors[5] == 1
        assert min(factors[:50]) > 0
        assert factors[50] == pytest.approx(0, abs=1e-12)
    with pytest.raises(ConfigError, match="polynomial"):
        schedule_factor("polynomial", 0, 50)


def test_a_precision_this_machine_lacks_is_a_clear_error() -> None:
    if torch.cuda.is_available():
        pytest.skip("an accelerator can compute in fp16")
    with pytest.raises(ConfigError, match="--mixed_precision") as caught:
        make_accelerator("fp16")
    assert len(str(caught.value).splitlines()) == 3
    assert "use bf16, or no" in str(caught.value)
    # And a run in another precision can follow in the same process.
    assert make_accelerator("bf16").mixed_precision == "bf16"
    assert make_accelerator("no").mixed_precision == "no"


def test_what_is_proposed_instead_of_bf16_is_not_bf16(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU older than bf16."""

    def refuse(**_: object) -> None:
        raise ValueError("bf16 mixed precision requires a supported device.")

    monkeypatch.setattr("dreamrie.trainer.control.Accelerator", refuse)
    with pytest.raises(ConfigError, match="use fp16, or no"):
        make_accelerator("bf16")
