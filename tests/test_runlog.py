"""Run records: valid JSON whatever the numbers, files whole or absent, a quiet terminal."""

from __future__ import annotations

import json
import logging
import math
import re
import sys
from pathlib import Path
from typing import Any

import pytest

from dreamrie import __version__
from dreamrie.adapter_file import DIFFUSERS_FILE
from dreamrie.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ImageError,
    NumericalError,
)
from dreamrie.run_folder import ADAPTER, folder_for_older_run
from dreamrie.runlog import (
    RunLog,
    check_records,
    code_version,
    exit_code,
    package_versions,
    start_logging,
)

STEP = {"step": 3, "loss": 0.25, "lr": 1e-3, "grad_norm": 2.5, "steps_per_s": 7.5, "skipped": None}


def lines(path: Path) -> list[dict[str, object]]:
    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


def test_records_are_one_json_object_a_line(tmp_path: Path) -> None:
    with RunLog(tmp_path / "a" / "b", 5, quiet=True) as log:
        log.step(STEP)
        assert lines(tmp_path / "a" / "b" / "metrics.jsonl") == [STEP]  # on disk while it runs
        log.scores(3, {"similarity": 0.5})
        log.spectrum(3, point={"layer": [2.0, 1.0]}, change={"layer": [0.5, 0.0]})
    assert lines(tmp_path / "a" / "b" / "metrics.jsonl") == [
        STEP,
        {"step": 3, "scores": {"similarity": 0.5}},
    ]
    assert lines(tmp_path / "a" / "b" / "spectrum.jsonl") == [
        {"step": 3, "point": {"layer": [2.0, 1.0]}, "change": {"layer": [0.5, 0.0]}}
    ]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    with RunLog(tmp_path, 5, quiet=True) as log:
        log.step(STEP | {"loss": math.nan, "grad_norm": -math.inf, "skipped": "loss"})
        log.spectrum(3, change={"layer": [1.0, math.nan]})
    record = lines(tmp_path / "metrics.jsonl")[0]
    assert (record["loss"], record["grad_norm"], record["lr"]) == (None, None, 1e-3)
    assert lines(tmp_path / "spectrum.jsonl")[0]["change"] == {"layer": [1.0, None]}


def test_a_new_run_starts_with_empty_records(tmp_path: Path) -> None:
    for _ in range(2):
        with RunLog(tmp_path, 5, quiet=True) as log:
            log.step(STEP)
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


def test_without_a_folder_nothing_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on every process but the main one."""
    monkeypatch.chdir(tmp_path)
    with RunLog(None, 5, quiet=False) as log:
        log.step(STEP)
        log.scores(3, {"similarity": 0.5})
        log.spectrum(3, change={})
        log.manifest("rank: 4\n", [], {}, {})
    assert not list(tmp_path.iterdir())


def test_the_manifest_says_how_to_repeat_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["train_dreambooth.py"])
    with RunLog(tmp_path, 5, quiet=True) as log:
        flags = ["--instance_prompt", "a photo of a sks dög"]
        facts = {"base_model": {"commit": None, "directory": Path("x")}, "gap": math.inf}
        log.manifest("rank: 4\n", flags, {"run": 7}, facts)
    record = json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
    assert record["command"].endswith(
        "train_dreambooth.py --instance_prompt 'a photo of a sks dög'"
    )
    assert record["seeds"] == {"run": 7}
    assert record["versions"] == package_versions()
    assert record["base_model"] == {"commit": None, "directory": "x"}
    assert record["gap"] is None
    assert (tmp_path / "config.yaml").read_text() == "rank: 4\n"


def test_versions_and_code() -> None:
    versions = package_versions()
    assert versions["dreamrie"] == __version__
    assert versions["torch"].startswith("2.")
    assert set(versions) >= {"python", "diffusers", "peft", "accelerate", "transformers"}
    assert all(letter in "0123456789abcdef+" for letter in code_version())


def test_the_progress_bar_shows_loss_rate_and_speed_on_a_terminal_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for quiet, shown in ((None, False), (True, False), (False, True)):
        with RunLog(tmp_path, 4, quiet=quiet) as log:
            for step in range(1, 5):
                log.step(STEP | {"step": step})
        text = capsys.readouterr().err
        assert bool(text) == shown
    for words in ("4/4", "loss=0.2500", "lr=1.0e-03", "steps/s=7.5", "ETA 00:00"):
        assert words in text


def test_the_progress_bar_of_slow_steps_shows_steps_per_second_too(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with RunLog(tmp_path, 4, quiet=False) as log:
        log.step(STEP | {"step": 1, "steps_per_s": 0.0521})
    text = capsys.readouterr().err
    assert "steps/s=0.0521" in text
    assert "s/step" not in text


def test_messages_stand_on_lines_of_their_own_beside_the_bar(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    handler, root = logging.StreamHandler(sys.stderr), logging.getLogger()
    root.addHandler(handler)
    handlers = list(root.handlers)
    try:
        with RunLog(tmp_path, 4, quiet=False) as log:
            assert not capsys.readouterr().err  # no bar before there is a step to show
            for step in range(1, 4):
                log.step(STEP | {"step": step})
                root.warning("message %d", step)
        assert root.handlers == handlers
    finally:
        root.removeHandler(handler)
    pieces = re.split(r"[\r\n]", capsys.readouterr().err)
    assert [piece for piece in pieces if "message" in piece] == [
        "message 1",
        "message 2",
        "message 3",
    ]


def test_records_on_a_full_disk_are_told_once_and_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """/dev/full takes nothing; the training behind the log goes on."""
    with RunLog(tmp_path, 4, quiet=True) as log:
        record: Any = log._metrics
        record._file.close()
        record._file = Path("/dev/full").open("wb", buffering=0)
        for step in range(1, 5):
            log.step(STEP | {"step": step})
            log.spectrum(step, change={"layer": [1.0]})
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 2
    assert "metrics.jsonl" in errors[0]
    assert "No space left" in errors[0]
    assert errors[1].endswith("the last 4 lines were never written")
    assert len(lines(tmp_path / "spectrum.jsonl")) == 4


def test_an_older_run_is_moved_aside_whole(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "dreamrie")
    (tmp_path / "mine.txt").write_text("mine")
    for number in (1, 2, 3):
        with RunLog(tmp_path, 4, quiet=True) as log:
            log.step(STEP | {"step": number})
            log.manifest(f"rank: {number}\n", [], {}, {})
            assert not (tmp_path / ADAPTER).exists()
            assert not (tmp_path / "samples").exists()
        (tmp_path / ADAPTER).write_text(f"adapter {number}")
        (tmp_path / "samples").mkdir()
        (tmp_path / "samples" / f"{number}.png").write_text("picture")
    assert {p.name for p in tmp_path.iterdir() if p.is_dir()} == {
        "previous-1",
        "previous-2",
        "samples",
    }
    for number in (1, 2):
        older = tmp_path / f"previous-{number}"
        assert (older / ADAPTER).read_text() == f"adapter {number}"
        assert (older / "config.yaml").read_text() == f"rank: {number}\n"
        assert (older / "run.json").exists()
        assert [record["step"] for record in lines(older / "metrics.jsonl")] == [number]
        assert (older / "spectrum.jsonl").exists()
        assert [p.name for p in (older / "samples").iterdir()] == [f"{number}.png"]
        assert f"moved to {older}" in caplog.text
    assert (tmp_path / "mine.txt").read_text() == "mine"
    assert folder_for_older_run(tmp_path) == tmp_path / "previous-3"


def test_a_folder_without_a_run_is_left_as_it_is(tmp_path: Path) -> None:
    assert ADAPTER == DIFFUSERS_FILE
    assert folder_for_older_run(tmp_path / "absent") is None
    (tmp_path / "config.yaml").write_text("rank: 4\n")
    with RunLog(tmp_path, 4, quiet=True):
        pass
    assert not list(tmp_path.glob("previous-*"))
    assert (tmp_path / "config.yaml").exists()


def test_closing_twice_is_harmless_and_happens_after_an_error(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), RunLog(tmp_path, 4, quiet=True) as log:
        log.step(STEP)
        raise ZeroDivisionError
    log.close()
    log.step(STEP)  # closed: nothing more is written
    assert len(lines(tmp_path / "metrics.jsonl")) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with RunLog(tmp_path, 4, quiet=True, tensorboard_dir=Path("logs")) as log:
        log.step(STEP)
        log.step(STEP | {"step": 4, "loss": math.nan})
        log.scores(3, {"similarity": 0.5})
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 0.25)]
    assert [e.value for e in events.Scalars("scores/similarity")] == [0.5]
    assert [e.step for e in events.Scalars("lr")] == [3, 4]
    assert [e.value for e in events.Scalars("steps_per_s")] == [7.5, 7.5]


def test_tensorboard_that_is_not_installed_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunLog(tmp_path, 4, quiet=True, tensorboard_dir=Path("logs"))
    check_records(tensorboard=False)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_records(tensorboard=True)


def test_records_that_cannot_be_opened(tmp_path: Path) -> None:
    (tmp_path / "spectrum.jsonl").mkdir()
    with pytest.raises(ConfigError, match=r"spectrum\.jsonl"):
        RunLog(tmp_path, 3)


# ------------------------------------------------------------------------------ the command


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ConfigError("rank"), 2),
        (ImageError("picture"), 2),
        (AdapterError("file"), 2),
        (NumericalError("loss"), 1),
        (CheckpointError("disk"), 1),
        (KeyboardInterrupt(), 130),
    ],
)
def test_exit_codes(
    error: ConfigError | KeyboardInterrupt, code: int, caplog: pytest.LogCaptureFixture
) -> None:
    assert exit_code(error) == code
    assert len(caplog.records) == 1
    assert str(error) in caplog.text
    assert not caplog.records[0].exc_info


def test_a_crash_is_one_line_unless_verbose(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    level = logging.getLogger("dreamrie").level
    try:
        start_logging(False)
        sys.excepthook(ZeroDivisionError, ZeroDivisionError("by zero"), None)
        text = capsys.readouterr().err
        assert text.splitlines()[0] == "error: unexpected ZeroDivisionError: by zero"
        assert "-v" in text
        start_logging(True)
        assert sys.excepthook is sys.__excepthook__
    finally:
        logging.getLogger("dreamrie").setLevel(level)
