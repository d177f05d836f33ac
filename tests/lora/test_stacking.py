"""Adapters beside each other: each is there completely or not at all, and acts only when it is asked."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from dreamrie.errors import ConfigError
from dreamrie.lora import LowRank, attach_lora, lora_pairs, stacking
from tests.small_adapters import TARGETS, Small, output, trained_small
from tests.strategies import noise


def changes(seed: int, rank: int, *without: str) -> dict[str, LowRank]:
    """Changes of the small model's layers; the rank of each is one more than that of the one before."""
    shapes = {"mix": ((6,), (7,)), "deep.narrow": ((4,), (8,)), "deep.cut": ((5,), (3, 3, 2))}
    found = {}
    for number, (name, (out, into)) in enumerate(shapes.items()):
        kernel, own = (1, 1) if len(into) > 1 else (), rank + number
        left, right = noise(seed, *out, own, *kernel), noise(seed + 9, own, *into)
        found[name] = LowRank(left.float(), right.float())
    return {name: change for name, change in found.items() if name not in without}


def acting(model: Any, *names: str) -> Tensor:
    """Output with some adapters."""
    for module in model.modules():
        if hasattr(module, "set_adapter"):
            module.set_adapter(list(names))
    return output(model)


def dense(*parts: dict[str, LowRank]) -> Tensor:
    """Output with the changes in the weights."""
    model = Small()
    for part in parts:
        for name, (left, right) in part.items():
            weight = model.get_submodule(name).weight
            weight.data += (left.flatten(1) @ right.flatten(1)).reshape(weight.shape)
    return output(model)


def law_adapters_rest_until_they_are_asked(impl: Any) -> None:
    """The base to the bit after each is put on, then any sum of them, then the base again, one after another."""
    model, base = Small(), output(Small())
    first, second = changes(1, 2), changes(2, 1, "mix")
    impl.stack_lora(model, first, "one")
    assert torch.equal(output(model), base)
    impl.stack_lora(model, second, "two")
    assert torch.equal(output(model), base)
    for names, parts in (
        (["one"], [first]),
        (["two"], [second]),
        (["one", "two"], [first, second]),
    ):
        wanted = dense(*parts)
        assert float((wanted - base).abs().max()) > 0.5
        assert torch.allclose(acting(model, *names), wanted, atol=1e-4)
    impl.rest_lora(model)
    assert torch.equal(output(model), base)
    acting(model, "one", "two")
    impl.unstack_lora(model, "one")
    assert torch.equal(output(model), base)
    assert torch.allclose(acting(model, "two"), dense(second), atol=1e-4)


def test_law() -> None:
    law_adapters_rest_until_they_are_asked(stacking)


def test_flags_and_random_numbers_are_left_alone() -> None:
    model = Small()
    model.get_submodule("mix").requires_grad_(False)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    state = torch.get_rng_state()
    stacking.stack_lora(model, changes(1, 2), "one")
    assert torch.equal(torch.get_rng_state(), state)
    pairs = {id(p) for pair in lora_pairs(model, "one") for p in (pair.left, pair.right)}
    ours = [p.requires_grad for p in model.parameters() if id(p) in pairs]
    assert ours == [False] * 6
    assert [p.requires_grad for p in model.parameters() if id(p) not in pairs] == flags


@pytest.mark.parametrize("fault", ["shape", "layer"])
def test_a_failure_leaves_the_other_adapters_and_nothing_of_its_own(fault: str) -> None:
    model, wrong = Small(), changes(2, 1)
    stacking.stack_lora(model, changes(1, 2), "one")
    if fault == "shape":
        wrong["deep.cut"] = LowRank(wrong["deep.cut"].left[:4], wrong["deep.cut"].right)
    else:
        wrong["deep.norm"] = wrong["mix"]
    with pytest.raises((ConfigError, ValueError)):
        stacking.stack_lora(model, wrong, "two")
    assert torch.equal(output(model), output(Small()))
    assert torch.allclose(acting(model, "one"), dense(changes(1, 2)), atol=1e-4)
    stacking.stack_lora(model, changes(2, 1), "two")
    assert len(lora_pairs(model, "two")) == 3


def test_an_adapter_in_training_is_set_aside_and_acts_again() -> None:
    """With its flags, though PEFT changes them."""
    model, pairs = trained_small()
    base, on = output(Small()), output(model)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    assert not torch.allclose(base, on, atol=1e-2)
    with stacking.aside(model):
        assert torch.equal(output(model), base)
        stacking.stack_lora(model, changes(1, 2), "one")
        assert torch.allclose(acting(model, "one"), dense(changes(1, 2)), atol=1e-4)
        stacking.unstack_lora(model, "one")
    assert torch.equal(output(model), on)
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert [pair.name for pair in lora_pairs(model)] == [pair.name for pair in pairs]


def test_a_second_adapter_is_no_surprise() -> None:
    """PEFT warns of it where nobody said that it is on purpose."""
    model = Small()
    attach_lora(model, 2, TARGETS)
    config = LoraConfig(r=1, target_modules=["mix"])
    with pytest.warns(UserWarning, match="multiple adapters"):
        inject_adapter_in_model(config, model, "loud")
    with stacking.several_on_purpose():
        inject_adapter_in_model(config, model, "quiet")  # a warning would be an error
    assert model.peft_config.keys() >= {"loud", "quiet"}
