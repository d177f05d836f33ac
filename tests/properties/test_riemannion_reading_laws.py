"""Laws of the reading that the gradient norm keeps for the step: it is used, and no change in between is missed.

Each law takes the module that offers `Riemannion`; `tests/mutants/reading.py` runs it on broken ones.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import dreamrie.riemannion as real
from dreamrie.errors import ConfigError
from tests.margins import within
from tests.reference import dense as reference
from tests.strategies import ANCHORED, F32, Pair, Quadratic, make_pairs, moved, noise, run

Change = Callable[[Any, list[Pair]], None]


def ready(impl: Any, dtype: torch.dtype = torch.float64) -> tuple[Any, list[Pair]]:
    """An optimizer with momentum, and gradients for its next step."""
    pairs = make_pairs(ANCHORED, dtype=dtype)
    optimizer = impl.Riemannion(pairs, lr=0.02)
    run(optimizer, Quadratic(pairs), 2)
    Quadratic(pairs).backward(2)
    return optimizer, pairs


def bytes_of(optimizer: Any, pairs: list[Pair]) -> list[Tensor]:
    """Factors and state, copied."""
    factors = [factor.detach().clone() for pair in pairs for factor in (pair.left, pair.right)]
    return [*factors, *(v.clone() for entry in optimizer.state.values() for v in entry.values())]


def equal(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def law_the_step_takes_what_the_norm_read(impl: Any) -> None:
    """Norm and step read once together; the bytes are those of a step that read for itself; nothing stays behind."""
    for dtype in (torch.float64, F32):
        asked, alone = ready(impl, dtype), ready(impl, dtype)
        start = [pair.x for pair in asked[1]]
        for t in range(3, 6):
            with mock.patch.object(impl, "read_groups", side_effect=impl.read_groups) as reader:
                norm = asked[0].tangent_grad_norm(for_step=True)
                asked[0].step()
            assert reader.call_count == 1
            assert float(norm) == float(alone[0].tangent_grad_norm())
            alone[0].step()
            assert equal(bytes_of(*asked), bytes_of(*alone))
            assert asked[0]._reading is None
            for _, pairs in (asked, alone):
                Quadratic(pairs).backward(t)
        assert moved([start, [pair.x for pair in asked[1]]]) > 1e-2


def gradients_scaled(_: Any, pairs: list[Pair]) -> None:
    for pair in pairs:
        for factor in (pair.left, pair.right):
            assert factor.grad is not None
            factor.grad.mul_(0.25)


def gradient_replaced(_: Any, pairs: list[Pair]) -> None:
    """The new tensors may get the memory of the old ones."""
    changes = [noise(40 + index, *pair.change.shape) for index, pair in enumerate(pairs)]
    for pair, change in zip(pairs, changes, strict=True):
        pair.left.grad = pair.right.grad = None
        pair.set_gradient(change)


def gradient_accumulated(_: Any, pairs: list[Pair]) -> None:
    (3.0 * pairs[0].left.sum() + pairs[0].right.square().sum()).backward()


def gradients_gone(_: Any, pairs: list[Pair]) -> None:
    pairs[1].left.grad = pairs[1].right.grad = None


def factor_written(_: Any, pairs: list[Pair]) -> None:
    with torch.no_grad():
        pairs[0].right.mul_(1.5)


def data_exchanged(_: Any, pairs: list[Pair]) -> None:
    pairs[0].left.data = 1.5 * pairs[0].left.data


def state_written(optimizer: Any, pairs: list[Pair]) -> None:
    for pair in pairs:
        for factor in (pair.left, pair.right):
            optimizer.state[factor]["momentum"].zero_()


def state_exchanged(optimizer: Any, pairs: list[Pair]) -> None:
    for pair in pairs:
        for factor in (pair.left, pair.right):
            entry = optimizer.state[factor]
            entry["momentum"] = torch.zeros_like(entry["momentum"])


def state_loaded(optimizer: Any, _: list[Pair]) -> None:
    """The counters of the layers live in the groups, which loading replaces."""
    state = copy.deepcopy(optimizer.state_dict())
    for entry in state["state"].values():
        entry["momentum"] *= -1
    optimizer.load_state_dict(state)


def scaling_changed(optimizer: Any, _: list[Pair]) -> None:
    optimizer.param_groups[0]["scaling"][0] *= 2


def floor_changed(optimizer: Any, pairs: list[Pair]) -> None:
    """Only layers whose factors are foreign see the floor while they are read."""
    optimizer.param_groups[0]["sigma_floor"] = 1.2


def another_step(optimizer: Any, pairs: list[Pair]) -> None:
    optimizer.step()
    Quadratic(pairs).backward(7)


CHANGES: tuple[Change, ...] = (
    gradients_scaled,
    gradient_replaced,
    gradient_accumulated,
    gradients_gone,
    factor_written,
    data_exchanged,
    state_written,
    state_exchanged,
    state_loaded,
    scaling_changed,
    floor_changed,
    another_step,
)


def law_no_change_in_between_is_missed(impl: Any, change: Change) -> None:
    """Norm, change, step is change, step to the byte, and not the step without the change."""
    asked, alone, unchanged = (ready(impl) for _ in range(3))
    unchanged[0].step()
    asked[0].tangent_grad_norm(for_step=True)
    for optimizer, pairs in (asked, alone):
        change(optimizer, pairs)
        optimizer.step()
    assert not equal(bytes_of(*alone), bytes_of(*unchanged))
    assert equal(bytes_of(*asked), bytes_of(*alone))


def law_the_norm_loses_no_digits(impl: Any) -> None:
    """The norm is that of the dense projection when nearly all of the gradient, or hardly any, is in the core."""
    for share in (1.0, 1e-7):
        pairs = make_pairs(ANCHORED)
        total = 0.0
        for index, pair in enumerate(pairs):
            u, _, v = reference.svd_r(pair.x, pair.rank)
            core = u @ noise(index, pair.rank, pair.rank) @ v.mT
            gradient = share * core + (1 - share) * noise(60 + index, *core.shape)
            pair.set_gradient(gradient)
            total += float(reference.projection(u, v, gradient).norm() ** 2)
        norm = float(impl.Riemannion(pairs).tangent_grad_norm())
        within("norm from products", abs(norm / total**0.5 - 1), 1e-13)


def test_the_step_takes_what_the_norm_read() -> None:
    law_the_step_takes_what_the_norm_read(real)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_no_change_in_between_is_missed(change: Change) -> None:
    law_no_change_in_between_is_missed(real, change)


def test_the_norm_loses_no_digits() -> None:
    law_the_norm_loses_no_digits(real)


def test_a_gradient_lost_in_between_is_refused() -> None:
    """The step reads anew, and so it sees that half of the tangent space is missing."""
    optimizer, pairs = ready(real)
    optimizer.tangent_grad_norm(for_step=True)
    pairs[0].left.grad = None
    with pytest.raises(ConfigError, match=pairs[0].name):
        optimizer.step()


def test_without_gradients_the_norm_is_zero_and_the_step_does_nothing() -> None:
    optimizer, pairs = ready(real)
    optimizer.zero_grad()
    before = bytes_of(optimizer, pairs)
    assert float(optimizer.tangent_grad_norm(for_step=True)) == 0.0
    optimizer.step()
    assert equal(bytes_of(optimizer, pairs), before)


def test_a_kept_reading_is_no_part_of_a_copy() -> None:
    optimizer, _ = ready(real)
    optimizer.tangent_grad_norm(for_step=True)
    assert optimizer._reading is not None
    assert copy.deepcopy(optimizer)._reading is None
