"""Examples and errors of dreamrie.loi."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import dreamrie
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.loi import (
    LeadingSvd,
    digest,
    driver,
    leading_svd,
    locally_optimal_init,
    optimal_point,
    split_point,
)
from dreamrie.lora import attach_lora, base_fingerprint, lora_pairs
from tests.reference import nets
from tests.strategies import F64, frame, noise


def attached(**options: Any) -> tuple[nn.Module, list[Any]]:
    model = nets.net()
    return model, attach_lora(model, 2, nets.TARGETS, **options)


def test_report_names_layers_energies_and_the_untouched_step(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, pairs = attached()
    with caplog.at_level(logging.INFO, logger="dreamrie"):
        report = dreamrie.locally_optimal_init(model, pairs, nets.squares, nets.batches(3))
    assert [layer.name for layer in report.layers] == nets.TARGETS
    assert (report.estimator, report.batches) == ("mean_gradient", 3)
    assert report.captured == pytest.approx(1.0, abs=1e-10)
    assert report.loss_change < 1e-12
    for layer in report.layers:
        assert layer.alpha == pytest.approx(0.1 / math.sqrt(2))
        assert 0 < layer.share < 1 < layer.gap
    assert "1.0000 of the optimum" in report.summary()
    assert report.summary() in caplog.text


def test_default_alpha_follows_the_rank_of_each_layer() -> None:
    model = nn.ModuleDict({"a": nn.Linear(9, 8), "b": nn.Linear(8, 3)})

    def loss(net: Any, batch: Tensor) -> Tensor:
        return net["b"](torch.tanh(net["a"](batch))).square().mean()

    pairs = attach_lora(model, 3, ["a", "b"])
    report = locally_optimal_init(model, pairs, loss, [noise(0, 6, 9, dtype=torch.float32)])
    assert [layer.rank for layer in report.layers] == [3, 1]
    assert [layer.alpha for layer in report.layers] == pytest.approx([0.1 / math.sqrt(3), 0.1])


@pytest.mark.parametrize("estimator", ["mean_gradient", "sketch", "backprop_rsvd"])
def test_loss_that_draws_from_its_own_generator(estimator: Any) -> None:
    """Averaging estimators take it; a fixed objective is impossible and said so."""
    model, pairs = attached()
    own = torch.Generator().manual_seed(1)

    def loss(net: nn.Module, batch: Any) -> Tensor:
        shaken = batch[0] + torch.randn(batch[0].shape, generator=own, dtype=F64)
        return nets.squares(net, (shaken, batch[1]))

    if estimator == "backprop_rsvd":
        before = pairs[0].left.detach().clone()
        with pytest.raises(NumericalError, match="objective is not fixed"):
            locally_optimal_init(model, pairs, loss, nets.batches(2), estimator=estimator)
        assert torch.equal(pairs[0].left, before)
    else:
        report = locally_optimal_init(model, pairs, loss, nets.batches(2), estimator=estimator)
        assert math.isnan(report.loss_change)
        assert "does not repeat" in report.summary()


def test_gradient_accumulation_of_the_caller_survives() -> None:
    model, pairs = attached()
    nets.squares(model, nets.batches(1)[0]).backward()
    before = pairs[0].left.grad
    locally_optimal_init(model, pairs, nets.squares, nets.batches(2), estimator="sketch")
    assert pairs[0].left.grad is before


def test_a_wide_gradient_takes_the_randomized_path_and_still_holds_the_optimum(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("dreamrie.loi.points.FULL_SVD_SIZE", 16)
    values = 0.8 ** torch.arange(60, dtype=F64)
    g = (frame(0, 70, 60) * values) @ frame(1, 60, 60).T
    svd = leading_svd(g, 9, torch.Generator().manual_seed(0))
    assert svd.values.shape == (9,)
    assert svd.energy(split_point(svd, 4, 0.1)) / float((values[:8] ** 2).sum()) > 1 - 1e-6


def test_fp16_and_bf16_gradients_are_decomposed_in_fp32() -> None:
    svd = leading_svd(noise(0, 8, 9).bfloat16(), 3)
    assert svd.left.dtype == torch.float32


def test_gap_of_an_exhausted_spectrum_is_infinite() -> None:
    svd = LeadingSvd(frame(0, 5, 2), torch.tensor([2.0, 1.0], dtype=F64), frame(1, 4, 2))
    assert svd.gap(1) == math.inf
    assert svd.optimum(1) == 5.0


def test_close_singular_values_are_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    model = nets.prescribed(20, 18)
    pairs = attach_lora(model, 2, ["layer"])
    flat = frame(0, 20, 18) @ frame(1, 18, 18).T
    with caplog.at_level(logging.WARNING):
        locally_optimal_init(model, pairs, nets.prescribed_loss, [flat])
    assert "in 1 of 1 layers (first layer)" in caplog.text


def test_digest_sees_one_bit_and_takes_every_dtype() -> None:
    weight = noise(0, 4, 5).bfloat16()
    before = digest(weight)
    assert digest(weight.clone()) == before
    weight.view(torch.int16)[1, 2] ^= 1
    assert digest(weight) != before
    assert digest(torch.empty(0)) != digest(torch.empty(0, 1))


# -------------------------------------------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"estimator": "magic"}, "mean_gradient, sketch, backprop_rsvd"),
        ({"alpha": 0.0}, "alpha must be finite and not zero"),
        ({"alpha": math.nan}, "alpha must be finite"),
        ({"lr": -1.0}, "lr must be finite"),
        ({"lr": 0.1}, "layer 'conv'.*below lr"),
        ({"oversample": 3}, "belong to backprop_rsvd"),
        ({"estimator": "backprop_rsvd", "power": -1}, "power must not be negative"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    model, pairs = attached()
    with pytest.raises(ConfigError, match=message):
        locally_optimal_init(model, pairs, nets.squares, nets.batches(1), **options)


@pytest.mark.parametrize("estimator", ["mean_gradient", "sketch", "backprop_rsvd"])
def test_no_batch_is_named(estimator: Any) -> None:
    model, pairs = attached()
    with pytest.raises(ConfigError, match="no batch"):
        locally_optimal_init(model, pairs, nets.squares, iter(()), estimator=estimator)


def test_no_pair_and_no_anchor_are_named() -> None:
    model, pairs = attached(init="default")
    with pytest.raises(ConfigError, match="layer 'conv' has no anchor"):
        locally_optimal_init(model, pairs, nets.squares, nets.batches(1))
    with pytest.raises(ConfigError, match="no LoRA pair"):
        locally_optimal_init(model, [], nets.squares, nets.batches(1))


def test_pairs_of_another_model_are_named() -> None:
    model, _ = attached()
    _, others = attached()
    with pytest.raises(ConfigError, match="not parameters of this model"):
        locally_optimal_init(model, others, nets.squares, nets.batches(1))


@pytest.mark.parametrize("estimator", ["mean_gradient", "sketch", "backprop_rsvd"])
def test_a_loss_that_ignores_the_model_is_named(estimator: Any) -> None:
    model, pairs = attached()

    def detached(net: nn.Module, batch: Any) -> Tensor:
        return nets.squares(net, batch).detach()

    with pytest.raises(ConfigError, match="does not depend on the adapted layers"):
        locally_optimal_init(model, pairs, detached, nets.batches(1), estimator=estimator)


def test_no_gradient_anywhere_is_named() -> None:
    model, pairs = attached()
    with pytest.raises(ConfigError, match="no adapted layer has a gradient"):
        locally_optimal_init(model, pairs, lambda net, b: 0 * nets.squares(net, b), nets.batches(1))


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_not_finite_names_the_batch(value: float) -> None:
    model, pairs = attached()
    left = pairs[0].left.detach().clone()
    data = nets.batches(3)
    data[1][1][0, 0] = value
    with pytest.raises(NumericalError, match="batch 2"):
        locally_optimal_init(model, pairs, nets.squares, data)
    assert torch.equal(pairs[0].left, left)
    assert pairs[0].left.requires_grad
    assert not pairs[0].base_weight.requires_grad


def test_a_gradient_that_is_not_finite_names_the_layer() -> None:
    model = nets.prescribed(6, 5)
    pairs = attach_lora(model, 1, ["layer"])

    def loss(net: Any, batch: Tensor) -> Tensor:
        return (net() - net().detach()).abs().sqrt().sum()

    for estimator in ("mean_gradient", "sketch"):
        with pytest.raises(NumericalError, match=r"layer 'layer'.*not finite"):
            locally_optimal_init(model, pairs, loss, [noise(0, 6, 5)], estimator=estimator)


def test_a_loss_per_sample_is_named() -> None:
    model, pairs = attached()
    with pytest.raises(ConfigError, match="one number"):
        locally_optimal_init(model, pairs, lambda net, b: net(b[0]), nets.batches(1))


class Tied(nn.Module):
    """Two layers share one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(8, 8)
        self.two = nn.Linear(8, 8)
        self.two.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.two(torch.tanh(self.one(x)))


def test_tied_weights_are_named_and_the_sketch_separates_them() -> None:
    model = Tied()
    pairs = attach_lora(model, 2, ["one"])
    x = noise(0, 6, 8, dtype=torch.float32)

    def loss(net: nn.Module, batch: Tensor) -> Tensor:
        return net(batch).square().mean()

    with pytest.raises(ConfigError, match=r"layer 'one'.*tied.*two.weight.*sketch"):
        locally_optimal_init(model, pairs, loss, [x])
    assert locally_optimal_init(model, pairs, loss, [x], estimator="sketch").captured > 0.999


def test_a_quantized_base_is_named_and_the_sketch_takes_it() -> None:
    model, pairs = attached()
    pairs[1].base_weight = nn.Parameter(
        torch.zeros(pairs[1].out, pairs[1].in_, dtype=torch.uint8), requires_grad=False
    )
    with pytest.raises(ConfigError, match=r"layer 'first'.*uint8.*sketch"):
        locally_optimal_init(model, pairs, nets.squares, nets.batches(1))
    report = locally_optimal_init(model, pairs, nets.squares, nets.batches(1), estimator="sketch")
    assert report.captured == pytest.approx(1.0)


def test_a_start_that_misses_the_optimum_is_refused_and_undone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, pairs = attached()
    before = base_fingerprint(model)
    left = [pair.left.detach().clone() for pair in pairs]

    def same_index(svd: LeadingSvd, rank: int, alpha: float) -> Any:
        point = split_point(svd, rank, alpha)
        return point._replace(v=svd.right[:, :rank])

    monkeypatch.setattr(driver, "split_point", same_index)
    with pytest.raises(NumericalError, match="of the optimal gradient energy"):
        locally_optimal_init(model, pairs, nets.squares, nets.batches(1))
    assert all(torch.equal(pair.left, old) for pair, old in zip(pairs, left, strict=True))
    assert base_fingerprint(model) == before


def test_optimal_point_refuses_what_it_cannot_do() -> None:
    with pytest.raises(ConfigError, match="rank 6"):
        optimal_point(noise(0, 5, 7), 6, 0.1)
    with pytest.raises(ConfigError, match="alpha"):
        optimal_point(noise(0, 5, 7), 2, 0.0)
    with pytest.raises(NumericalError, match="not finite"):
        optimal_point(noise(0, 5, 7) * math.nan, 2, 0.1)


def test_works_without_peft_in_sight() -> None:
    """LOI needs the attributes of a pair, not the class."""
    model, pairs = attached()

    class Foreign:
        def __init__(self, pair: Any) -> None:
            self._pair = pair

        def __getattr__(self, name: str) -> Any:
            return getattr(self._pair, name)

    wrapped = [Foreign(pair) for pair in lora_pairs(model)]
    report = locally_optimal_init(model, wrapped, nets.squares, nets.batches(1))  # type: ignore[arg-type]
    assert report.captured == pytest.approx(1.0)
    assert torch.equal(pairs[0].left, wrapped[0].left)
