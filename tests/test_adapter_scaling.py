"""Strengths that PEFT states in settings: each layer counts what PEFT itself lets it count."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor, nn

from dreamrie import adapter_open, adapter_reading
from dreamrie.errors import AdapterError
from tests.small_adapters import TARGETS, Small
from tests.test_adapter_file import relative
from tests.test_adapter_names import NO_ALPHA, factors

REAL = SimpleNamespace(
    open_adapter=lambda path: adapter_open.open_adapter(path),
    load_adapter=lambda *a, **k: adapter_reading.load_adapter(*a, **k),
)
# r is 2 and lora_alpha 3 where no pattern fits. The order of patterns counts, and is not that of the alphabet.
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "root": {"use_rslora": True},
    "ranks": {"rank_pattern": {"mix": 5, r"deep\.n.*": 3}},
    "alphas": {"alpha_pattern": {"narrow": 7, "deep.cut": 1}},
    "all": {"rank_pattern": {"mix": 5}, "alpha_pattern": {"^mix": 7}, "use_rslora": True},
    "order": {"alpha_pattern": {"mix": 7, ".*": 5, "deep.cut": 9}},
}
BUDGET = 1e-6


def by_peft(folder: Path, **settings: Any) -> dict[str, Tensor]:
    """PEFT writes a folder; the change of each layer as PEFT computes it after loading that folder."""
    config = LoraConfig(r=2, lora_alpha=3, target_modules=TARGETS, **settings)
    model: Any = get_peft_model(Small(), config)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    # PEFT writes patterns by the alphabet, people do not.
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text("utf-8")), **settings}), "utf-8")
    loaded: Any = PeftModel.from_pretrained(Small(), folder)  # type: ignore[arg-type]
    return {
        name: loaded.base_model.model.get_submodule(name).get_delta_weight("default").detach()
        for name in TARGETS
    }


def dense(left: Tensor, right: Tensor, scaling: float = 1.0) -> Tensor:
    return scaling * left.detach().double().flatten(1) @ right.detach().double().flatten(1)


def law_settings_of_peft_count_as_in_peft(impl: Any, case: str, folder: Path) -> None:
    """Ranks and alphas by layer, over r or its root: each layer's change is PEFT's, with a model or without."""
    wanted = by_peft(folder / case, **CASES[case])
    opened = impl.open_adapter(folder / case).changes
    pairs = {pair.name: pair for pair in impl.load_adapter(Small(), folder / case).pairs}
    assert set(opened) == set(pairs) == set(wanted)
    for name, delta in wanted.items():
        flat = delta.double().flatten(1)
        assert relative(dense(*opened[name]), flat) < BUDGET
        assert (
            relative(dense(pairs[name].left, pairs[name].right, pairs[name].scaling), flat) < BUDGET
        )


@pytest.mark.parametrize("case", CASES)
def test_settings_of_peft_count_as_in_peft(case: str, tmp_path: Path) -> None:
    law_settings_of_peft_count_as_in_peft(REAL, case, tmp_path)


@pytest.mark.parametrize("case", ["root", "alphas", "order"])
def test_these_settings_are_not_the_plain_ones(case: str, tmp_path: Path) -> None:
    """Control: with the same factors, PEFT's change of a layer is another one."""
    plain, other = by_peft(tmp_path / "p"), by_peft(tmp_path / "c", **CASES[case])
    assert relative(other["deep.narrow"], plain["deep.narrow"]) > 0.1


def tensors(prefix: str, layers: tuple[str, ...] = ("mix",)) -> dict[str, Tensor]:
    return {
        f"{prefix}{layer}.lora_{part}.weight": tensor
        for layer in layers
        for part, tensor in zip("AB", factors()[layer], strict=True)
    }


def test_settings_in_the_header_are_of_their_own_model(tmp_path: Path) -> None:
    """diffusers states U-Net and text encoder apart; a model without settings counts alpha = rank, and that is said."""
    text = "text_encoder.text_model.encoder.layers.0.mlp.fc1"
    named = {**tensors("unet."), f"{text}.lora_A.weight": torch.ones(2, 3)}
    named[f"{text}.lora_B.weight"] = torch.ones(4, 2)
    unet = {"unet.r": 2, "unet.lora_alpha": 3}
    pattern = {
        "text_encoder.r": 9,
        "text_encoder.rank_pattern": {"text_model.encoder.layers.0.mlp.fc1": 2},
    }
    both = {**unet, **pattern, "text_encoder.lora_alpha": 8}
    for settings, scaling, is_said in ((both, 4.0, False), (unet, 1.0, True)):
        save_file(named, tmp_path / "x", {"lora_adapter_metadata": json.dumps(settings)})
        found = adapter_open.open_adapter(tmp_path / "x")
        assert torch.equal(dense(*found.changes[text]), torch.full((4, 3), 2 * scaling).double())
        right, left = factors()["mix"]
        assert relative(dense(*found.changes["mix"]), dense(left, right, 1.5)) < BUDGET
        assert (NO_ALPHA in found.unchecked) == is_said


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"rank_pattern": {"mix": 3}},
            r"r = 3 and lora_alpha = 3 .* 1 layers such as mix.*rank \[2\]",
        ),
        ({"rank_pattern": {"mix": 0}}, "rank_pattern in its adapter_config.json must give"),
        ({"alpha_pattern": {"mix": "7"}}, "alpha_pattern in its adapter_config.json must give"),
        ({"alpha_pattern": ["mix"]}, "alpha_pattern in its adapter_config.json must give"),
        ({"alpha_pattern": {"(mix": 7}}, "no regular expression"),
        ({"use_rslora": 3}, "use_rslora in its adapter_config.json must be true or false"),
    ],
)
def test_settings_that_contradict_are_refused(
    settings: dict[str, Any], said: str, tmp_path: Path
) -> None:
    save_file(tensors("base_model.model."), tmp_path / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 3, **settings}
    (tmp_path / "adapter_config.json").write_text(json.dumps(known), "utf-8")
    for read in (
        adapter_open.open_adapter,
        lambda path: adapter_reading.load_adapter(Small(), path),
    ):
        with pytest.raises(AdapterError, match=said):
            read(tmp_path)


def test_patterns_are_matched_with_the_path_that_the_file_has(tmp_path: Path) -> None:
    """A text encoder's folder of transformers before 5.6 states `text_model`; the present layout has none."""
    layer = "text_model.encoder.layers.0.mlp.fc1"
    named = {
        f"base_model.model.{layer}.lora_{part}.weight": torch.ones(shape)
        for part, shape in (("A", (2, 3)), ("B", (4, 2)))
    }
    save_file(named, tmp_path / "adapter_model.safetensors")
    known = {"peft_type": "LORA", "r": 2, "lora_alpha": 2, "alpha_pattern": {f"^{layer}": 6}}
    (tmp_path / "adapter_config.json").write_text(json.dumps(known), "utf-8")

    class Level(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            inside = nn.ModuleDict({"mlp": nn.ModuleDict({"fc1": nn.Linear(3, 4)})})
            self.encoder = nn.ModuleDict({"layers": nn.ModuleList([inside])})

    pairs = adapter_reading.load_adapter(Level(), tmp_path).pairs
    assert [(pair.name, pair.scaling) for pair in pairs] == [("encoder.layers.0.mlp.fc1", 3.0)]
