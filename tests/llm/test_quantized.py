"""A quantized base: trained on by its outputs alone, its bytes fingerprinted, its packages asked for by name."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch
from safetensors.torch import load

from dreamrie.adapter_reading import load_adapter
from dreamrie.config import LlmConfig, config_of
from dreamrie.errors import AdapterError, ConfigError
from dreamrie.llm import models, prepare
from dreamrie.llm import task as real
from dreamrie.llm.targets import target_modules
from dreamrie.loi import locally_optimal_init
from dreamrie.lora import attach_lora, fingerprint
from dreamrie.lora.fingerprint import base_fingerprint
from tests.llm import small
from tests.llm.packed import KINDS, pack_, unpack_
from tests.llm.test_task import logits_of
from tests.llm.test_train_llm import KilledError, leg, world

_load = prepare.load_language_model


@contextmanager
def loaded_as(change: Any) -> Iterator[list[Any]]:
    """The command loads its model and gets a changed one; those that it got."""
    found: list[Any] = []

    def load_changed(*args: Any, **options: Any) -> models.LanguageModel:
        language = _load(*args, **options)
        found.append(change(language.model))
        return language

    with mock.patch.object(prepare, "load_language_model", load_changed):
        yield found


def packed(kind: str) -> Any:
    return pack_(small.model(), kind)


def law_ll14_a_packed_base_trains_as_its_dense_twin(impl: Any, example: tuple[str, str]) -> None:
    """LOI by sketch or PEFT's start, steps, file, resumed run: to the bit as on the dense base with the same numbers.

    The base's weight raises when it is calculated with, and its bytes are those of before.
    """
    kind, optimizer = example
    plan = {"max_train_steps": 3, "validation_data": [], "target_modules": ["q_proj", "down_proj"]}
    with world() as values:
        values |= {**plan, "optimizer": optimizer}
        if optimizer == "adamw":
            del values["loi_batches"]
        with loaded_as(unpack_):
            wanted, dense = leg(impl, values)
        values["output_dir"] += "-packed"
        with loaded_as(lambda model: pack_(model, kind)) as bases:
            straight, records = leg(impl, values)
            values["output_dir"] += "-again"
            with pytest.raises(KilledError):
                leg(impl, values, kill_in=3)
            resumed, found = leg(impl, values, resume_from_checkpoint="latest")
    assert (resumed, found) == (straight, records)
    assert records == dense
    tensors, twins = load(straight), load(wanted)
    assert all(torch.equal(tensor, twins[name]) for name, tensor in tensors.items())
    assert set(tensors) == set(twins)
    assert len(bases) == 3
    assert {base_fingerprint(base) for base in bases} == {base_fingerprint(packed(kind))}


LL14 = [("bytes", "riemannion"), ("wrapped", "riemannion"), ("bytes", "adamw")]


@pytest.mark.parametrize("example", LL14, ids="-".join)
def test_ll14(example: tuple[str, str]) -> None:
    law_ll14_a_packed_base_trains_as_its_dense_twin(real, example)


def law_ll15_the_fingerprint_covers_bytes_and_scales(impl: Any, kind: str) -> None:
    """A byte or a scale of a packed weight that differs is another base; an adapter changes nothing."""
    wanted = impl.base_fingerprint(packed(kind))
    assert set(impl.rounded_fingerprints(packed(kind))) == {"exact"}
    assert wanted not in {
        impl.base_fingerprint(small.model()),
        impl.base_fingerprint(packed(KINDS[kind == KINDS[0]])),
    }

    def layer(model: Any) -> Any:
        return model.model.layers[1].mlp.up_proj

    def storage(model: Any, part: str) -> torch.Tensor:
        one = layer(model)
        if kind == "wrapped":
            return getattr(one.weight, part)
        return (
            one.scale
            if part == "scale"
            else torch.Tensor.as_subclass(one.weight.data, torch.Tensor)
        )

    for part in ("number", "scale"):
        other = packed(kind)
        with torch._C.DisableTorchFunctionSubclass():
            storage(other, part).view(torch.uint8).reshape(-1)[3] ^= 1
        assert impl.base_fingerprint(other) != wanted
        assert impl.rounded_fingerprints(other) != impl.rounded_fingerprints(packed(kind))
    adapted = packed(kind)
    attach_lora(adapted, 3, target_modules(adapted, ["attention", "mlp"]))
    assert impl.base_fingerprint(adapted) == wanted


@pytest.mark.parametrize("kind", KINDS)
def test_ll15(kind: str) -> None:
    law_ll15_the_fingerprint_covers_bytes_and_scales(fingerprint, kind)


@pytest.mark.parametrize("kind", KINDS)
def test_what_needs_the_numbers_of_the_base_is_refused(kind: str) -> None:
    """PEFT's starts by a decomposition, and LOI by the full gradient; the model is then as it was."""
    model = packed(kind)
    before = base_fingerprint(model)
    for init in ("pissa", "olora"):
        with pytest.raises(ConfigError, match=rf"the start '{init}' is computed from .* quantized"):
            attach_lora(model, 3, ["self_attn.q_proj"], init=init)
        assert not any("lora" in name for name, _ in model.named_modules())
    attach_lora(packed(kind), 4, ["self_attn.q_proj"], init="orthogonal")
    pairs = attach_lora(model, 3, ["self_attn.q_proj"])
    with pytest.raises(ConfigError, match="Use estimator='sketch'"):
        locally_optimal_init(
            model, pairs, lambda *_: torch.ones(()), [1], estimator="mean_gradient"
        )
    assert base_fingerprint(model) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_file_belongs_to_the_packed_base(kind: str, tmp_path: Path) -> None:
    """Back onto it the same function; onto the dense one only if asked for."""
    model = packed(kind)
    pairs = attach_lora(model, 3, target_modules(model, ["attention", "mlp"]))
    for pair in pairs:
        pair.left.data[:, :3] += 0.1
    settings: dict[str, Any] = {"batch_size": 1, "seed": 0, "max_length": 8}
    examples = [real.Encoded((5,), (6,), "a")]
    real.CausalLmTask(model, pairs, examples, **settings).save(tmp_path, {})
    again = packed(kind)
    base = logits_of(again)
    assert load_adapter(again, tmp_path).unchecked == ()
    size = float(logits_of(model).norm())
    assert float((base - logits_of(model)).norm()) > 0.05 * size
    assert float((logits_of(again) - logits_of(model)).norm()) < 1e-5 * size
    said = "were quantized or of mixed precision, the model's rounded to .* cannot be compared[.]"
    with pytest.raises(AdapterError, match=said):
        load_adapter(small.model(), tmp_path)
    assert len(load_adapter(small.model(), tmp_path, other_base=True).unchecked) == 1


def test_a_package_that_is_missing_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    find = importlib.util.find_spec
    absent = {"bitsandbytes", "torchao"}
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in absent else find(name)
    )
    for quantization, package in models.QUANTIZERS.items():
        with pytest.raises(ConfigError, match=f"{quantization} needs {package}, not installed"):
            models.load_language_model(str(tmp_path), quantization=quantization)


def test_a_gguf_file_is_not_packed_again(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    with (
        pytest.raises(ConfigError, match="does not quantize again"),
        mock.patch.object(importlib.util, "find_spec", lambda name: ModuleType(name)),
    ):
        models.load_language_model(str(tmp_path / "model.gguf"), quantization="nf4")


def test_what_transformers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The packing, the precision it is unpacked to, and where to; nothing moves the model afterwards."""
    small.save_model(tmp_path)
    torchao = ModuleType("torchao.quantization")
    torchao.Int8WeightOnlyConfig = lambda: "int8 weights"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "torchao.quantization", torchao)
    asked: list[dict[str, Any]] = []

    def loader(_: str, **options: Any) -> Any:
        asked.append(options)
        made = small.model()
        made.is_quantized = True
        made.to = None
        return made

    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: ModuleType(name))
    monkeypatch.setattr(models, "BitsAndBytesConfig", lambda **options: options)
    monkeypatch.setattr(models, "TorchAoConfig", lambda kind: {"torchao": kind})
    monkeypatch.setattr(models.AutoModelForCausalLM, "from_pretrained", loader)
    for quantization in models.QUANTIZERS:
        models.load_language_model(
            str(tmp_path), quantization=quantization, precision="bf16", device="cpu"
        )
    assert {str(options["device_map"]) for options in asked} == {"{'': 'cpu'}"}
    assert {options["dtype"] for options in asked} == {torch.bfloat16}
    assert [options["quantization_config"] for options in asked] == [
        {
            "load_in_4bit": True,
            "bnb_4bit_quant_type": "nf4",
            "bnb_4bit_compute_dtype": torch.bfloat16,
        },
        {"load_in_8bit": True},
        {"torchao": "int8 weights"},
    ]


def test_the_full_gradient_of_a_packed_base_is_refused_at_once() -> None:
    known = {"model": "m", "data": ["d"], "quantization": "nf4"}
    config_of(LlmConfig, known)
    config_of(LlmConfig, {**known, "optimizer": "adamw"})
    with pytest.raises(ConfigError, match="use --loi_estimator sketch"):
        config_of(LlmConfig, {**known, "loi_estimator": "mean_gradient"})


@pytest.mark.slow
@pytest.mark.parametrize("quantization", sorted(models.QUANTIZERS))
def test_real_packed_layers(quantization: str) -> None:
    """Where the package is installed: the command trains on them, resumes to the bit, and leaves every byte."""
    package = models.QUANTIZERS[quantization]
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed")
    with world() as values, loaded_as(lambda model: model) as bases:
        values |= {"quantization": quantization, "max_train_steps": 4, "learning_rate": 0.02}
        straight, records = leg(real, values)
        values["output_dir"] += "-again"
        with pytest.raises(KilledError):
            leg(real, values, kill_in=3)
        assert leg(real, values, resume_from_checkpoint="latest") == (straight, records)
        fresh = models.load_language_model(values["model"], quantization=quantization)
        assert len({base_fingerprint(base) for base in [*bases, fresh.model]}) == 1
        assert load_adapter(fresh.model, Path(values["output_dir"])).unchecked == ()
    losses = [row["loss"] for row in records if "loss" in row]
    assert losses[-1] < 0.8 * losses[0]
