"""Given factors go onto exactly the named layers, or nothing changes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from dreamrie.errors import ConfigError
from dreamrie.lora import LowRank, attach_lora, place
from dreamrie.lora.place import adapted_layer, factor_shapes, largest_rank, place_lora
from tests.small_adapters import TARGETS, Small, output, state_of


def changes_for(model: nn.Module, ranks: dict[str, int]) -> dict[str, LowRank]:
    generator = torch.Generator().manual_seed(4)
    found = {}
    for name, rank in ranks.items():
        left, right = factor_shapes(model, name, rank)
        found[name] = LowRank(
            torch.randn(left, generator=generator), torch.randn(right, generator=generator)
        )
    return found


def test_each_layer_has_its_rank_scaling_and_factors() -> None:
    """Scalings to the bit, though PEFT would divide alpha by the rank; in whatever order they are given."""
    ranks, scalings = (
        {"deep.narrow": 3, "mix": 5, "deep.cut": 2},
        {"mix": 0.1, "deep.cut": 1.7, "deep.narrow": 1 / 3},
    )
    model = Small()
    base = output(model)
    changes = changes_for(model, ranks)
    pairs = {pair.name: pair for pair in place_lora(model, changes, scalings, "mine")}
    assert list(pairs) == ["mix", "deep.cut", "deep.narrow"]
    for name, pair in pairs.items():
        assert (pair.rank, pair.anchor_rank, pair.scaling) == (ranks[name], 0, scalings[name])
        assert torch.equal(pair.left, changes[name].left)
        assert torch.equal(pair.right, changes[name].right)
    dense = Small()
    with torch.no_grad():
        for name, pair in pairs.items():
            weight: Any = dense.get_submodule(name).weight
            weight += pair.delta().reshape(weight.shape)
    assert float((output(model) - base).abs().max()) > 0.1
    assert torch.allclose(output(model), output(dense), rtol=1e-5, atol=1e-5)


def test_a_name_that_ends_another_or_looks_like_a_pattern() -> None:
    """`a` is the end of `b.a`, and a dot matches anything: exactly the named layers are adapted."""
    model = nn.ModuleDict(
        {"a": nn.Linear(3, 2), "b": nn.ModuleDict({"a": nn.Linear(3, 2)}), "bxa": nn.Linear(3, 2)}
    )
    for names in (["a"], ["b.a"]):
        fresh = nn.ModuleDict(dict(model.items()))
        place_lora(
            fresh, changes_for(fresh, dict.fromkeys(names, 1)), dict.fromkeys(names, 2.0), "x"
        )
        adapted = [name for name, module in fresh.named_modules() if hasattr(module, "lora_A")]
        assert adapted == names
        model = nn.ModuleDict(
            {
                "a": nn.Linear(3, 2),
                "b": nn.ModuleDict({"a": nn.Linear(3, 2)}),
                "bxa": nn.Linear(3, 2),
            }
        )


def test_a_failure_takes_everything_back() -> None:
    """A factor of another shape, found when the layers are adapted already; and a failure inside PEFT."""
    model = Small()
    changes = changes_for(model, dict.fromkeys(TARGETS, 2))
    scalings = dict.fromkeys(TARGETS, 1.0)
    before = state_of(model)
    wrong = {
        **changes,
        "deep.narrow": LowRank(changes["deep.narrow"].left[:2], changes["deep.narrow"].right),
    }
    with pytest.raises(ConfigError, match=r"shape \(2, 2\), not \(4, 2\)"):
        place_lora(model, wrong, scalings, "x")
    assert state_of(model) == before
    with (
        mock.patch.object(place, "lora_pairs", return_value=[]),
        pytest.raises(ConfigError, match="0 layers instead"),
    ):
        place_lora(model, changes, scalings, "x")
    assert state_of(model) == before
    assert len(place_lora(model, changes, scalings, "x")) == 3


def test_where_an_adapter_sits() -> None:
    model = Small()
    assert adapted_layer(model) is None
    attach_lora(model, 1, ["deep.narrow"])
    assert adapted_layer(model) == "Small"
    del model.peft_config
    assert adapted_layer(model) == "deep.narrow"


def test_shapes_of_factors() -> None:
    model = Small()
    assert factor_shapes(model, "mix", 3) == ((6, 3), (3, 7))
    assert factor_shapes(model, "deep.cut", 3) == ((5, 3, 1, 1), (3, 3, 3, 2))
    assert largest_rank(model) == 6
    assert largest_rank(nn.ReLU()) == 0
    for name in ("deep", "deep.norm"):
        with pytest.raises(ConfigError, match="needs Linear or Conv2d"):
            factor_shapes(model, name, 3)
