"""Laws of the optimizer on LoRA pairs: paths against references (O4, O5, O13, O17, docs/method.md 10).

Each law takes the module that offers `Riemannion` first; `tests/mutants/optimizer_*.py` run it on broken ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dreamrie.riemannion as real
from tests.margins import within
from tests.reference import dense as reference
from tests.strategies import (
    ANCHORED,
    F32,
    F64,
    LAYERS,
    Pair,
    Quadratic,
    distance,
    make_pairs,
    moved,
    noise,
    run,
)


def law_o4_example_by_hand(impl: Any) -> None:
    """3 x 2, r = 1, worked on paper: X = e1 e1^T, G = 3 e1 e2^T + 4 e2 e1^T, lr = 2/3, c = 5/8.

    G is tangent; its orthogonal factor is e1 e2^T + e2 e1^T with a zero lower-right block. X - lr D has the upper
    block [[1, -2/3], [-2/3, 0]] with eigenvalues 4/3 and -1/3, and the leading eigenvector (2, -1) / sqrt 5.
    """
    c = 0.625
    left = nn.Parameter(torch.tensor([[4.0], [0.0], [0.0]], dtype=F64))
    right = nn.Parameter(torch.tensor([[1 / (4 * c), 0.0]], dtype=F64))
    pair = Pair("by hand", left, right, c, 1)
    pair.set_gradient(torch.tensor([[0.0, 3.0], [4.0, 0.0], [0.0, 0.0]], dtype=F64))
    impl.Riemannion([pair], lr=2 / 3).step()
    wanted = torch.tensor([[16.0, -8.0], [-8.0, 4.0], [0.0, 0.0]], dtype=F64) / 15
    within("O4 by hand", (pair.x - wanted).abs().max(), 1e-12)


def law_o5_path_equals_dense(impl: Any) -> None:
    """60 noisy steps with momentum equal the dense reference: plain and anchored decay, 2r > min."""
    for dtype, bar in ((F64, 1e-11), (F32, 1e-5)):
        for layers, decay, decay_to in (
            (LAYERS, 0.1, "zero"),
            (ANCHORED, 0.1, "anchor"),
            (ANCHORED, 0.3, "zero"),
        ):
            pairs = make_pairs(layers, dtype=dtype)
            problem = Quadratic(pairs)
            starts = [pair.x.to(F64) for pair in pairs]
            slow = [
                reference.DenseRiemannion(
                    x,
                    pair.rank,
                    0.02,
                    0.9,
                    decay,
                    x if pair.anchor_rank and decay_to == "anchor" else None,
                )
                for x, pair in zip(starts, pairs, strict=True)
            ]
            anchors = [
                x if pair.anchor_rank else 0.0 for x, pair in zip(starts, pairs, strict=True)
            ]
            optimizer = impl.Riemannion(pairs, 0.02, 0.9, decay, decay_to=decay_to)
            path = run(optimizer, problem, 60)
            wanted = []
            for t in range(60):
                for index, (one, anchor) in enumerate(zip(slow, anchors, strict=True)):
                    one.step(problem.gradient(index, one.X - anchor, t))
                wanted.append([one.X for one in slow])
            assert moved(path) > 0.05
            within(f"O5 60 steps {dtype}", distance(path, wanted), bar)


def law_8_average_equals_heavy_ball(impl: Any) -> None:
    """(1 - b) sum b^k g and sum b^k g have one direction: the path is that of an exponential average."""
    pairs = make_pairs()
    problem = Quadratic(pairs)
    path = run(impl.Riemannion(pairs, lr=0.02, momentum=0.8), problem, 20)
    slow = [reference.DenseRiemannion(pair.x, pair.rank, 0.02, 0.8) for pair in make_pairs()]
    wanted = []
    for t in range(20):
        for index, one in enumerate(slow):
            one.step(0.2 * problem.gradient(index, one.X, t))
        wanted.append([one.X for one in slow])
    within("8 average", distance(path, wanted), 1e-12)


def law_o13_quadratic_of_rank_r_is_solved(impl: Any) -> None:
    """With a decaying lr a target on the manifold is reached to 1e-8."""
    pairs = make_pairs(LAYERS[:3])
    targets = [pair.x for pair in make_pairs(LAYERS[:3], seed=500)]
    optimizer = impl.Riemannion(pairs, lr=0.3, momentum=0.5)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.93)
    for _ in range(310):
        for pair, target in zip(pairs, targets, strict=True):
            pair.set_gradient(pair.x - target)
        optimizer.step()
        schedule.step()
    worst = max(float((p.x - t).norm() / t.norm()) for p, t in zip(pairs, targets, strict=True))
    within("O13 quadratic", worst, 1e-8)


def law_o17_accumulation_is_linear(impl: Any) -> None:
    """4 micro-batches accumulated into the gradients equal one of their sum."""
    paths = []
    for micro in (1, 4):
        pairs = make_pairs(ANCHORED)
        optimizer = impl.Riemannion(pairs, lr=0.02)
        path = []
        for t in range(10):
            parts = [
                [noise(1000 * t + 10 * k + i, *pair.change.shape) for k in range(4)]
                for i, pair in enumerate(pairs)
            ]
            for pair, several in zip(pairs, parts, strict=True):
                if micro == 1:
                    pair.set_gradient(torch.stack(several).sum(dim=0))
                    continue
                sums = [torch.zeros_like(pair.left), torch.zeros_like(pair.right)]
                for part in several:
                    pair.set_gradient(part)
                    sums = [
                        total + p.grad
                        for total, p in zip(sums, (pair.left, pair.right), strict=True)
                    ]
                pair.left.grad, pair.right.grad = sums
            optimizer.step()
            path.append([pair.x for pair in pairs])
        paths.append(path)
    assert moved(paths[0]) > 0.05
    within("O17", distance(paths[1], paths[0]), 1e-12)


def law_groups_and_layers_do_not_mix(impl: Any) -> None:
    """Two groups with their options equal two optimizers, one layer each equals all in one."""
    together, alone = make_pairs(), make_pairs()
    groups = [
        {"pairs": together[:2], "lr": 0.01, "weight_decay": 0.2},
        {"pairs": together[2:], "momentum": 0.5},
    ]
    path = run(impl.Riemannion(groups, lr=0.03), Quadratic(together), 10)
    optimizers = [impl.Riemannion([pair], lr=0.01, weight_decay=0.2) for pair in alone[:2]]
    optimizers += [impl.Riemannion([pair], lr=0.03, momentum=0.5) for pair in alone[2:]]
    other = []
    for t in range(10):
        Quadratic(alone).backward(t)
        for optimizer in optimizers:
            optimizer.step()
        other.append([pair.x for pair in alone])
    assert moved(path) > 0.01
    within("O7 groups", distance(path, other), 1e-12)


LAWS = (
    law_o4_example_by_hand,
    law_o5_path_equals_dense,
    law_8_average_equals_heavy_ball,
    law_o13_quadratic_of_rank_r_is_solved,
    law_o17_accumulation_is_linear,
    law_groups_and_layers_do_not_mix,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_of_the_optimizer(law: Any) -> None:
    """The law holds for the library."""
    law(real)
