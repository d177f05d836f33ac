"""Laws of the optimizers of LoRA pairs beside Riemannion: their papers' formulas, gauge, anchor, descent.

Each law takes the package of optimizers first; `tests/mutants/pair_optimizers.py` runs it on broken ones. Numbers are
those of docs/method.md 10.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import dreamrie.optimizers as real
from dreamrie.optimizers import OPTIMIZERS
from tests.margins import within
from tests.properties.beside import follow
from tests.reference.pair_methods import DenseRiemann, IMuon, LoraMuon, LoraRite
from tests.small_task import SmallTask
from tests.strategies import (
    ANCHORED,
    F64,
    LAYERS,
    Pair,
    Quadratic,
    distance,
    frame,
    make_pairs,
    moved,
    noise,
    regauge,
    run,
)

FACTOR_METHODS = {"lora_muon": LoraMuon, "imuon": IMuon, "lora_rite": LoraRite}
OWN = ("riemann_sgd", "riemann_adam", *FACTOR_METHODS)
INVARIANT = sorted(name for name, entry in OPTIMIZERS.items() if entry.gauge_invariant)
DEPENDENT = sorted(set(OPTIMIZERS) - set(INVARIANT))


def rate(name: str) -> float:
    """A learning rate that moves the small problems by some percent in a few steps."""
    return 0.1 if name in ("riemann_sgd", "sgd") else 0.02


# ------------------------------------------------------------------------------------------------- formulas


def law_factor_methods_equal_their_papers(impl: Any, name: str) -> None:
    """8 noisy steps with momentum equal the printed formulas on X, without and with decay, for every scaling."""
    for decay in (0.5, 0.0):
        pairs = make_pairs(LAYERS[:3])
        roots = [pair.scaling**0.5 for pair in pairs]
        slow = [
            FACTOR_METHODS[name](root * p.left.detach(), root * p.right.detach(), 0.02, 0.9, decay)
            for root, p in zip(roots, pairs, strict=True)
        ]
        optimizer = impl.build_optimizer(name, pairs, lr=0.02, weight_decay=decay, momentum=0.9)
        follow(f"{name} is its paper", optimizer, Quadratic(pairs), slow, 1e-10)


def law_21_riemann_sgd_and_adam_equal_dense(impl: Any) -> None:
    """8 noisy steps equal the corrected Alg. 6 on dense matrices: both methods, both starts of the averages, decay."""
    for name, options, decay, layers in (
        ("riemann_adam", {}, 0.5, ANCHORED),
        ("riemann_adam", {"bias_correction": False}, 0.5, LAYERS[:2]),
        ("riemann_sgd", {}, 0.5, LAYERS[2:]),
        ("riemann_adam", {}, 0.0, LAYERS[2:]),
    ):
        pairs, lr = make_pairs(layers), 0.002 if options else rate(name)
        slow = [
            DenseRiemann(
                pair.x,
                pair.rank,
                lr,
                0.9,
                decay,
                adam=name == "riemann_adam",
                correct=not options,
                anchor=pair.x if pair.anchor_rank else None,
            )
            for pair in pairs
        ]
        optimizer = impl.build_optimizer(name, pairs, lr=lr, weight_decay=decay, **options)
        follow(f"21 {name}", optimizer, Quadratic(pairs), slow, 1e-11)


# ------------------------------------------------------------------------------------------------- gauge


def products(impl: Any, name: str, condition: float | None, steps: int = 4) -> list[list[Tensor]]:
    """Path of a network's adapters, from factors that were turned if a condition is given."""
    task = SmallTask(init="default")
    for number, pair in enumerate(task.pairs):
        with torch.no_grad():
            pair.left.copy_(noise(number, *pair.left.shape) / 3)
        if condition is not None:
            regauge(pair, condition, seed=number)  # type: ignore[arg-type]
    optimizer = impl.build_optimizer(name, task.pairs, lr=rate(name), weight_decay=0.1)
    path = []
    for t in range(1, steps + 1):
        task.loss(task.batch(t, 0)).backward()
        optimizer.step()
        optimizer.zero_grad()
        path.append(task.deltas())
    return path


def law_5_products_do_not_depend_on_the_factors(impl: Any, name: str) -> None:
    """The factors (B R, R^-1 A) give the same path of the product, through a network, with momentum and decay."""
    plain = products(impl, name, None)
    assert moved(plain) > 0.005
    within(f"5 {name}", distance(products(impl, name, 50.0), plain), 1e-10)


def law_scaling_is_part_of_the_product(impl: Any, name: str) -> None:
    """Another scaling with factors that give the same product gives the same path of the product."""
    paths = []
    for other in (1.0, 4.0):
        pairs = make_pairs(LAYERS[:3])
        for pair in pairs:
            with torch.no_grad():
                pair.left.mul_(1 / other)
            pair.scaling *= other
        optimizer = impl.build_optimizer(name, pairs, lr=rate(name), weight_decay=0.1)
        paths.append(run(optimizer, Quadratic(pairs), 3))
    assert moved(paths[0]) > 0.005
    within(f"scaling {name}", distance(*paths), 1e-10)


# ------------------------------------------------------------------------------------------------- anchor, decay


def law_a10_own_methods_keep_the_anchor(impl: Any, name: str) -> None:
    """6 steps with decay and momentum leave the anchor's bytes, although its gradient is not zero."""
    pairs = make_pairs(ANCHORED)
    kept = [
        (p.left.detach()[:, p.rank :].clone(), p.right.detach()[p.rank :].clone()) for p in pairs
    ]
    optimizer = impl.build_optimizer(name, pairs, lr=rate(name), weight_decay=0.2)
    assert moved(run(optimizer, Quadratic(pairs), 6)) > 0.01
    for pair, (left, right) in zip(pairs, kept, strict=True):
        assert pair.left.grad is not None
        assert float(pair.left.grad[:, pair.rank :].abs().min()) > 0
        assert torch.equal(pair.left.detach()[:, pair.rank :], left)
        assert torch.equal(pair.right.detach()[pair.rank :], right)


def law_16_decay_pulls_to_the_anchor(impl: Any, name: str) -> None:
    """Without gradient the anchor is a fixed point, and the change X - X0 shrinks by 1 - lr wd per step, to 1 %."""
    pairs = make_pairs(ANCHORED)
    optimizer = impl.build_optimizer(name, pairs, lr=0.1, weight_decay=0.1, momentum=0.0)
    start = [pair.x for pair in pairs]
    for _ in range(3):
        for pair in pairs:
            pair.set_gradient(torch.zeros_like(pair.x))
        optimizer.step()
    for pair, x in zip(pairs, start, strict=True):
        within(f"16 fixed point {name}", (pair.x - x).norm() / x.norm(), 1e-12)
    kick = impl.build_optimizer(name, pairs, lr=1e-3, momentum=0.0)
    run(kick, Quadratic(pairs), 1)
    sizes = [float(pair.change.norm()) for pair in pairs]
    assert min(sizes) > 1e-4
    decay = impl.build_optimizer(name, pairs, lr=0.1, weight_decay=0.1, momentum=0.0)
    for _ in range(8):
        for pair in pairs:
            pair.set_gradient(torch.zeros_like(pair.x))
        decay.step()
    for pair, size in zip(pairs, sizes, strict=True):
        within(f"16 shrinks {name}", abs(float(pair.change.norm()) / (size * 0.99**8) - 1), 1e-2)


# ------------------------------------------------------------------------------------------------- descent


def solved(impl: Any, name: str, steps: int = 50) -> float:
    """What is left of |X - T|^2, T of rank r at a distance, after steps of linearly falling length."""
    pair: Pair = make_pairs(LAYERS[:1])[0]
    goal = (frame(70, 10, 2) * torch.tensor([1.5, 1.0], dtype=F64)) @ frame(71, 6, 2).mT
    first = float((pair.x - goal).square().sum())
    # Steps of this length have a large product where they are added to the factors, which imuon needs memory against.
    lr = 0.4
    optimizer = impl.build_optimizer(name, [pair], lr=lr, momentum=0.9)
    for t in range(steps):
        optimizer.param_groups[0]["lr"] = lr * (1 - t / steps)
        pair.set_gradient(pair.x - goal)
        optimizer.step()
    return float((pair.x - goal).square().sum()) / first


def law_o13_a_quadratic_is_solved(impl: Any, name: str) -> None:
    """50 steps bring the squared distance to a matrix of rank r to a fifth (measured: 0.005 to 0.062)."""
    within(f"O13 {name}", solved(impl, name), 0.2)


def law_bias_correction_is_a_switch(impl: Any) -> None:
    """Without it the first step of RiemannAdam is (1 - beta1) / sqrt(1 - beta2) = 3.16 times as long."""
    lengths = []
    for correct in (True, False):
        pairs = make_pairs(LAYERS[:1], size=10.0)
        start = pairs[0].x
        optimizer = impl.build_optimizer("riemann_adam", pairs, lr=1e-5, bias_correction=correct)
        run(optimizer, Quadratic(pairs), 1)
        lengths.append(float((pairs[0].x - start).norm()))
    within("first step", abs(lengths[0] / (1e-5 * 2**0.5) - 1), 1e-6)
    within("first steps", abs(lengths[1] / lengths[0] - 0.1 / 0.001**0.5), 1e-5)


# ------------------------------------------------------------------------------------------------- tests


@pytest.mark.parametrize("name", sorted(FACTOR_METHODS))
def test_factor_methods_equal_their_papers(name: str) -> None:
    law_factor_methods_equal_their_papers(real, name)


def test_riemann_sgd_and_adam_equal_dense() -> None:
    law_21_riemann_sgd_and_adam_equal_dense(real)


@pytest.mark.parametrize("name", INVARIANT)
def test_products_do_not_depend_on_the_factors(name: str) -> None:
    law_5_products_do_not_depend_on_the_factors(real, name)


@pytest.mark.parametrize("name", DEPENDENT)
def test_the_others_depend_on_the_factors(name: str) -> None:
    """They claim nothing, and the law would notice: orthogonal turns or scalings change the path by over 1e-3."""
    plain = products(real, name, None)
    assert distance(products(real, name, 50.0), plain) > 1e-3


@pytest.mark.parametrize("name", OWN)
def test_scaling_is_part_of_the_product(name: str) -> None:
    law_scaling_is_part_of_the_product(real, name)


@pytest.mark.parametrize("name", OWN)
def test_own_methods_keep_the_anchor(name: str) -> None:
    law_a10_own_methods_keep_the_anchor(real, name)


@pytest.mark.parametrize("name", OWN)
def test_decay_pulls_to_the_anchor(name: str) -> None:
    law_16_decay_pulls_to_the_anchor(real, name)


@pytest.mark.parametrize("name", OWN)
def test_a_quadratic_is_solved(name: str) -> None:
    law_o13_a_quadratic_is_solved(real, name)


def test_bias_correction_is_a_switch() -> None:
    law_bias_correction_is_a_switch(real)
