"""The paper's protocol, small: every subject, the mean over subjects, and what is missing is named first."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import eval.__main__ as command
from dreamrie.errors import ConfigError
from eval import paper
from eval.report.facts import find_score
from eval.results import load_result
from tests.eval.small_runs import (
    FakeAccelerator,
    SampleSpy,
    contents,
    no_extras,
    save_adapter,
    spy,
)
from tests.eval.test_prompts import dreambooth
from tests.small_models import small_folder, write_pictures

__all__ = ["no_extras", "spy"]
pytestmark = pytest.mark.usefixtures("no_extras")

SETTINGS = {
    "subjects": ["dog6", "backpack"],
    "base_prompt": "a photo of a {subject}",
    "base_images": 3,
    "images_per_prompt": 2,
    "token": "sks",
    "model": "MODEL",
    "sampler": "ddim",
    "steps": 1,
    "guidance": 3.0,
    "seed": 0,
    "encoders": ["tiny-clip"],
}


def write_settings(folder: Path, **change: Any) -> Path:
    """A settings file; JSON is YAML. A value of None is left out."""
    values = {**SETTINGS, "model": str(small_folder("sd2-eps")), **change}
    lines = [f"{name}: {json.dumps(value)}" for name, value in values.items() if value is not None]
    path = folder / "small.yaml"
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(folder / "dog6", seed=1)
    save_adapter(folder / "backpack", seed=2)
    return folder


@pytest.fixture
def words(tmp_path: Path, adapters: Path) -> list[str]:
    """A command line for two subjects."""
    data = tmp_path / "data"
    for seed, name in enumerate(("dog6", "backpack")):
        write_pictures(data / name, 2, seed=seed)
    dreambooth(data)
    found = ["paper", "--config", str(write_settings(tmp_path)), "--data", str(data)]
    return [*found, "--adapters", str(adapters), "--output", str(tmp_path / "out")]


def test_every_subject_is_drawn_and_scored(
    tmp_path: Path, words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """Base prompt and editing prompts by class; the mean over subjects with its standard error, by hand."""
    assert command.main([*words, "--json", str(tmp_path / "t.json")]) == 0
    printed = capsys.readouterr().out
    dog = load_result(tmp_path / "out" / "dog6")
    assert [picture.prompt for picture in dog.pictures] == [
        *["a photo of a sks dog"] * 3,
        *["a sks dog in the jungle"] * 2,
        *["a sks dog in a chef outfit"] * 2,
    ]
    bag = load_result(tmp_path / "out" / "backpack")
    assert bag.pictures[-1].text == "a cube shaped backpack"
    base, whole_run = "tiny-clip image, base prompt", "tiny-clip image"
    found = {score.name: score for score in dog.scores}
    assert set(found[base].values) == {"000-00.png", "000-01.png", "000-02.png"}
    edits = {f"00{i}-0{j}.png" for i in (1, 2) for j in (0, 1)}
    assert set(found["tiny-clip text"].values) == edits
    assert set(found[whole_run].values) == {*found[base].values, *edits}
    # Report and comparison show the first score of a metric: that of all pictures.
    assert find_score(dog, "image_similarity") is found[whole_run]
    assert find_score(dog, "copy_score").values.keys() == found[whole_run].values.keys()
    table = json.loads((tmp_path / "t.json").read_text("utf-8"))
    one, two = (table["subjects"][name][base] for name in ("dog6", "backpack"))
    assert one == found[base].mean
    whole = table["summary"][base]
    assert whole["mean"] == pytest.approx((one + two) / 2)
    assert whole["standard_error"] == pytest.approx(abs(one - two) / 2)
    assert abs(one - two) > 1e-4
    assert f"{whole['mean']:.4f} ± {whole['standard_error']:.4f}" in printed


def test_the_pictures_are_drawn_once_and_with_common_noise(
    tmp_path: Path, words: list[str], spy: SampleSpy
) -> None:
    """A lost picture is the only one that is drawn again; a subject alone gets the same pictures."""
    assert command.main([*words, "--batch-size", "1"]) == 0
    assert len(spy.seeds) == 14
    assert spy.seeds[:7] == spy.seeds[7:]
    before = contents(tmp_path / "out" / "dog6")
    assert before != contents(tmp_path / "out" / "backpack")
    (tmp_path / "out" / "dog6" / "pictures" / "001-01.png").unlink()
    spy.seeds.clear()
    assert command.main([*words, "--batch-size", "1", "--subjects", "dog6"]) == 0
    assert len(spy.seeds) == 1
    assert contents(tmp_path / "out" / "dog6") == before


def test_processes_share_every_subject(
    tmp_path: Path,
    words: list[str],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr("eval.running.make_accelerator", lambda: FakeAccelerator(1))
    assert command.main(words) == 0
    assert capsys.readouterr().out == ""
    assert [len(contents(tmp_path / "out" / name)) for name in SETTINGS["subjects"]] == [3, 3]
    monkeypatch.setattr("eval.running.make_accelerator", lambda: FakeAccelerator(0))
    assert command.main(words) == 0
    assert "mean of 2 subjects" in capsys.readouterr().out


def test_everything_missing_is_named_before_anything_is_drawn(
    tmp_path: Path, words: list[str], spy: SampleSpy, capsys: pytest.CaptureFixture[str]
) -> None:
    """An adapter of one subject and the photos of another, in one message."""
    (tmp_path / "data" / "backpack" / "picture-1.png").unlink()
    lonely = tmp_path / "adapters"
    save_adapter(lonely / "backpack")
    assert command.main([*words, "--adapters", str(lonely)]) == 2
    said = capsys.readouterr().err
    assert "2 of 2 subjects cannot be scored" in said
    assert "dog6: there is no adapter" in said
    assert "backpack holds 1 picture" in said
    assert spy.seeds == []
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("names", ["dgo6", "bear_plushie", ","])
def test_unknown_subjects_are_named(
    words: list[str], capsys: pytest.CaptureFixture[str], names: str
) -> None:
    """Of the table or not: the settings say which are scored."""
    assert command.main([*words, "--subjects", names]) == 2
    assert "dog6, backpack" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"steps": None}, "missing settings: steps; unknown ones: none"),
        ({"rank": 4}, "missing settings: none; unknown ones: rank"),
        ({"steps": "many"}, "steps is 'many'; expected is int"),
        ({"steps": True}, "steps is True"),
        ({"guidance": "7"}, "guidance is '7'; expected is float"),
        ({"subjects": "dog6"}, "subjects is 'dog6'"),
        ({"subjects": []}, r"subjects is \[\]"),
        ({"base_images": 0}, "base_images 0 cannot work"),
        ({"sampler": "euler"}, "allowed: ddim"),
        ({"base_prompt": "a photo"}, "base_prompt must hold"),
    ],
)
def test_settings_that_cannot_work_are_named(
    tmp_path: Path, change: dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError, match=said):
        paper.read_settings(write_settings(tmp_path, **change))


def test_the_shipped_settings_are_the_papers() -> None:
    """Half of the 30 subjects, 30 and 10 pictures; what the paper leaves open is marked where it stands."""
    settings = paper.read_settings(paper.CONFIG)
    assert len(settings.subjects) == len(set(settings.subjects)) == 15
    assert settings.subjects[0] == "can"
    assert settings.subjects[-1] == "vase"
    assert (settings.base_images, settings.images_per_prompt) == (30, 10)
    assert (settings.sampler, settings.steps, settings.guidance) == ("ddim", 50, 7.0)
    assert settings.encoders == ["dino", "dinov2", "clip"]
    assert settings.model == "sd2-base"
    blocks = paper.CONFIG.read_text("utf-8").split("\n\n")
    for name in ("token", "sampler", "seed", "encoders"):
        (block,) = [block for block in blocks if f"\n{name}:" in block]
        assert "Open" in block, name


def test_a_missing_settings_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="there is no file"):
        paper.read_settings(tmp_path / "absent.yaml")
