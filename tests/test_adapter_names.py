"""A4, A6: files of other programs are read by the names that they use; nothing is guessed in silence."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers import StableDiffusionPipeline
from diffusers.utils import convert_state_dict_to_kohya
from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from dreamrie import adapter_reading, adapter_scaling
from dreamrie.adapter_names import arrange
from dreamrie.adapter_reading import LoadedAdapter, load_adapter
from dreamrie.errors import AdapterError
from tests.small_adapters import TARGETS, Small, output, read, save_small, state_of
from tests.small_models import small_components
from tests.test_adapter_file import relative, trained_plain, unet_output

NO_DIGEST = "whether the file is whole and unchanged (it has no digest of dreamrie)"
NO_BASE = "whether the model has the base weights that it was trained on (it names none)"
NO_ALPHA = "its strength (it states no alpha; alpha = rank was taken)"
REAL = SimpleNamespace(
    load_adapter=lambda *a, **k: adapter_reading.load_adapter(*a, **k),
    foreign_scalings=lambda *a, **k: adapter_scaling.foreign_scalings(*a, **k),
)


def flat(layer: str) -> str:
    return f"lora_unet_{layer.replace('.', '_')}"


SPELLINGS: dict[str, tuple[Callable[[str], str], Callable[[str], str]]] = {
    "diffusers": (lambda n: f"unet.{n}.lora_A.weight", lambda n: f"unet.{n}.lora_B.weight"),
    "no prefix": (lambda n: f"{n}.lora_A.weight", lambda n: f"{n}.lora_B.weight"),
    "PEFT": (
        lambda n: f"base_model.model.{n}.lora_A.weight",
        lambda n: f"base_model.model.{n}.lora_B.weight",
    ),
    "older diffusers": (
        lambda n: f"unet.{n}.lora.down.weight",
        lambda n: f"unet.{n}.lora.up.weight",
    ),
    "kohya": (lambda n: f"{flat(n)}.lora_down.weight", lambda n: f"{flat(n)}.lora_up.weight"),
}


def factors(rank: int = 2, seed: int = 5) -> dict[str, tuple[Tensor, Tensor]]:
    """Random `lora_A` and `lora_B` for each layer of `Small`."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"mix": ((7,), (6,)), "deep.cut": ((3, 3, 2), (5,)), "deep.narrow": ((8,), (4,))}
    found = {}
    for layer, (right, left) in shapes.items():
        ones = (1, 1) if len(right) == 3 else ()
        found[layer] = (
            torch.randn(rank, *right, generator=generator),
            torch.randn(*left, rank, *ones, generator=generator),
        )
    return found


def spelled(how: str, alpha: float | None = None, rank: int = 2) -> dict[str, Tensor]:
    """The tensors of a foreign file."""
    down, up = SPELLINGS[how]
    tensors = {}
    for layer, (right, left) in factors(rank).items():
        tensors[down(layer)], tensors[up(layer)] = right, left
        if alpha is not None:
            tensors[down(layer).split(".lora")[0] + ".alpha"] = torch.tensor(alpha)
    return tensors


def by_peft(alpha: float, rank: int = 2) -> Tensor:
    """Output of the model with these factors, as PEFT itself computes it."""
    model: Any = inject_adapter_in_model(
        LoraConfig(r=rank, lora_alpha=alpha, target_modules=TARGETS),
        Small(),  # type: ignore[arg-type]
    )
    with torch.no_grad():
        for layer, (right, left) in factors(rank).items():
            module = model.get_submodule(layer)
            module.lora_A["default"].weight.copy_(right)
            module.lora_B["default"].weight.copy_(left)
    return output(model)


def law_a4_foreign_spellings_are_read(impl: Any, how: str, folder: Path) -> None:
    """A4: with alpha or without, the output is PEFT's; what cannot be checked is returned and logged, and no more."""
    for alpha in (None, 3.0):
        path = folder / f"{how}-{alpha}.safetensors"
        save_file(spelled(how, alpha), path)
        model = Small()
        base = output(model)
        loaded: LoadedAdapter = impl.load_adapter(model, path)
        wanted = by_peft(2.0 if alpha is None else alpha)
        assert float((wanted - base).abs().max()) > 0.1
        assert float((wanted - by_peft(5.0)).abs().max()) > 0.1
        assert torch.allclose(output(model), wanted, rtol=1e-5, atol=1e-5)
        assert loaded.unchecked == (NO_DIGEST, NO_BASE, *((NO_ALPHA,) if alpha is None else ()))


@pytest.mark.parametrize("how", SPELLINGS)
def test_foreign_spellings_are_read(
    how: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.WARNING):
        law_a4_foreign_spellings_are_read(REAL, how, tmp_path)
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 2
    assert all(NO_DIGEST in text and NO_BASE in text for text in said)


@pytest.mark.parametrize("writer", ["diffusers", "kohya"])
def test_files_of_the_real_writers(writer: str, tmp_path: Path) -> None:
    """diffusers' own writer with its settings in the header, and its converter to kohya: same output on a U-Net."""
    parts, pairs = trained_plain("sd15")
    state = get_peft_model_state_dict(parts.unet)
    if writer == "diffusers":
        config = parts.unet.peft_config["default"].to_dict()
        StableDiffusionPipeline.save_lora_weights(
            tmp_path, unet_lora_layers=state, unet_lora_adapter_metadata=config
        )
        path = tmp_path / "pytorch_lora_weights.safetensors"
        assert load_file(path)
    else:
        path = tmp_path / "kohya.safetensors"
        named = {f"unet.{name}": tensor for name, tensor in state.items()}
        flat_state = convert_state_dict_to_kohya(named)
        # The converter writes alpha = rank whatever it was (ecosystem.md, D3).
        for name in flat_state:
            if name.endswith(".alpha"):
                flat_state[name] = torch.tensor(pairs[0].scaling * pairs[0].rank)
        save_file(flat_state, path)
    model = small_components("sd15").unet
    base, wanted = unet_output(model), unet_output(parts.unet)
    loaded = load_adapter(model, path)
    assert {pair.scaling for pair in loaded.pairs} == {3.0}
    assert relative(base, wanted) > 1e-3
    assert relative(unet_output(model), wanted) < 2e-6
    assert loaded.unchecked == (NO_DIGEST, NO_BASE)


def refuse(
    path: Path, tensors: dict[str, Tensor], said: str, metadata: dict[str, str] | None = None
) -> None:
    """The file is refused with these words; the model is as it was."""
    save_file(tensors, path, metadata=metadata)
    model = Small()
    before = state_of(model)
    with pytest.raises(AdapterError, match=said):
        load_adapter(model, path)
    assert state_of(model) == before


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_an_alpha_is_one_positive_number(value: float, tmp_path: Path) -> None:
    tensors = spelled("kohya", 3.0)
    name = f"{flat('mix')}.alpha"
    refuse(
        tmp_path / "x",
        {**tensors, name: torch.tensor(value)},
        f"{name} must be one positive number",
    )
    refuse(tmp_path / "x", {**tensors, name: torch.ones(2)}, r"got \[1.0, 1.0\]")


def test_alpha_for_all_layers_or_none(tmp_path: Path) -> None:
    tensors = spelled("kohya", 3.0)
    del tensors[f"{flat('mix')}.alpha"]
    refuse(tmp_path / "x", tensors, "1 of 3 layers have no alpha, such as mix")
    lone = {**spelled("kohya", 3.0)}
    for name in [name for name in lone if "mix.lora" in name]:
        del lone[name]
    refuse(tmp_path / "x", lone, "2 tensors are missing.*counterpart of lora_unet_mix.alpha")


SETTINGS: dict[str, tuple[Any, str]] = {
    "not JSON": ("{", "is not JSON"),
    "a list": ("[1]", "is not JSON"),
    "DoRA": ({"unet.r": 2, "unet.use_dora": True}, "asks for use_dora"),
    "root in words": ({"unet.r": 2, "unet.use_rslora": "yes"}, "use_rslora .* got 'yes'"),
    "alpha in a list": (
        {"unet.r": 2, "unet.alpha_pattern": [9]},
        "alpha_pattern .* positive numbers",
    ),
    "rank of another": ({"unet.r": 2, "unet.rank_pattern": {"mix": 9}}, r"r = 9 .*mix.*rank \[2\]"),
    "no expression": ({"unet.r": 2, "unet.alpha_pattern": {"(": 9}}, "no regular expression"),
    "another rank": ({"unet.r": 3, "unet.lora_alpha": 3}, r"r = 3 .*rank \[2\]"),
    "no rank": ({}, r"r = None and lora_alpha = None"),
    "alpha of zero": ({"unet.r": 2, "unet.lora_alpha": 0}, "lora_alpha = 0"),
    "alpha in words": ({"unet.r": 2, "unet.lora_alpha": "2"}, "lora_alpha = '2'"),
}


@pytest.mark.parametrize("row", SETTINGS)
def test_settings_in_the_header_are_kept_or_refused(row: str, tmp_path: Path) -> None:
    settings, said = SETTINGS[row]
    text = settings if isinstance(settings, str) else json.dumps(settings)
    refuse(tmp_path / "x", spelled("diffusers"), said, {"lora_adapter_metadata": text})


def test_settings_and_alphas_contradict_each_other(tmp_path: Path) -> None:
    settings = json.dumps({"unet.r": 2, "unet.lora_alpha": 4})
    refuse(
        tmp_path / "x",
        spelled("diffusers", 4.0),
        "which one counts",
        {"lora_adapter_metadata": settings},
    )


def test_kohya_names_that_two_layers_share_have_no_place(tmp_path: Path) -> None:
    """`a.b` and `a_b` are both a_b there; guessing would adapt the wrong one."""

    class Alike(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.ModuleDict({"b": nn.Linear(3, 2)})
            self.a_b = nn.Linear(3, 2)

    tensors = {
        "lora_unet_a_b.lora_down.weight": torch.ones(1, 3),
        "lora_unet_a_b.lora_up.weight": torch.ones(2, 1),
    }
    save_file(tensors, tmp_path / "x")
    with pytest.raises(AdapterError, match="2 of 2 tensors have no place in the model Alike"):
        load_adapter(Alike(), tmp_path / "x")
    save_file({n.replace("lora_unet_a_b", "a_b"): t for n, t in tensors.items()}, tmp_path / "x")
    assert [pair.name for pair in load_adapter(Alike(), tmp_path / "x").pairs] == ["a_b"]


def test_a_model_with_a_child_named_unet(tmp_path: Path) -> None:
    """The prefix is part of the name there."""
    whole = nn.ModuleDict({"unet": Small()})
    save_file(spelled("diffusers"), tmp_path / "x")
    assert {p.name for p in load_adapter(whole, tmp_path / "x").pairs} == {
        f"unet.{n}" for n in TARGETS
    }


def test_a_file_of_dreamrie_without_digest_is_foreign(tmp_path: Path) -> None:
    """As versions before format 2 wrote it: loaded, and what is missing is said."""
    path = save_small(tmp_path)
    wanted = Small()
    load_adapter(wanted, path)
    tensors, facts = read(path)
    old = {key: value for key, value in facts.items() if not key.startswith("dreamrie_")}
    save_file(tensors, path, metadata={**old, "dreamrie_version": "0.1.0"})
    model = Small()
    loaded = load_adapter(model, path)
    assert loaded.unchecked == (NO_DIGEST, NO_BASE, NO_ALPHA)
    assert loaded.facts["instance_prompt"] == facts["instance_prompt"]
    assert torch.equal(output(model), output(wanted))


def test_each_tensor_finds_its_layer(tmp_path: Path) -> None:
    """The table of names, as the reader uses it."""
    from dreamrie.adapter_container import open_container

    save_file(spelled("kohya", 3.0), tmp_path / "x")
    places = arrange(open_container(tmp_path / "x"), Small())
    assert places.factors["deep.cut"] == (
        f"{flat('deep.cut')}.lora_up.weight",
        f"{flat('deep.cut')}.lora_down.weight",
    )
    assert places.alphas == {name: f"{flat(name)}.alpha" for name in TARGETS}
