"""Laws of the optimizer on LoRA pairs: state, guards, precision (O7-O9, O11, O12, O17, docs/method.md 10).

Each law takes the module that offers `Riemannion` first; `tests/mutants/optimizer_*.py` run it on broken ones.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

import dreamrie.riemannion as real
from dreamrie.errors import NumericalError
from tests.margins import within
from tests.reference import dense as reference
from tests.strategies import (
    ANCHORED,
    F32,
    F64,
    LAYERS,
    Pair,
    Quadratic,
    make_pairs,
    moved,
    noise,
    regauge,
    run,
)

# ------------------------------------------------------------------------------------------------- what stays as it is


def law_o7_gradients_are_read_only(impl: Any) -> None:
    """`p.grad` is neither written nor created; a layer without gradients keeps parameters and state to the bit."""
    pairs = make_pairs()
    problem = Quadratic(pairs)
    optimizer = impl.Riemannion(pairs, lr=0.02, weight_decay=0.1)
    run(optimizer, problem, 2)
    problem.backward(2)
    idle = pairs[1]
    idle.left.grad = idle.right.grad = None
    before = [p.detach().clone() for p in (idle.left, idle.right)]
    state = copy.deepcopy([optimizer.state[p] for p in (idle.left, idle.right)])
    grads = [
        (p, p.grad.clone()) for pair in pairs for p in (pair.left, pair.right) if p.grad is not None
    ]
    others = [pair.x for pair in pairs if pair is not idle]
    optimizer.step()
    for parameter, gradient in grads:
        assert parameter.grad is not None
        assert torch.equal(parameter.grad, gradient)
    assert idle.left.grad is None
    assert idle.right.grad is None
    for parameter, bytes_, kept in zip((idle.left, idle.right), before, state, strict=True):
        assert torch.equal(parameter, bytes_)
        for key, value in kept.items():
            assert torch.equal(optimizer.state[parameter][key], value)
    for pair, x in zip([p for p in pairs if p is not idle], others, strict=True):
        assert float((pair.x - x).norm()) > 1e-3


def law_a10_anchor_is_frozen(impl: Any) -> None:
    """50 steps with decay and momentum leave the anchor's bytes, and step 0 is the anchor itself."""
    for decay_to in ("anchor", "zero"):
        pairs = make_pairs(ANCHORED)
        for pair in pairs:
            within("A10 start", pair.change.abs().max(), 1e-15)
        kept = [
            (p.left.detach()[:, p.rank :].clone(), p.right.detach()[p.rank :].clone())
            for p in pairs
        ]
        optimizer = impl.Riemannion(pairs, lr=0.02, weight_decay=0.1, decay_to=decay_to)
        path = run(optimizer, Quadratic(pairs), 50)
        assert moved(path) > 0.05
        for pair, (left, right) in zip(pairs, kept, strict=True):
            assert torch.equal(pair.left.detach()[:, pair.rank :], left)
            assert torch.equal(pair.right.detach()[pair.rank :], right)


def law_tangent_norm_counts_the_point_alone(impl: Any) -> None:
    """The gradient norm is that of the projected gradient; the anchor's columns do not enter."""
    pairs = make_pairs(ANCHORED)
    for i, pair in enumerate(pairs):
        regauge(pair, 10.0, seed=i)
    optimizer = impl.Riemannion(pairs, lr=0.02)
    for t in range(2):
        Quadratic(pairs).backward(t)
        total = 0.0
        for index, pair in enumerate(pairs):
            u, _, v = reference.svd_r(pair.x, pair.rank)
            gradient = Quadratic(pairs).gradient(index, pair.change, t)
            total += float(reference.projection(u, v, gradient).norm() ** 2)
        within("tangent norm", abs(float(optimizer.tangent_grad_norm()) / total**0.5 - 1), 1e-11)
        optimizer.step()


def law_o11_non_finite_gradients_are_skipped(impl: Any) -> None:
    """NaN or Inf in one layer: its bytes and state stay, it is counted, the rest is stepped as without it."""
    for bad in (float("nan"), float("inf")):
        for first in (0, 3):
            clean, pairs = make_pairs(), make_pairs()
            problem = Quadratic(pairs)
            plain = impl.Riemannion(clean, lr=0.02, max_consecutive_skips=3)
            optimizer = impl.Riemannion(pairs, lr=0.02, max_consecutive_skips=3)
            run(plain, Quadratic(clean), first)
            run(optimizer, problem, first)
            for again in range(3):
                Quadratic(clean).backward(first + again)
                clean[2].left.grad = clean[2].right.grad = None
                plain.step()
                problem.backward(first + again)
                gradient = pairs[2].right.grad
                assert gradient is not None
                gradient[1, 2] = bad
                factors = [p.detach().clone() for p in (pairs[2].left, pairs[2].right)]
                state = copy.deepcopy(
                    [dict(optimizer.state.get(p, {})) for p in (pairs[2].left, pairs[2].right)]
                )
                if again < 2:
                    optimizer.step()
                else:
                    with pytest.raises(NumericalError, match=pairs[2].name):
                        optimizer.step()
                assert optimizer.skipped_steps == again + 1
                for p, bytes_, kept in zip(
                    (pairs[2].left, pairs[2].right), factors, state, strict=True
                ):
                    assert torch.equal(p, bytes_)
                    now = optimizer.state.get(p, {})
                    assert now.keys() == kept.keys()
                    assert all(torch.equal(now[k], kept[k]) for k in kept)
                for index in (0, 1, 3):
                    within("O11 neighbours", (pairs[index].x - clean[index].x).norm(), 1e-12)


def law_o12_grad_scaler(impl: Any) -> None:
    """With a GradScaler a finite step equals the plain one and an overflow leaves every byte."""
    plain, scaled = make_pairs(dtype=F32), make_pairs(dtype=F32)
    first, second = impl.Riemannion(plain, lr=0.02), impl.Riemannion(scaled, lr=0.02)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for t in range(3):
        for pairs in (plain, scaled):
            products = [pair.scaling * pair.left @ pair.right for pair in pairs]
            loss = sum(
                (
                    (x * noise(10 * t + i, *x.shape, dtype=F32)).sum()
                    for i, x in enumerate(products)
                ),
                torch.zeros(()),
            )
            (scaler.scale(loss) if pairs is scaled else loss).backward()
        if t == 1:
            for pairs in (plain, scaled):
                gradient = pairs[0].left.grad
                assert gradient is not None
                gradient[0, 0] = float("inf")
        before = [p.detach().clone() for pair in scaled for p in (pair.left, pair.right)]
        scaler.step(second)
        scaler.update()
        if t == 1:
            after = [p.detach() for pair in scaled for p in (pair.left, pair.right)]
            assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
            assert second.skipped_steps == 0
        else:
            first.step()
        first.zero_grad()
        second.zero_grad()
    for a, b in zip(plain, scaled, strict=True):
        within("O12", (a.x - b.x).norm() / b.x.norm(), 1e-5)


# ------------------------------------------------------------------------------------------------- the state


def law_o17_all_state_is_in_the_state(impl: Any) -> None:
    """`optimizer.state` holds 2 (out + in) r + r numbers per layer, and no tensor is kept anywhere else."""
    pairs = make_pairs(ANCHORED)
    optimizer = impl.Riemannion(pairs, lr=0.02, weight_decay=0.1)
    run(optimizer, Quadratic(pairs), 3)
    numbers = sum(value.numel() for entry in optimizer.state.values() for value in entry.values())
    assert numbers == sum((2 * (a.out + a.in_) + 1) * a.rank for a in ANCHORED)
    groups = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    known = ("state", "param_groups")
    rest = {name: value for name, value in vars(optimizer).items() if name not in known}
    kept = [leaf for leaf in tree_leaves([groups, rest]) if isinstance(leaf, Tensor)]
    assert not kept, f"{len(kept)} tensors outside of optimizer.state"


def law_o8_state_is_fp32(impl: Any) -> None:
    """bf16 parameters: saved, loaded and stepped equals never saved, to the bit; the state stays fp32 and matters."""
    pairs = make_pairs(ANCHORED, dtype=torch.bfloat16)
    optimizer = impl.Riemannion(pairs, lr=1e-4)
    run(optimizer, Quadratic(pairs), 3)
    twins = [
        Pair(
            p.name,
            nn.Parameter(p.left.detach().clone()),
            nn.Parameter(p.right.detach().clone()),
            p.scaling,
            p.rank,
            p.anchor_rank,
        )
        for p in pairs
    ]
    other = impl.Riemannion(twins, lr=1e-4)
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for each in (optimizer, other):
        dtypes = {v.dtype for entry in each.state.values() for v in entry.values()}
        assert dtypes == {F32}
    run(optimizer, Quadratic(pairs), 3, start=3)
    run(other, Quadratic(twins), 3, start=3)
    for pair, twin in zip(pairs, twins, strict=True):
        assert torch.equal(pair.left, twin.left)
        assert torch.equal(pair.right, twin.right)
    for a, b in zip(optimizer.state.values(), other.state.values(), strict=True):
        assert all(torch.equal(a[key], b[key]) for key in a)


def law_bf16_masters_do_not_stall(impl: Any) -> None:
    """150 steps far below the resolution of bf16 travel as far as in fp32."""
    travels = []
    for dtype in (torch.bfloat16, F32):
        pairs = make_pairs(LAYERS[:1], dtype=dtype)
        optimizer = impl.Riemannion(pairs, lr=2e-5, momentum=0.0)
        start, pull = optimizer.spectra()["layer0"].to(F64), -pairs[0].x.to(F64)
        for _ in range(150):
            pairs[0].set_gradient(pull)
            optimizer.step()
        travels.append(optimizer.spectra()["layer0"].to(F64) - start)
    assert float(travels[1].min()) > 2.9e-3
    within("bf16 travel", (travels[0] - travels[1]).abs().max(), 1e-4)


def law_o9_18_state_round_trip(impl: Any) -> None:
    """State loaded into a fresh optimizer before its first step continues to the bit, through torch.save."""
    pairs = make_pairs(ANCHORED)
    optimizer = impl.Riemannion(pairs, lr=0.02, weight_decay=0.1)
    run(optimizer, Quadratic(pairs), 5)
    saved = copy.deepcopy(optimizer.state_dict())
    factors = [(p.left.detach().clone(), p.right.detach().clone()) for p in pairs]
    path = run(optimizer, Quadratic(pairs), 5, start=5)
    again = make_pairs(
        ANCHORED, seed=900
    )  # another start, so that only loading can explain the path
    for new, old, (left, right) in zip(again, pairs, factors, strict=True):
        new.name = old.name
        with torch.no_grad():
            new.left.copy_(left)
            new.right.copy_(right)
    fresh = impl.Riemannion(again, lr=0.7)
    fresh.load_state_dict(saved)
    other = run(fresh, Quadratic(again), 5, start=5)
    for a, b in zip(path, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    for entry in saved["state"].values():
        for value in entry.values():
            assert all(
                value.data_ptr() != w.data_ptr() for e in fresh.state.values() for w in e.values()
            )


LAWS = (
    law_o17_all_state_is_in_the_state,
    law_o7_gradients_are_read_only,
    law_a10_anchor_is_frozen,
    law_tangent_norm_counts_the_point_alone,
    law_o8_state_is_fp32,
    law_bf16_masters_do_not_stall,
    law_o9_18_state_round_trip,
    law_o11_non_finite_gradients_are_skipped,
    law_o12_grad_scaler,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law_of_the_optimizer(law: Any) -> None:
    """The law holds for the library."""
    law(real)
