"""LoRA layers that take bf16 inputs as they are: the same bits as with PEFT's casts."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from dreamrie.lora import attach_lora
from dreamrie.lora.precision import keep_inputs_narrow


def adapted(kind: str) -> nn.Module:
    """One frozen bf16 layer with an adapter in fp32 that does something, the same at each call."""
    torch.manual_seed(0)
    layer: nn.Module = nn.Conv2d(8, 6, 3, padding=1) if kind == "conv" else nn.Linear(8, 6)
    model = nn.ModuleDict({"layer": layer}).bfloat16()
    for pair in attach_lora(model, 2, ["layer"], init="default", use_dora=kind == "dora"):
        pair.left.data.normal_(0.0, 0.3)
    return model


def passes(model: Any, x: Tensor) -> list[Tensor]:
    """Output, gradient of the input and of all that is trained, under autocast to bf16."""
    x = x.clone().requires_grad_(True)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", torch.bfloat16):
        y: Tensor = model["layer"](x)
    return [y.detach(), *torch.autograd.grad(y.float().square().sum(), [x, *trained])]


def inputs(kind: str, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """Inputs of the layer of `adapted`."""
    shape = (2, 8, 5, 5) if kind == "conv" else (3, 7, 8)
    return torch.randn(shape, generator=torch.Generator().manual_seed(1)).to(dtype)


def same_bits(found: list[Tensor], wanted: list[Tensor]) -> bool:
    """Whether all tensors are equal, types included."""
    pairs = list(zip(found, wanted, strict=True))
    return all(a.dtype == b.dtype and torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("kind", ["linear", "conv", "dora"])
def test_outputs_and_gradients_are_the_same_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    usual, narrow = adapted(kind), adapted(kind)
    keep_inputs_narrow(narrow)
    keep_inputs_narrow(narrow)
    x = inputs(kind, dtype)
    assert same_bits(passes(narrow, x), passes(usual, x))


def test_dora_without_the_cast_would_have_other_numbers() -> None:
    """PEFT takes the type of the input for the norms of the rows, so its layers are left alone."""
    usual: Any = adapted("dora")
    wrong: Any = adapted("dora")
    wrong["layer"].cast_input_dtype_enabled = False
    x = inputs("dora")
    assert not same_bits(passes(wrong, x), passes(usual, x))


@pytest.mark.parametrize("kind", ["linear", "conv"])
def test_no_wide_copy_of_the_input_is_made(kind: str) -> None:
    """What `lora_A` is given, with the change and without."""
    seen = []
    for narrow in (False, True):
        model: Any = adapted(kind)
        if narrow:
            keep_inputs_narrow(model)
        factor = model["layer"].lora_A["default"]
        factor.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
        passes(model, inputs(kind))
    assert seen == [torch.float32, torch.bfloat16]


@pytest.mark.parametrize("kind", ["linear", "conv", "dora"])
def test_without_autocast_the_input_is_cast_as_before(kind: str) -> None:
    usual: Any = adapted(kind)
    narrow: Any = adapted(kind)
    keep_inputs_narrow(narrow)
    x = inputs(kind)
    assert torch.equal(narrow["layer"](x), usual["layer"](x))


def test_a_copy_casts_for_itself() -> None:
    """A copy that asked the first model would see its DoRA, or none."""
    model: Any = adapted("linear")
    keep_inputs_narrow(model)
    twin: Any = copy.deepcopy(model)
    wanted = passes(twin, inputs("linear"))
    model["layer"].lora_variant["default"] = "DoRA, as far as the cast is concerned"
    assert same_bits(passes(twin, inputs("linear")), wanted)
    seen = []
    factor = twin["layer"].lora_A["default"]
    factor.register_forward_pre_hook(lambda _, given: seen.append(given[0].dtype))
    passes(twin, inputs("linear"))
    assert seen == [torch.bfloat16]


def test_factors_in_fp64_are_served_as_before() -> None:
    """Autocast leaves fp64 alone, so the input has to be cast for them."""
    usual, narrow = adapted("linear"), adapted("linear")
    keep_inputs_narrow(narrow)
    for model in (usual, narrow):
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.double()
    x = inputs("linear")
    assert same_bits(passes(narrow, x), passes(usual, x))


def test_a_pickled_model_comes_back_with_it() -> None:
    model: Any = adapted("linear")
    keep_inputs_narrow(model)
    twin = pickle.loads(pickle.dumps(model))
    assert same_bits(passes(twin, inputs("linear")), passes(model, inputs("linear")))
    assert twin["layer"]._cast_input_dtype.args == (twin["layer"],)
