"""The one way to write a file: whole or not at all, whatever fails, whoever asks."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest

from dreamrie import adapter_file, files, runlog
from dreamrie.diffusion import images


def litter(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_is_replaced_whole_with_the_usual_permissions(tmp_path: Path) -> None:
    """Long names too: the temporary one must not be longer than a file name may be."""
    target = tmp_path / ("ü" * 120 + ".bin")
    files.write_atomic(target, b"old")
    files.write_atomic(target, b"new and longer")
    assert target.read_bytes() == b"new and longer"
    assert litter(tmp_path) == [target.name]
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE(target.stat().st_mode) == 0o666 & ~mask


def test_a_new_folder_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    """Not before, not after a failure, and never in the place of another one."""
    target = tmp_path / "folder"
    with files.new_folder(target) as folder:
        (folder / "deep").mkdir()
        (folder / "deep" / "a.bin").write_bytes(b"a")
        (folder / "deep" / "a.bin").chmod(0o600)
        assert not target.exists()
    assert litter(tmp_path) == ["folder"]
    assert (target / "deep" / "a.bin").read_bytes() == b"a"
    mask = os.umask(0o022)
    os.umask(mask)
    assert stat.S_IMODE((target / "deep" / "a.bin").stat().st_mode) == 0o666 & ~mask
    assert stat.S_IMODE(target.stat().st_mode) == 0o777 & ~mask
    with pytest.raises(OSError), files.new_folder(target) as folder:
        (folder / "other.bin").write_bytes(b"b")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "new") as folder:
        raise RuntimeError
    assert litter(tmp_path) == ["folder"]
    assert litter(target) == ["deep"]


@pytest.mark.parametrize("fault", ["fdopen", "fsync", "replace", "interrupt"])
def test_a_failed_write_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The disk is full at each stage, or Ctrl-C comes: the old file is intact, nothing lies beside it."""
    target = tmp_path / "file.bin"
    files.write_atomic(target, b"old")
    error = KeyboardInterrupt() if fault == "interrupt" else OSError(28, "No space left on device")

    def fail(*_: object, **__: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync" if fault == "interrupt" else fault, fail)
        with pytest.raises(type(error)):
            files.write_atomic(target, b"new")
    assert target.read_bytes() == b"old"
    assert litter(tmp_path) == ["file.bin"]


def test_the_file_is_synced_before_the_rename_and_the_folder_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In any other order a power cut can leave an empty file under the right name."""
    events: list[str] = []
    sync, replace = os.fsync, os.replace

    def noted_sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        sync(descriptor)

    def noted_replace(source: Path, target: Path) -> None:
        events.append("rename")
        replace(source, target)

    monkeypatch.setattr(files.os, "fsync", noted_sync)
    monkeypatch.setattr(files.os, "replace", noted_replace)
    files.write_atomic(tmp_path / "file.bin", b"new")
    assert events == ["file", "rename", "folder"]


@pytest.mark.parametrize(("code", "raised"), [(errno.EINVAL, False), (errno.EIO, True)])
def test_a_file_system_without_folder_sync_is_no_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, raised: bool
) -> None:
    def refuse(_: int) -> None:
        raise OSError(code, "refused")

    monkeypatch.setattr(files.os, "fsync", refuse)
    if raised:
        with pytest.raises(OSError, match="refused"):
            files.sync_folder(tmp_path)
    else:
        files.sync_folder(tmp_path)


def test_there_is_one_writer() -> None:
    """Records, adapters and pictures go through it; none of them renames or syncs by itself."""
    for module in (runlog, adapter_file, images):
        text = Path(module.__file__ or "").read_text("utf-8")
        assert "write_atomic(" in text
        for own in ("fsync", "os.replace", ".replace(path)", "mkstemp"):
            assert own not in text, (module.__name__, own)
