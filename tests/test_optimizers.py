"""Optimizers by name: each is the method it says, over every factor once."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreamrie.trainer as loop
from dreamrie.errors import ConfigError
from dreamrie.lora import attach_lora
from dreamrie.optimizers import OPTIMIZERS, build_optimizer, describe_optimizer, trained_numbers
from dreamrie.optimizers.pair_optimizer import PairOptimizer
from dreamrie.riemannion import Riemannion
from tests.small_task import RANK, SIZES, SmallTask, train_small
from tests.strategies import Pair, Quadratic, run

PLAIN = sorted(name for name, entry in OPTIMIZERS.items() if entry.anchor == "trained")


def stepped(name: str, init: str, **options: Any) -> tuple[SmallTask, list[Tensor], list[Tensor]]:
    """A task after one step; its factors before, and the gradients."""
    task = SmallTask(init=init, dtype=torch.float32)
    if init == "default":  # leave lora_B = 0, where lora_A has no gradient
        with torch.no_grad():
            for number, pair in enumerate(task.pairs):
                generator = torch.Generator().manual_seed(number)
                pair.left.copy_(torch.randn(pair.left.shape, generator=generator))
    optimizer = build_optimizer(name, task.pairs, **options)
    before = task.factors()
    task.loss(task.batch(1, 0)).backward()
    gradients = [p.grad.clone() for pair in task.pairs for p in (pair.left, pair.right)]
    optimizer.step()
    return task, before, gradients


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_factor_is_in_one_group(name: str) -> None:
    task = SmallTask(init="orthonormal" if OPTIMIZERS[name].needs_rank else "default")
    optimizer = build_optimizer(name, task.pairs, lr=1e-3)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    wanted = [id(p) for pair in task.pairs for p in (pair.left, pair.right)]
    assert sorted(held) == sorted(wanted)


def test_adamw_is_torchs() -> None:
    """First step of decoupled Adam: factor * (1 - lr decay) - lr * g / (|g| + eps)."""
    task, before, gradients = stepped("adamw", "default", lr=0.01, weight_decay=0.5)
    for old, new, gradient in zip(before, task.factors(), gradients, strict=True):
        expected = old * (1 - 0.01 * 0.5) - 0.01 * gradient / (gradient.abs() + 1e-8)
        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-7)


def test_loraplus_moves_the_output_side_sixteen_times_as_far() -> None:
    task, before, gradients = stepped("loraplus", "default", lr=1e-3)
    for index, (old, new) in enumerate(zip(before, task.factors(), strict=True)):
        step = 16e-3 if index % 2 == 0 else 1e-3
        expected = old - step * gradients[index] / (gradients[index].abs() + 1e-8)
        torch.testing.assert_close(new, expected, rtol=1e-4, atol=1e-6)


def test_rprec_adamw_preconditions_by_the_other_factor() -> None:
    """AdamW's first step has the sign of (B^T B + 0.01)^-1 g for the input side."""
    task, before, gradients = stepped("rprec_adamw", "default", lr=1e-3)
    differing = 0
    for index in range(len(task.pairs)):
        left, right = before[2 * index : 2 * index + 2]
        gradient = gradients[2 * index + 1]
        scaled = torch.linalg.solve(left.T @ left + 0.01 * torch.eye(RANK), gradient)
        moved = task.factors()[2 * index + 1] - right
        expected = -1e-3 * scaled / (scaled.abs() + 1e-8)
        torch.testing.assert_close(moved, expected, rtol=1e-3, atol=1e-6)
        differing += int((scaled.sign() != gradient.sign()).sum())
    assert differing >= 2  # so plain AdamW would be noticed


def test_sgd_is_torchs() -> None:
    """First step: the decay joins the gradient, and momentum starts from it."""
    task, before, gradients = stepped("sgd", "default", lr=0.05, weight_decay=0.5)
    for old, new, gradient in zip(before, task.factors(), gradients, strict=True):
        torch.testing.assert_close(new, old - 0.05 * (gradient + 0.5 * old), rtol=1e-5, atol=1e-7)


def test_lorafa_moves_lora_b_alone_by_its_projected_gradient() -> None:
    """AdamW's first step has the sign of g (A A^T)^-1; no gradient of lora_A is even computed."""
    task = SmallTask(init="default", dtype=torch.float32)
    optimizer = build_optimizer("lorafa", task.pairs, lr=1e-3)
    before = task.factors()
    task.loss(task.batch(1, 0)).backward()
    differing = 0
    wanted = []
    for index, pair in enumerate(task.pairs):
        gradient, right = pair.left.grad, before[2 * index + 1]
        assert gradient is not None
        assert pair.right.grad is None
        projected = torch.linalg.solve(right @ right.T, gradient.T).T
        differing += int((projected.sign() != gradient.sign()).sum())
        wanted.append(before[2 * index] - 1e-3 * projected.sign())
    optimizer.step()
    assert differing >= 2  # so plain AdamW would be noticed
    for index, expected in enumerate(wanted):
        torch.testing.assert_close(task.factors()[2 * index], expected, rtol=0, atol=2e-5)
        assert torch.equal(task.factors()[2 * index + 1], before[2 * index + 1])


def test_lorafa_refuses_anchors_and_convolutions() -> None:
    with pytest.raises(ConfigError, match="lorafa takes no anchored adapter"):
        build_optimizer("lorafa", SmallTask().pairs, lr=0.1)
    pairs = attach_lora(nn.Sequential(nn.Conv2d(6, 9, 3)), 2, ["0"], init="default")
    with pytest.raises(ConfigError, match="lorafa takes matrices only, 0 is a convolution"):
        build_optimizer("lorafa", pairs, lr=0.1)


@pytest.mark.parametrize("name", ["riemann_adam", "lora_muon", "imuon", "lora_rite"])
def test_ours_train_convolutions_by_their_matrix(name: str) -> None:
    """A kernel (out, in, 3, 3) steps as the (out, 9 in) matrix that it is."""
    results = []
    for shape in ((2, 6, 3, 3), (2, 54)):
        left, right = (
            torch.randn(n, generator=torch.Generator().manual_seed(n[1])) for n in ((9, 2), (2, 54))
        )
        end = (9, 2, 1, 1) if len(shape) == 4 else (9, 2)
        pair = Pair(
            "layer",
            nn.Parameter(left.reshape(end).clone()),
            nn.Parameter(right.reshape(shape).clone()),
            0.5,
            2,
        )
        optimizer = build_optimizer(name, [pair], lr=0.1)  # type: ignore[list-item]
        run(optimizer, Quadratic([pair]), 3)
        results.append(pair.x)
    assert torch.equal(results[0], results[1])
    assert float((results[0] - 0.5 * left @ right).norm()) > 0.05


def test_the_trainer_logs_the_norm_without_the_anchor(tmp_path: Path) -> None:
    """Of the columns that are trained, or of the Riemannian gradient; clipping uses the same number."""
    for name in ("lora_muon", "riemann_adam"):
        outcome = train_small(loop, tmp_path / name, SmallTask(), name=name, lr=0.02)
        task = SmallTask()
        task.loss(task.batch(1, 0)).backward()
        optimizer = build_optimizer(name, task.pairs, lr=0.02)
        assert isinstance(optimizer, PairOptimizer)
        wanted = float(optimizer.gradient_norm())
        everything = [
            p.grad for pair in task.pairs for p in (pair.left, pair.right) if p.grad is not None
        ]
        # At the start both halves have the same gradient, and the tangent norm is another number.
        counted = float(nn.utils.get_total_norm(everything)) / wanted
        assert counted == pytest.approx(2**0.5, rel=1e-9) if name == "lora_muon" else counted < 0.5
        assert outcome.steps[0]["grad_norm"] == pytest.approx(wanted, rel=1e-9)


def test_muon_moves_each_factor_by_an_orthogonal_matrix() -> None:
    task, before, _ = stepped("muon", "default", lr=0.01)
    for old, new in zip(before, task.factors(), strict=True):
        values = torch.linalg.svdvals(old - new) / (
            0.01 * max(1, old.shape[0] / old.shape[1]) ** 0.5
        )
        assert values.min() > 0.5
        assert values.max() < 1.3


def test_riemannion_moves_the_product_by_the_learning_rate() -> None:
    task, before, _ = stepped("riemannion", "orthonormal", lr=1e-3)
    for index, pair in enumerate(task.pairs):
        left, right = before[2 * index : 2 * index + 2]
        change = pair.delta() - pair.scaling * left @ right
        assert 0.95e-3 < torch.linalg.matrix_norm(change, 2) < 1.2e-3
        assert torch.equal(pair.left.detach()[:, pair.rank :], left[:, pair.rank :])


def test_momentum_and_decay_reach_riemannion() -> None:
    task = SmallTask()
    optimizer = build_optimizer("riemannion", task.pairs, lr=0.1, weight_decay=0.2, momentum=0.7)
    assert isinstance(optimizer, Riemannion)
    group = optimizer.param_groups[0]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.1, 0.2, 0.7)
    default = build_optimizer("riemannion", SmallTask().pairs, lr=0.1)
    assert default.param_groups[0]["momentum"] == 0.5


@pytest.mark.parametrize("name", PLAIN)
def test_on_an_anchored_layout_others_are_a_named_baseline(
    name: str, caplog: pytest.LogCaptureFixture
) -> None:
    """A10: they train all 2r columns, and the log says so."""
    task = SmallTask(dtype=torch.float32)
    assert describe_optimizer(name, task.pairs) == f"{name} (rank-2r baseline)"
    assert describe_optimizer("riemannion", task.pairs) == "riemannion"
    with caplog.at_level(logging.WARNING, "dreamrie"):
        optimizer = build_optimizer(name, task.pairs, lr=0.01)
    assert "rank-2r baseline" in caplog.text
    before = task.factors()
    task.loss(task.batch(1, 0)).backward()
    optimizer.step()
    anchor = task.pairs[0].left.detach()[:, RANK:]
    assert not torch.equal(anchor, before[0][:, RANK:])


def test_on_a_plain_layout_nothing_is_said(caplog: pytest.LogCaptureFixture) -> None:
    task = SmallTask(init="default")
    with caplog.at_level(logging.WARNING, "dreamrie"):
        build_optimizer("adamw", task.pairs, lr=0.01)
    assert not caplog.records
    assert describe_optimizer("adamw", task.pairs) == "adamw"


def test_trained_numbers() -> None:
    sides = SIZES[0] + SIZES[1] + SIZES[1] + SIZES[2]
    anchored, plain = SmallTask().pairs, SmallTask(init="default").pairs
    assert trained_numbers("riemannion", anchored) == sides * RANK
    assert trained_numbers("adamw", anchored) == sides * 2 * RANK
    assert trained_numbers("adamw", plain) == sides * RANK
    assert trained_numbers("imuon", anchored) == sides * RANK
    assert trained_numbers("lorafa", plain) == (SIZES[1] + SIZES[2]) * RANK


def test_riemannion_refuses_a_start_of_rank_zero() -> None:
    """At the latest in its first step: PEFT's default lora_B = 0 is off the manifold."""
    task = SmallTask(init="default")
    with pytest.raises(ConfigError, match=r"(?s)'?0'?.*attach_lora"):
        optimizer = build_optimizer("riemannion", task.pairs, lr=0.1)
        task.loss(task.batch(1, 0)).backward()
        optimizer.step()


def test_bad_arguments() -> None:
    pairs = SmallTask().pairs
    with pytest.raises(ConfigError, match="unknown; use one of riemannion"):
        build_optimizer("sgdd", pairs, lr=0.1)
    with pytest.raises(ConfigError, match="no adapted layer"):
        build_optimizer("adamw", [], lr=0.1)
    with pytest.raises(ConfigError, match="momentum is not a setting of adamw"):
        build_optimizer("adamw", pairs, lr=0.1, momentum=0.9)


def test_muon_refuses_convolutions() -> None:
    model = nn.Sequential(nn.Conv2d(6, 9, 3))
    pairs = attach_lora(model, 2, ["0"], init="default")
    with pytest.raises(ConfigError, match="muon takes matrices only, 0 is a convolution"):
        build_optimizer("muon", pairs, lr=0.1)
