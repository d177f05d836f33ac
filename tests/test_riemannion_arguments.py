"""What Riemannion refuses: bad options, pairs that cannot be trained, gradients and factors that cannot be used."""

from __future__ import annotations

import logging
import math
from typing import Any

import pytest
import torch
from torch import nn

from dreamrie.errors import ConfigError, NumericalError
from dreamrie.riemannion import Riemannion
from tests.small_optimizer import stepped
from tests.strategies import F64, LAYERS, Layer, Pair, Quadratic, make_pair, make_pairs, noise


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("lr", -1e-3),
        ("lr", math.nan),
        ("lr", math.inf),
        ("lr", "1e-3"),
        ("lr", True),
        ("lr", torch.tensor([1e-3, 1e-3])),
        ("lr", torch.tensor(-1.0)),
        ("momentum", 1.0),
        ("momentum", -0.1),
        ("weight_decay", -0.1),
        ("weight_decay", math.nan),
        ("decay_to", "base"),
        ("sigma_floor", 0.0),
        ("exact_norm", 1),
        ("inner_iters", 0),
        ("inner_iters", 1.5),
        ("max_consecutive_skips", 0),
    ],
)
def test_bad_option_is_named(option: str, value: Any) -> None:
    """A bad option is a ConfigError that names it, in the constructor and in a group."""
    with pytest.raises(ConfigError, match=option):
        Riemannion(make_pairs(), **{option: value})
    optimizer = Riemannion(make_pairs(LAYERS[:1]))
    with pytest.raises(ConfigError, match=option):
        optimizer.add_param_group({"pairs": make_pairs(LAYERS[1:2], seed=5), option: value})


def broken_pair(**change: Any) -> Pair:
    pair = make_pair(Layer(6, 5, 2, 0.5), seed=1)
    for name, value in change.items():
        setattr(pair, name, value)
    return pair


@pytest.mark.parametrize(
    ("pair", "words"),
    [
        (broken_pair(rank=3), "rank 3"),
        (broken_pair(anchor_rank=1), "anchor 1"),
        (broken_pair(scaling=0.0), "scaling"),
        (broken_pair(scaling=math.nan), "scaling"),
        (broken_pair(left=nn.Parameter(torch.ones(6, 2))), "dtype"),
        (
            broken_pair(right=nn.Parameter(torch.ones(2, 5, dtype=F64), requires_grad=False)),
            "one factor of two",
        ),
        (broken_pair(left=nn.Parameter(torch.ones(6, dtype=F64))), "factors"),
        (
            broken_pair(
                left=nn.Parameter(noise(0, 6, 7)), right=nn.Parameter(noise(1, 7, 5)), rank=7
            ),
            r"allowed is 1\.\.5",
        ),
    ],
)
def test_pair_that_cannot_be_trained_is_named(pair: Pair, words: str) -> None:
    """The message holds the layer's name and the reason."""
    with pytest.raises(ConfigError, match=words) as error:
        Riemannion([pair])
    assert pair.name in str(error.value)


def test_pairs_are_needed_once_each() -> None:
    """No pairs, bare parameters, a pair given twice: ConfigError."""
    pairs = make_pairs()
    with pytest.raises(ConfigError, match="no LoRA pairs"):
        Riemannion([])
    with pytest.raises(ConfigError, match="'pairs'"):
        Riemannion([{"params": [pairs[0].left]}])
    with pytest.raises(ConfigError, match="given twice"):
        Riemannion([pairs[0], pairs[1], pairs[0]])
    optimizer = Riemannion(pairs[:1])
    with pytest.raises(ConfigError, match="given twice"):
        optimizer.add_param_group({"pairs": pairs[:1]})


def test_product_below_rank_names_the_remedy() -> None:
    """PEFT's default start, one factor zero, is off the manifold; nothing is written."""
    pairs = make_pairs()
    with torch.no_grad():
        pairs[2].left.zero_()
    optimizer = Riemannion(pairs, lr=0.02)
    Quadratic(pairs).backward(0)
    before = [p.detach().clone() for pair in pairs for p in (pair.left, pair.right)]
    with pytest.raises(ConfigError, match="locally_optimal_init") as error:
        optimizer.step()
    assert pairs[2].name in str(error.value)
    after = [p.detach() for pair in pairs for p in (pair.left, pair.right)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_non_finite_factors_are_named() -> None:
    """A damaged adapter is a NumericalError before anything is written."""
    pairs = make_pairs()
    optimizer = Riemannion(pairs, lr=0.02)
    Quadratic(pairs).backward(0)
    with torch.no_grad():
        pairs[1].right[0, 0] = math.nan
    with pytest.raises(NumericalError, match=pairs[1].name):
        optimizer.step()


def test_half_a_pair_is_refused() -> None:
    """One gradient of two leaves half of the tangent space unknown: ConfigError, nothing written."""
    for side in ("left", "right"):
        optimizer, pairs = stepped()
        Quadratic(pairs).backward(2)
        getattr(pairs[1], side).grad = None
        before = [p.detach().clone() for pair in pairs for p in (pair.left, pair.right)]
        with pytest.raises(ConfigError, match=f"{pairs[1].name}.*the {side} one has none"):
            optimizer.step()
        after = [p.detach() for pair in pairs for p in (pair.left, pair.right)]
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def test_fp16_is_warned_about(caplog: pytest.LogCaptureFixture) -> None:
    """fp16 factor gradients underflow at small singular values: said in the log."""
    with caplog.at_level(logging.WARNING, logger="dreamrie"):
        Riemannion(make_pairs(LAYERS[:1], dtype=torch.float16))
    assert "fp16" in caplog.text
