"""The factors of a pair: setting, export, arithmetic, masks, and the bytes of the base."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.fixed_rank import Point
from dreamrie.lora import (
    LowRank,
    attach_lora,
    balance,
    balanced_factors,
    base_fingerprint,
    combine,
    export_factors,
    mask_anchor_gradients_,
)
from tests.margins import within
from tests.reference import nets
from tests.strategies import F64, noise


def test_set_start_refuses_a_wrong_point() -> None:
    pair = attach_lora(nets.net(), 2, ["first"])[0]
    good = pair.point()
    with pytest.raises(ConfigError, match="anchored=False"):
        pair.set_start(good, anchored=False)
    with pytest.raises(ConfigError, match=r"layer 'first': start has shapes"):
        pair.set_start(Point(good.v, good.s, good.u), anchored=True)
    for bad in (0.0, math.nan):
        with pytest.raises(NumericalError, match="layer 'first'"):
            pair.set_start(good._replace(s=good.s * torch.tensor([1.0, bad])), anchored=True)
    assert torch.equal(pair.point().s, good.s)


def test_factors_that_are_not_finite_are_named() -> None:
    pair = attach_lora(nets.net(), 2, ["first"])[0]
    pair.left.data[3, 1] = math.nan
    with pytest.raises(NumericalError, match="layer 'first'"):
        pair.point()


def test_channels_last_factors_are_named() -> None:
    model = nets.net()
    pair = attach_lora(model, 2, ["conv"])[0]
    model.to(memory_format=torch.channels_last)
    with pytest.raises(ConfigError, match=r"layer 'conv'.*not contiguous"):
        pair.right_matrix()


def test_low_rank_arithmetic_refuses_what_does_not_fit() -> None:
    a, b = LowRank(noise(0, 5, 2), noise(1, 2, 4)), LowRank(noise(0, 5, 2), noise(1, 2, 3))
    with pytest.raises(ConfigError, match="cannot add 2 changes"):
        combine([a, b])
    with pytest.raises(ConfigError, match="cannot add 0 changes"):
        combine([])
    with pytest.raises(ConfigError, match="with 1 weights"):
        combine([a, a], [1.0])
    with pytest.raises(ConfigError, match="do not multiply"):
        balance(LowRank(a.left, noise(0, 3, 4)))
    with pytest.raises(ConfigError, match="rank must be at least 1"):
        balance(a, rank=0)
    with pytest.raises(ConfigError, match="no LoRA pair to export"):
        export_factors([])


class _WithoutDouble(Tensor):
    """A tensor on a device that has no fp64, like Apple's; its CPU copy is an ordinary one."""

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        named = (*args, *(kwargs or {}).values())
        if func is Tensor.double or any(value is torch.float64 for value in named):
            raise TypeError("this device has no float64")
        result = super().__torch_function__(func, types, args, kwargs or {})
        return result.as_subclass(Tensor) if func is Tensor.cpu else result


def test_export_computes_on_the_cpu() -> None:
    """Factors on a device without fp64 export the same numbers as on one that has it."""
    left, right = noise(0, 7, 4).float(), noise(1, 4, 6).float()
    with pytest.raises(TypeError, match="no float64"):
        left.as_subclass(_WithoutDouble).double()

    def factors(kind: type[Tensor]) -> LowRank:
        pair = SimpleNamespace(
            name="x",
            scaling=0.625,
            left_matrix=lambda: left.as_subclass(kind),
            right_matrix=lambda: right.as_subclass(kind),
        )
        return balanced_factors(pair)

    for part, wanted in zip(factors(_WithoutDouble), factors(Tensor), strict=True):
        assert type(part) is Tensor
        assert part.dtype == F64
        assert torch.equal(part, wanted)


def test_an_untrained_pair_exports_zero() -> None:
    pairs = attach_lora(nets.net(), 2, nets.TARGETS)
    for change in export_factors(pairs).values():
        assert bool(change.left.isfinite().all())
        within("zero export", (change.left.flatten(1) @ change.right.flatten(1)).norm(), 1e-14)
    kept = export_factors(pairs, drop_below=1e-7)
    assert all(1 <= change.left.shape[1] <= 4 for change in kept.values())


def test_mask_takes_missing_gradients_and_plain_pairs() -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, ["first"])
    mask_anchor_gradients_(pairs)
    assert pairs[0].left.grad is None
    plain = attach_lora(nets.net(), 2, ["first"], init="gaussian")
    plain[0].left.grad = torch.ones_like(plain[0].left)
    mask_anchor_gradients_(plain)
    assert bool((plain[0].left.grad == 1).all())


def test_fingerprint_sees_every_base_byte_and_no_adapter() -> None:
    model: Any = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "mix": nn.Linear(4, 6)}).to(F64)
    before = base_fingerprint(model)
    pairs = attach_lora(model, 2, ["mix"])
    nets.disturb(pairs)
    assert base_fingerprint(model) == before
    model["norm"].running_mean[1] += 1e-9
    assert base_fingerprint(model) != before
    model["norm"].running_mean[1] = 0
    assert base_fingerprint(model) == before
    model["mix"].get_base_layer().bias.data[2].neg_()
    assert base_fingerprint(model) != before
