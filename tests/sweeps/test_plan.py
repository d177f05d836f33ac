"""The file of a sweep: every bad entry is named before anything is trained, and folders get names that people read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from dreamrie.config import config_of, to_yaml
from dreamrie.config.train_config import TrainConfig
from dreamrie.errors import ConfigError
from dreamrie.sweeps.parts import name_of, value_text
from dreamrie.sweeps.plan import Sweep, check_folders, read_sweep
from tests.contracts.sources import ROOT
from tests.small_models import write_pictures


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    folder = tmp_path / "pictures"
    folder.mkdir()
    write_pictures(folder, 2)
    return folder


def concept(name: str, pictures: Path, **more: Any) -> dict[str, Any]:
    prompt = f"a sks {name}"
    return {"name": name, "instance_data_dir": str(pictures), "instance_prompt": prompt, **more}


def read(folder: Path, content: Any) -> Sweep:
    path = folder / "sweep.yaml"
    text = content if isinstance(content, str) else yaml.safe_dump(content, sort_keys=False)
    path.write_text(text, "utf-8")
    return read_sweep(path, folder / "out")


def refused(folder: Path, content: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        read(folder, content)
    assert not (folder / "out").exists()
    return str(caught.value)


def test_every_concept_meets_every_setting(tmp_path: Path, pictures: Path) -> None:
    """In the order of the file; the grid and the concept count before the base, and a run is an ordinary training."""
    content = {
        "base": {"rank": 2, "max_train_steps": 7, "learning_rate": 0.5},
        "concepts": [concept("dog", pictures), concept("cat", pictures, rank=8)],
        "grid": {"learning_rate": [0.01, 0.02], "seed": [0, 1]},
    }
    sweep = read(tmp_path, content)
    assert sweep.varied == ("learning_rate", "seed")
    assert [run.name for run in sweep.runs] == [
        f"{name},learning_rate={rate},seed={seed}"
        for name in ("dog", "cat")
        for rate in ("0.01", "0.02")
        for seed in (0, 1)
    ]
    last = sweep.runs[-1]
    values = {key: value for key, value in concept("cat", pictures).items() if key != "name"}
    alone = {**values, "rank": 8, "max_train_steps": 7, "learning_rate": 0.02, "seed": 1}
    assert last.config == config_of(TrainConfig, {**alone, "output_dir": str(last.folder)})
    assert (last.concept, last.steps, last.folder.parent) == ("cat", 7, tmp_path / "out")
    assert sweep.runs[0].config.adapter.rank == 2


def test_the_base_may_be_a_file_with_a_folder_of_its_own(tmp_path: Path, pictures: Path) -> None:
    base = tmp_path / "base.yaml"
    base.write_text("output_dir: runs/demo\nrank: 3\n", "utf-8")
    sweep = read(tmp_path, {"base": str(base), "concepts": [concept("dog", pictures)]})
    (run,) = sweep.runs
    assert (run.name, run.config.adapter.rank, run.folder) == ("dog", 3, tmp_path / "out" / "dog")
    assert "nowhere.yaml" in refused(tmp_path, {"base": "nowhere.yaml"})


def test_all_bad_entries_are_named_at_once(tmp_path: Path, pictures: Path) -> None:
    content = {
        "concepts": [
            concept("dog", pictures),
            concept("cat", pictures, rank=0),
            concept("owl", tmp_path / "nothing"),
        ],
        "grid": {"learning_rate": [0.01, -1.0]},
    }
    said = refused(tmp_path, content)
    assert "4 entries of the sweep cannot work; nothing was trained" in said
    assert "cat,learning_rate=0.01: rank cannot be 0" in said
    assert "sweep.yaml, concept cat" in said
    assert "dog,learning_rate=-1.0 and 1 more: learning_rate cannot be -1.0" in said
    assert "sweep.yaml, grid" in said
    assert "concept owl: " in said
    content = {"base": {"rnak": 4}, "concepts": [concept(n, pictures) for n in ("dog", "cat")]}
    said = refused(tmp_path, content)
    assert "all 2 runs: rnak is not a setting" in said
    assert "did you mean rank?" in said


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("conzepts: []", "conzepts is not a part of a sweep: did you mean concepts?"),
        ("task: pictures", "task cannot be 'pictures': give dreambooth or llm"),
        ("task: [llm]", "task cannot be ['llm']"),
        ("base: 3", "base is neither"),
        ("base: {1: 2}", "base is neither"),
        ("base: {push_to_hub: true}", "base: push_to_hub is decided by the sweep"),
        ("concepts: {name: dog}", "concepts is not a list"),
        ("concepts: [{rank: 4}]", "concept 1 has no name"),
        ("concepts: [{name: a}, {name: a}]", "concept a is there twice"),
        ("concepts: [{name: a, 3: 4}]", "concept a: a setting's name is no text"),
        ("grid: [1]", "grid is not a list of"),
        ("grid: {rank: 4}", "grid: rank is 4; give a list"),
        ("grid: {rank: []}", "grid: rank is []; give a list"),
        ("grid: {rank: [4, 4]}", "grid: rank has a value twice"),
        ("grid: {output_dir: [a, b]}", "grid: output_dir is decided by the sweep"),
        ("base: {dry_run: true}", "base: dry_run is decided by the sweep"),
        ("concepts: [{name: a, rank: 2}]\ngrid: {rank: [2, 3]}", "concept a: rank is varied by the grid"),
    ],
)  # fmt: skip
def test_a_file_of_another_form_is_refused(tmp_path: Path, content: str, words: str) -> None:
    assert words in refused(tmp_path, content)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("grid:\n  rank: [2]\n  seed: [1]\n  rank: [4]\n", "line 4, and before that line 2"),
        ("concepts:\n- name: a\n  rank: 2\n  rank: 2\n", "line 4, and before that line 3"),
        ("base: {rank: 1,\n  'rank': 2}", "line 2, and before that line 1"),
    ],
)
def test_a_setting_that_is_given_twice_is_refused(tmp_path: Path, content: str, words: str) -> None:
    """Wherever it stands; the message names it and both lines."""
    said = refused(tmp_path, content)
    assert said.startswith("rank is given twice\n  where: ")
    assert words in said


def test_one_training_under_two_names_is_refused(tmp_path: Path, pictures: Path) -> None:
    """A value that is the default anyway, and names that differ in case alone."""
    content = {"concepts": [concept("dog", pictures)], "grid": {"momentum": [None, 0.5]}}
    assert "are the same training" in refused(tmp_path, content)
    content = {"concepts": [concept("dog", pictures), concept("Dog", pictures)]}
    assert "Dog and dog would share a folder" in refused(tmp_path, content)


def test_names_of_folders_are_readable_and_possible() -> None:
    assert name_of("dog", {"rank": 4, "use_rslora": True}) == "dog,rank=4,use_rslora=true"
    assert name_of("", {}) == "run"
    assert value_text(["q_proj", "v_proj"]) == "q_proj+v_proj"
    strange = name_of("my dog/../x", {"seed": None})
    assert strange.startswith("my-dog-..-x-")
    assert strange.endswith(",seed=default")
    assert name_of("a/b", {}) != name_of("a b", {})
    assert len(name_of("x" * 300, {f"setting{n}": "y" * 60 for n in range(9)})) < 200


def test_a_folder_with_other_settings_is_refused(tmp_path: Path, pictures: Path) -> None:
    """All of them are named; the same settings, and folders where nothing was trained, are let through."""
    content: dict[str, Any] = {"concepts": [concept("dog", pictures), concept("cat", pictures)]}
    sweep = read(tmp_path, content)
    check_folders(sweep)
    for run in sweep.runs:
        run.folder.mkdir(parents=True)
        (run.folder / "config.yaml").write_text(to_yaml(run.config), "utf-8")
    check_folders(sweep)
    other = read(tmp_path, {**content, "base": {"rank": 7}})
    with pytest.raises(ConfigError) as caught:
        check_folders(other)
    said = str(caught.value)
    assert "2 of 2 folders" in said
    assert "dog: the run cannot go on with other settings: rank was 4 and is now 7" in said
    assert "cat: the run" in said
    (sweep.runs[0].folder / "checkpoint-900").mkdir()
    with pytest.raises(ConfigError, match=r"1 of 2 folders(.|\n)*checkpoint-900 is beyond the end"):
        check_folders(sweep)


def test_a_sweep_of_language_models(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("", "utf-8")
    content: dict[str, Any] = {
        "task": "llm",
        "base": {"model": "somewhere", "data": [str(rows)]},
        "grid": {"target_modules": [["attention"], ["attention", "mlp"]]},
    }
    sweep = read(tmp_path, content)
    names = [run.name for run in sweep.runs]
    assert names == ["target_modules=attention", "target_modules=attention+mlp"]
    content["base"]["data"] = [str(tmp_path / "none.jsonl"), "datasets:any"]
    assert f"{tmp_path / 'none.jsonl'} does not exist" in refused(tmp_path, content)


def test_the_example_is_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    sweep = read_sweep(Path("examples/sweep.yaml"), tmp_path / "out")
    assert len(sweep.runs) == 4
    assert {run.steps for run in sweep.runs} == {200}
