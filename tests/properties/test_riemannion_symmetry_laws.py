"""Laws of the optimizer on LoRA pairs: symmetries, and how factors are read (O1-O3, O15, O16, docs/method.md 10).

Each law takes the module that offers `Riemannion` first; `tests/mutants/optimizer_*.py` run it on broken ones.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import dreamrie.riemannion as real
from tests.margins import within
from tests.strategies import (
    ANCHORED,
    F32,
    F64,
    LAYERS,
    Layer,
    Pair,
    Quadratic,
    distance,
    frame,
    make_pairs,
    moved,
    regauge,
    run,
)

# ------------------------------------------------------------------------------------------------- symmetries


def law_o1_gauge(impl: Any) -> None:
    """From (B, A) and (B C, C^-1 A), 50 steps with momentum and decay: one path; AdamW takes two."""
    for dtype, condition, bar in ((F64, 1e3, 1e-10), (F64, 1e6, 1e-7), (F32, 1e3, 1e-3)):
        paths = []
        for gauge in (None, condition):
            pairs = make_pairs(dtype=dtype)
            if gauge is not None:
                for i, pair in enumerate(pairs):
                    regauge(pair, gauge, seed=40 + i)
            optimizer = impl.Riemannion(pairs, lr=0.02, weight_decay=0.1)
            paths.append(run(optimizer, Quadratic(pairs), 50))
        within(f"O1 {dtype} condition {condition:.0e}", distance(paths[1], paths[0]), bar)
        assert moved(paths[0]) > 0.5


def law_o1_gauge_in_mid_run(impl: Any) -> None:
    """Factors turned from outside between two steps are the same point: the path goes on."""
    paths = []
    for gauge in (False, True):
        pairs = make_pairs(ANCHORED)
        optimizer = impl.Riemannion(pairs, lr=0.02)
        path = run(optimizer, Quadratic(pairs), 10)
        if gauge:
            for i, pair in enumerate(pairs):
                regauge(pair, 10.0, seed=60 + i)
        paths.append(path + run(optimizer, Quadratic(pairs), 10, start=10))
    within("O1 in mid-run", distance(paths[1], paths[0]), 1e-10)


def law_o2_orthogonal_equivariance(impl: Any) -> None:
    """The problem turned by P, Q takes the turned path."""
    for dtype, bar in ((F64, 1e-11), (F32, 1e-4)):
        frames = [
            (frame(70 + i, a.out, a.out), frame(80 + i, a.in_, a.in_)) for i, a in enumerate(LAYERS)
        ]
        pairs, turned = make_pairs(dtype=dtype), make_pairs(dtype=dtype)
        for pair, (left, right) in zip(turned, frames, strict=True):
            with torch.no_grad():
                pair.left.copy_(left @ pair.left.to(F64))
                pair.right.copy_(pair.right.to(F64) @ right.mT)
        path = run(impl.Riemannion(pairs, lr=0.02), Quadratic(pairs), 20)
        other = run(impl.Riemannion(turned, lr=0.02), Quadratic(turned, frames=frames), 20)
        back = [
            [left.mT @ x.to(F64) @ right for x, (left, right) in zip(xs, frames, strict=True)]
            for xs in other
        ]
        assert moved(path) > 0.05
        within(f"O2 {dtype}", distance(back, path), bar)


def law_o3_transposition(impl: Any) -> None:
    """The transposed problem takes the transposed path (an Adam-like second moment per block does not)."""
    for dtype, bar in ((F64, 1e-12), (F32, 1e-4)):
        pairs = make_pairs(dtype=dtype)
        swapped = [
            Pair(
                p.name,
                nn.Parameter(p.right.detach().mT.clone()),
                nn.Parameter(p.left.detach().mT.clone()),
                p.scaling,
                p.rank,
            )
            for p in pairs
        ]
        path = run(impl.Riemannion(pairs, lr=0.02), Quadratic(pairs), 30)
        other = run(impl.Riemannion(swapped, lr=0.02), Quadratic(swapped, transposed=True), 30)
        assert moved(path) > 0.05
        within(f"O3 {dtype}", distance([[x.mT for x in xs] for xs in other], path), bar)


def law_o16_loss_scale(impl: Any) -> None:
    """Loss times 1e-3 and 1e3 gives the same path without decay."""
    for dtype, bar in ((F64, 1e-12), (F32, 1e-4)):
        paths = []
        for scale in (1.0, 1e-3, 1e3):
            pairs = make_pairs(dtype=dtype)
            optimizer = impl.Riemannion(pairs, lr=0.02)
            paths.append(run(optimizer, Quadratic(pairs, loss_scale=scale), 20))
        assert moved(paths[0]) > 0.05
        within(f"O16 {dtype}", max(distance(other, paths[0]) for other in paths[1:]), bar)


# ------------------------------------------------------------------------------------------------- reading factors


def law_o15_foreign_factors_are_read_again(impl: Any) -> None:
    """Factors written from outside, in place or through `.data`, are the next start; never the stored point."""
    for way in ("copy", "data", "swap"):
        pairs, others = make_pairs(), make_pairs(seed=300)
        optimizer = impl.Riemannion(pairs, lr=0.02)
        run(optimizer, Quadratic(pairs), 3)
        for pair, other in zip(pairs, others, strict=True):
            for name in ("left", "right"):
                mine, theirs = getattr(pair, name), getattr(other, name)
                if way == "copy":
                    with torch.no_grad():
                        mine.copy_(theirs)
                elif way == "data":
                    mine.data.mul_(0).add_(theirs.data)
                else:
                    mine.data = theirs.data.clone()
        starts = [pair.x for pair in pairs]
        Quadratic(pairs).backward(3)
        optimizer.step()
        for pair, start in zip(pairs, starts, strict=True):
            # One step moves by at most 2 * 1.155 * lr in spectral norm; the stored point is farther away.
            size = torch.linalg.matrix_norm(pair.x - start, 2)
            within("O15 move", size, 2 * 1.155 * 0.02)
            assert float(size) > 1e-3


def law_convolutions_are_matrices(impl: Any) -> None:
    """(R, in, kh, kw) and (out, R, 1, 1) factors take the path of their matrices, channels-last included."""
    flat = make_pairs([Layer(6, 18, 2, 0.625)])
    with torch.no_grad():
        left = flat[0].left.detach().reshape(6, 2, 1, 1).clone()
        right = (
            flat[0]
            .right.detach()
            .reshape(2, 2, 3, 3)
            .to(memory_format=torch.channels_last, copy=True)
        )
    conv = [Pair(flat[0].name, nn.Parameter(left), nn.Parameter(right), 0.625, 2)]
    path = run(impl.Riemannion(flat, lr=0.02), Quadratic(flat), 5)
    other = run(impl.Riemannion(conv, lr=0.02), Quadratic(conv), 5)
    within("12 convolution", distance(other, path), 1e-12)


LAWS = (
    law_o1_gauge,
    law_o1_gauge_in_mid_run,
    law_o2_orthogonal_equivariance,
    law_o3_transposition,
    law_o16_loss_scale,
    law_o15_foreign_factors_are_read_again,
    law_convolutions_are_matrices,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_of_the_optimizer(law: Any) -> None:
    """The law holds for the library."""
    law(real)


def test_o1_control_adamw_depends_on_the_factors() -> None:
    """The gauge law is not trivial: AdamW's paths differ by more than 10 %."""
    paths = []
    for gauge in (None, 1e3):
        pairs = make_pairs()
        if gauge is not None:
            for i, pair in enumerate(pairs):
                regauge(pair, gauge, seed=40 + i)
        parameters = [p for pair in pairs for p in (pair.left, pair.right)]
        paths.append(run(torch.optim.AdamW(parameters, lr=0.02), Quadratic(pairs), 50))
    assert distance(paths[1], paths[0]) > 0.1
