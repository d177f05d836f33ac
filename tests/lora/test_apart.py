"""Keeping pairs apart from other adapters: room, hooks, and layers that only one side has."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.loi import locally_optimal_init
from dreamrie.lora import LowRank, attach_lora
from dreamrie.lora.apart import avoided, keep_apart, row_space
from tests.reference import nets
from tests.strategies import F64, frame, noise


def change(out: int, in_: int, rank: int, seed: int = 0) -> LowRank:
    return LowRank(noise(seed, out, rank), noise(seed + 1, rank, in_))


def test_layers_without_another_adapter_stay_free(caplog: pytest.LogCaptureFixture) -> None:
    """Two of three layers have others; layers that only the others have are not looked at."""
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    assert avoided(pairs) is None
    others = [
        {"first": change(21, 81, 3), "elsewhere": change(4, 4, 1)},
        {"first": change(21, 81, 2, seed=5), "second": change(13, 21, 4)},
    ]
    with caplog.at_level(logging.INFO, "dreamrie"):
        keep_apart(pairs, others)
    assert "2 given adapters: 2 layers avoid 4 to 5 of their input directions" in caplog.text
    found: Any = avoided(pairs)
    assert [None if basis is None else tuple(basis.shape) for basis in found] == [
        None,
        (81, 5),
        (21, 4),
    ]


def test_no_other_adapter_changes_nothing(caplog: pytest.LogCaptureFixture) -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    with caplog.at_level(logging.INFO, "dreamrie"):
        keep_apart(pairs, [])
    assert avoided(pairs) is None
    assert not any(pair.right._backward_hooks for pair in pairs)
    assert "kept orthogonal" not in caplog.text


def test_too_little_room_is_named_before_anything_is_changed() -> None:
    """20 of 21 directions are taken, and rank 2 needs two; no layer is left half-way."""
    pairs = attach_lora(nets.net(), 2, nets.TARGETS)
    crowd = [{"first": change(21, 81, 3), "second": change(13, 21, 10, seed)} for seed in (3, 8)]
    with pytest.raises(
        ConfigError, match=r"layer 'second'.*20 of its 21 input.*1 are left.*rank 2"
    ):
        keep_apart(pairs, crowd)
    assert avoided(pairs) is None
    assert not any(pair.right._backward_hooks for pair in pairs)


def test_room_for_exactly_the_rank_is_enough() -> None:
    """Two directions are left for rank 2, so X0 has one row space to choose."""
    model = nets.prescribed(17, 12)
    pairs = attach_lora(model, 2, ["layer"])
    keep_apart(pairs, [{"layer": change(17, 12, 10)}])
    basis: Any = avoided(pairs)
    locally_optimal_init(model, pairs, nets.prescribed_loss, [noise(4, 17, 12)], avoid=basis)
    point = pairs[0].point()
    assert float((basis[0].T @ point.v).norm()) < 1e-12
    assert point.v.shape == (12, 2)


def test_changes_of_another_shape_or_value_are_refused() -> None:
    pairs = attach_lora(nets.net(), 2, ["first"])
    with pytest.raises(ConfigError, match=r"layer 'first'.*shape \(80, 3\), expected \(81, q\)"):
        keep_apart(pairs, [{"first": change(21, 80, 3)}])
    broken = change(21, 81, 3)
    broken.right[0, 0] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        keep_apart(pairs, [{"first": broken}])


def test_a_change_of_zero_takes_no_room() -> None:
    zero = LowRank(torch.zeros(9, 3, dtype=F64), noise(0, 3, 14))
    assert row_space([zero]).shape == (14, 0)
    pairs = attach_lora(nets.net(), 2, ["first"])
    keep_apart(pairs, [{"first": LowRank(torch.zeros(21, 1, dtype=F64), noise(0, 1, 81))}])
    pairs[0].right.grad = None
    nets.squares(pairs_model(pairs), nets.batches(1)[0]).backward()
    assert float(pairs[0].right.grad.abs().max()) > 0  # type: ignore[union-attr]


def pairs_model(pairs: list[Any]) -> Any:
    """The same factors on a net of their own, so that a loss can be differentiated."""
    model = nets.net()
    model.first = pairs[0].module
    return model.eval()


def test_the_hook_outlives_switching_gradients_off_and_keeps_the_type() -> None:
    """Validation switches adapters off and on; a gradient in bf16 stays one."""
    for dtype, bar in ((F64, 1e-14), (torch.bfloat16, 1e-2)):
        model = nets.net(dtype=dtype).eval()
        pairs = attach_lora(model, 2, ["first"])
        for factor in (pairs[0].left, pairs[0].right):
            factor.data = factor.data.to(dtype)
        keep_apart(pairs, [{"first": change(21, 81, 3)}])
        pairs[0].right.requires_grad_(False)
        pairs[0].right.requires_grad_(True)
        nets.squares(model, nets.batches(1, dtype=dtype)[0]).backward()
        gradient = pairs[0].right.grad
        assert gradient is not None
        assert gradient.dtype == dtype
        basis = row_space([change(21, 81, 3)])
        assert float((gradient.double() @ basis).norm() / gradient.double().norm()) < bar


def test_loi_refuses_bases_that_do_not_fit() -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    for avoid, said in (
        ([None], "one entry for each of 3 layers"),
        ([None, frame(0, 80, 3), None], r"shape \(80, 3\), expected \(81, q\)"),
        ([None, None, frame(0, 21, 20)], "1 are left, and rank 2"),
    ):
        with pytest.raises(ConfigError, match=said):
            locally_optimal_init(model, pairs, nets.squares, nets.batches(1), avoid=avoid)


def test_a_silent_layer_starts_at_random_but_apart(caplog: pytest.LogCaptureFixture) -> None:
    """No gradient reaches the convolution, and its start is orthogonal all the same."""
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)

    def loss(net: Any, batch: Any) -> torch.Tensor:
        with torch.no_grad():
            hidden = torch.tanh(net.conv(batch[0])).flatten(1)
        value: torch.Tensor = net.second(torch.tanh(net.first(hidden))).square().mean()
        return value

    basis = frame(0, 27, 6)
    locally_optimal_init(model, pairs, loss, nets.batches(1), avoid=[basis, None, None], alpha=0.2)
    assert "no gradient reaches 1 of 3 layers (conv" in caplog.text
    point = pairs[0].point()
    assert float((basis.T @ point.v).norm()) < 1e-12
    assert point.s.tolist() == pytest.approx([0.2, 0.2])
