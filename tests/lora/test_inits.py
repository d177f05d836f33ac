"""Starts by name: what they refuse and how, which inputs count, layers of all kinds."""

from __future__ import annotations

import functools
import importlib.util
import sys
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from dreamrie.errors import ConfigError
from dreamrie.init_table import INITS
from dreamrie.lora import LoraPair, attach_lora, base_fingerprint, lora_pairs, start_pairs
from dreamrie.lora.inits import Data, Loi, eva
from dreamrie.lora.inits.corda import oriented, scaled_covariance
from dreamrie.lora.inits.inputs import as_rows
from tests.llm.packed import BytesLinear
from tests.margins import within
from tests.reference import nets, starts
from tests.strategies import noise

DATA = Data(nets.squares, nets.batches(2))


def attached(
    name: str, model: nn.Module | None = None, rank: int = 2, targets: Any = nets.TARGETS
) -> tuple[Any, list[LoraPair]]:
    model = nets.net() if model is None else model
    return model, attach_lora(model, rank, targets, init=INITS[name].layout)


def without_second(model: Any, batch: Any) -> Tensor:
    return model.first(model.conv(batch[0]).flatten(1)).square().mean()


def one_picture(batch: Any) -> Any:
    return batch[0][:1], batch[1][:1]


def dark(batch: Any) -> Any:
    return torch.zeros_like(batch[0]), batch[1]


def circular() -> nn.Module:
    model = nets.net()
    model.conv.padding_mode = "circular"
    return model


def of_rank_one() -> nn.Module:
    model = nets.net()
    model.second.weight.data.copy_(noise(1, 13, 1) @ noise(2, 1, 21))
    return model


ONE, DARK = [one_picture(b) for b in nets.batches(1)], [dark(b) for b in nets.batches(2)]


@pytest.mark.parametrize(
    ("name", "options", "data", "message"),
    [
        ("eva", {}, None, r"'eva' is computed from batches: attach with"),
        ("corda", {}, Data(nets.squares, []), "'corda' got no batch"),
        ("eva", {}, Data(nets.squares, []), "'eva' got no batch"),
        ("lora_ga", {}, Data(nets.squares, []), "got no batch"),
        ("eva", {"rank": 4}, DATA, "'first' sees 7 rows .* rank 4 needs at least 8"),
        ("eva", {"rank": 11, "targets": ["second"]}, DATA, "at least 22 input directions, it has 21"),
        ("corda", {}, Data(without_second, nets.batches(1)), "layer 'second': the loss does not use"),
        ("corda", {}, Data(nets.squares, DARK), "layer 'conv': its inputs .* zero or not finite"),
        ("corda", {"model": circular()}, DATA, "layer 'conv'.*mode 'circular'"),
        ("lora_ga", {}, Data(nets.squares, ONE), "layer 'first': its gradient has rank below 4"),
        ("milora", {"model": of_rank_one()}, None, "layer 'second': the smallest singular value"),
        ("orthogonal", {"rank": 3}, None, "layer 'conv'.*two halves; 3 is odd"),
    ],
)  # fmt: skip
def test_what_a_start_cannot_do_is_named(
    name: str, options: dict[str, Any], data: Data | None, message: str
) -> None:
    model, pairs = attached(name, **options)
    own = [pair.right.detach().clone() for pair in pairs]
    with pytest.raises(ConfigError, match=message):
        start_pairs(name, model, pairs, data)
    assert all(torch.equal(old, pair.right) for old, pair in zip(own, pairs, strict=True))
    assert not any(pair.module._forward_pre_hooks for pair in pairs)


@pytest.mark.parametrize(
    ("name", "layout", "message"),
    [
        ("pissa", "default", r"no anchor, and the start 'pissa' needs 2.*init='orthonormal'"),
        ("eva", "orthonormal", r"2 anchor columns, and the start 'eva' allows none.*init='default'"),
        ("pisa", "default", "init 'pisa' is not supported here; allowed: loi, orthonormal"),
    ],
)  # fmt: skip
def test_the_layout_must_be_that_of_the_start(name: str, layout: str, message: str) -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS, init=layout)
    with pytest.raises(ConfigError, match=message):
        start_pairs(name, model, pairs, DATA)
    with pytest.raises(ConfigError, match="no LoRA pair"):
        start_pairs("eva", model, [])


def test_eva_does_not_go_round_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    model, pairs = attached("eva")
    monkeypatch.setattr(eva, "MOST_ROUNDS", 1)
    with pytest.raises(ConfigError, match="have not settled after 4 forward passes"):
        start_pairs("eva", model, pairs, DATA)
    monkeypatch.undo()
    assert start_pairs("eva", model, pairs, DATA).startswith("eva, ")


def test_a_packed_base_is_refused_where_its_numbers_are_needed() -> None:
    dense = nn.Sequential(nn.Linear(12, 9, bias=False), nn.Tanh(), nn.Linear(9, 8, bias=False))
    rows = Data(lambda net, batch: net(batch).square().mean(), [noise(7, 11, 12).float()])
    for name in ("milora", "pissa", "corda", "lora_ga", "eva", "stiefel_both"):
        model = nn.Sequential(BytesLinear.of(dense[0]), nn.Tanh(), BytesLinear.of(dense[2]))
        pairs = attach_lora(model, 2, ["0", "2"], init=INITS[name].layout)
        if name in ("eva", "stiefel_both"):
            assert start_pairs(name, model, pairs, rows).startswith(name)
            continue
        with pytest.raises(ConfigError, match=r"layer '0'.*quantized"):
            start_pairs(name, model, pairs, rows)


@pytest.mark.parametrize("name", ["corda", "eva"])
def test_places_that_the_loss_does_not_use_are_not_seen(name: str) -> None:
    """A row of tokens with padding starts an adapter like the row without; without `used` it does not."""
    long, used = noise(5, 2, 9, 12), torch.arange(9) < torch.tensor([[9], [6]])
    found: list[Tensor] = []
    # The same places alone, then between others of which `used` may know nothing.
    alone = (long * used[..., None])[used][None]
    for batch, counted in ((alone, None), (long, lambda _: used), (long, None)):
        model = nn.ModuleDict({"mix": nn.Linear(12, 7)}).double()
        model["mix"].weight.data.copy_(noise(1, 7, 12))
        pairs = attach_lora(model, 2, ["mix"], init=INITS[name].layout)
        data = Data(lambda net, rows: net["mix"](rows).square().sum(), [batch], counted)
        start_pairs(name, model, pairs, data)
        found.append(pairs[0].right_matrix().detach()[:2])
    within("padding", nets.relative(found[1], found[0]), 1e-6)
    assert nets.relative(found[2], found[0]) > 1e-2


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, (3, 2), stride=2, padding=(0, 2), dilation=(1, 2)),
        nn.Linear(6, 5),
    ],
    ids=["plain", "uneven", "linear"],
)
def test_rows_times_the_matrix_are_the_layer(layer: Any) -> None:
    pixels = noise(3, 2, 3, 7, 6)
    model = nn.ModuleDict({"one": layer}).double()
    expected = layer(pixels).detach()
    (pair,) = attach_lora(model, 2, ["one"], init="default")
    rows = as_rows(pair, pixels)
    out = rows @ pair.as_matrix(pair.base_weight).T + layer.bias
    if expected.ndim == 4 and isinstance(layer, nn.Conv2d):
        expected = expected.flatten(2).transpose(1, 2)
    within("rows", (out.detach() - expected.reshape(out.shape)).abs().max(), 1e-12)


def test_small_layers_and_half_precision_bases() -> None:
    """Ranks that were lowered, and fp32 factors over bf16: the driver checks that nothing changes."""
    for name in ("corda", "lora_ga", "eva"):
        model, pairs = attached(name, rank=3, targets=[*nets.TARGETS[1:], "head"])
        start_pairs(name, model, pairs, DATA)
        assert [pair.rank for pair in pairs] == [3, 3, 2 if INITS[name].anchored else 3]
        if name == "eva":  # which has no use for the weight
            continue
        half, pairs = attached(name, nets.net(dtype=torch.bfloat16))
        base = base_fingerprint(half)
        for pair in pairs:
            pair.left.data, pair.right.data = pair.left.data.float(), pair.right.data.float()
        start_pairs(name, half, pairs, Data(nets.squares, nets.batches(2, dtype=torch.bfloat16)))
        assert base_fingerprint(half) == base


def test_a_start_that_is_small_beside_a_step_is_said(caplog: pytest.LogCaptureFixture) -> None:
    model, pairs = attached("orthonormal")
    start_pairs("orthonormal", model, pairs, loi=Loi(alpha=0.02, lr=2e-2))
    assert not caplog.text
    start_pairs("orthonormal", model, pairs, loi=Loi(alpha=0.02, lr=1e-1))
    assert "singular values down to 2.0e-02" in caplog.text
    assert "below the learning rate (1.0e-01) in 3 of 3 layers" in caplog.text


def test_a_start_by_name_is_the_one_of_attach_lora() -> None:
    for name in ("pissa", "olora", "milora"):
        at_once = attach_lora(nets.net(), 2, nets.TARGETS, init=name)
        model, pairs = attached("orthonormal")
        assert start_pairs(name, model, pairs) == name
        for pair, other in zip(pairs, at_once, strict=True):
            within("twice", nets.relative(starts.dense(pair), starts.dense(other)), 1e-12)


def test_corda_is_pefts(monkeypatch: pytest.MonkeyPatch) -> None:
    """To fp32, which PEFT computes in. It takes a decorator from attrs, a package that it does not ask for."""
    if importlib.util.find_spec("attr") is None:
        monkeypatch.setitem(sys.modules, "attr", types.SimpleNamespace(dataclass=dataclass))
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    rows, weight = [noise(seed, 40, 12) for seed in (3, 4)], noise(1, 7, 12)
    seen = starts.Seen({"mix": weight})
    config = LoraConfig(
        r=2, lora_alpha=2, target_modules=["mix"], init_lora_weights="corda",
        corda_config=CordaConfig(corda_method="ipm"),
    )  # fmt: skip
    run: Callable[[], Any] = functools.partial(lambda: [seen({"mix": part}) for part in rows])
    preprocess_corda(seen, config, run_model=run)
    inject_adapter_in_model(config, seen)
    theirs = weight - seen.mix.base_layer.weight.double()
    covariance = (scaled_covariance(rows[0]) + scaled_covariance(rows[1])) / 2
    point = oriented(weight, covariance, 2)
    within("corda of PEFT", nets.relative((point.u * point.s) @ point.v.T, theirs), 1e-4)


@pytest.mark.parametrize("init", ["default", "orthonormal"])
def test_rslora_is_the_scaling_of_peft(init: str) -> None:
    """sqrt(r) for the r that is trained, where r was lowered too; point and function do not change with it."""
    plain, model = nets.net(), nets.net()
    pairs = attach_lora(model, 3, [*nets.TARGETS, "head"], init=init, use_rslora=True)
    others = attach_lora(plain, 3, [*nets.TARGETS, "head"], init=init)
    pixels = nets.batches(1)[0][0]
    moved = (model.eval()(pixels) - plain.eval()(pixels)).detach().abs().max()
    within("rslora step 0", moved, 1e-14)
    assert len({pair.rank for pair in pairs}) == (2 if init == "orthonormal" else 1)
    for pair, other in zip(pairs, others, strict=True):
        within("rslora", abs(pair.scaling - pair.rank**0.5), 1e-14)
        assert other.scaling == 1.0
        if init == "orthonormal":
            within("rslora point", nets.relative(starts.dense(pair), starts.dense(other)), 1e-14)
    if init == "default":
        config = LoraConfig(r=3, lora_alpha=3, target_modules=["first"], use_rslora=True)
        (theirs,) = lora_pairs(inject_adapter_in_model(config, nets.net()))
        assert pairs[1].scaling == theirs.scaling
