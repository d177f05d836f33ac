"""One fingerprint for all loads of a file that can be told to be the same; another for other weights."""

from __future__ import annotations

import copy
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn

from dreamrie.diffusion.components import load_components
from dreamrie.lora import attach_lora, fingerprint
from dreamrie.lora.fingerprint import base_fingerprint, rounded_fingerprints
from tests.small_adapters import TARGETS, Small, train_by_hand
from tests.small_models import small_folder

HALF, BRAIN = torch.float16, torch.bfloat16


def law_a6_fingerprint_survives_the_precision(impl: Any) -> None:
    """A6: fp32, fp64, fp16 and bf16 loads of one file share a digest wherever a digest can be shared at all."""
    wide = impl.rounded_fingerprints(Small())
    assert set(wide) == {"float16", "bfloat16"}
    assert impl.rounded_fingerprints(Small().double()) == wide
    assert impl.rounded_fingerprints(Small().half()) == {"float16": wide["float16"]}
    assert impl.rounded_fingerprints(Small().bfloat16()) == {"bfloat16": wide["bfloat16"]}
    # A half-precision file loaded in fp32 is told by the digest of its own precision only.
    rounded = impl.rounded_fingerprints(Small().bfloat16().float())
    assert rounded["bfloat16"] == wide["bfloat16"]
    assert rounded["float16"] != wide["float16"]
    assert len({*wide.values()}) == 2


def law_a6_fingerprint_sees_other_weights(impl: Any) -> None:
    """A6: any weight or buffer changed by more than the rounding, renamed or reshaped; an adapter changes nothing."""
    wanted = impl.rounded_fingerprints(Small())
    model = Small()
    pairs = attach_lora(model, 2, TARGETS)
    train_by_hand(pairs)
    assert impl.rounded_fingerprints(model) == wanted
    for change in (
        lambda m: m.mix.weight.data[0, 0].mul_(1.01),
        lambda m: m.mix.bias.data[5].neg_(),
        lambda m: m.deep["norm"].running_mean[2].add_(1),
        lambda m: m.deep["norm"].num_batches_tracked.add_(1),
        lambda m: m.deep.update({"again": nn.Linear(1, 1)}),
        lambda m: setattr(m, "scale", nn.Parameter(m.scale.detach()[None])),
    ):
        other = Small()
        change(other)
        found = impl.rounded_fingerprints(other)
        assert set(found) == set(wanted)
        assert not set(found.values()) & set(wanted.values())


@pytest.mark.parametrize(
    "law", [law_a6_fingerprint_survives_the_precision, law_a6_fingerprint_sees_other_weights]
)
def test_law(law: Any) -> None:
    law(fingerprint)


def test_loads_of_one_folder_in_three_precisions() -> None:
    """diffusers' own rounding at load is the rounding of the fingerprint."""
    folder = small_folder("sd2-eps")
    wide = rounded_fingerprints(load_components(folder).unet)
    for dtype, name in ((HALF, "float16"), (BRAIN, "bfloat16")):
        unet = load_components(folder, dtype=dtype).unet
        assert unet.conv_in.weight.dtype == dtype
        assert rounded_fingerprints(unet) == {name: wide[name]}


def test_less_than_the_rounding_of_half_precision_is_not_seen() -> None:
    """Said in the docstring; `base_fingerprint` sees it."""
    model = Small()
    wanted, exact = rounded_fingerprints(model), base_fingerprint(model)
    with torch.no_grad():
        model.mix.weight[0, 0] *= 1 + 1e-6
    assert base_fingerprint(model) != exact
    assert rounded_fingerprints(model) == wanted


@pytest.mark.parametrize("other", [BRAIN, torch.float8_e4m3fn, torch.int8])
def test_mixed_and_quantized_models_have_the_exact_one(other: torch.dtype) -> None:
    model = Small().half()
    model.register_buffer("extra", torch.ones(3).to(other))
    assert rounded_fingerprints(model) == {"exact": base_fingerprint(model)}


def test_one_precision_beside_fp32_is_its_own() -> None:
    """As diffusers keeps some modules in fp32."""
    model = Small().half()
    model.deep.float()
    whole = rounded_fingerprints(Small())
    assert rounded_fingerprints(model) == {"float16": whole["float16"]}


def test_computed_once_until_a_tensor_changes() -> None:
    """A run saves often; a model that was written, moved or cast since is hashed again."""
    model: Any = Small()
    with mock.patch.object(fingerprint, "_rounded", wraps=fingerprint._rounded) as work:
        first = rounded_fingerprints(model)
        first["float16"] = "someone else's"
        wanted = rounded_fingerprints(model)
        assert wanted["float16"] != "someone else's"
        train_by_hand(attach_lora(model, 1, ["mix"]))
        assert rounded_fingerprints(model) == wanted
        assert work.call_count == 1
        assert rounded_fingerprints(copy.deepcopy(model)) == wanted
        assert work.call_count == 2
        with torch.no_grad():
            model.deep["narrow"].bias.add_(1)
        assert rounded_fingerprints(model) != wanted
        with torch.no_grad():
            model.deep["narrow"].bias.sub_(1)
        model.half()
        assert set(rounded_fingerprints(model)) == {"float16"}
        assert work.call_count == 4


def test_a_model_loaded_under_inference_mode() -> None:
    """Its tensors count no writes."""
    with torch.inference_mode():
        model = Small()
    assert rounded_fingerprints(model) == rounded_fingerprints(Small())
