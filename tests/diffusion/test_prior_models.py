"""D6: class pictures belong to the weights that drew them, and come back to the byte."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from dreamrie.config import TrainConfig, parse_config
from dreamrie.diffusion import prepare, prior
from dreamrie.diffusion.components import Components, load_components
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS, sample
from dreamrie.lora import attach_lora
from tests.diffusion.test_prior import Counting
from tests.small_models import make_small_pipeline, small_components, write_pictures
from tests.small_settings import NEEDED


def another(part: str) -> Components:
    """The small model with one number of one part changed, at the same place."""
    parts = small_components("tiny-vae")
    if part == "schedule":
        changed = {**parts.scheduler_config, "beta_end": 0.03}
        return dataclasses.replace(parts, scheduler_config=changed)
    module = getattr(parts, part)
    with torch.no_grad():
        list(module.parameters())[-1].view(-1)[0].add_(1e-3)
    return parts


def law_another_model_never_reuses(impl: Any) -> None:
    """A changed weight of any part, or another schedule, at the same path means new pictures in a new folder."""
    ensure = Counting(impl)
    with tempfile.TemporaryDirectory() as place:
        first, _ = ensure(Path(place), 1)
        before = first[0].read_bytes()
        for part in ("unet", "text_encoder", "vae", "schedule"):
            parts = another(part)
            assert parts.source == small_components("tiny-vae").source
            paths, made = ensure(Path(place), 1, parts=parts)
            assert made == 1, part
            assert paths != first
        assert first[0].read_bytes() == before
        assert ensure(Path(place), 1) == (first, 0)


def test_law() -> None:
    law_another_model_never_reuses(prior)


def test_a_folder_that_is_trained_further_gets_new_class_pictures(tmp_path: Path) -> None:
    """The same path on the disk, saved over with other weights, and back again."""
    ensure, found = Counting(prior), []
    for seed in (0, 1, 0):
        model = load_components(make_small_pipeline("tiny-vae", tmp_path / "model", seed=seed))
        found.append(ensure(tmp_path / "class", 2, parts=model))
    assert [made for _, made in found] == [2, 2, 0]
    assert found[0][0] == found[2][0] != found[1][0]
    assert found[0][0][0].read_bytes() != found[1][0][0].read_bytes()


def test_an_attached_adapter_is_not_another_model(tmp_path: Path) -> None:
    parts = small_components("tiny-vae")
    bare = prior.model_key(parts)
    attach_lora(parts.unet, 2, ATTENTION_TARGETS, init="pissa")
    assert prior.model_key(parts) == bare


def test_a_commit_spares_hashing_but_not_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of a model of the Hub only the first layer is read; another commit or variant is another model."""
    parts = small_components("tiny-vae")
    hashed: list[Any] = []

    def noted(module: Any) -> str:
        hashed.append(module)
        return fingerprint(module)

    fingerprint = prior.base_fingerprint
    monkeypatch.setattr(prior, "base_fingerprint", noted)
    source = dataclasses.replace(parts.source, resolved="a/b", commit="0" * 40)
    hub = dataclasses.replace(parts, source=source)
    key = prior.model_key(hub)
    assert hashed == [hub.unet.conv_in]
    newer = dataclasses.replace(hub, source=dataclasses.replace(source, commit="1" * 40))
    assert prior.model_key(newer) != key
    with torch.no_grad():
        hub.unet.conv_in.weight.copy_(hub.unet.conv_in.weight.half().float())
    assert prior.model_key(hub) != key


def test_a_truncated_picture_comes_back_to_the_byte(tmp_path: Path) -> None:
    """Damaged in the middle, lost, or emptied: drawn again alone, as it was drawn the first time."""
    ensure = Counting(prior)
    paths, _ = ensure(tmp_path, 4, batch_size=1)
    contents = [path.read_bytes() for path in paths]
    paths[1].write_bytes(contents[1][:-40])
    paths[2].unlink()
    paths[3].write_bytes(b"")
    assert ensure(tmp_path, 4, batch_size=1) == (paths, 3)
    assert [path.read_bytes() for path in paths] == contents


@pytest.mark.parametrize(("batch", "after"), [(1, 1), (1, 3), (2, 1), (2, 2), (3, 1)])
def test_an_interrupted_making_goes_on_to_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, after: int
) -> None:
    """Ctrl-C in the call after so many: what is there stays, the rest is that of an undisturbed making."""
    whole, _ = Counting(prior)(tmp_path / "whole", 5, batch_size=batch)
    calls: list[int] = []

    def interrupted(*arguments: Any, **options: Any) -> Any:
        calls.append(1)
        if len(calls) > after:
            raise KeyboardInterrupt
        return sample(*arguments, **options)

    monkeypatch.setattr(prior, "sample", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Counting(prior)(tmp_path / "part", 5, batch_size=batch)
    monkeypatch.setattr(prior, "sample", sample)
    kept = len(list((tmp_path / "part").rglob("*.png")))
    assert kept == batch * after
    paths, made = Counting(prior)(tmp_path / "part", 5, batch_size=batch)
    assert made == 5 - kept
    assert [path.read_bytes() for path in paths] == [path.read_bytes() for path in whole]


def test_own_pictures_that_suffice_ask_nothing_of_the_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No hash, no folder, no sampling."""
    own = write_pictures(tmp_path, 3)

    def refused(components: Components) -> dict[str, object]:
        raise AssertionError(components)

    monkeypatch.setattr(prior, "model_key", refused)
    assert Counting(prior)(tmp_path, 3) == (own, 0)
    assert sorted(tmp_path.iterdir()) == own


def config_with_prior(folder: Path, *flags: str) -> TrainConfig:
    words = ["--with_prior_preservation", "--class_prompt", "a dog", "--num_class_images", "1"]
    return parse_config([*NEEDED, *words, "--class_data_dir", str(folder), *flags])


@pytest.mark.parametrize(("resolved", "guidance"), [("dreamrie/tiny-sd", 4.0), ("a/b", 7.5)])
def test_class_pictures_are_drawn_at_the_models_own_guidance(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, resolved: str, guidance: float
) -> None:
    """Whatever the samples of a validation are drawn at; the record beside the pictures says it."""
    parts = small_components("tiny-vae")
    parts = dataclasses.replace(parts, source=dataclasses.replace(parts.source, resolved=resolved))
    attach_lora(parts.unet, 2, ATTENTION_TARGETS, init="orthonormal")
    asked: list[float] = []

    def noted(*_: Any, **options: Any) -> list[Image.Image]:
        asked.append(options["guidance_scale"])
        return [Image.new("RGB", (64, 64))]

    monkeypatch.setattr(prior, "sample", noted)
    config = config_with_prior(tmp_path, "--guidance_scale", "2.5")
    (path,) = prepare.class_pictures(parts, config)
    assert asked == [guidance]
    record = json.loads((path.parent / "class_images.json").read_text(encoding="utf-8"))
    assert record["guidance_scale"] == guidance
    assert record["prompt"] == "a dog"
