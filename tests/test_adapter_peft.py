"""A4: PEFT's folder, read by PEFT itself and by dreamrie, and folders that PEFT wrote, read by dreamrie."""

from __future__ import annotations

import json
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn

from dreamrie import adapter_container, adapter_peft, adapter_reading
from dreamrie.adapter_container import find_adapter, read_metadata
from dreamrie.adapter_file import base_facts, save_diffusers_lora
from dreamrie.adapter_peft import PEFT_FILE, PEFT_SETTINGS, peft_settings
from dreamrie.adapter_reading import load_adapter
from dreamrie.errors import AdapterError
from dreamrie.lora import LowRank
from tests.small_adapters import TARGETS, Small, output, split, state_of, trained_small
from tests.small_models import small_components
from tests.test_adapter_file import relative, trained, unet_output
from tests.test_adapter_names import NO_BASE, NO_DIGEST
from tests.test_adapter_universal import BUDGET, FACTS, error, halves, trained_convolutions

Settings = dict[str, Any]
REAL = SimpleNamespace(
    save_peft=lambda *a, **k: adapter_peft.save_peft(*a, **k),
    load_adapter=lambda *a, **k: adapter_reading.load_adapter(*a, **k),
)
"""Looked up at each call, so that a mutant of a module is seen."""


def small_changes() -> dict[str, LowRank]:
    """Anchored, of unequal ranks, linear layers and a convolution."""
    return {pair.name: halves(pair) for pair in trained_small()[1]}


def save_small_peft(folder: Path, impl: Any = adapter_peft, **options: Any) -> Path:
    """A folder of dreamrie that names its base."""
    facts = {**FACTS, **base_facts(Small())}
    path: Path = impl.save_peft(folder, small_changes(), facts, **options)
    return path


def edited(folder: Path, change: Callable[[Settings], None]) -> None:
    """The same folder with other settings."""
    file = folder / PEFT_SETTINGS
    settings = json.loads(file.read_text("utf-8"))
    change(settings)
    file.write_text(json.dumps(settings), "utf-8")


def refused(folder: Path, said: str, impl: Any = REAL) -> None:
    """The folder is refused with these words, and the model is as it was."""
    model = Small()
    before = state_of(model)
    with pytest.raises(AdapterError, match=said):
        impl.load_adapter(model, folder)
    assert state_of(model) == before


def law_a4_peft_reads_the_folder(impl: Any) -> None:
    """A4: from_pretrained and load_adapter give the trained model, for linear layers and convolutions."""
    for kind, build in (("sd2-eps", trained), ("sd15", trained_convolutions)):
        parts, pairs = build(kind)
        base, wanted = unet_output(small_components(kind).unet), unet_output(parts.unet)
        assert relative(base, wanted) > 1000 * BUDGET
        with tempfile.TemporaryDirectory() as folder:
            impl.save_peft(Path(folder), {pair.name: halves(pair) for pair in pairs}, FACTS)
            model: Any = PeftModel.from_pretrained(small_components(kind).unet, folder)
            assert relative(unet_output(model), wanted) < BUDGET, kind  # 7e-7
            other: Any = get_peft_model(
                small_components(kind).unet, LoraConfig(r=1, target_modules=["to_q"])
            )
            other.load_adapter(folder, "second")
            other.set_adapter("second")
            assert relative(unet_output(other), wanted) < BUDGET, kind


def law_a3_the_folder_comes_back(impl: Any) -> None:
    """A3: dreamrie reads the same change of every layer, and what the folder says about itself."""
    model, _ = trained_small()
    with tempfile.TemporaryDirectory() as folder:
        save_small_peft(Path(folder), impl)
        found = Small()
        loaded = impl.load_adapter(found, folder)
        assert loaded.unchecked == ()
        assert {key: loaded.facts[key] for key in FACTS} == FACTS
        assert relative(output(Small()), output(model)) > 1000 * BUDGET
        assert relative(output(found), output(model)) < BUDGET
        assert [pair.scaling for pair in loaded.pairs] == [1.0, 1.0, 1.0]


def law_a6_no_setting_can_change(impl: Any) -> None:
    """A6: lora_alpha 16 for 160, and whatever else stands in either file, is an AdapterError."""
    changes: list[Callable[[Settings], Any]] = [lambda s: s.update(lora_alpha=160)]
    changes += [lambda s: s.update(use_bias=False), lambda s: s.pop("revision"), dict.clear]
    changes += [
        lambda s, key=key: s.update({key: "x"})  # type: ignore[misc]
        for key in peft_settings([], 1, FACTS)
    ]
    with tempfile.TemporaryDirectory() as name:
        folder = save_small_peft(Path(name), impl)
        whole = (folder / PEFT_SETTINGS).read_bytes()
        edited(folder, lambda s: None)
        assert impl.load_adapter(Small(), folder).unchecked == ()  # laid out otherwise
        for change in changes:
            (folder / PEFT_SETTINGS).write_bytes(whole)
            edited(folder, change)
            refused(folder, "digest differs", impl)
        (folder / PEFT_SETTINGS).unlink()
        refused(folder, "adapter_config.json was written beside it and is missing", impl)
        (folder / PEFT_SETTINGS).write_bytes(whole)
        raw = (folder / PEFT_FILE).read_bytes()
        (folder / PEFT_FILE).write_bytes(raw[:-1] + bytes([raw[-1] ^ 1]))
        refused(folder, "digest differs", impl)


LAWS = (law_a4_peft_reads_the_folder, law_a3_the_folder_comes_back, law_a6_no_setting_can_change)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(REAL)


def test_what_the_folder_holds(tmp_path: Path) -> None:
    """One rank, alpha = r, the layers by their whole names; the same bytes from the same changes."""
    folder = save_small_peft(tmp_path / "a")
    settings = json.loads((folder / PEFT_SETTINGS).read_text("utf-8"))
    assert (settings["r"], settings["lora_alpha"]) == (6, 6)
    assert settings["base_model_name_or_path"] == FACTS["base_model"]
    assert settings["revision"] == FACTS["base_model_commit"]
    assert settings["target_modules"] == r"deep\.cut|deep\.narrow|mix"
    tensors = load_file(folder / PEFT_FILE)
    assert {t.shape[0] for n, t in tensors.items() if "lora_A" in n} == {6}
    assert set(tensors) == {
        f"base_model.model.{name}.lora_{part}.weight" for name in TARGETS for part in "AB"
    }
    facts = {**FACTS, **base_facts(Small())}
    backwards = dict(reversed(small_changes().items()))
    again = adapter_peft.save_peft(tmp_path / "b", backwards, read_metadata(folder) | facts)
    for name in (PEFT_FILE, PEFT_SETTINGS):
        assert (again / name).read_bytes() == (folder / name).read_bytes()


def test_only_the_named_layers_are_adapted(tmp_path: Path) -> None:
    """A list of names would also adapt whatever ends like one of them."""
    model = nn.ModuleDict({"mix": nn.Linear(3, 2), "deep": nn.ModuleDict({"mix": nn.Linear(3, 2)})})
    change = LowRank(torch.ones(2, 1), torch.ones(1, 3))
    adapter_peft.save_peft(tmp_path, {"mix": change}, {})
    adapted = PeftModel.from_pretrained(model, tmp_path)  # type: ignore[arg-type]
    named = {name for name, _ in adapted.named_parameters() if "lora_" in name}
    assert named == {f"base_model.model.mix.lora_{part}.default.weight" for part in "AB"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_balanced_first(dtype: torch.dtype, tmp_path: Path) -> None:
    folder = save_small_peft(tmp_path, dtype=dtype)
    tensors = load_file(folder / PEFT_FILE)
    for name, change in small_changes().items():
        parts = [tensors[f"base_model.model.{name}.lora_{part}.weight"] for part in "BA"]
        assert {part.dtype for part in parts} == {dtype}
        left, right = (part.double().flatten(1) for part in parts)
        wanted = change.left.flatten(1) @ change.right.flatten(1)
        assert error(left @ right, wanted) < {torch.float16: 1e-3, torch.bfloat16: 1e-2}[dtype]
    assert load_adapter(Small(), folder).unchecked == ()


def test_a_text_encoder_is_another_model(tmp_path: Path) -> None:
    change = {"text_encoder.text_model.x": LowRank(torch.ones(2, 1), torch.ones(1, 3))}
    with pytest.raises(AdapterError, match="a PEFT folder holds the adapter of one model"):
        adapter_peft.save_peft(tmp_path, change, {})
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("survivor", [True, False])
def test_a_failed_save_leaves_the_old_folder(
    survivor: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full at the second file: both are as before, or neither is there."""
    if survivor:
        save_small_peft(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}
    real = os.replace

    def full(source: Any, target: Any) -> None:
        if Path(target).name == PEFT_FILE:
            raise OSError(28, "No space left on device")
        real(source, target)

    monkeypatch.setattr("dreamrie.files.os.replace", full)
    with pytest.raises(AdapterError, match="No space left"):
        adapter_peft.save_peft(tmp_path, {"mix": small_changes()["mix"]}, {})
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_a_run_folder_stays_one(tmp_path: Path) -> None:
    """Where both kinds of files lie, the training's own is found."""
    model, pairs = trained_small()
    ours = save_diffusers_lora(tmp_path, pairs, FACTS, base=model)
    save_small_peft(tmp_path)
    assert find_adapter(tmp_path) == ours
    ours.unlink()
    assert find_adapter(tmp_path) == tmp_path / PEFT_FILE


# ------------------------------------------------------------------------------------------- folders of PEFT itself


def written_by_peft(folder: Path, **settings: Any) -> Tensor:
    """A folder as PEFT saves it, and the output of its model."""
    model: Any = get_peft_model(Small(), LoraConfig(target_modules=TARGETS, **settings))  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    model.save_pretrained(folder)
    return output(model)


def test_the_strength_of_a_folder_is_that_of_peft(tmp_path: Path) -> None:
    """alpha / r = 1.5 stands in the settings alone."""
    wanted = written_by_peft(tmp_path, r=2, lora_alpha=3)
    for path in (tmp_path, tmp_path / PEFT_FILE):
        model = Small()
        loaded = load_adapter(model, path)
        assert {pair.scaling for pair in loaded.pairs} == {1.5}
        assert relative(output(model), wanted) < BUDGET
        assert loaded.unchecked == (NO_DIGEST, NO_BASE)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"use_dora": True}, "asks for use_dora in its adapter_config.json"),
        ({"alpha_pattern": {"mix": -7}}, "alpha_pattern in its .* positive numbers"),
        ({"peft_type": "LOHA"}, "asks for peft_type = 'LOHA'"),
        ({"bias": "all"}, "asks for bias"),
        ({"init_lora_weights": "PiSSA_niter_4"}, "asks for init_lora_weights = 'PiSSA_niter_4'"),
        ({"r": 3}, r"r = 3 and lora_alpha = 3 in its adapter_config.json.*rank \[2\]"),
        ({"r": [2]}, r"states r = \[2\]"),
        ({"lora_alpha": None}, "lora_alpha = None"),
        ({"lora_alpha": 10**400}, "lora_alpha = 1000"),
        ({"lora_adapter_metadata": 1}, None),
    ],
)
def test_settings_that_are_more_than_plain_lora(
    settings: Settings, said: str | None, tmp_path: Path
) -> None:
    """What the factors alone would not reproduce is refused; an unknown word is not."""
    written_by_peft(tmp_path, r=2, lora_alpha=3)
    edited(tmp_path, lambda found: found.update(settings))
    if said is None:
        assert load_adapter(Small(), tmp_path).pairs[0].scaling == 1.5
    else:
        refused(tmp_path, said)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("", "cannot be read"),
        ("[1]", "it is no table"),
        ('{"r": 2, "r": 3}', "'r' stands twice"),
        ('{"lora_alpha": NaN}', "NaN in the header"),
        ("[" * 9000, "cannot be read"),
        (" " * 4_000_001, "it is too large"),
    ],
)
def test_settings_that_are_no_settings(text: str, said: str, tmp_path: Path) -> None:
    written_by_peft(tmp_path, r=2, lora_alpha=3)
    (tmp_path / PEFT_SETTINGS).write_text(text, "utf-8")
    refused(tmp_path, f"{re.escape(str(tmp_path / PEFT_SETTINGS))}.*{said}")


def test_settings_are_facts_of_the_file_they_lie_beside_alone(tmp_path: Path) -> None:
    """Another file in the folder is not read by PEFT's settings."""
    written_by_peft(tmp_path, r=2, lora_alpha=3)
    facts = adapter_container.open_container(tmp_path).facts
    assert json.loads(facts[PEFT_SETTINGS])["lora_alpha"] == 3
    other = tmp_path / "other.safetensors"
    other.write_bytes((tmp_path / PEFT_FILE).read_bytes())
    assert read_metadata(other) == split(other.read_bytes())[0]["__metadata__"]
    assert {pair.scaling for pair in load_adapter(Small(), other).pairs} == {1.0}
