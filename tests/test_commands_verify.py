"""`verify`: a loader that puts something else on the base is caught, and the verdict says no more than was checked."""

from __future__ import annotations

import functools
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from diffusers import StableDiffusionPipeline

from dreamrie import __main__ as command
from dreamrie.adapter_file import DIFFUSERS_FILE, save_diffusers_lora
from dreamrie.adapter_open import open_adapter
from dreamrie.adapter_peft import save_peft
from dreamrie.adapter_universal import save_universal
from dreamrie.diffusion import verifying
from dreamrie.lora import LoraPair
from tests.small_models import make_small_pipeline, small_components, small_folder
from tests.test_adapter_file import trained

pytestmark = pytest.mark.end_to_end

STEPS = 2


@functools.cache
def saved(folder: Path) -> Path:
    """Folder of an adapter that names its base, as a training leaves it."""
    parts, pairs = trained("sd2-eps")
    facts = {"base_model": str(small_folder("sd2-eps").resolve()), "instance_prompt": "a sks dog"}
    save_diffusers_lora(folder, pairs, facts, base=parts.unet)
    return folder


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return saved(tmp_path_factory.mktemp("adapter"))


_GOOD_LOAD = StableDiffusionPipeline.load_lora_weights


def loader_that(change: Callable[[list[LoraPair]], None]) -> Any:
    """Diffusers' loader with a fault of its own."""

    def load(self: Any, *words: Any, **options: Any) -> None:
        _GOOD_LOAD(self, *words, **options)
        with torch.no_grad():
            change(verifying.lora_pairs(self.unet, options["adapter_name"]))

    return mock.patch.object(StableDiffusionPipeline, "load_lora_weights", load)


def a_layer_off(pairs: list[LoraPair]) -> None:
    pairs[3].left.zero_()


def a_layer_turned(pairs: list[LoraPair]) -> None:
    pairs[2].left.copy_(pairs[2].left.flip(0))


def a_little_stronger(pairs: list[LoraPair]) -> None:
    pairs[-1].left.mul_(1.001)


def all_off(pairs: list[LoraPair]) -> None:
    for pair in pairs:
        pair.left.zero_()


def law_another_change_is_not_verified(impl: Any, folder: Path) -> None:
    """A loader that loses, turns or scales the change of one layer is caught, and the layer named."""
    assert impl.verify(folder, steps=STEPS).problems == ()
    for fault, number in ((a_layer_off, 3), (a_layer_turned, 2), (a_little_stronger, -1)):
        names: list[str] = []

        def named(
            pairs: list[LoraPair], fault: Any = fault, number: int = number, names: Any = names
        ) -> None:
            fault(pairs)
            names.append(pairs[number].name)

        with loader_that(named):
            found = impl.verify(folder, steps=STEPS)
        assert any(names[0] in text for text in found.problems), fault.__name__
        assert found.worst_distance is not None
        assert found.worst_distance > 5e-4


def only(found: Any) -> str:
    """The one problem."""
    assert len(found.problems) == 1
    return str(found.problems[0])


def law_lost_layers_are_no_equality(impl: Any) -> None:
    """A layer that only one way adapts is a problem, whichever way that is; equal changes are none."""
    changes = {
        layer: verifying.LowRank(torch.randn(5, 2).double(), torch.randn(2, 4).double())
        for layer in ("a", "b")
    }
    known = verifying.Verification(Path("x"), "base", "diffusers", "p", 2, (), ())
    assert impl.judged(known, impl.compared(changes, changes), 0, 9).problems == ()
    less = {"a": changes["a"]}
    for one, other in ((changes, less), (less, changes)):
        problem = only(impl.judged(known, impl.compared(one, other), 0, 9))
        assert "1 of 2 layers" in problem
        assert problem.endswith("b")
    assert impl.judged(known, {"a": float("nan")}, 0, 9).problems


def law_pictures_decide_too(impl: Any) -> None:
    """Pictures apart by more than one grey level are a problem, and so are those of the bare base."""
    known = verifying.Verification(Path("x"), "base", "diffusers", "p", 1, (), ())
    same = {"a": 0.0}
    assert impl.judged(known, same, 1, 2).problems == ()
    problem = only(impl.judged(known, same, 2, 9))
    assert "2 grey levels" in problem
    for from_base in (0, 1):
        problem = only(impl.judged(known, same, 0, from_base))
        assert "base model" in problem


@pytest.mark.parametrize("law", [law_lost_layers_are_no_equality, law_pictures_decide_too])
def test_law(law: Any) -> None:
    law(verifying)


def test_another_change(adapter: Path) -> None:
    law_another_change_is_not_verified(verifying, adapter)


@pytest.mark.parametrize("form", ["diffusers", "universal", "peft"])
def test_every_format_is_verified_by_its_public_loader(
    form: str, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    opened, place = open_adapter(adapter), tmp_path / "found.json"
    given = {"diffusers": adapter, "universal": tmp_path / "u.safetensors", "peft": tmp_path / "p"}
    if form != "diffusers":
        writer = {"universal": save_universal, "peft": save_peft}[form]
        writer(given[form], opened.changes, opened.facts)
    words = ["verify", str(given[form]), "--steps", str(STEPS), "--json", str(place)]
    assert command.main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("verified: ")
    assert "digest and layers are those that were written" in out
    assert "whether the pictures are good" in out
    record = json.loads(place.read_text("utf-8"))
    assert record["verified"] is True
    assert record["loader"] == ("PEFT" if form == "peft" else "diffusers")
    assert (record["layers"], record["unchecked"]) == (len(opened.changes), [])
    assert record["worst_distance"] < 1e-6
    assert record["grey_between"] <= 1
    assert record["grey_from_base"] > 8
    assert record["prompt"] == "a sks dog"


def test_a_loader_that_does_nothing_is_caught_by_the_pictures_as_well(adapter: Path) -> None:
    with loader_that(all_off):
        found = verifying.verify(adapter, steps=STEPS)
    assert found.grey_from_base == 0
    assert (found.grey_between or 0) > 8
    assert len(found.problems) == 3


def test_a_loader_that_fails_is_named(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fail(*words: Any, **options: Any) -> None:
        raise RuntimeError("size mismatch")

    with mock.patch.object(StableDiffusionPipeline, "load_lora_weights", fail):
        assert command.main(["verify", str(adapter), "--steps", str(STEPS)]) == 1
    out = " ".join(capsys.readouterr().out.split())
    assert out.startswith("NOT verified: ")
    assert "diffusers does not load it: size mismatch" in out
    assert "nothing was compared with diffusers" in out


def test_a_damaged_file_and_another_base_are_not_verified(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 1: the question was a good one, and the answer is no."""
    raw = bytearray((adapter / DIFFUSERS_FILE).read_bytes())
    raw[-2] ^= 1
    (tmp_path / "d.safetensors").write_bytes(raw)
    (tmp_path / "cut.safetensors").write_bytes(raw[:50])
    base = str(small_folder("sd2-eps"))
    for name, word in (("d", "digest differs"), ("cut", "damaged")):
        words = ["verify", str(tmp_path / f"{name}.safetensors"), "--base", base, "--steps", "1"]
        assert command.main(words) == 1
        assert word in " ".join(capsys.readouterr().out.split())
    other = str(make_small_pipeline("sd2-eps", tmp_path / "other", seed=1))
    assert command.main(["verify", str(adapter), "--base", other, "--steps", "1"]) == 1
    assert "fingerprint differs" in " ".join(capsys.readouterr().out.split())


def test_a_base_that_predicts_something_else_is_no_base(adapter: Path, tmp_path: Path) -> None:
    """The same weights under a scheduler that reads them otherwise: noise, whichever loader."""
    opened = open_adapter(adapter)
    facts = {**opened.facts, "prediction_type": "epsilon"}
    save_universal(tmp_path / "u.safetensors", opened.changes, facts)
    right, wrong = str(small_folder("sd2-eps")), str(small_folder("sd2-v"))
    assert verifying.verify(tmp_path / "u.safetensors", right, steps=STEPS).problems == ()
    (problem,) = verifying.verify(tmp_path / "u.safetensors", wrong, steps=STEPS).problems
    assert "epsilon" in problem
    assert "v_prediction" in problem


def test_what_cannot_be_asked_is_refused(
    adapter: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_adapter(adapter)
    save_universal(tmp_path / "n.safetensors", opened.changes, {})
    for words, said in (
        ([str(adapter), "--steps", "0"], "--steps must be at least 1"),
        ([str(adapter), "--base", str(tmp_path / "gone")], "--base"),
        ([str(adapter), "--prompt", " "], "--prompt is empty"),
        ([str(tmp_path / "gone")], "there is no adapter"),
        ([str(tmp_path / "n.safetensors")], "--base MODEL"),
        ([str(adapter), "--json", str(tmp_path / "no" / "x.json")], "--json"),
    ):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "dreamrie"):
            assert command.main(["verify", *words]) == 2, words
        assert said in caplog.text, words
        assert "--pretrained" not in caplog.text


def test_what_a_file_does_not_say_is_said(
    adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file without fingerprint is verified on the base that was given, and the verdict tells what is not known."""
    opened = open_adapter(adapter)
    facts = {k: v for k, v in opened.facts.items() if not k.startswith("dreamrie_base")}
    save_universal(tmp_path / "u.safetensors", opened.changes, facts)
    base = str(small_folder("sd2-eps"))
    words = ["verify", str(tmp_path / "u.safetensors"), "--base", base, "--steps", str(STEPS)]
    assert command.main(words) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "not known whether the model has the base weights that it was trained on" in out
    assert "base weights those of the training" not in out


def test_the_embedded_model_is_found_by_its_name() -> None:
    source = verifying.load_base("dreamrie/tiny-sd").source
    assert source.requested == ""
    assert verifying.base_named_by(Path("x"), {"base_model": "a/b", "base_model_commit": "c"}) == (
        "a/b",
        "c",
    )
    assert small_components("sd2-eps").source.resolved != source.resolved
