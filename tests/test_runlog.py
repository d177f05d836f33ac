"""Run records: valid JSON whatever the numbers, files whole or absent, a quiet terminal."""

from __future__ import annotations

import json
import logging
import math
import sys
from pathlib import Path

import pytest

from dreamrie import __version__
from dreamrie.errors import (
    AdapterError,
    CheckpointError,
    ConfigError,
    ImageError,
    NumericalError,
)
from dreamrie.runlog import (
    RunLog,
    check_output_dir,
    code_version,
    exit_code,
    package_versions,
    start_logging,
    write_atomic,
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
        {"step": 3, "validation": {"similarity": 0.5}},
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
    for words in ("4/4", "loss=0.2500", "lr=1.0e-03", "step/s"):
        assert words in text


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
    assert [e.value for e in events.Scalars("validation/similarity")] == [0.5]
    assert [e.step for e in events.Scalars("lr")] == [3, 4]


def test_tensorboard_that_is_not_installed_is_a_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        RunLog(tmp_path, 4, quiet=True, tensorboard_dir=Path("logs"))
    check_output_dir(tmp_path)
    with pytest.raises(ConfigError, match="pip install tensorboard"):
        check_output_dir(tmp_path, tensorboard=True)


# ------------------------------------------------------------------------------------ files


def test_a_failed_write_says_where_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The disk is full: the message names the file, which is intact; nothing lies beside it."""
    target = tmp_path / "file.bin"
    write_atomic(target, b"old")

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("dreamrie.files.os.replace", full)
    with pytest.raises(CheckpointError, match="No space left") as caught:
        write_atomic(target, b"new")
    assert str(target) in str(caught.value)
    monkeypatch.undo()
    assert target.read_bytes() == b"old"
    assert [path.name for path in tmp_path.iterdir()] == ["file.bin"]


def test_output_folders_that_cannot_be_used(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("mine")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    for bad in (file, file / "below" / "it", tmp_path / "loop" / "x", tmp_path / ("n" * 300)):
        with pytest.raises(ConfigError, match="output folder cannot be used") as caught:
            check_output_dir(bad)
        assert "--output_dir" in str(caught.value)
        assert len(str(caught.value).splitlines()) == 3
        with pytest.raises(ConfigError):
            RunLog(bad, 3)
    assert file.read_text() == "mine"
    for good in (tmp_path, tmp_path / "new", tmp_path / "new" / "er" / "ümläut and blank"):
        check_output_dir(good)
        assert good == tmp_path or not good.exists()  # looking creates nothing


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
