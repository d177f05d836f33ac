"""Adapters as they are attached: names, copies, starts, and what cannot be adapted."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

from dreamrie.errors import ConfigError
from dreamrie.lora import attach_lora, lora_pairs
from dreamrie.lora.inits import stiefel
from tests.margins import within
from tests.reference import nets
from tests.small_models import small_unet
from tests.strategies import noise


@pytest.mark.filterwarnings("ignore:Already found a `peft_config`:UserWarning")
def test_two_adapters_need_a_name() -> None:
    model = nets.net()
    for name, layer in (("one", "first"), ("two", "second")):
        inject_adapter_in_model(LoraConfig(r=2, target_modules=[layer]), model, name)
    with pytest.raises(ConfigError, match=r"several adapters \['one', 'two'\]"):
        lora_pairs(model)
    assert [pair.name for pair in lora_pairs(model, "two")] == ["second"]
    with pytest.raises(ConfigError, match="no adapter named 'three'"):
        lora_pairs(model, "three")


def test_copies_and_pickles_stay_anchored() -> None:
    model = nets.net()
    pairs = attach_lora(model, 2, nets.TARGETS)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        again = lora_pairs(twin)
        assert [pair.anchor_rank for pair in again] == [2, 2, 2]
        assert torch.equal(again[0].left, pairs[0].left)
        assert again[0].left is not pairs[0].left


def _unet() -> nn.Module:
    return small_unet("sd2-eps")


@pytest.mark.parametrize("make", [nets.net, _unet], ids=["plain", "diffusers"])
def test_a_model_is_adapted_completely_or_not_at_all(
    make: Callable[[], nn.Module], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A start that fails at the second layer leaves modules, gradient flags and PEFT's books as they were."""
    model = make()
    targets = nets.TARGETS if make is nets.net else ["to_q", "to_k"]
    next(model.parameters()).requires_grad_(False)
    before = {name: id(module) for name, module in model.named_modules()}
    flags = [parameter.requires_grad for parameter in model.parameters()]
    real, calls = stiefel.write_point, []

    def fail_at_the_second(*arguments: Any) -> None:
        calls.append(arguments)
        if len(calls) == 2:
            raise torch.linalg.LinAlgError("no start")
        real(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(stiefel, "write_point", fail_at_the_second)
        with pytest.raises(torch.linalg.LinAlgError, match="no start"):
            attach_lora(model, 2, targets)
    assert len(calls) == 2
    assert {name: id(module) for name, module in model.named_modules()} == before
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    assert not hasattr(model, "peft_config")
    assert len(attach_lora(model, 2, targets)) > 2


def test_starts_are_reproducible_and_differ_between_layers() -> None:
    for init in ("orthonormal", "gaussian", "default", "orthogonal", "pissa_niter_4"):
        made = []
        for seed in (1, 1, 2):
            torch.manual_seed(100 * len(made))
            state = torch.get_rng_state()
            generator = torch.Generator().manual_seed(seed)
            model = nn.ModuleDict({"a": nn.Linear(9, 8), "b": nn.Linear(9, 8)}).double()
            model["b"].weight.data.copy_(model["a"].weight)
            model["a"].weight.data.copy_(noise(0, 8, 9))
            model["b"].weight.data.copy_(noise(0, 8, 9))
            state = torch.get_rng_state()
            pairs = attach_lora(model, 2, ["a", "b"], init=init, generator=generator)
            assert torch.equal(torch.get_rng_state(), state), init
            made.append([pair.right.detach().clone() for pair in pairs])
        assert torch.equal(made[0][0], made[1][0]), init
        if init != "pissa_niter_4":
            assert not torch.equal(made[0][0], made[2][0]), init
            assert not torch.equal(made[0][0], made[0][1]), init


def test_pissa_start_is_the_leading_part_of_the_weight() -> None:
    model = nets.net()
    weight = model.first.weight.detach().clone()
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    pair = attach_lora(model, 3, ["first"], init="pissa")[0]
    point = pair.point()
    truth = (u[:, :3] * s[:3]) @ vh[:3]
    # PEFT decomposes in fp32.
    within("pissa start", nets.relative((point.u * point.s) @ point.v.T, truth), 1e-5)
    assert torch.equal(pair.base_weight, weight)


def test_orthonormal_start_has_the_asked_size() -> None:
    pairs = attach_lora(nets.net(), 4, ["first"])
    within("default alpha", (pairs[0].point().s - 0.05).abs().max(), 1e-14)
    pairs = attach_lora(nets.net(), 4, ["first"], alpha=-0.3)
    within("asked alpha", (pairs[0].point().s - 0.3).abs().max(), 1e-14)


def test_without_anchor_the_function_moves_and_is_said_to(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model = nets.net().eval()
    before = model(nets.batches(1)[0][0]).detach()
    pairs = attach_lora(model, 2, nets.TARGETS, anchored=False)
    assert [pair.anchor_rank for pair in pairs] == [0, 0, 0]
    assert [pair.left.shape[1] for pair in pairs] == [2, 2, 2]
    assert not torch.equal(model(nets.batches(1)[0][0]).detach(), before)
    assert "changes at step 0" in caplog.text
    assert pairs[0].point().s.shape == (2,)


# -------------------------------------------------------------------------------------------------------- errors


def injected(**options: Any) -> nn.Module:
    model = nn.ModuleDict(
        {"word": nn.Embedding(11, 8), "mix": nn.Linear(8, 6), "group": nn.Conv2d(4, 6, 3, groups=2)}
    )
    inject_adapter_in_model(LoraConfig(**{"r": 2, "target_modules": ["mix"], **options}), model)
    return model


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, r"layer 'mix'.*DoRA.*use_dora=False"),
        ({"target_modules": ["word"]}, r"layer 'word'.*Embedding.*Linear and Conv2d"),
        ({"target_modules": ["group"]}, r"layer 'group'.*grouped convolution"),
        ({"lora_bias": True}, r"layer 'mix'.*bias.*lora_bias=False"),
        ({"lora_alpha": 0}, r"layer 'mix'.*scaling must be positive.*lora_alpha"),
    ],
)
@pytest.mark.filterwarnings("ignore:LoRA adapter added to ConvNd layer:UserWarning")
def test_what_has_no_matrix_form_is_named_with_a_remedy(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        lora_pairs(injected(**options))


def test_a_merged_adapter_is_named() -> None:
    model: Any = injected()
    model["mix"].merge()
    with pytest.raises(ConfigError, match=r"layer 'mix'.*merged.*Unmerge"):
        lora_pairs(model)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "rank must be a whole number"),
        ({"rank": True}, "rank must be a whole number"),
        ({"rank": 2.0}, "rank must be a whole number"),
        ({"dropout": 1.0}, r"dropout must lie in \[0, 1\)"),
        ({"alpha": 0.0}, "alpha must be finite and not zero"),
        ({"alpha": math.inf}, "alpha must be finite"),
        ({"alpha": 0.1, "init": "pissa"}, "'pissa' has its own"),
        ({"init": "eva"}, r"'eva' is computed from batches.*init='default'.*start_pairs\('eva'"),
        ({"init": "corda"}, r"'corda' is computed from batches.*init='orthonormal'"),
        ({"init": "pisa"}, "'pisa' is not supported here; allowed: loi, orthonormal"),
        ({"init": "default", "anchored": True}, "needs and allows no anchor"),
        ({"init": "olora", "anchored": False}, "never written"),
        ({"init": "orthogonal", "rank": 3}, "two halves; 3 is odd"),
    ],
)
def test_bad_settings_are_named(options: dict[str, Any], message: str) -> None:
    model = nets.net()
    with pytest.raises(ConfigError, match=message):
        attach_lora(model, **{"rank": 2, "target_modules": ["first"], **options})
    assert not any("lora" in name for name, _ in model.named_parameters())


def test_a_layer_of_one_row_cannot_hold_point_and_anchor() -> None:
    model = nn.ModuleDict({"score": nn.Linear(8, 1)})
    with pytest.raises(ConfigError, match=r"layer 'score': its weight is 1 x 8.*at least 2"):
        attach_lora(model, 1, ["score"])
    assert attach_lora(model, 1, ["score"], init="default")[0].rank == 1
