"""The demo's pictures, and the whole demo on a small random pipeline."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFont

from dreamrie.config import parse_config
from dreamrie.diffusion.images import load_image
from eval.training import encoder_pair
from examples import demo, demo_pictures
from examples.demo_pictures import CELL_PX, GAP_PX, LABEL_PX, Row, make_grid, smooth, wrap
from examples.demo_scores import score_table
from tests.contracts.sources import ROOT
from tests.small_models import make_small_pipeline

pytestmark = pytest.mark.end_to_end

PROMPTS = ["a sks disc", "a sks disc on grass"]


def size_of(path: Path) -> tuple[int, int]:
    """Width and height of a written picture."""
    with Image.open(path) as picture:
        return picture.size


def test_the_demo_trains_and_shows_what_the_saved_file_does(
    tmp_path: Path, disc_pictures: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One command makes the three pictures and the scores; the grid names the step, and its rows differ."""
    model = make_small_pipeline("tiny-vae", tmp_path / "model")
    out = tmp_path / "run"
    flags = [
        "--pretrained_model_name_or_path",
        str(model),
        "--instance_data_dir",
        str(disc_pictures),
    ]
    flags += ["--output_dir", str(out), "--max_train_steps", "3", "--num_inference_steps", "2"]
    flags += ["--train_batch_size", "2", "--spectrum_steps", "1", "--loi_batches", "2"]
    flags += ["--validation_prompt", *PROMPTS]
    scores = ["--score_steps", "2", "--score_images", "4", "--score_inference_steps", "1"]
    scores += [
        "--score_prompts",
        "embedded",
        "--score_encoders",
        "effnet-lite2-64-160",
        "tiny-clip",
    ]
    demo.main([*flags, *scores])
    said = capsys.readouterr().out
    cell = r"[+-]?\d\.\d{3} \[-?\d\.\d{3} -?\d\.\d{3}\]"
    for name in (r"image similarity \(effnet-lite2-64-160\)", r"text similarity \(tiny-clip\)"):
        assert re.search(rf"{name} +{cell} +{cell} +-?{cell}", said), said
    sizes = {name: size_of(out / f"{name}.png") for name in ("grid", "loss", "spectrum")}
    assert min(min(size) for size in sizes.values()) > 300
    assert (out / "pytorch_lora_weights.safetensors").stat().st_size > 1000

    best = json.loads((out / "best" / "best.json").read_text("utf-8"))["step"]
    plain = [*flags, "--score_steps", "0"]
    config = parse_config(["--config", str(ROOT / "examples" / "demo.yaml"), *plain])
    (references, before, after), table = demo.compare(config)
    assert after.label == f"with the adapter of step {best}, chosen by its scores"
    assert table == ""
    assert len(references.pictures) == 2
    assert before.captions == after.captions == PROMPTS
    pairs = zip(before.pictures, after.pictures, strict=True)
    moved = [np.abs(np.asarray(a, float) - np.asarray(b, float)).max() for a, b in pairs]
    assert min(moved) >= 1


def test_a_training_that_fails_ends_the_demo_with_its_exit_code(tmp_path: Path) -> None:
    """A missing folder of pictures is said by the trainer; nothing is drawn."""
    flags = [
        "--instance_data_dir",
        str(tmp_path / "nowhere"),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    with pytest.raises(SystemExit) as stop:
        demo.main(flags)
    assert stop.value.code == 2
    assert not (tmp_path / "out" / "grid.png").exists()


def test_the_grid_puts_each_picture_at_its_place() -> None:
    """Colors are found again where row and column say, whatever the size of a picture."""
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250)]
    pictures = [
        Image.new("RGB", (size, size), color)
        for size, color in zip((8, 64, 300), colors, strict=True)
    ]
    grid = make_grid(
        [Row("first", pictures, ["", "", ""]), Row("second", pictures[:1], ["caption"])]
    )
    assert grid.width == LABEL_PX + 3 * (CELL_PX + GAP_PX) + GAP_PX
    for column, color in enumerate(colors):
        at = (LABEL_PX + column * (CELL_PX + GAP_PX) + CELL_PX // 2, GAP_PX + CELL_PX // 2)
        assert grid.getpixel(at) == color
    second = (LABEL_PX + CELL_PX // 2, GAP_PX + CELL_PX + 2 * GAP_PX + CELL_PX // 2)
    assert grid.getpixel(second) == colors[0]
    label = np.asarray(grid)[:, : LABEL_PX - GAP_PX]
    assert (label.min(axis=(1, 2)) < 128).sum() > 10, "the labels are not visible"


def test_captions_are_wrapped_and_lose_no_word() -> None:
    """Every line fits unless it is one word."""
    font = ImageFont.load_default(16)
    text = "a photo of a sks robot on a background of extraordinarilylongwords"
    lines = wrap(text, 90, font)
    assert " ".join(lines) == text
    assert all(font.getlength(line) <= 90 or " " not in line for line in lines)
    assert wrap("", 90, font) == []


def test_the_running_mean_is_worked_out_by_hand() -> None:
    """Windows of two: the first value alone, then pairs."""
    assert smooth([1.0, 3.0, 5.0, 1.0], 2) == [1.0, 2.0, 4.0, 3.0]


@pytest.mark.parametrize("kinds", [("point", "change"), ("change",)], ids=["riemannion", "adamw"])
def test_the_spectrum_is_drawn_for_any_optimizer(tmp_path: Path, kinds: tuple[str, ...]) -> None:
    """One panel for each kind that the run recorded; layers may differ in rank."""
    lines = [
        {"step": step} | {kind: {"a": [0.2, 0.1 * step], "b": [0.3]} for kind in kinds}
        for step in range(3)
    ]
    (tmp_path / "s.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    demo_pictures.plot_spectrum(tmp_path / "s.jsonl", tmp_path / "s.png")
    width, height = size_of(tmp_path / "s.png")
    assert abs(width / height - len(kinds) * 5.5 / 4) < 0.02


def test_a_skipped_step_leaves_a_hole_in_the_loss_curve(tmp_path: Path) -> None:
    """A step without a finite loss is written as null and is not drawn."""
    lines = [{"step": 1, "loss": 1.0}, {"step": 2, "loss": None}, {"step": 3, "loss": 0.5}]
    (tmp_path / "m.jsonl").write_text("\n".join(map(json.dumps, lines)), "utf-8")
    demo_pictures.plot_loss(tmp_path / "m.jsonl", tmp_path / "m.png")
    assert size_of(tmp_path / "m.png") == (840, 480)


def test_without_scores_the_demo_shows_the_last_adapter(tmp_path: Path) -> None:
    assert demo.chosen_adapter(tmp_path) == (tmp_path, "with the adapter")


def test_the_demo_scores_pair_the_pictures() -> None:
    """The adapter draws the reference itself where the base model draws another concept: 1 against less, paired."""
    folder = ROOT / "examples" / "concepts"
    owls = [load_image(folder / "owl" / f"{number}.png") for number in range(4)]
    robots = [load_image(folder / "robot" / f"{number}.png") for number in range(4)]
    texts = [f"an owl on color {number}" for number in range(4)]
    table = score_table(
        robots, owls, owls, texts, encoder_pair(["effnet-lite2-64-160", "tiny-clip"])
    )
    cells = [line for line in table.splitlines() if line.startswith("image similarity")]
    numbers = [float(number) for number in re.findall(r"-?\d\.\d{3}", cells[0])]
    before, after, gain = numbers[0], numbers[3], numbers[6]
    assert after > 0.7 > before
    assert gain == pytest.approx(after - before, abs=1.1e-3)
    assert "real pictures to each other" in table
