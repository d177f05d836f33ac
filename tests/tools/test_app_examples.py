"""The command that makes the app's examples, on an example instead of a training."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.gallery import EXAMPLES
from dreamrie.adapter_open import open_adapter
from dreamrie.diffusion.images import load_image, save_png
from dreamrie.lora.comparing import change_norm, distance
from tests.contracts.sources import ROOT
from tools import app_examples

FILE = "pytorch_lora_weights.safetensors"


def test_an_example_holds_the_best_step_and_a_picture_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The change is the same to half precision; scores and sheet are those of the run."""
    old, best = EXAMPLES / "owl", tmp_path / "runs" / "owl-0" / "best"
    about = json.loads((old / "about.json").read_text("utf-8"))
    best.mkdir(parents=True)
    shutil.copy(old / "adapter.safetensors", best / FILE)
    sheets = sorted(old.glob("step-*.webp"))
    for sheet in sheets:
        folder = best.parent / "scored" / sheet.stem
        folder.mkdir(parents=True)
        save_png(load_image(sheet), folder / "pictures.png")
    shutil.copy(old / "scores.jsonl", best.parent / "scores.jsonl")
    (best / "best.json").write_text(json.dumps({"step": about["step"], "reason": about["reason"]}))
    monkeypatch.setattr(app_examples, "STEPS", 2)
    words = ["--runs", str(tmp_path / "runs"), "--output", str(tmp_path / "out")]
    app_examples.main([*words, "--concepts", "owl"])
    new = tmp_path / "out" / "owl"
    assert sorted(path.name for path in new.iterdir()) == sorted(p.name for p in old.iterdir())
    assert list((tmp_path / "out").iterdir()) == [new]
    before, after = (open_adapter(each / "adapter.safetensors") for each in (old, new))
    assert after.has_digest
    assert set(after.changes) == set(before.changes)
    for layer, change in after.changes.items():
        assert distance(change, before.changes[layer]) < 1e-3 * change_norm(change)
    assert load_image(new / "thumbnail.png").size == (64, 64)
    written = json.loads((new / "about.json").read_text("utf-8"))
    # The examples in the checkout were trained with other defaults than today's, and name them.
    named, today = about.pop("source"), written.pop("source")
    assert named.startswith(f"{today} --")
    assert {**written, "thumbnail": 0} == {**about, "thumbnail": 0}
    # Packed a second time, so not the same bytes, but nearest to its own step.
    values = {path.name: np.asarray(load_image(path), dtype=float) for path in sheets}
    for name in values:
        copy = np.asarray(load_image(new / name), dtype=float)
        apart = {other: np.abs(copy - each).mean() for other, each in values.items()}
        assert min(apart, key=lambda other: apart[other]) == name


def test_every_concept_has_a_seed() -> None:
    assert set(app_examples.SEEDS) == {p.name for p in (ROOT / "examples" / "concepts").iterdir()}
