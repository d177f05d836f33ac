"""The scorer on a small random pipeline: same noise every time, nothing disturbed, everything recorded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from torch import Tensor

from dreamrie.config import parse_config
from dreamrie.diffusion.components import Components
from dreamrie.diffusion.images import load_image
from dreamrie.diffusion.pipeline import ATTENTION_TARGETS
from dreamrie.errors import ConfigError, NumericalError
from dreamrie.lora import LoraPair, attach_lora
from dreamrie.trainer import scored_folder
from eval.encoders.base import Encoder
from eval.training import ConceptScorer, Plan, make_scorer, read_curve, scorer, setup
from tests.small_models import small_components, small_folder, write_pictures
from tests.test_adapter_file import train_by_hand

PROMPTS = ("a sks owl on grass", "a sks owl at night", "a sks owl in space", "a sks owl on grass")
TEXTS = tuple(prompt.replace("a sks owl", "an owl") for prompt in PROMPTS)


def pixels(image: Image.Image) -> Tensor:
    """A picture as 48 numbers."""
    small = image.resize((4, 4), Image.Resampling.BOX)
    return torch.tensor(list(small.tobytes()), dtype=torch.float32) - 127.5


def by_letters(texts: list[str]) -> Tensor:
    """A text as 48 numbers."""
    rows = [[sum(map(ord, text[i::48])) % 97 - 48.0 for i in range(48)] for text in texts]
    return torch.tensor(rows)


def encoder(name: str, reads: bool) -> Encoder:
    text = f"{name} text" if reads else None
    return Encoder(
        name,
        f"{name} image",
        text,
        "4 x 4",
        "0" * 64,
        (pixels,),
        lambda x: x,
        by_letters if reads else None,
    )


@pytest.fixture
def parts() -> Components:
    return small_components("tiny-vae")


@pytest.fixture
def pairs(parts: Components) -> list[LoraPair]:
    generator = torch.Generator().manual_seed(0)
    return attach_lora(parts.unet, 2, ATTENTION_TARGETS, generator=generator)


def make(parts: Components, folder: Path, **changes: Any) -> ConceptScorer:
    """A scorer of four pictures."""
    paths = write_pictures(folder / "real", 3)
    values: dict[str, Any] = {
        "prompt_set": "four 123",
        "prompts": PROMPTS,
        "texts": TEXTS,
        "drift_prompts": ("a car", "a tree"),
        "reference": tuple(load_image(path) for path in paths),
        "image_encoder": encoder("first", reads=False),
        "text_encoder": encoder("second", reads=True),
        "steps": 2,
        "guidance_scale": 2.0,
        "batch_size": 3,
        "max_steps": 10,
    }
    (folder / "run").mkdir(exist_ok=True)
    return ConceptScorer(parts, Plan(**values | changes), folder / "run")


def test_the_same_model_has_the_same_scores_and_another_has_others(
    parts: Components, pairs: list[LoraPair], tmp_path: Path
) -> None:
    """Common random numbers: what differs between two steps is the model alone."""
    scores = make(parts, tmp_path)
    scores(0)
    scores(5)
    train_by_hand(pairs, seed=1)
    scores(10)
    first, same, other = scores.curve.rows
    assert torch.equal(first.image, same.image)
    assert same.drift is not None
    assert same.drift.abs().max() < 2e-7, "an adapter without change does not drift"
    assert other.drift is not None
    assert other.drift.min() > 2e-6
    assert (first.image - other.image).abs().max() > 1e-4
    assert first.text is not None
    assert other.text is not None
    assert (first.text - other.text).abs().max() > 1e-4


def test_scoring_disturbs_neither_the_model_nor_the_random_numbers(
    parts: Components, pairs: list[LoraPair], tmp_path: Path
) -> None:
    train_by_hand(pairs, seed=1)
    parts.unet.train()
    changes = [pair.delta().clone() for pair in pairs]
    wanted = [parameter.requires_grad for parameter in parts.unet.parameters()]
    state = torch.get_rng_state()
    make(parts, tmp_path)(3)
    assert torch.equal(torch.get_rng_state(), state)
    assert [parameter.requires_grad for parameter in parts.unet.parameters()] == wanted
    assert parts.unet.training
    assert all(
        torch.equal(pair.delta(), change) for pair, change in zip(pairs, changes, strict=True)
    )


def test_every_single_value_and_what_it_depends_on_is_kept(
    parts: Components, pairs: list[LoraPair], tmp_path: Path
) -> None:
    """E3: the first line of scores.jsonl names encoders, weights, metric versions and exact texts (E4)."""
    scores = make(parts, tmp_path)
    verdict = scores(0)
    assert verdict.best_step is None
    train_by_hand(pairs, seed=1)
    verdict = scores(5)
    assert verdict.best_step == 5
    assert f"image similarity {scores.curve.image(scores.curve.rows[1])[0]:.3f}" in verdict.reason
    run = tmp_path / "run"
    facts = json.loads((run / "scores.jsonl").read_text("utf-8").splitlines()[0])
    assert facts["prompts"] == list(PROMPTS)
    assert facts["prompt_set"] == "four 123"
    assert facts["texts"] == list(TEXTS)
    assert facts["encoders"]["second"] == {"weights_sha256": "0" * 64, "preprocessing": "4 x 4"}
    assert facts["metrics"]["image_similarity"] == 1
    again = read_curve(run / "scores.jsonl")
    for old, new in zip(scores.curve.rows, again.rows, strict=True):
        assert torch.equal(old.image, new.image)
        assert old.margin is not None
        assert new.margin is not None
        assert torch.equal(old.margin, new.margin)
    assert again.yardstick.ceiling == scores.curve.yardstick.ceiling
    for picture in (run / "scores.png", scored_folder(run, 5) / "pictures.png"):
        with Image.open(picture) as opened:
            assert min(opened.size) >= 64


def test_black_pictures_are_named_and_the_step_is_not_chosen(
    parts: Components, pairs: list[LoraPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two of four pictures are black, and both of the unrelated prompts: no mean is made of the other two."""
    scores, draw = make(parts, tmp_path), scorer.sample
    scores(0)

    def half_black(*arguments: Any, **how: Any) -> list[Image.Image]:
        pictures = draw(*arguments, **how)
        return [Image.new("RGB", p.size) if i < 2 else p for i, p in enumerate(pictures)]

    monkeypatch.setattr(scorer, "sample", half_black)
    verdict = scores(5)
    assert verdict.best_step is None
    assert verdict.is_alarm
    assert verdict.scores == {"blank": 4}
    assert "0 (a sks owl on grass)" in verdict.message
    record = json.loads((tmp_path / "run" / "scores.jsonl").read_text("utf-8").splitlines()[-1])
    drift = ["4 (a car)", "5 (a tree)"]
    assert record["blank"] == ["0 (a sks owl on grass)", "1 (a sks owl at night)", *drift]
    assert read_curve(tmp_path / "run" / "scores.jsonl").broken[0].step == 5


def test_numbers_that_are_not_finite_are_an_alarm_and_end_nothing(
    parts: Components, pairs: list[LoraPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = make(parts, tmp_path)
    scores(0)

    def diverged(*arguments: Any, **how: Any) -> list[Image.Image]:
        raise NumericalError("not finite")

    monkeypatch.setattr(scorer, "sample", diverged)
    verdict = scores(5)
    assert verdict.is_alarm
    assert "not finite" in verdict.message
    assert "lower --learning_rate" in verdict.message


def test_without_an_encoder_that_reads_texts_image_similarity_alone_decides(
    parts: Components, pairs: list[LoraPair], tmp_path: Path
) -> None:
    scores = make(parts, tmp_path, text_encoder=None)
    scores(0)
    train_by_hand(pairs, seed=1)
    verdict = scores(5)
    assert verdict.best_step == 5
    assert "text" not in verdict.reason
    assert set(verdict.scores) == {"image", "drift", "copies"}


def settings_for(folder: Path, *flags: str) -> Any:
    words = ["--pretrained_model_name_or_path", str(small_folder("tiny-vae"))]
    words += ["--instance_data_dir", str(folder), "--instance_prompt", "a photo of a sks red owl"]
    return parse_config([*words, "--score_steps", "5", *flags])


def test_the_settings_become_a_plan(
    parts: Components, pairs: list[LoraPair], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first encoder is for pictures, the first that reads is for texts, weights come from NAME=FILE."""
    asked: list[tuple[str, Path | None]] = []

    def load(name: str, weights: Path | None) -> Encoder:
        asked.append((name, weights))
        return encoder(name, reads=name == "clip")

    monkeypatch.setattr(setup, "load_encoder", load)
    write_pictures(tmp_path / "concept", 2)
    flags = ["--score_images", "5", "--score_prompts", "living", "--guidance_scale", "3"]
    flags += ["--score_encoders", "dino=w.pth", "clip"]
    scores = make_scorer(settings_for(tmp_path / "concept", *flags), parts, tmp_path)
    plan = scores._plan
    assert asked == [("dino", Path("w.pth")), ("clip", None)]
    assert plan.image_encoder.name == "dino"
    assert plan.text_encoder is not None
    assert plan.text_encoder.name == "clip"
    assert len(plan.prompts) == len(set(plan.prompts)) == 5
    assert all("sks red owl" in prompt for prompt in plan.prompts)
    assert [p.replace("sks ", "") for p in plan.prompts] == list(plan.texts)
    assert (plan.steps, plan.guidance_scale, plan.max_steps) == (25, 3.0, 400)
    assert not any("owl" in prompt for prompt in plan.drift_prompts)


@pytest.mark.parametrize("text", ["a {subject} at night\n", "drift"])
def test_prompts_that_cannot_be_scored_are_refused_at_once(
    parts: Components, tmp_path: Path, text: str
) -> None:
    """One prompt has no other to be told from; a set without subject is for drift."""
    write_pictures(tmp_path / "concept", 2)
    (tmp_path / "one.txt").write_text(text, "utf-8")
    chosen = text if text == "drift" else str(tmp_path / "one.txt")
    with pytest.raises(ConfigError, match="--score_prompts"):
        make_scorer(settings_for(tmp_path / "concept", "--score_prompts", chosen), parts, tmp_path)


def test_an_encoder_that_would_not_be_used_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        setup, "load_encoder", lambda name, file: encoder(name, reads="clip" in name)
    )
    first, reader = setup.encoder_pair(["clip"])
    assert first is reader
    assert setup.encoder_pair(["dino"])[1] is None
    with pytest.raises(ConfigError, match="dinov2 would not be used"):
        setup.encoder_pair(["dino", "dinov2", "clip"])


def test_one_picture_of_the_concept_is_too_few(parts: Components, tmp_path: Path) -> None:
    write_pictures(tmp_path / "concept", 1)
    with pytest.raises(ConfigError, match="at least two pictures"):
        make_scorer(settings_for(tmp_path / "concept"), parts, tmp_path)


def test_an_unknown_prompt_set_is_named(parts: Components, tmp_path: Path) -> None:
    write_pictures(tmp_path / "concept", 2)
    with pytest.raises(ConfigError, match=r"'objcts'.*Did you mean 'objects'"):
        make_scorer(
            settings_for(tmp_path / "concept", "--score_prompts", "objcts"), parts, tmp_path
        )
