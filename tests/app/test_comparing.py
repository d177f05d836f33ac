"""Scores of concepts for the plane: those that were made while they were trained, of examples and of one's own."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from app.comparing import Scoring, points, scored_entries, scorings
from app.gallery import EXAMPLES, Gallery
from app.storage import Owner, Storage
from tests.app.fakes import FACTS

OWL = EXAMPLES / "owl"


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "data")


@pytest.fixture
def gallery(storage: Storage) -> Gallery:
    return Gallery(storage, FACTS.base)


@pytest.fixture
def owner(storage: Storage) -> Owner:
    return storage.owner("k" * 20)


def own_run(storage: Storage, owner: Owner, *, steps: tuple[int, ...] = (100, 300)) -> str:
    """A training with the scores of an example, and adapters at some of its steps."""
    name = storage.create(owner, "runs", "my owl")
    folder = storage.folder(owner, "runs", name)
    shutil.copy(OWL / "scores.jsonl", folder)
    for step in steps:
        at = folder / "scored" / f"step-{step:06d}"
        at.mkdir(parents=True)
        shutil.copy(OWL / "adapter.safetensors", at / "pytorch_lora_weights.safetensors")
    best = folder / "best"
    best.mkdir()
    shutil.copy(OWL / "adapter.safetensors", best / "pytorch_lora_weights.safetensors")
    (best / "best.json").write_text(json.dumps({"step": 300}), "utf-8")
    return name


def of_owl(storage: Storage, gallery: Gallery, owner: Owner) -> list[Scoring]:
    return scorings(storage, owner, [gallery.entry(owner, "example:owl")])


def test_every_example_has_scores(storage: Storage, gallery: Gallery, owner: Owner) -> None:
    entries = scored_entries(storage, gallery, owner)
    assert {entry.id for entry in entries} == {f"example:{f.name}" for f in EXAMPLES.glob("*/")}


def test_scores_of_an_example(storage: Storage, gallery: Gallery, owner: Owner) -> None:
    """By step from the base model on; one is chosen, and it is the step that the example says it is of."""
    found = of_owl(storage, gallery, owner)
    about = json.loads((OWL / "about.json").read_text("utf-8"))
    assert [scoring.step for scoring in found] == sorted({scoring.step for scoring in found})
    assert found[0].step == 0
    (chosen,) = [scoring for scoring in found if scoring.is_chosen]
    assert chosen.step == about["step"]
    mean, low, high = chosen.image
    assert low <= mean <= high
    # The reason was written when it was trained, from the same records.
    assert f"image similarity {mean:.3f}" in about["reason"]
    assert chosen.text is not None
    assert f"text similarity {chosen.text[0]:.3f}" in about["reason"]
    assert chosen.kept is not None
    assert f"followed {chosen.kept[0]:.0%}" in about["reason"]
    # Only the chosen step of an example was kept.
    assert [scoring.adapter for scoring in found if scoring.adapter] == ["example:owl"]
    assert chosen.adapter == "example:owl"


def test_scores_of_ones_own(storage: Storage, gallery: Gallery, owner: Owner) -> None:
    """Each scored step can be opened as the checkpoint that it is; the base model as none."""
    name = own_run(storage, owner)
    entry = gallery.entry(owner, f"run:{name}")
    assert entry in scored_entries(storage, gallery, owner)
    found = scorings(storage, owner, [entry])
    known = of_owl(storage, gallery, owner)
    assert [s.image for s in found] == [s.image for s in known]
    assert found[0].adapter == ""
    assert [s.adapter for s in found[1:]] == [f"run:{name}@{s.step}" for s in found[1:]]
    assert gallery.entry(owner, f"run:{name}@300").step == 300


def test_nobody_sees_scores_of_another(storage: Storage, gallery: Gallery, owner: Owner) -> None:
    """Neither in the list nor by the entry of somebody else."""
    entry = gallery.entry(owner, f"run:{own_run(storage, owner)}")
    other = storage.owner("o" * 20)
    assert entry not in scored_entries(storage, gallery, other)
    assert scorings(storage, other, [entry]) == []
    assert scorings(storage, owner, [entry]) != []


@pytest.mark.parametrize("content", ["", "{", '{"prompt_set": 3}\n', "\x00\x01"])
def test_records_that_cannot_be_read_are_left_out(
    storage: Storage, gallery: Gallery, owner: Owner, content: str
) -> None:
    """A training may be writing them; the other concepts are shown all the same."""
    name = own_run(storage, owner)
    storage.file(owner, "runs", name, "scores.jsonl").write_text(content, "utf-8")
    entries = [gallery.entry(owner, f"run:{name}"), gallery.entry(owner, "example:owl")]
    assert {s.entry.id for s in scorings(storage, owner, entries)} == {"example:owl"}


def test_points_say_what_they_are(storage: Storage, gallery: Gallery, owner: Owner) -> None:
    """One series for each concept, the base model and the chosen step marked."""
    found = of_owl(storage, gallery, owner)
    shown = points(found)
    assert [point.id for point in shown] == [f"example:owl@{s.step}" for s in found]
    assert shown[0].label == "owl, base model"
    assert shown[-1].label == f"owl, step {found[-1].step}"
    assert [point.is_base for point in shown] == [s.step == 0 for s in found]
    assert [point.is_chosen for point in shown] == [s.is_chosen for s in found]
    assert {point.series for point in shown} == {"owl"}
    assert [point.image for point in shown] == [s.image for s in found]
