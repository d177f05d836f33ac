"""N: laws of the training loop. Each takes the loop as an argument, so that a faulty one can be tried."""

from __future__ import annotations

import math
import multiprocessing
import os
import socket
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.func import functional_call

from dreamrie.errors import NumericalError
from dreamrie.fixed_rank import norm, project_dense
from dreamrie.optimizers import build_optimizer
from dreamrie.runlog import RunLog
from dreamrie.trainer import LoopSettings, loop, make_accelerator
from tests.small_task import SmallTask, distance, train_small


@contextmanager
def folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory() as name:
        yield Path(name)


def moved(task: SmallTask) -> float:
    """How far the product has gone from its start, relative to the size of the base weights."""
    return max(float(p.delta().norm() / p.base_weight.norm()) for p in task.pairs)


# ------------------------------------------------------------------------------ N2 accumulation


def law_accumulation(impl: Any, kind: Any = SmallTask) -> None:
    """k micro-batches of b equal one of k b; to 1e-12 in fp64, 1e-6 in fp32."""
    for dtype, bar in ((torch.float64, 1e-12), (torch.float32, 2e-6)):
        # Riemannion does not see the size of the gradient, so weight decay on AdamW and the
        # clipping threshold are there to notice a wrong one.
        for name, extra in (("riemannion", {"max_grad_norm": 0.3}), ("adamw", {})):
            outcomes = []
            for count in (1, 3):
                task = kind(batch_size=6 // count, samples_per_step=6, dtype=dtype)
                with folder() as where:
                    outcomes.append(
                        train_small(impl, where, task, name=name, accumulation=count, **extra)
                    )
            whole, parts = outcomes
            assert moved(whole.task) > 1e-2
            assert distance(parts.task.deltas(), whole.task.deltas()) <= bar
            assert len(parts.steps) == len(whole.steps) == 8
            for one, other in zip(whole.steps, parts.steps, strict=True):
                assert math.isclose(one["loss"], other["loss"], rel_tol=bar)
                assert math.isclose(one["grad_norm"], other["grad_norm"], rel_tol=10 * bar)


def test_accumulation() -> None:
    law_accumulation(loop)


# --------------------------------------------------------------------------------- N3 schedule

SHAPES = {
    # peak 1; warm-up climbs in a line and never starts at 0; the end value follows the last step
    ("linear", 6, 2): ([1 / 3, 2 / 3, 1, 3 / 4, 2 / 4, 1 / 4], 0.0),
    ("cosine", 4, 0): ([1, (2 + 2**0.5) / 4, 1 / 2, (2 - 2**0.5) / 4], 0.0),
    ("constant", 4, 3): ([1 / 4, 2 / 4, 3 / 4, 1], 1.0),
}


def law_schedule(impl: Any) -> None:
    """The schedule counts optimizer steps, whatever the accumulation, and ends at its end value."""
    for (shape, steps, warmup), (factors, end) in SHAPES.items():
        for accumulation in (1, 3):
            task = SmallTask(batch_size=2, samples_per_step=6)
            with folder() as where:
                outcome = train_small(
                    impl,
                    where,
                    task,
                    lr=0.02,
                    max_steps=steps,
                    scheduler=shape,
                    warmup_steps=warmup,
                    accumulation=accumulation,
                )
            rates = [record["lr"] for record in outcome.steps]
            assert rates == pytest.approx([0.02 * factor for factor in factors], rel=1e-12)
            assert outcome.optimizer.param_groups[0]["lr"] == pytest.approx(0.02 * end, abs=1e-17)


def test_schedule() -> None:
    law_schedule(loop)


def law_groups_keep_their_ratio(impl: Any) -> None:
    """LoRA+ has two learning rates; the schedule scales both."""
    with folder() as where:
        task = SmallTask(init="default", dtype=torch.float32)
        outcome = train_small(impl, where, task, name="loraplus", lr=1e-3, scheduler="linear")
    assert {group["lr"] for group in outcome.optimizer.param_groups} == {0.0}
    left = max(float(pair.left.detach().abs().max()) for pair in task.pairs)
    # Adam's first steps are lr in every entry: 8 falling steps of 16e-3 sum up to 72e-3.
    assert 36e-3 < left <= 72e-3 * 1.01


def test_groups_keep_their_ratio() -> None:
    law_groups_keep_their_ratio(loop)


# ---------------------------------------------------------------------- N1 numbers not finite


def spoiler(bad_steps: set[int], kind: str) -> Any:
    """Make the loss NaN, or keep it finite and make its gradient NaN."""

    def spoil(step: int, loss: Tensor) -> Tensor:
        if step not in bad_steps:
            return loss
        return loss * math.nan if kind == "loss" else loss + (loss * 0).sqrt()

    return spoil


def law_bad_steps_are_skipped(impl: Any, kind: Any = SmallTask) -> None:
    """A step with a loss or gradient that is not finite leaves every byte as it was."""
    for name in ("riemannion", "adamw"):
        for what in ("loss", "gradient"):
            final = []
            # Up to step 5 with step 5 spoiled, and up to step 4 only: the same bytes.
            for steps, bad in ((4, set()), (5, {5})):
                task = kind(spoil=spoiler(bad, what))
                with folder() as where:
                    outcome = train_small(impl, where, task, name=name, max_steps=steps)
                final.append(outcome)
            before, after = final
            assert moved(before.task) > 1e-3
            for one, other in zip(before.task.factors(), after.task.factors(), strict=True):
                assert torch.equal(one, other)
            saved, kept = before.optimizer.state_dict(), after.optimizer.state_dict()
            for key, entries in saved["state"].items():
                for word, value in entries.items():
                    assert torch.equal(
                        torch.as_tensor(value), torch.as_tensor(kept["state"][key][word])
                    )
            assert after.result.skipped_steps == 1
            assert after.steps[-1]["skipped"] == what
            assert [record["skipped"] for record in after.steps[:-1]] == [None] * 4
            if what == "loss":
                assert after.steps[-1]["loss"] is None


def test_bad_steps_are_skipped() -> None:
    law_bad_steps_are_skipped(loop)


def law_three_bad_steps_stop_the_run(impl: Any, kind: Any = SmallTask) -> None:
    """Two in a row, a good one, two more: goes on. Three in a row: an error, and nothing is saved."""
    with folder() as where:
        task = kind(spoil=spoiler({2, 3, 5, 6}, "loss"))
        assert train_small(impl, where, task).result.skipped_steps == 4
        assert len(task.saved) == 1
    with folder() as where:
        task = kind(spoil=spoiler({3, 4, 5}, "loss"))
        with pytest.raises(NumericalError) as caught:
            train_small(impl, where, task)
        assert not task.saved
        assert {path.suffix for path in where.glob("[!.]*")} == {".jsonl"}
    for word in ("3 times in a row", "step 5", task.describe(task.batch(5, 0)), "named examples"):
        assert word in str(caught.value)


def test_three_bad_steps_stop_the_run() -> None:
    law_three_bad_steps_stop_the_run(loop)


# ------------------------------------------------------------- N4 unscale, clip, step in order


def tangent_norm(task: SmallTask, points: Tensor) -> float:
    """Norm of the Riemannian gradient from dense gradients of the effective weights."""
    layers = {pair.name: pair for pair in task.pairs}
    weights = {
        f"{name}.weight": (pair.base_weight + pair.delta()).detach().requires_grad_()
        for name, pair in layers.items()
    }
    bare = SmallTask().model
    plain = torch.nn.Sequential(
        *(m.base_layer if hasattr(m, "base_layer") else m for m in bare.children())
    )
    target = (points @ task.teacher).sin()
    loss = (functional_call(plain, weights, (points,)) - target).square().mean()
    gradients = torch.autograd.grad(loss, list(weights.values()))
    total = 0.0
    for pair, gradient in zip(layers.values(), gradients, strict=True):
        total += float(norm(project_dense(pair.point(), gradient))) ** 2
    return math.sqrt(total)


def law_clips_the_tangent_norm(impl: Any) -> None:
    """Clipping scales all gradients by one number: limit / norm of the Riemannian gradient."""
    limit, lr = 0.2, 0.05
    with folder() as where:
        ours = train_small(impl, where, SmallTask(), lr=lr, max_grad_norm=limit)
        free = train_small(impl, where, SmallTask(), lr=lr)
    task = SmallTask()
    optimizer = build_optimizer("riemannion", task.pairs, lr=lr)
    clipped = 0
    for step in range(1, 9):
        batch = task.batch(step, 0)
        size = tangent_norm(task, batch[1])
        assert ours.steps[step - 1]["grad_norm"] == pytest.approx(size, rel=1e-9)
        share = min(1.0, limit / (size + 1e-6))
        clipped += share < 0.9
        optimizer.zero_grad()
        (task.loss(batch) * share).backward()
        optimizer.step()
    assert 3 <= clipped
    assert distance(free.task.deltas(), task.deltas()) > 1e-3
    assert distance(ours.task.deltas(), task.deltas()) < 1e-10


def test_clips_the_tangent_norm() -> None:
    law_clips_the_tangent_norm(loop)


@contextmanager
def loss_scale(initial: float) -> Iterator[Any]:
    """An accelerator that scales the loss as with fp16, but computes in full precision on the CPU."""
    accelerator = make_accelerator()
    scaler = torch.amp.GradScaler("cpu", init_scale=initial, growth_interval=10_000)
    accelerator.scaler, accelerator.native_amp = scaler, True
    AcceleratorState._shared_state["_mixed_precision"] = "fp16"
    accelerator.autocast = nullcontext
    try:
        yield accelerator
    finally:
        AcceleratorState._reset_state()


def law_unscales_before_clipping(impl: Any) -> None:
    """A loss scale of 2^10 changes no byte: norm and clipping see the true gradients."""
    results = []
    for scaled in (False, True):
        task = SmallTask(dtype=torch.float64)
        with folder() as where:
            if scaled:
                with loss_scale(2.0**10) as accelerator:
                    result = train_small(
                        impl, where, task, max_grad_norm=0.2, accelerator=accelerator
                    )
            else:
                result = train_small(impl, where, task, max_grad_norm=0.2)
        results.append(result)
    plain, scaled_one = results
    assert [r["grad_norm"] for r in plain.steps] == [r["grad_norm"] for r in scaled_one.steps]
    for one, other in zip(plain.task.factors(), scaled_one.task.factors(), strict=True):
        assert torch.equal(one, other)


def test_unscales_before_clipping() -> None:
    law_unscales_before_clipping(loop)


def test_an_overflow_of_the_loss_scale_is_a_skipped_step_not_the_end() -> None:
    """fp16 starts by overflowing: the scale falls until it fits, and no byte moves until then."""
    task = SmallTask(dtype=torch.float32)
    start = task.factors()
    seen = []
    task.spoil = lambda step, loss: (seen.append(task.factors()), loss * 1e4)[1]
    with folder() as where, loss_scale(2.0**127) as accelerator:
        accelerator.scaler.set_backoff_factor(2.0**-30)
        outcome = train_small(loop, where, task, accelerator=accelerator)
    reasons = [record["skipped"] for record in outcome.steps]
    count = reasons.count("gradient")
    assert 1 <= count <= 4
    assert reasons == ["gradient"] * count + [None] * (8 - count)
    for factors in seen[: count + 1]:
        assert all(torch.equal(a, b) for a, b in zip(start, factors, strict=True))
    assert moved(task) > 1e-3


# ------------------------------------------------------------------------------ N5 repetition


def law_same_seed_same_bytes(impl: Any) -> None:
    """Two runs with one seed agree to the bit, dropout included; another seed differs."""

    def factors(seed: int) -> list[Tensor]:
        task = SmallTask(dropout=0.3, dtype=torch.float32)
        torch.manual_seed(int(torch.randint(1000, ())))  # the caller's state must not matter
        with folder() as where:
            return train_small(impl, where, task, seed=seed).task.factors()

    first, again, other = factors(3), factors(3), factors(4)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    assert distance(first, other) > 1e-4


def test_same_seed_same_bytes() -> None:
    law_same_seed_same_bytes(loop)


def test_the_callers_random_state_is_untouched() -> None:
    task = SmallTask(dropout=0.3)
    before = torch.get_rng_state()
    with folder() as where:
        train_small(loop, where, task)
    assert torch.equal(before, torch.get_rng_state())


def test_the_anchor_is_untouched_and_out_of_the_norm() -> None:
    """A10: 50 steps with decay, momentum and clipping leave the frozen half bit for bit."""
    task = SmallTask(dtype=torch.float32)
    anchors = [(p.left[:, p.rank :].clone(), p.right[p.rank :].clone()) for p in task.pairs]
    with folder() as where:
        train_small(loop, where, task, max_steps=50, weight_decay=0.1, max_grad_norm=0.2)
    assert moved(task) > 1e-2
    for pair, (left, right) in zip(task.pairs, anchors, strict=True):
        assert torch.equal(pair.left[:, pair.rank :], left)
        assert torch.equal(pair.right[pair.rank :], right)


def test_under_bf16_the_adapter_and_the_state_stay_fp32() -> None:
    """N6: autocast touches the forward pass only, and stays within its budget."""
    outcomes = []
    try:
        for precision in ("no", "bf16"):
            task = SmallTask(dtype=torch.float32)
            with folder() as where:
                accelerator = make_accelerator(precision)
                outcomes.append(train_small(loop, where, task, accelerator=accelerator))
    finally:
        AcceleratorState._reset_state()
    full, half = outcomes
    kinds = {p.dtype for pair in half.task.pairs for p in (pair.left, pair.right)}
    for entries in half.optimizer.state.values():
        kinds |= {
            v.dtype for v in entries.values() if isinstance(v, Tensor) and v.is_floating_point()
        }
    assert kinds == {torch.float32}
    assert 1e-5 < abs(full.steps[0]["loss"] - half.steps[0]["loss"]) < 2e-2
    assert distance(half.task.deltas(), full.task.deltas()) < 0.2


# -------------------------------------------------------------------------------- two processes


def _worker(rank: int, port: int, where: Path) -> None:
    """One of two processes; forked, so that nothing is imported again."""
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": "1",  # accelerate warns about a choice of its own otherwise
        "WORLD_SIZE": "2",
        "LOCAL_WORLD_SIZE": "2",
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "ACCELERATE_USE_CPU": "true",
    }
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator()
    assert accelerator.num_processes == 2
    task = SmallTask(batch_size=3, samples_per_step=6)
    optimizer = build_optimizer("riemannion", task.pairs, lr=0.05)
    settings = LoopSettings(max_steps=8, scheduler="constant", max_grad_norm=0.3)
    with RunLog(where if accelerator.is_main_process else None, 8, quiet=True) as log:
        loop.train(task, optimizer, settings, log, accelerator)
    assert len(task.saved) == accelerator.is_main_process
    torch.save(task.deltas(), where / f"rank{rank}.pt")
    accelerator.end_training()


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_two_processes_equal_one(tmp_path: Path) -> None:
    """Two processes with 3 points each are one with 6; only the main process writes."""
    one = SmallTask(batch_size=6, samples_per_step=6)
    train_small(loop, tmp_path, one, max_grad_norm=0.3)
    (tmp_path / "small.pt").unlink()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=_worker, args=(rank, port, tmp_path)) for rank in range(2)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert worker.exitcode == 0
    assert (tmp_path / "small.pt").exists()
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"rank{rank}.pt"), one.deltas()) < 1e-10
