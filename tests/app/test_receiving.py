"""Uploads and what is left of them: kinds that are refused, rights of copies, old files, what a crash left."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from app import receiving
from app.storage import Storage, StorageError
from tests.app.test_storage import KEYS, tree, world

PROGRAMS = {
    "Linux": b"\x7fELF\x02\x01",
    "Windows": b"MZ\x90" + bytes(61) + b"PE\0\0",
    "macOS": b"\xcf\xfa\xed\xfe",
    "a script": b"#!/bin/sh\n",
}


@pytest.mark.parametrize("system", PROGRAMS)
def test_a_program_is_refused_whatever_it_is_called(system: str) -> None:
    with world() as here:
        for name in ("photo.png", "notes.txt"):
            with pytest.raises(StorageError, match="is a program"):
                here.receive([here.upload(name, PROGRAMS[system])])


def test_text_that_begins_like_a_program_is_text() -> None:
    with world() as here:
        for number, content in enumerate((b"MZ is short for something", b"#1 of them", b"ELF")):
            found = here.receive([here.upload(f"{number + 1}.txt", content)])
            assert found == [f"{number + 1}.txt"]


@pytest.mark.parametrize("name", ["a.exe", "a.png.exe", "a", ".png", "a.png ", "a.svg", "a.html"])
def test_another_suffix_is_refused_by_name(name: str) -> None:
    with world() as here:
        with pytest.raises(StorageError, match=r"not of a kind that is used here: \.png, \.txt\."):
            here.receive([here.upload(name)])


def test_copies_are_private_and_not_executable() -> None:
    """Whatever rights the upload has."""
    with world() as here:
        upload = here.upload("a.png")
        os.chmod(upload, 0o777)
        here.receive([upload])
        copy = here.storage.file(here.alice, "photos", "dog", "a.png")
        assert copy.read_bytes() == b"picture"
        assert copy.stat().st_mode & 0o777 == 0o600
        assert Path(upload).exists()


def test_a_photo_and_its_caption_stay_together() -> None:
    """Also where another pair of this name is there."""
    with world() as here:
        pair = [here.upload("My dog!.PNG"), here.upload("My dog!.txt")]
        assert here.receive(pair) == ["My-dog.png", "My-dog.txt"]
        assert here.receive(pair) == ["My-dog-2.png", "My-dog-2.txt"]
        assert here.receive([pair[0], pair[0]]) == ["My-dog-3.png", "My-dog-3-2.png"]


@pytest.mark.parametrize("more", [b"", b"picture and more"])
def test_a_file_that_changes_after_the_check_is_refused(
    more: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    with world() as here:
        folder = here.storage.folder(here.alice, "photos", "dog")
        before, upload = tree(folder.parent), Path(here.upload("a.png"))
        check = receiving.check_bytes

        def grow(*args: int) -> None:
            check(*args)
            upload.write_bytes(more)

        monkeypatch.setattr(receiving, "check_bytes", grow)
        with pytest.raises(StorageError, match="changed while it was read"):
            here.receive([str(upload)])
        assert tree(folder.parent) == before


NO_KEYS = (
    *("", "short", "x" * 15, "x" * 201, "with a blank in it", "a/../b/../c/../d", "user:"),
    *("user:a\nb", "user:" + "x" * 201, "user:\ud800", "é" * 20, None, 7, b"x" * 20),
)


@pytest.mark.parametrize("key", NO_KEYS)
def test_a_key_that_could_be_guessed_is_no_owner(tmp_path: Path, key: object) -> None:
    with pytest.raises(StorageError, match="who you are"):
        Storage(tmp_path / "data").owner(key)  # type: ignore[arg-type]


def test_an_owner_is_known_again_and_its_key_is_nowhere(tmp_path: Path) -> None:
    """After a restart too; names and contents of the storage do not tell the secret."""
    keys = [*KEYS, "user:anna", "user:Anna", "user:søren k."]
    ids = [Storage(tmp_path / "data").owner(key).id for key in keys]
    assert len(set(ids)) == len(keys)
    again = Storage(tmp_path / "data")
    assert [again.owner(key).id for key in keys] == ids
    assert all(len(id) == 32 and set(id) <= set("0123456789abcdef") for id in ids)
    again.create(again.owner(KEYS[0]), "photos", "dog")
    assert not [path for path in tmp_path.rglob("*") if KEYS[0] in str(path)]


def test_old_uploads_are_deleted_and_nothing_else() -> None:
    """A link goes, what it leads to stays; a folder goes when it is empty and as old."""
    with world() as here:
        old, new = Path(here.upload("old.png")), Path(here.upload("new.png"))
        (old.parent / "link").symlink_to(here.outside / "secret" / "key.png")
        before = tree(here.outside), tree(here.storage.root / "users")
        long_ago = time.time() - 7200
        for path in (old, old.parent, old.parent / "link"):
            os.utime(path, (long_ago, long_ago), follow_symlinks=False)
        assert here.storage.delete_abandoned(3600) == 2
        assert not old.exists()
        assert new.exists()
        assert before == (tree(here.outside), tree(here.storage.root / "users"))
        assert here.storage.delete_abandoned(0) == 1
        assert here.storage.delete_abandoned(0) == 0
        assert here.storage.incoming.is_dir()
        for age in (-1.0, float("nan")):
            with pytest.raises(StorageError):
                here.storage.delete_abandoned(age)


def test_what_a_crash_left_half_made_goes_at_the_next_start_but_not_what_is_being_made() -> None:
    with world() as here:
        home = here.storage.folder(here.alice, "photos", "dog").parent
        for name in (".receiving-old", ".removed-old", ".receiving-new"):
            (home / name).mkdir()
            (home / name / "0.png").write_bytes(b"half")
        for name in (".receiving-old", ".removed-old"):
            os.utime(home / name, (1, 1))
        assert here.storage.names(here.alice, "photos") == ["dog"]
        Storage(here.storage.root)
        left = sorted(path.name for path in home.iterdir())
        assert left == [".made-dog", ".receiving-new", "dog"]


def test_a_root_inside_a_link_is_resolved_once(tmp_path: Path) -> None:
    """Links above the root are the administrator's; below it they are refused."""
    (tmp_path / "disk").mkdir()
    (tmp_path / "way").symlink_to(tmp_path / "disk")
    storage = Storage(tmp_path / "way" / "data")
    assert storage.root == (tmp_path / "disk" / "data").resolve()
    owner = storage.owner(KEYS[0])
    assert storage.folder(owner, "runs", storage.create(owner, "runs", "dog")).is_dir()
    storage.incoming.rmdir()
    storage.incoming.symlink_to(tmp_path / "disk")
    with pytest.raises(StorageError, match="link"):
        Storage(tmp_path / "way" / "data")
