"""Records of a run on a disk that is full for a while, and after a checkpoint."""

from __future__ import annotations

import logging
import tempfile
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from dreamrie import records
from dreamrie.records import Record


class Disk:
    """A file whose disk is full while `is_full`; it takes a part of a line before it says so."""

    def __init__(self, real: Any) -> None:
        self._real, self.is_full = real, False

    def write(self, content: bytes) -> int:
        if self.is_full:
            if len(content) > 3:
                return int(self._real.write(content[:3]))
            raise OSError(28, "No space left on device")
        return int(self._real.write(content))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._real, name)


def law_no_line_is_lost_to_a_full_disk(impl: Any) -> None:
    """Lines of the bad time are written once there is room, in order and whole; until then the file is whole too."""
    with tempfile.TemporaryDirectory() as name:
        _a_full_disk(impl, Path(name) / "metrics.jsonl")


def _a_full_disk(impl: Any, path: Path) -> None:
    """Two good lines around two that must wait."""
    with closing(impl.Record(path)) as record:
        disk = record._file = Disk(record._file)
        record.add("first line")
        disk.is_full = True
        record.add("second line")
        record.add("third line")
        assert path.read_text() == "first line\n"
        assert record.sync() == len("first line\n")
        disk.is_full = False
        record.add("fourth line")
        assert path.read_text() == "first line\nsecond line\nthird line\nfourth line\n"
        record.close()
        record.add("too late")
    assert path.read_text().count("\n") == 4


def test_no_line_is_lost_to_a_full_disk(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "dreamrie")
    law_no_line_is_lost_to_a_full_disk(records)
    errors = [r.getMessage() for r in caplog.records if r.levelno == logging.ERROR]
    assert len(errors) == 1
    assert "training goes on and they wait" in errors[0]
    assert "takes lines again; none is lost" in caplog.text


def test_lines_that_were_never_written_are_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = Record(tmp_path / "metrics.jsonl")
    disk: Any = Disk(record._file)
    record._file = disk
    disk.is_full = True
    record.add("a line")
    record.add("another")
    record.close()
    assert "the last 2 lines were never written" in caplog.text
    assert (tmp_path / "metrics.jsonl").read_bytes() == b""


def law_a_record_is_cut_at_a_whole_line(impl: Any) -> None:
    """What came after the checkpoint goes; half a line before it goes too; what is whole stays."""
    with tempfile.TemporaryDirectory() as name:
        _cut_twice(impl, Path(name) / "metrics.jsonl")


def _cut_twice(impl: Any, path: Path) -> None:
    """In the middle of a file, and behind its end."""
    path.write_text("one\ntwo\nthree\nfou")
    record = impl.Record(path, len("one\ntwo\n"))
    record.add("next")
    record.close()
    assert path.read_text() == "one\ntwo\nnext\n"
    path.write_text("one\ntwo\nthr")
    record = impl.Record(path, 100)
    record.add("next")
    record.close()
    assert path.read_text() == "one\ntwo\nnext\n"


def test_a_record_is_cut_at_a_whole_line(caplog: pytest.LogCaptureFixture) -> None:
    law_a_record_is_cut_at_a_whole_line(records)
    assert "lacks the last 92 bytes of its lines" in caplog.text


def test_a_record_that_is_gone_begins_again_and_says_so(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    record = Record(tmp_path / "metrics.jsonl", 40)
    record.add("next")
    record.close()
    assert (tmp_path / "metrics.jsonl").read_text() == "next\n"
    assert "metrics.jsonl is gone; it begins again at this step" in caplog.text


def test_a_sync_that_fails_ends_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    record = Record(tmp_path / "metrics.jsonl")
    record.add("a line")

    def fails(_: int) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(records.os, "fsync", fails)
    assert record.sync() == len("a line\n")
    assert "cannot be synced" in caplog.text
    record.close()
