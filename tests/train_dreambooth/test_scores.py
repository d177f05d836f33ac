"""The command with scores on the way: what it leaves, what it says, and what it needs."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from PIL import Image

from dreamrie.checkpoint import MANIFEST, STATE, TENSORS
from dreamrie.diffusion.adapters import read_metadata
from dreamrie.trainer import StopRequest, loop
from tests.train_dreambooth.small_run import ADAPTER, PROMPT, Command, metrics

pytestmark = pytest.mark.end_to_end

SCORES = (
    *("--score_steps", 2, "--score_images", 4, "--score_prompts", "living"),
    *("--score_inference_steps", 1, "--score_encoders", "effnet-lite2-64-160", "tiny-clip"),
)


def test_a_scored_run_that_was_stopped_goes_on_with_its_scores(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Scores, choice and pictures are those of a run that never stopped; scorings after the checkpoint are repeated."""
    assert command(*SCORES, out="straight") == 0
    real = loop._Loop.after_step

    def killed(self: loop._Loop, step: int, stop: StopRequest) -> None:
        if step == 3:
            raise InterruptedError
        real(self, step, stop)

    monkeypatch.setattr(loop._Loop, "after_step", killed)
    with pytest.raises(InterruptedError):
        command(*SCORES, "--checkpointing_steps", 1)
    monkeypatch.undo()
    assert len((tmp_path / "run" / "scores.jsonl").read_text("utf-8").splitlines()) == 3
    (tmp_path / "run" / "scores.jsonl").write_text("of a later step")
    flags = ("--checkpointing_steps", 1, "--resume_from_checkpoint", "checkpoint-2")
    assert command(*SCORES, *flags) == 0
    (tmp_path / "run" / "best" / ADAPTER).unlink()
    finished = ("--checkpointing_steps", 1, "--resume_from_checkpoint", "latest")
    assert command(*SCORES, *finished) == 0  # makes best/ again
    names = ["scores.jsonl", "best/best.json", f"best/{ADAPTER}", ADAPTER, "scores.png"]
    names += [f"scored/step-{step:06d}/pictures.png" for step in (0, 2, 4)]
    for name in names:
        whole, again = (tmp_path / run / name for run in ("straight", "run"))
        assert whole.read_bytes() == again.read_bytes(), name


def test_a_scored_run_keeps_the_best_adapter_and_trains_the_same_one(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert command(*SCORES) == 0
    run = tmp_path / "run"
    names = {path.relative_to(run).as_posix() for path in run.rglob("*") if path.is_file()}
    scored = {f"scored/step-{step:06d}/pictures.png" for step in (0, 2, 4)}
    scored |= {f"scored/step-{step:06d}/{ADAPTER}" for step in (2, 4)}
    plain = {ADAPTER, "README.md", "config.yaml", "metrics.jsonl", "run.json", "spectrum.jsonl"}
    assert names == {
        ".lock",
        *(f"checkpoint-4/{name}" for name in (TENSORS, STATE, MANIFEST)),
        *plain,
        *scored,
        f"best/{ADAPTER}",
        "best/best.json",
        "scores.jsonl",
        "scores.png",
    }
    best = json.loads((run / "best" / "best.json").read_text("utf-8"))
    assert (run / "best" / ADAPTER).read_bytes() == (
        run / "scored" / f"step-{best['step']:06d}" / ADAPTER
    ).read_bytes()
    assert read_metadata(run / "best")["steps"] == str(best["step"])
    assert [line["step"] for line in metrics(run) if "scores" in line] == [0, 2, 4]
    assert "Step 0: before training, image similarity" in caplog.text
    assert f"best holds step {best['step']}: {best['reason']}; scoring took" in caplog.text
    facts = json.loads((run / "scores.jsonl").read_text("utf-8").splitlines()[0])
    assert all("sks disc" in prompt for prompt in facts["prompts"])
    assert not any("sks" in text for text in facts["texts"])
    assert command(out="plain") == 0
    assert (tmp_path / "plain" / ADAPTER).read_bytes() == (run / ADAPTER).read_bytes()
    # An older run goes as a whole.
    assert command("--max_train_steps", 1) == 0
    assert (run / "previous-1" / "best" / "best.json").is_file()
    assert not (run / "best").exists()


def test_a_dry_run_says_what_would_be_scored(
    command: Command, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command("--dry-run", *SCORES) == 0
    said = "scores: every 2 steps, 4 pictures of the set living, with effnet-lite2-64-160 and tiny-clip"
    assert said in capsys.readouterr().out
    assert command("--dry-run") == 0
    assert "scores: off" in capsys.readouterr().out


def test_scores_without_their_packages_say_what_to_install(
    command: Command, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "eval.training", None)
    assert command(*SCORES) == 2
    assert 'pip install -e ".[eval]"' in caplog.text


def test_weights_that_cannot_be_had_stop_before_training(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """A real encoder without a network: the message names the file and the way to hand it over; nothing is written."""
    assert command(*SCORES[:-2], "dino") == 2
    assert "timm/vit_small_patch16_224.dino" in caplog.text
    assert not (tmp_path / "run").exists()


def test_one_picture_is_too_few_to_score(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "one").mkdir()
    Image.effect_noise((64, 64), 50).save(tmp_path / "one" / "a.png")
    assert command(*SCORES, "--instance_data_dir", tmp_path / "one") == 2
    assert "scores need at least two pictures" in caplog.text


def test_a_prompt_without_the_token_is_refused(
    command: Command, caplog: pytest.LogCaptureFixture
) -> None:
    assert command(*SCORES, "--instance_prompt", PROMPT.replace("sks ", "")) == 2
    assert "token 'sks' is not a word of the instance prompt" in caplog.text
