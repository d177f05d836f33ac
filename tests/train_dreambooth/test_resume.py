"""A run that is stopped or killed goes on to the same bytes; one that cannot go on says why."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml
from PIL import Image

from dreamrie.checkpoint import list_checkpoints
from dreamrie.diffusion.task import DreamBoothTask
from dreamrie.trainer import loop
from tests.mutants.summary import FIGURE
from tests.train_dreambooth.killing import finish, kill_at_random, result_of, start, steps_in
from tests.train_dreambooth.small_run import ADAPTER, PROMPT, Command

pytestmark = pytest.mark.end_to_end

STEPS, EVERY = 14, 3


def killed_run(model: Path, pictures: Path, folder: Path, seed: int = 0) -> list[str]:
    """Prior preservation, flips, random crops, accumulation; a step sees 4 of 3 pictures."""
    settings = {
        "pretrained_model_name_or_path": model,
        "instance_data_dir": pictures,
        "instance_prompt": PROMPT,
        "output_dir": folder,
        "class_data_dir": folder.parent / "class",
        "class_prompt": "a photo of a disc",
        "num_class_images": 3,
        "max_train_steps": STEPS,
        "train_batch_size": 2,
        "gradient_accumulation_steps": 2,
        "rank": 2,
        "loi_batches": 2,
        "spectrum_steps": 2,
        "learning_rate": 1e-2,
        "checkpointing_steps": EVERY,
        "seed": seed,
    }
    words = [str(word) for name, value in settings.items() for word in (f"--{name}", value)]
    return [*words, "--with_prior_preservation", "--random_flip"]


def kill_and_resume(
    model: Path, pictures: Path, folder: Path, kills: int, record: Callable[[str, object], None]
) -> None:
    """One run that is never stopped, and `kills` that are killed once at a random moment and go on."""
    process = start(killed_run(model, pictures, folder / "straight"), folder / "straight")
    # How long the steps take, so that kills fall into all of them.
    while process.is_alive() and steps_in(folder / "straight") == 0:
        time.sleep(0.005)
    started = time.perf_counter()
    process.join()
    span, reached, failures, anew = time.perf_counter() - started, [], 0, 0
    assert process.exitcode == 0
    wanted, chance = result_of(folder / "straight"), random.Random(7)
    assert [row["step"] for row in wanted["losses"]] == list(range(1, STEPS + 1))
    for number in range(kills):
        run = folder / f"run-{number}"
        argv = killed_run(model, pictures, run)
        reached.append(kill_at_random(start(argv, run), run, chance, span))
        if list_checkpoints(run):
            assert finish([*argv, "--resume_from_checkpoint", "latest"], run) == 0
        else:
            anew += 1
            assert finish([*argv, "--resume_from_checkpoint", "latest"], run) == 1
            assert finish(argv, run) == 0
        failures += result_of(run) != wanted
    record(
        FIGURE,
        f"{kills} kills -9 at steps {min(reached)} to {max(reached)} of {STEPS}, {anew} before the first checkpoint: "
        f"{failures} runs that went on to other bytes",
    )
    assert len(set(reached)) > min(3, kills // 3)
    assert failures == 0


def test_twenty_killed_runs_go_on_to_the_same_bytes(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    kill_and_resume(model, pictures, tmp_path, 20, record_property)


@pytest.mark.slow
def test_two_hundred_killed_runs_go_on_to_the_same_bytes(
    model: Path,
    pictures: Path,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    kill_and_resume(model, pictures, tmp_path, 200, record_property)


# ------------------------------------------------------------------------------------- signals


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stopped_run_saves_and_goes_on_to_the_same_bytes(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    number: int,
) -> None:
    """C8: the step is finished, a checkpoint of it written, the exit code 130; the message says how to go on."""
    caplog.set_level("INFO", "dreamrie")
    flags = ("--max_train_steps", 5, "--checkpointing_steps", 100)
    assert command(*flags, out="straight") == 0
    real = loop._Loop.step

    def stopped(self: loop._Loop, step: int) -> None:
        if step == 3:
            os.kill(os.getpid(), number)
        real(self, step)

    monkeypatch.setattr(loop._Loop, "step", stopped)
    assert command(*flags) == 130
    monkeypatch.undo()
    assert [path.name for path in list_checkpoints(tmp_path / "run")] == ["checkpoint-3"]
    assert "--resume_from_checkpoint latest goes on from here" in caplog.text
    assert (tmp_path / "run" / ADAPTER).exists()
    assert command(*flags, "--resume_from_checkpoint", "latest") == 0
    assert result_of(tmp_path / "run") == result_of(tmp_path / "straight")


# ------------------------------------------------------------------------------------ settings


@pytest.fixture
def stopped_run(command: Command, tmp_path: Path) -> Path:
    """A finished run of four steps with checkpoints 2 and 4."""
    assert command("--checkpointing_steps", 2, "--lr_scheduler", "constant") == 0
    return tmp_path / "run"


REFUSED = [
    (("--learning_rate", "5e-3"), "learning_rate was 0.001 and is now 0.005"),
    (("--rank", 4), "rank was 2 and is now 4"),
    (("--seed", 1), "seed was 0 and is now 1"),
    (("--random_flip",), "random_flip was False and is now True"),
    (("--lr_scheduler", "linear"), "lr_scheduler was 'constant' and is now 'linear'"),
    (("--train_batch_size", 3), "train_batch_size was 2 and is now 3"),
]


@pytest.mark.parametrize(("flags", "said"), REFUSED)
def test_other_settings_are_refused_with_both_values(
    command: Command,
    stopped_run: Path,
    caplog: pytest.LogCaptureFixture,
    flags: tuple[object, ...],
    said: str,
) -> None:
    before = {path: path.stat().st_mtime_ns for path in stopped_run.rglob("*")}
    base = ("--checkpointing_steps", 2, "--resume_from_checkpoint", "latest")
    if "--lr_scheduler" not in flags:
        base += ("--lr_scheduler", "constant")
    assert command(*base, *flags) == 2
    assert said in caplog.text
    assert "its config.yaml is a --config" in caplog.text
    assert {path: path.stat().st_mtime_ns for path in stopped_run.rglob("*")} == before


def test_what_may_change_may_change(command: Command, stopped_run: Path, tmp_path: Path) -> None:
    """Longer, with a constant rate; other intervals; prompts to look at: the steps are those of one long run."""
    flags = ("--lr_scheduler", "constant", "--max_train_steps", 6)
    changed = ("--checkpointing_steps", 3, "--checkpoints_total_limit", 0, "--spectrum_steps", 2)
    looks = ("--validation_prompt", PROMPT, "--validation_steps", 3)
    assert command(*flags, *changed, *looks, "--resume_from_checkpoint", "latest") == 0
    assert command(*flags, "--checkpointing_steps", 6, out="long") == 0
    first, second = result_of(stopped_run), result_of(tmp_path / "long")
    for name in ("adapter", "tensors"):
        assert first[name] == second[name]
    names = [path.name for path in list_checkpoints(stopped_run)]
    assert names == ["checkpoint-2", "checkpoint-4", "checkpoint-6"]


def test_a_longer_run_keeps_its_warm_up(
    command: Command, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its default is a tenth of the length; given by hand, it is a setting like any other."""
    base = ("--lr_scheduler", "constant", "--checkpointing_steps", 2)
    assert command(*base, "--max_train_steps", 2) == 0
    longer = (*base, "--max_train_steps", 12, "--resume_from_checkpoint", "latest")
    assert command(*longer, "--lr_warmup_steps", 2) == 2
    assert "lr_warmup_steps was 0 and is now 2" in caplog.text
    assert command(*longer) == 0
    assert command(*base, "--max_train_steps", 12, "--lr_warmup_steps", 0, out="long") == 0
    first, second = result_of(tmp_path / "run"), result_of(tmp_path / "long")
    assert first["adapter"] == second["adapter"]


def test_the_settings_of_the_run_are_a_config_to_go_on_with(
    stopped_run: Path, model: Path, caplog: pytest.LogCaptureFixture
) -> None:
    import train_dreambooth

    config = yaml.safe_load((stopped_run / "config.yaml").read_text())
    assert "resume_from_checkpoint" not in config
    argv = [
        "--config",
        str(stopped_run / "config.yaml"),
        "--resume_from_checkpoint",
        "checkpoint-2",
    ]
    before = result_of(stopped_run)
    assert train_dreambooth.main(argv) == 0
    assert result_of(stopped_run) == before


def test_other_pictures_are_refused(
    command: Command,
    stopped_run: Path,
    tmp_path: Path,
    pictures: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """By content: the same files in another folder will do, one other pixel will not."""
    flags = ("--checkpointing_steps", 2, "--lr_scheduler", "constant")
    flags += ("--resume_from_checkpoint", "checkpoint-2")
    moved = tmp_path / "moved"
    moved.mkdir()
    for path in pictures.iterdir():
        (moved / path.name).write_bytes(path.read_bytes())
    assert command(*flags, "--instance_data_dir", moved) == 0
    image = Image.open(moved / "1.png")
    image.putpixel((0, 0), (1, 2, 3))
    image.save(moved / "1.png")
    assert command(*flags, "--instance_data_dir", moved) == 1
    assert "the content of the pictures of the concept was" in caplog.text


def test_a_missing_checkpoint_is_an_error_and_not_step_0(
    command: Command,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(DreamBoothTask, "batch", None)
    assert command("--resume_from_checkpoint", "latest") == 1
    assert "there is no checkpoint to go on from" in caplog.text
    assert not (tmp_path / "run").exists()


def test_a_shorter_run_than_its_checkpoint_is_refused(
    command: Command, stopped_run: Path, caplog: pytest.LogCaptureFixture
) -> None:
    flags = ("--lr_scheduler", "constant", "--max_train_steps", 3, "--lr_warmup_steps", 0)
    assert command(*flags, "--resume_from_checkpoint", "latest") == 1
    assert "checkpoint-4 is beyond the end of the training, which has 3 steps" in caplog.text


def test_no_checkpoints_when_they_are_switched_off(command: Command, tmp_path: Path) -> None:
    assert command("--checkpointing_steps", 0) == 0
    assert list_checkpoints(tmp_path / "run") == []
    assert (tmp_path / "run" / ADAPTER).exists()


def test_a_dry_run_says_where_it_would_go_on(
    command: Command, stopped_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--checkpointing_steps", 2, "--lr_scheduler", "constant")
    assert command(*flags, "--resume_from_checkpoint", "latest", "--dry-run") == 0
    assert f"# goes on from latest in {stopped_run}" in capsys.readouterr().out
