"""L3, L4, L6, L8, L9 and law 15 (docs/method.md 10): what LOI leaves to its caller."""

from __future__ import annotations

import copy
import logging
import random
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

import dreamrie.loi as real
import tests.reference.theorem as theorem
from dreamrie.errors import ConfigError
from dreamrie.lora import attach_lora, base_fingerprint
from tests.margins import within
from tests.reference import nets
from tests.reference.theorem import matrix
from tests.strategies import F64

ESTIMATORS = ("mean_gradient", "sketch", "backprop_rsvd")


# ----------------------------------------------------------------------------------------- nothing else changes


def law_l3_step_zero(impl: Any) -> None:
    """The output of the model and of each layer is what it was: fp64 1e-14, fp32 1e-6, bf16 and fp16 1e-3."""
    half = [(torch.bfloat16, 1e-3), (torch.float16, 1e-3)]
    for dtype, bar in [(F64, 1e-14), (torch.float32, 1e-6), *half]:
        model = nets.net(dtype=dtype).eval()
        pixels = nets.batches(1, seed=70, dtype=dtype)[0][0]
        before = model(pixels).detach()
        pairs = attach_lora(model, 2, nets.TARGETS, dropout=0.4)
        impl.locally_optimal_init(
            model, pairs, nets.squares, nets.batches(2, dtype=dtype), alpha=-0.7
        )
        after = model(pixels).detach()
        scale = before.abs().max()
        within(f"L3 {dtype}", (after - before).abs().max() / scale, bar)
        for pair in pairs:
            assert float(pair.point().s.min()) > 0.6, "a start of size zero proves nothing"
            within(f"L3 layer {dtype}", pair.delta().norm() / 0.7, bar)
        # LoRA dropout draws one mask for both halves, so it cannot break the identity either.
        for pair in pairs:
            pair.module.train()
        within(f"L3 dropout {dtype}", (model(pixels).detach() - before).abs().max() / scale, bar)


def law_l4_base_weights_keep_their_bytes(impl: Any) -> None:
    """Base bytes are the same after LOI, after training, with another adapter loaded, after deletion of ours."""
    model = nets.net()
    before = base_fingerprint(model)
    pairs = attach_lora(model, 2, nets.TARGETS)
    data = nets.batches(2)
    for estimator in ESTIMATORS:
        impl.locally_optimal_init(model, pairs, nets.squares, data, estimator=estimator)
        assert base_fingerprint(model) == before
    factors = [factor for pair in pairs for factor in (pair.left, pair.right)]
    optimizer = torch.optim.SGD(factors, lr=0.1)
    for _ in range(20):
        optimizer.zero_grad()
        nets.squares(model, data[0]).backward()
        optimizer.step()
    assert float(pairs[0].delta().norm()) > 1e-3
    assert base_fingerprint(model) == before
    with warnings.catch_warnings():
        # PEFT remarks that there are two adapters, and that one of them goes.
        warnings.simplefilter("ignore")
        inject_adapter_in_model(LoraConfig(r=1, target_modules=["first"]), model, "other")
        assert base_fingerprint(model) == before
        for pair in pairs:
            pair.module.delete_adapter("default")
    assert not any("default" in name for name, _ in model.named_parameters())
    assert base_fingerprint(model) == before


def law_l9_nothing_is_left_behind(impl: Any) -> None:
    """Random streams, train/eval modes, gradient flags and every .grad are as before, to the bit."""
    for estimator in ESTIMATORS:
        model = nets.net().train()
        model.first.eval()
        pairs = attach_lora(model, 2, nets.TARGETS, dropout=0.2)
        model.head.bias.requires_grad_(True)
        nets.squares(model, nets.batches(1)[0]).backward()
        grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
        flags = {n: p.requires_grad for n, p in model.named_parameters()}
        modes = {n: m.training for n, m in model.named_modules()}
        identity = {n: id(p) for n, p in model.named_parameters()}
        streams = (random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state())

        def data() -> Any:
            for batch in nets.batches(2):
                random.random(), np.random.rand(), torch.rand(1)
                yield batch

        impl.locally_optimal_init(model, pairs, nets.noisy_squares, data(), estimator=estimator)
        assert random.getstate() == streams[0]
        assert (np.random.get_state()[1] == streams[1]).all()
        assert torch.equal(torch.get_rng_state(), streams[2])
        assert {n: m.training for n, m in model.named_modules()} == modes
        assert {n: id(p) for n, p in model.named_parameters()} == identity
        assert {n: p.requires_grad for n, p in model.named_parameters()} == flags
        for name, parameter in model.named_parameters():
            old = grads[name]
            assert (parameter.grad is None) == (old is None), name
            assert old is None or torch.equal(parameter.grad, old), name


# ------------------------------------------------------------------------------------------------- odd inputs


def law_l6_dropout_is_off_while_estimating(impl: Any) -> None:
    """Dropout of the model and of the LoRA layers does not enter the estimate."""
    data = nets.batches(2)
    truth = nets.dense_gradients(nets.net(), nets.squares, data)
    for estimator in ESTIMATORS:
        model = nets.net().train()
        pairs = attach_lora(model, 2, nets.TARGETS, dropout=0.5)
        impl.locally_optimal_init(model, pairs, nets.squares, data, estimator=estimator)
        for pair in pairs:
            share = theorem.energy(matrix(pair.point()), pair.rank, truth[pair.name])
            lost = 1 - share / theorem.optimum(truth[pair.name], pair.rank)
            within(f"L6 dropout {estimator}", lost, 0.05 if estimator == "backprop_rsvd" else 1e-9)


def test_l6_a_layer_without_gradient_keeps_a_stated_start(caplog: Any) -> None:
    """One silent layer starts at random with the asked size, is named in the log, and counts as optimal."""
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)

    def loss(net: Any, batch: Any) -> Tensor:
        with torch.no_grad():
            hidden = torch.tanh(net.conv(batch[0])).flatten(1)
        return net.second(torch.tanh(net.first(hidden))).square().mean()

    with caplog.at_level(logging.WARNING):
        report = real.locally_optimal_init(model, pairs, loss, nets.batches(2), alpha=0.2)
    assert "no gradient reaches 1 of 3 layers (conv" in caplog.text
    silent = report.layers[0]
    assert (silent.name, silent.optimum, silent.captured) == ("conv", 0.0, 1.0)
    within("L6 silent", (pairs[0].point().s - 0.2).abs().max(), 1e-12)
    within("L6 silent delta", pairs[0].delta().norm(), 1e-14)


def law_l8_alpha_must_not_be_below_lr(impl: Any) -> None:
    """|alpha| below lr is a ConfigError naming layer and numbers; lr is allowed."""
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    before = [pair.left.detach().clone() for pair in pairs]
    for alpha in (0.099, -0.099):
        with pytest.raises(ConfigError, match=r"layer 'conv'.*at least 0\.1 "):
            impl.locally_optimal_init(
                model, pairs, nets.squares, nets.batches(1), alpha=alpha, lr=0.1
            )
    assert all(torch.equal(pair.left, old) for pair, old in zip(pairs, before, strict=True))
    impl.locally_optimal_init(model, pairs, nets.squares, nets.batches(1), alpha=-0.1, lr=0.1)


LAWS = [value for name, value in sorted(globals().items()) if name.startswith("law_")]


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    """Every law of this file on the real implementation."""
    law(real)


def test_l9_the_first_training_batch_is_the_same_with_and_without_loi() -> None:
    """A loader shuffled from the global stream gives the same first batch after LOI."""
    firsts = []
    for with_loi in (False, True):
        torch.manual_seed(21)
        model = nets.net()
        pairs = attach_lora(model, 2, nets.TARGETS)
        data = torch.utils.data.DataLoader(nets.batches(6), batch_size=None, shuffle=True)
        if with_loi:
            real.locally_optimal_init(model, pairs, nets.noisy_squares, data)
        firsts.append(next(iter(data))[0])
    assert torch.equal(*firsts)


def test_the_caller_may_copy_the_model_afterwards() -> None:
    """Factors stay leaf parameters in their modules: a deepcopy holds the start and trains."""
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    real.locally_optimal_init(model, pairs, nets.squares, nets.batches(1))
    twin = copy.deepcopy(model)
    nets.squares(twin, nets.batches(1)[0]).backward()
    assert twin.conv.lora_B["default"].weight.grad is not None
    assert torch.equal(twin.conv.lora_B["default"].weight, pairs[0].left)
