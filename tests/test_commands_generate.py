"""`generate`: pictures with the settings that made them, in a folder that is whole or not there."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from dreamrie import __main__ as command
from dreamrie.adapter_file import DIFFUSERS_FILE, save_diffusers
from dreamrie.adapter_open import open_adapter
from dreamrie.diffusion.generating import AdapterUse, Drawer, DrawRequest, adapter_digest
from dreamrie.diffusion.pipeline import sample
from dreamrie.errors import NumericalError
from tests.diffusion.test_generating import adapter
from tests.small_models import small_components, small_folder

pytestmark = pytest.mark.end_to_end

BASE = str(small_folder("sd2-eps"))
FAST = ("--steps", "2", "--guidance_scale", "3")


def generate(output: Path, *words: str) -> int:
    return command.main(["generate", *words, "--output", str(output)])


def pixels(path: Path) -> np.ndarray[Any, Any]:
    with Image.open(path) as picture:
        return np.asarray(picture, int)


def notes(path: Path) -> dict[str, Any]:
    with Image.open(path) as picture:
        picture.load()
        found: dict[str, Any] = json.loads(picture.info["dreamrie"])
    return found


def test_two_adapters_two_prompts_two_seeds(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The base is what the first adapter names; each picture tells how to draw it again."""
    one, two = adapter(1), adapter(2, 3) / DIFFUSERS_FILE
    words = ["--adapter", f"{one}:0.7", "--adapter", f"{two}:-0.5", "--rank", "2"]
    words += ["--prompt", "a sks døg", "--prompt", "snow", "--num_images", "2", "--seed", "5"]
    words += ["--negative_prompt", "blurred", "--width", "80", *FAST]
    out = tmp_path / "new" / "out"
    assert generate(out, *words) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        *(f"00{number}.png" for number in range(4)),
        "grid.png",
        "settings.json",
    ]
    said = " ".join(capsys.readouterr().out.split())
    assert said.startswith(f"4 pictures of 0.7 x {one.name}/{DIFFUSERS_FILE} + -0.5 x ")
    assert said.endswith(f"wrote {out}")
    records = json.loads((out / "settings.json").read_text("utf-8"))
    assert [(r["prompt"], r["seed"]) for r in records] == [
        *(("a sks døg", seed) for seed in (5, 6)),
        *(("snow", seed) for seed in (5, 6)),
    ]
    uses = [AdapterUse(one, 0.7, 2), AdapterUse(two, -0.5, 2)]
    with Drawer(small_components("sd2-eps")) as drawer:
        for record in records:
            assert notes(out / record["file"]) == {k: v for k, v in record.items() if k != "file"}
            request = DrawRequest(
                (record["prompt"],),
                (record["seed"],),
                record["negative_prompt"],
                record["steps"],
                record["guidance_scale"],
                record["width"],
                record["height"],
            )
            (again,) = drawer.draw(request, uses)
            assert np.abs(pixels(out / record["file"]) - np.asarray(again, int)).max() <= 1
            assert again.size == (80, 64)
    assert np.abs(pixels(out / "000.png") - pixels(out / "001.png")).max() > 8
    assert np.array_equal(pixels(out / "grid.png")[:64, :80], pixels(out / "000.png"))
    assert np.array_equal(pixels(out / "grid.png")[68:, 84:], pixels(out / "003.png"))
    assert records[0]["adapters"] == [
        {
            "file": f"{one.name}/{DIFFUSERS_FILE}",
            "sha256": adapter_digest(one),
            "scale": 0.7,
            "rank": 2,
        },
        {
            "file": f"{two.parent.name}/{DIFFUSERS_FILE}",
            "sha256": adapter_digest(two),
            "scale": -0.5,
            "rank": 2,
        },
    ]
    # Pictures are shown around; where things lie on this computer is nobody's business.
    assert records[0]["base"] == Path(BASE).name
    assert str(Path(BASE).parent) not in (out / "settings.json").read_text("utf-8")


def test_without_an_adapter_the_base_draws(tmp_path: Path) -> None:
    assert generate(tmp_path / "out", "--base", BASE, "--prompt", "snow", *FAST) == 0
    (wanted,) = sample(small_components("sd2-eps"), ["snow"], [0], steps=2, guidance_scale=3.0)
    assert np.array_equal(pixels(tmp_path / "out" / "000.png"), np.asarray(wanted, int))
    names = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert names == ["000.png", "settings.json"]
    assert notes(tmp_path / "out" / "000.png")["adapters"] == []


def test_the_embedded_model_and_its_usual_guidance_are_the_last_resort(tmp_path: Path) -> None:
    assert generate(tmp_path, "--prompt", "snow", "--steps", "1") == 0
    found = notes(tmp_path / "000.png")
    assert (found["base"], found["guidance_scale"], found["width"]) == ("dreamrie/tiny-sd", 4.0, 64)


def test_the_adapters_of_a_run_are_told_apart(tmp_path: Path) -> None:
    """All files are called the same, and so are the folders of the best."""
    best = tmp_path / "dog" / "best"
    best.mkdir(parents=True)
    (best / DIFFUSERS_FILE).write_bytes((adapter(1) / DIFFUSERS_FILE).read_bytes())
    opened = open_adapter(adapter(1))
    save_diffusers(tmp_path / "own.safetensors", opened.changes, opened.facts)
    words = ["--adapter", str(best), "--adapter", str(tmp_path / "own.safetensors")]
    assert generate(tmp_path / "out", *words, "--prompt", "x", *FAST) == 0
    found = [used["file"] for used in notes(tmp_path / "out" / "000.png")["adapters"]]
    assert found == [f"dog/best/{DIFFUSERS_FILE}", "own.safetensors"]


def test_adapters_of_two_bases_are_refused_with_both_names(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    opened = open_adapter(adapter(1))
    facts = {key: text for key, text in opened.facts.items() if not key.startswith("dreamrie_base")}
    save_diffusers(tmp_path / "b.safetensors", opened.changes, facts | {"base_model": "other/one"})
    words = ["--adapter", str(adapter(1)), "--adapter", str(tmp_path / "b.safetensors")]
    with caplog.at_level(logging.ERROR, "dreamrie"):
        assert generate(tmp_path / "out", *words, "--prompt", "x") == 2
    assert small_folder("sd2-eps").name in caplog.text
    assert "other/one" in caplog.text
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_asked_is_refused_before_any_work(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Drawer, "draw", None)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("mine")
    usual = ["--prompt", "x", "--base", BASE]
    for words, said in (
        (["--prompt", "x", "--num_images", "0"], "--num_images must be at least 1"),
        ([*usual, "--rank", "2"], "--rank does nothing without --adapter"),
        ([*usual, "--adapter", f"{adapter(1)}:nan"], "no finite number"),
        ([*usual, "--adapter", f"{adapter(1)}:5"], "from -4 to 4; got 5"),
        ([*usual, "--adapter", str(adapter(1)), "--rank", "0"], "must be a whole number from 1"),
        ([*usual, "--adapter", str(tmp_path / "gone")], "there is no adapter"),
        ([*usual, "--width", "50"], "width must be a multiple of 16"),
        (["--prompt", " ", "--base", BASE], "prompt is empty"),
        (["--prompt", "x", "--base", str(tmp_path / "gone")], "--base"),
        ([*usual, "--output", str(tmp_path / "full")], "is there already"),
    ):
        caplog.clear()
        with caplog.at_level(logging.ERROR, "dreamrie"):
            more = [] if "--output" in words else ["--output", str(tmp_path / "out")]
            assert command.main(["generate", *words, *more]) == 2, words
        assert said in caplog.text, words
        assert "--pretrained" not in caplog.text
    assert not (tmp_path / "out").exists()
    assert (tmp_path / "full" / "x").read_text() == "mine"


def test_a_failed_drawing_leaves_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*words: Any, **options: Any) -> None:
        raise NumericalError("not finite")

    monkeypatch.setattr("dreamrie.diffusion.generating.draw", fail)
    assert generate(tmp_path / "out", "--base", BASE, "--prompt", "x") != 0
    assert list(tmp_path.iterdir()) == []
