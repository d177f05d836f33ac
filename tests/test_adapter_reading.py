"""A6, A7: an adapter arrives whole, or is refused with a reason and the model stays as it was, to the bit.

`tests/fuzz/test_mutated_adapters.py` does the same with random damage.
"""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn

import dreamrie
from dreamrie import adapter_file, adapter_reading
from dreamrie.adapter_file import BASE_KEY, DIGEST_KEY, FORMAT_KEY, LAYERS_KEY
from dreamrie.adapter_reading import load_adapter
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.lora import attach_lora, lora_pairs, place
from tests.small_adapters import (
    FACTS,
    TARGETS,
    Small,
    output,
    rewrite,
    save_small,
    state_of,
    trained_small,
)

Change = Callable[[dict[str, Tensor], dict[str, str]], None]
REAL = SimpleNamespace(
    load_adapter=lambda *a, **k: adapter_reading.load_adapter(*a, **k),
    save_diffusers_lora=lambda *a, **k: adapter_file.save_diffusers_lora(*a, **k),
    content_digest=lambda *a, **k: adapter_file.content_digest(*a, **k),
)
"""Looked up at each call, so that a mutant of the module is seen."""
BUDGET = 2e-6


def refused(impl: Any, path: Path, said: str, model: nn.Module | None = None) -> None:
    """The file is refused with these words, and the model is as it was."""
    model = Small() if model is None else model
    before = state_of(model)
    with pytest.raises(AdapterError, match=said) as caught:
        impl.load_adapter(model, path)
    assert path.name in str(caught.value)
    assert state_of(model) == before


def factor(layer: str, part: str) -> str:
    return f"unet.{layer}.lora_{part}.weight"


# ---------------------------------------------------------------------------------------------------------- the rows


def half_gone(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    for name in [name for name in tensors if "lora_B" in name]:
        del tensors[name]


def layer_gone(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    del tensors[factor("mix", "A")], tensors[factor("mix", "B")]


def nothing_left(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors.clear()


def wrong_prefix(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    for name in list(tensors):
        tensors[name.replace("unet.", "transformer.")] = tensors.pop(name)


def extra_layer(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors[factor("more", "A")], tensors[factor("more", "B")] = torch.ones(2, 7), torch.ones(6, 2)


def extra_tensor(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors["unet.mix.lora_magnitude"] = torch.ones(3)


def extra_known_layer(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """A norm has no matrix form, though its name is known."""
    tensors[factor("deep.norm", "A")], tensors[factor("deep.norm", "B")] = (
        torch.ones(2, 5),
        torch.ones(5, 2),
    )


def text_encoder(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors["text_encoder.q_proj.lora_A.weight"] = torch.ones(2, 5)


def same_place_twice(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors["unet.mix.lora_down.weight"] = tensors[factor("mix", "A")].clone()


def narrower(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors[factor("mix", "B")] = tensors[factor("mix", "B")][:, :5]


def huge_rank(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """Zeros: no value changes, and a large model would need gigabytes."""
    name = factor("mix", "B")
    tensors[name] = torch.cat([tensors[name], torch.zeros(6, 1)], 1)
    name = factor("mix", "A")
    tensors[name] = torch.cat([tensors[name], torch.zeros(1, 7)], 0)


def flat_convolution(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    name = factor("deep.cut", "A")
    tensors[name] = tensors[name].flatten(1)


def no_axes(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors[factor("mix", "A")] = torch.tensor(1.0)


def nan(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors[factor("deep.narrow", "B")][1, 2] = math.nan


def infinity(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors[factor("deep.cut", "A")][1, 2, 0, 1] = -math.inf


STRUCTURE: dict[str, tuple[Change, str]] = {
    "half gone": (half_gone, "3 tensors are missing.*lora_A.*lora_B"),
    "empty": (nothing_left, "is empty"),
    "wrong prefix": (
        wrong_prefix,
        r"6 of 6 tensors have no place.*transformer\..*Expected are names such as unet",
    ),
    "extra layer": (extra_layer, r"2 of 8 tensors have no place.*unet\.more\.lora_A"),
    "extra tensor": (extra_tensor, "1 of 7 tensors have no place.*lora_magnitude"),
    "layer without a matrix": (extra_known_layer, "does not fit.*deep.norm.*BatchNorm2d"),
    "text encoder": (text_encoder, "1 of 7 tensors .* a text encoder, the first is text_encoder"),
    "one place twice": (same_place_twice, "names one place twice.*lora_down"),
    "wrong rank": (narrower, r"size mismatch.*mix\.lora_B.*\(6, 5\).*\(6, 6\) for rank 6"),
    "rank too large": (huge_rank, "layer mix has rank 7; allowed is 1 to 6"),
    "wrong shape": (flat_convolution, r"size mismatch.*\(6, 18\).*\(6, 3, 3, 2\)"),
    "a number for a matrix": (no_axes, r"size mismatch.*mix\.lora_A"),
    "NaN": (nan, r"not finite.*deep\.narrow\.lora_B"),
    "infinity": (infinity, r"not finite.*deep\.cut\.lora_A"),
}
"""Refused without any digest: for foreign files, and for files whose digest was made to fit."""


def law_a6_what_does_not_fit_is_refused(impl: Any, row: str) -> None:
    """6.1: missing, extra, misshapen or not finite is an error by name, though the digest fits or is absent."""
    change, said = STRUCTURE[row]
    for how in ({"digest": impl.content_digest}, {"foreign": True}):
        with tempfile.TemporaryDirectory() as folder:
            path = save_small(Path(folder), impl=impl)
            impl.load_adapter(Small(), path)
            refused(impl, rewrite(path, change, **how), said)


@pytest.mark.parametrize("row", STRUCTURE)
def test_what_does_not_fit_is_refused(row: str) -> None:
    law_a6_what_does_not_fit_is_refused(REAL, row)


def prompt_changed(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    facts["instance_prompt"] = "a sks dog"


def fact_added(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    facts["lora_alpha"] = "160"


def fact_gone(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    del facts["prediction_type"]


def fingerprint_gone(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    for key in [key for key in facts if key.startswith(BASE_KEY)]:
        del facts[key]


def one_bit(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    tensors[factor("mix", "A")].view(torch.int32)[2, 3] ^= 1


def names_swapped(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    """The convolution's factors are scaled; nothing about the shapes tells."""
    tensors[factor("deep.cut", "A")] *= 3
    tensors[factor("deep.cut", "B")] /= 3


def alpha_added(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    for layer in TARGETS:
        tensors[f"unet.{layer}.alpha"] = torch.tensor(60.0)


def half_precision(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    for name in tensors:
        tensors[name] = tensors[name].half()


def digest_changed(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
    facts[DIGEST_KEY] = facts[DIGEST_KEY][::-1]


CHANGES = (
    *(prompt_changed, fact_added, fact_gone, fingerprint_gone, one_bit, names_swapped, alpha_added),
    *(half_precision, digest_changed),
)


def law_a6_any_change_breaks_the_digest(impl: Any, change: Change) -> None:
    """6.1: alpha, any bit of a value, any fact of the header: the digest differs, and that is said."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder), impl=impl)
        impl.load_adapter(Small(), path)
        refused(impl, rewrite(path, change), "digest differs")


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_any_change_breaks_the_digest(change: Change) -> None:
    law_a6_any_change_breaks_the_digest(REAL, change)


@pytest.mark.parametrize("row", ["truncated", "zero bytes", "longer"])
def test_a_file_of_another_length_is_refused(row: str, tmp_path: Path) -> None:
    """6.1; more of it in `test_adapter_container.py`."""
    path = save_small(tmp_path)
    raw = path.read_bytes()
    path.write_bytes(
        {"truncated": raw[: len(raw) // 2], "zero bytes": b"", "longer": raw + b"\0"}[row]
    )
    refused(REAL, path, "cannot be read|is damaged")


def law_a6_lost_layers_are_named(impl: Any) -> None:
    """6.1: a file of dreamrie that lacks whole layers says which, though all that is left fits."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder), impl=impl)
        rewrite(path, layer_gone, digest=impl.content_digest)
        refused(impl, path, r"2 of 6 tensors are missing: mix\.lora_A, mix\.lora_B")


def test_lost_layers_are_named() -> None:
    law_a6_lost_layers_are_named(REAL)


def law_a6_another_base_is_refused(impl: Any) -> None:
    """6.1: same shapes, other weights, by one part in a thousand in one place; an override loads, and is logged."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder), impl=impl)
        for change in (
            lambda m: m.scale.data.mul_(1.01),
            lambda m: m.deep.norm.running_var.mul_(2),
        ):
            other = Small()
            change(other)
            refused(
                impl,
                path,
                "not those of the model: the fingerprint differs.*other_base=True",
                other,
            )
            loaded = impl.load_adapter(other, path, other_base=True)
            assert len(loaded.pairs) == 3
            assert "fingerprint differs" in loaded.unchecked[0]


def test_another_base_is_refused() -> None:
    law_a6_another_base_is_refused(REAL)


def law_a6_a_failure_inside_leaves_nothing(impl: Any) -> None:
    """A6: when PEFT has adapted the layers already and something fails then, all of it is taken back."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder), impl=impl)
        for error in (ConfigError("no"), RuntimeError("no memory"), ValueError("no")):
            with mock.patch.object(place, "lora_pairs", side_effect=error):
                refused(impl, path, "does not fit.*The model is as it was")


def test_a_failure_inside_leaves_nothing() -> None:
    law_a6_a_failure_inside_leaves_nothing(REAL)


def law_a7_saving_never_writes_into_the_old_file(impl: Any) -> None:
    """A7: whoever has the old file open keeps it; a model loaded from a path can be saved to it."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder), impl=impl)
        old = path.read_bytes()
        os.link(path, Path(folder) / "old")
        model = Small()
        pairs = impl.load_adapter(model, path).pairs
        before = output(model)
        with torch.no_grad():
            pairs[0].left *= 2
        after = output(model)
        assert not torch.allclose(before, after)
        impl.save_diffusers_lora(Path(folder), pairs, {}, base=model)
        assert torch.equal(output(model), after)
        assert (Path(folder) / "old").read_bytes() == old
        fresh = Small()
        impl.load_adapter(fresh, path)
        assert torch.allclose(output(fresh), after, rtol=1e-5, atol=1e-5)


def test_saving_never_writes_into_the_old_file() -> None:
    law_a7_saving_never_writes_into_the_old_file(REAL)


def law_a3_loaded_is_the_trained_model(impl: Any) -> None:
    """A3: every layer arrives with its change; facts come back; the caller's random stream is untouched."""
    with tempfile.TemporaryDirectory() as folder:
        path = save_small(Path(folder), impl=impl)
        model, wanted = Small(), output(trained_small()[0])
        base, stream = output(model), torch.get_rng_state()
        assert float((wanted - base).abs().max()) > 0.1
        loaded = impl.load_adapter(model, path, adapter_name="mine")
        assert torch.allclose(output(model), wanted, rtol=1e-5, atol=1e-5)
        assert torch.equal(torch.get_rng_state(), stream)
    assert loaded.unchecked == ()
    assert FACTS.items() <= loaded.facts.items()
    assert [pair.name for pair in loaded.pairs] == [p.name for p in lora_pairs(model, "mine")]
    assert {pair.name for pair in loaded.pairs} == set(TARGETS)
    trainable = {id(p) for p in model.parameters() if p.requires_grad}
    assert trainable == {id(f) for pair in loaded.pairs for f in (pair.left, pair.right)}


def test_loaded_is_the_trained_model() -> None:
    law_a3_loaded_is_the_trained_model(REAL)


def test_a_second_adapter_is_refused(tmp_path: Path) -> None:
    """On the same layers or on others, by PEFT's books or without them; the first one stays as it is."""
    path = save_small(tmp_path)
    for targets in (["mix"], TARGETS):
        model = Small()
        pairs = attach_lora(model, 1, targets, adapter_name="first")
        before = (
            [p.clone() for p in model.parameters()],
            [p.requires_grad for p in model.parameters()],
        )
        with pytest.raises(AdapterError, match="carries an adapter already"):
            load_adapter(model, path)
        del model.peft_config
        with pytest.raises(AdapterError, match=r"carries an adapter already \(at mix\); remove it"):
            load_adapter(model, path)
        assert [pair.name for pair in lora_pairs(model, "first")] == [pair.name for pair in pairs]
        after = list(model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(after, before[0], strict=True))
        assert [p.requires_grad for p in after] == before[1]
    wrapped = get_peft_model(Small(), LoraConfig(r=1, target_modules=["mix"]))
    with pytest.raises(AdapterError, match="PeftModel"):
        load_adapter(wrapped, path)


@pytest.mark.parametrize("key", [DIGEST_KEY, FORMAT_KEY, LAYERS_KEY])
def test_a_file_of_dreamrie_does_not_become_foreign_by_a_lost_line(
    key: str, tmp_path: Path
) -> None:
    """Removed or misspelt: what is left shows that a digest was there."""
    for misspelt in (False, True):

        def lose(tensors: dict[str, Tensor], facts: dict[str, str], again: bool = misspelt) -> None:
            text = facts.pop(key)
            if again:
                facts[f"{key}_"] = text

        refused(
            REAL,
            rewrite(save_small(tmp_path), lose),
            "is damaged.*(dreamrie_format|dreamrie_digest)",
        )


def test_a_file_of_a_newer_dreamrie_is_refused(tmp_path: Path) -> None:
    def newer(tensors: dict[str, Tensor], facts: dict[str, str]) -> None:
        facts[FORMAT_KEY] = "3"

    path = rewrite(save_small(tmp_path), newer, digest=adapter_file.content_digest)
    refused(REAL, path, "of format '3', and this dreamrie reads '2'")


def test_the_public_name() -> None:
    assert dreamrie.load_adapter is load_adapter
    assert "load_adapter" in dreamrie.__all__
