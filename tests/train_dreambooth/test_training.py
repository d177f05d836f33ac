"""The command from end to end, on a small random pipeline: what it writes and says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

import train_dreambooth
from dreamrie.checkpoint import MANIFEST, STATE, TENSORS
from dreamrie.diffusion.adapters import load_saved_adapter
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.pipeline import sample
from dreamrie.diffusion.prior import ensure_class_images
from dreamrie.streams import derive_seed
from tests.contracts.sources import ROOT
from tests.train_dreambooth.small_run import ADAPTER, PROMPT, Command, metrics, moved

pytestmark = pytest.mark.end_to_end

# ------------------------------------------------------------------------------------ training


def test_a_run_leaves_everything_needed_to_use_and_repeat_it(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--validation_prompt", PROMPT, "a dog", "--validation_steps", 2)
    assert command(*flags) == 0
    assert not capsys.readouterr().out  # no bar, no chatter outside of the log
    run = tmp_path / "run"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    samples = {
        f"samples/step-{step:06d}{end}.png" for step in (0, 2, 4) for end in ("", "-0", "-1")
    }
    assert names == {
        ".lock",
        *(f"checkpoint-4/{name}" for name in (TENSORS, STATE, MANIFEST)),
        ADAPTER,
        "README.md",
        "config.yaml",
        "metrics.jsonl",
        "run.json",
        "spectrum.jsonl",
        *samples,
    }
    record = json.loads((run / "run.json").read_text())
    assert f"--instance_prompt '{PROMPT}'" in record["command"]
    assert record["optimizer"] == "riemannion"
    assert "LOI" in record["initialization"]
    assert record["base_model"]["requested"].endswith("model")
    assert record["prediction_type"] == "epsilon"
    assert record["pictures"] == {"concept": ["0.png", "1.png", "2.png"]}
    assert "resolution: 64\n" in (run / "config.yaml").read_text()  # it was left to the model
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4]
    assert moved(run) > 1e-3
    # The recorded settings are a --config that gives the same adapter, byte for byte.
    first = (run / ADAPTER).read_bytes()
    recorded = tmp_path / "config.yaml"
    recorded.write_bytes((run / "config.yaml").read_bytes())
    other = tmp_path / "again"
    assert train_dreambooth.main(["--config", str(recorded), "--output_dir", str(other)]) == 0
    assert (other / ADAPTER).read_bytes() == first
    assert train_dreambooth.main(["--config", str(recorded), "--seed", "1"]) == 0
    assert (run / ADAPTER).read_bytes() != first
    # The run that was there before is whole, in a folder of its own.
    older = run / "previous-1"
    assert (older / ADAPTER).read_bytes() == first
    assert {path.relative_to(older).as_posix() for path in older.rglob("*.*")} == names - {".lock"}


def test_the_file_does_in_plain_diffusers_what_the_trainer_showed(
    command: Command, tmp_path: Path, model: Path
) -> None:
    """Last validation picture, once more from the stock base and the saved file."""
    assert command("--validation_prompt", PROMPT, "--learning_rate", 0.05, "--start_scale", 1) == 0
    samples = tmp_path / "run" / "samples"
    trained = np.asarray(Image.open(samples / "step-000004-0.png"), float)
    untrained = np.asarray(Image.open(samples / "step-000000-0.png"), float)
    pipe = StableDiffusionPipeline.from_pretrained(model, dtype=torch.float32, safety_checker=None)
    pipe.load_lora_weights(tmp_path / "run")
    components = replace(load_components(model), unet=pipe.unet)
    (again,) = sample(components, [PROMPT], [derive_seed(0, "sample", 0)], steps=2)
    assert np.abs(trained - untrained).max() >= 5
    assert np.abs(np.asarray(again, float) - trained).max() <= 1


def test_adamw_alone_is_the_usual_lora(command: Command, tmp_path: Path) -> None:
    flags = ("--optimizer", "adamw", "--learning_rate", 1e-2, "--loi_batches", None)
    assert command(*flags) == 0
    assert moved(tmp_path / "run") > 1e-3
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["optimizer"], record["initialization"]) == ("adamw", "default")


def test_adamw_from_loi_is_a_named_baseline(command: Command, tmp_path: Path) -> None:
    # Its learning rate is no spectral norm, so the start may be smaller.
    flags = ("--optimizer", "adamw", "--init", "loi", "--learning_rate", 0.05)
    assert command(*flags, "--max_train_steps", 2) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["optimizer"] == "adamw (rank-2r baseline)"


@pytest.mark.parametrize(
    ("init", "batches", "said"),
    [
        ("orthonormal", None, "orthonormal"),
        ("pissa", None, "pissa"),
        ("corda", 2, "corda, 2 batches"),
        pytest.param("lora_ga", 2, "lora_ga, 2 batches", marks=pytest.mark.slow),
    ],
)
def test_other_anchored_starts(
    command: Command, tmp_path: Path, init: str, batches: int | None, said: str
) -> None:
    assert command("--init", init, "--loi_batches", batches, "--max_train_steps", 2) == 0
    assert moved(tmp_path / "run") > 1e-5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["initialization"] == said


@pytest.mark.slow
def test_a_start_from_inputs_for_adamw(command: Command, tmp_path: Path) -> None:
    flags = ("--optimizer", "adamw", "--init", "eva", "--max_train_steps", 2)
    assert command(*flags, "--learning_rate", 0.05) == 0
    assert moved(tmp_path / "run") > 1e-5
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert (record["optimizer"], record["initialization"][:5]) == ("adamw", "eva, ")


def test_a_base_in_bf16_trains_the_same_adapter_to_rounding(
    command: Command, tmp_path: Path, model: Path
) -> None:
    """Scale of the losses: rounding of bf16, 1e-2. The adapter itself is fp32 and fits the base in fp32."""
    assert command("--max_train_steps", 2, out="wide") == 0
    assert command("--max_train_steps", 2, "--base_precision", "bf16", out="half") == 0
    wide, half = metrics(tmp_path / "wide"), metrics(tmp_path / "half")
    for one, other in zip(wide, half, strict=True):
        assert one["loss"] != other["loss"]
        assert other["loss"] == pytest.approx(one["loss"], rel=1e-2)
    with safe_open(tmp_path / "half" / ADAPTER, "pt") as file:
        assert {file.get_tensor(name).dtype for name in file.keys()} == {torch.float32}
    # Trained on the rounded weights of the same file, so it belongs to that model.
    found = load_saved_adapter(load_components(model), tmp_path / "half")
    assert found["steps"] == "2"


def test_prior_preservation_makes_the_missing_class_pictures(
    command: Command, tmp_path: Path
) -> None:
    kept = tmp_path / "class"
    flags = ("--with_prior_preservation", "--class_data_dir", kept, "--class_prompt", "a disc")
    assert command(*flags, "--num_class_images", 3, "--max_train_steps", 2) == 0
    made = sorted(kept.rglob("*.png"))
    assert len(made) == 3
    stamps = [path.stat().st_mtime_ns for path in made]
    assert command(*flags, "--num_class_images", 3, "--max_train_steps", 2) == 0
    assert [path.stat().st_mtime_ns for path in made] == stamps
    with_prior = metrics(tmp_path / "run")[0]["loss"]
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["pictures"]["class"] == [path.name for path in made]
    assert command("--max_train_steps", 2, out="without") == 0
    assert with_prior != metrics(tmp_path / "without")[0]["loss"]


def test_class_pictures_are_those_of_the_bare_base_model(
    command: Command, tmp_path: Path, model: Path
) -> None:
    """Whatever the start of the adapter that is already attached while they are made."""
    flags = ("--with_prior_preservation", "--class_prompt", "a disc", "--num_class_images", 2)
    flags = (*flags, "--class_data_dir", tmp_path / "class", "--max_train_steps", 1)
    assert command(*flags, "--init", "pissa", "--loi_batches", None) == 0
    bare = ensure_class_images(load_components(model), "a disc", tmp_path / "bare", 2)
    made = sorted((tmp_path / "class").rglob("*.png"))
    assert [path.read_bytes() for path in made] == [path.read_bytes() for path in bare]
    assert moved(tmp_path / "run") > 1e-5  # the adapter was switched on again


def test_the_slow_parts_are_announced(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--with_prior_preservation", "--class_prompt", "a disc", "--num_class_images", 1)
    flags = (*flags, "--class_data_dir", tmp_path / "class", "--validation_prompt", PROMPT)
    assert command(*flags, "--max_train_steps", 1) == 0
    starts = [
        next(place for place, message in enumerate(caplog.messages) if words in message)
        for words in (
            "making 1 of 1 class pictures",
            "start loi: from 2 batches of 2",
            "Samples before training",
        )
    ]
    assert starts == sorted(starts)


def test_the_card_names_the_trigger_and_nothing_of_the_machine(
    command: Command, tmp_path: Path
) -> None:
    """README.md of the run; that of somebody else is kept, and the training is none the worse."""
    assert command("--validation_prompt", PROMPT, "--max_train_steps", 1) == 0
    card = (tmp_path / "run" / "README.md").read_text("utf-8")
    assert f'instance_prompt: "{PROMPT}"' in card
    assert "url: samples/step-000001-0.png" in card
    assert "| steps | 1 |" in card
    assert "3 pictures" in card
    assert str(tmp_path) not in card
    assert "ümläut" not in card
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "README.md").write_text("my own words")
    assert command("--max_train_steps", 1, out="own") == 0
    assert (tmp_path / "own" / "README.md").read_text() == "my own words"
    assert (tmp_path / "own" / ADAPTER).is_file()


def test_tensorboard_on_request(command: Command, tmp_path: Path) -> None:
    assert command("--report_to", "tensorboard", "--max_train_steps", 1) == 0
    assert list((tmp_path / "run" / "logs").glob("events.*"))


# -------------------------------------------------------------------------------- as a program


def test_help_is_grouped_and_exits_0(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        train_dreambooth.main(["--help"])
    assert caught.value.code == 0
    text = capsys.readouterr().out
    for word in ("\nmodel:\n", "\noptimizer:\n", "--instance_data_dir PATH", "--config FILE.yaml"):
        assert word in text


def test_the_script_has_no_logic_of_its_own() -> None:
    """At most 150 lines, and no loop but comprehensions."""
    text = (ROOT / "train_dreambooth.py").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 150
    assert "    for " not in text
    assert "while " not in text
