"""W1, W2: whatever a browser says, paths stay inside their owner's folder, and links lead nowhere."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import pytest

import app.storage
from app import names, receiving
from app.storage import KINDS, Owner, StorageError
from tests.app.fence import fenced

KEYS = ("a-secret-of-alice", "b-secret-of-bob-1")
HOSTILE = (
    *("", ".", "..", "...", "../..", "../../etc", "/", "/etc/passwd", "//etc", "~", "~root", "~/x"),
    *("a\0b", "\0", "a\nb", "a/b", "a\\b", "..\\..\\x", "C:\\x", "C:", "a:b", "\\\\server\\x"),
    *("a\u2215b", "a\u2044b", "\uff0e\uff0e", "\uff0f", "\u2024\u2024", "e\u0301", "\u202etxt"),
    *("CON", "con", "NUL.txt", "aux", "com1", "lpt9.png", "name.", "name ", " name", "."),
    *("%2e%2e", "%2e%2e%2fx", "..%00", "x" * 300, "-rf", "--help", "*", "?", "$HOME", "`id`"),
    *("\ud800", "🙂", "file:///etc/passwd", "..;", ".. ", "\t", "a|b", "<x>"),
    *(None, 3, True, b"x", ["x"], Path("/etc")),
)


class World(NamedTuple):
    """A storage with two owners, and what lies around it."""

    impl: Any
    storage: Any
    alice: Owner
    bob: Owner
    outside: Path

    def upload(self, name: str, content: bytes = b"picture") -> str:
        path = self.storage.incoming / hashlib.sha256(name.encode()).hexdigest()[:8] / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(content)
        return str(path)

    def receive(self, uploads: list[str], name: str = "dog", **limits: Any) -> list[str]:
        found: list[str] = self.storage.receive(
            *(self.alice, "photos", name, uploads),
            **{"max_bytes": 10**6, "max_files": 9, "suffixes": frozenset({".png", ".txt"})}
            | limits,
        )
        return found


@contextmanager
def world(impl: Any = app.storage, **settings: Any) -> Iterator[World]:
    """Two owners with a folder "dog" each; beside the root lies one whose name begins like the root's."""
    with tempfile.TemporaryDirectory() as place, fenced(Path(place)):
        around = Path(os.path.realpath(place))
        outside = around / "data2"
        (outside / "secret").mkdir(parents=True)
        (outside / "secret" / "key.png").write_bytes(b"secret")
        storage = impl.Storage(around / "data", **settings)
        alice, bob = (storage.owner(key) for key in KEYS)
        for owner in (alice, bob):
            for kind in KINDS:
                assert storage.create(owner, kind, "Dog") == "dog"
            storage.file(owner, "photos", "dog", "0.png").write_bytes(owner.id.encode())
        yield World(impl, storage, alice, bob, outside)


def tree(folder: Path) -> str:
    """Hash of names, kinds and contents below a folder."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        kind = "link" if path.is_symlink() else "folder" if path.is_dir() else "file"
        digest.update(f"{path.relative_to(folder)} {kind}\n".encode())
        if kind == "file":
            digest.update(path.read_bytes())
    return digest.hexdigest()


def lies_inside(path: Path, folder: Path) -> bool:
    """The oracle: it knows nothing of how the storage makes paths."""
    real, home = os.path.realpath(path), os.path.realpath(folder)
    return os.path.commonpath([real, home]) == home


def calls(here: World, name: Any) -> list[Callable[[], Any]]:
    """Every method that takes a name, with this one in each place."""
    s, a = here.storage, here.alice
    # Who holds an Owner of another's id is that owner: ids are made from secrets.
    forged = Owner(name) if name != here.bob.id else a
    limits: dict[str, Any] = {"max_bytes": 9, "max_files": 9, "suffixes": frozenset({".png"})}
    return [
        lambda: s.folder(a, "photos", name),
        lambda: s.file(a, "photos", name),
        lambda: s.file(a, "photos", name, "0.png"),
        lambda: s.file(a, "photos", "dog", name),
        lambda: s.file(a, "photos", "dog", "inner", name),
        lambda: s.file(a, "photos", "dog", name, "inner"),
        lambda: s.folder(a, name, "dog"),
        lambda: s.names(a, name),
        lambda: s.create(a, name, "dog"),
        lambda: s.folder(forged, "photos", "dog"),
        lambda: s.create(forged, "photos", "dog"),
        lambda: s.names(forged, "photos"),
        lambda: s.used(forged),
        lambda: s.receive(a, "photos", "dog", [name], **limits),
        lambda: s.receive(a, "photos", "dog", name, **limits),
        lambda: s.receive(a, "photos", name, [], **limits),
        lambda: s.remove(a, "photos", name),
        lambda: s.remove(forged, "photos", "dog"),
    ]


def check_contained(here: World, name: Any) -> None:
    """A path of the owner's own or a refusal without a path; what lies outside, and what is another's, is as before."""
    root, home = str(here.storage.root), here.storage.root / "users" / here.alice.id
    before = tree(here.outside), tree(here.storage.root / "users" / here.bob.id)
    for call in calls(here, name):
        try:
            # A broken storage may be asked to remove "/etc": the fence stops it, which fails the law.
            with fenced(home, lists=True):
                found, said = call(), ""
        except StorageError as error:
            found, said = None, str(error)
        assert root not in said
        assert str(here.outside) not in said
        if isinstance(found, Path):
            assert lies_inside(found, home), name
            assert found.is_absolute()
        elif isinstance(found, str):
            assert names.is_folder_name(found)
        else:
            assert found is None or isinstance(found, list | int), (name, found)
    assert before == (tree(here.outside), tree(here.storage.root / "users" / here.bob.id))


def law_a_hostile_name_stays_inside_or_is_refused(impl: Any) -> None:
    """W1: whatever name a method gets, its path lies in the owner's folder, or the name is refused without a path."""
    with world(impl) as here:
        outside = (
            *HOSTILE,
            str(here.outside / "secret" / "key.png"),
            here.bob.id,
            str(here.outside),
        )
        for name in outside:
            check_contained(here, name)
        assert here.storage.names(here.bob, "photos") == ["dog"]


def law_what_is_no_name_everywhere_is_refused(impl: Any) -> None:
    """W1: names that other systems read otherwise are refused: devices, dots and blanks at the end, other slashes."""
    with world(impl) as here:
        for name in HOSTILE:
            with pytest.raises(StorageError):
                here.storage.folder(here.alice, "photos", name)
            with pytest.raises(StorageError):
                here.storage.file(here.alice, "photos", "dog", name)


def law_links_lead_nowhere(impl: Any) -> None:
    """W1: a link in the place of a folder or a file, at any depth, is refused and never removed through."""
    with world(impl) as here:
        s, a, secret = here.storage, here.alice, here.outside / "secret"
        folder = s.folder(a, "photos", "dog")
        before = tree(here.outside)
        (folder / "way").symlink_to(secret, target_is_directory=True)
        (folder / "key.png").symlink_to(secret / "key.png")
        (folder / "dangling").symlink_to(here.outside / "new")
        (folder.parent / "linked").symlink_to(secret, target_is_directory=True)
        (folder.parent / "other").symlink_to(s.folder(here.bob, "photos", "dog"))
        for parts in (("way",), ("way", "key.png"), ("key.png",), ("dangling",), ("dangling", "x")):
            with pytest.raises(StorageError):
                s.file(a, "photos", "dog", *parts)
        for name in ("linked", "other"):
            for call in (s.folder, s.file, s.remove):
                with pytest.raises(StorageError):
                    call(a, "photos", name)
        assert s.names(a, "photos") == ["dog"]
        assert s.used(a) == len(a.id)
        s.remove(a, "photos", "dog")
        home = folder.parent
        home.rename(home.with_name("aside"))
        home.symlink_to(secret, target_is_directory=True)
        with pytest.raises(StorageError):
            s.create(a, "photos", "new")
        assert tree(here.outside) == before


def law_owners_never_meet(impl: Any) -> None:
    """W2: nothing that an owner does changes or shows another's folders, though they have the same names."""
    with world(impl) as here:
        s, a, b = here.storage, here.alice, here.bob
        theirs = s.root / "users" / b.id
        before = tree(theirs)
        assert s.file(a, "photos", "dog", "0.png").read_bytes() == a.id.encode()
        only = s.create(a, "photos", "only mine")
        here.receive([here.upload("1.png")])
        assert s.names(b, "photos") == ["dog"]
        with pytest.raises(StorageError):
            s.folder(b, "photos", only)
        s.remove(a, "photos", "dog")
        assert tree(theirs) == before
        assert s.file(b, "photos", "dog", "0.png").read_bytes() == b.id.encode()


def law_only_uploads_are_received(impl: Any) -> None:
    """W3: nothing is taken but plain files that lie in `incoming` itself, not in a folder whose name begins alike."""
    with world(impl) as here:
        s, good = here.storage, here.upload("good.png")
        folder, incoming = s.folder(here.alice, "photos", "dog"), s.incoming
        near = incoming.with_name("incoming2")
        near.mkdir()
        (near / "key.png").write_bytes(b"secret")
        (incoming / "way").symlink_to(here.outside, target_is_directory=True)
        (incoming / "link.png").symlink_to(here.outside / "secret" / "key.png")
        os.link(here.outside / "secret" / "key.png", incoming / "hard.png")
        os.mkfifo(incoming / "pipe.png")
        (incoming / "folder.png").mkdir()
        refused = [
            *(here.outside / "secret" / "key.png", near / "key.png", incoming / "link.png"),
            *(incoming / "hard.png", incoming / "pipe.png", incoming / "folder.png", incoming),
            incoming / "way" / "secret" / "key.png",
            s.file(here.bob, "photos", "dog", "0.png"),
            s.file(here.alice, "photos", "dog", "0.png"),
            incoming / "gone.png",
            f"{incoming}/../incoming2/key.png",
            f"{incoming}/../users/{here.bob.id}/photos/dog/0.png",
        ]
        before = tree(folder.parent)
        for path in refused:
            with pytest.raises(StorageError):
                here.receive([good, str(path)])
            assert tree(folder.parent) == before, path
        assert here.receive([good]) == ["good.png"]


def law_no_two_names_differ_only_in_capitals(impl: Any) -> None:
    """W1: names are unique where a and A are one letter, so that no file replaces another on any system."""
    with world(impl) as here:
        uploads = [here.upload(name) for name in ("A.png", "a.PNG", "ä.png", "Ä.png", "🙂.png")]
        uploads.append(here.upload("file.png"))
        found = here.receive(uploads) + here.receive([here.upload("a.png", b"later")], max_files=99)
        folder = here.storage.folder(here.alice, "photos", "dog")
        assert len({name.casefold() for name in found}) == len(found) == 7
        assert sorted({*found, "0.png"}) == sorted(path.name for path in folder.iterdir())
        with pytest.raises(StorageError, match="capital"):
            here.storage.file(here.alice, "photos", "dog", found[0].swapcase())


def law_all_files_are_received_or_none(impl: Any) -> None:
    """W3: a disk that is full at any moment leaves the folder as it was, and nothing half copied anywhere."""
    with world(impl) as here:
        uploads = [here.upload(f"{number}.png") for number in (1, 2, 3)]
        folder = here.storage.folder(here.alice, "photos", "dog")
        before, tried = tree(folder.parent), 0
        for name in ("fsync", "rename"):
            for fails_at in (1, 2, 3):
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr(receiving.os, name, failing(getattr(os, name), fails_at))
                    with pytest.raises(StorageError, match="No space left"):
                        here.receive(uploads)
                assert tree(folder.parent) == before, (name, fails_at)
                tried += 1
        assert tried == 6
        assert len(here.receive(uploads)) == 3


def failing(works: Callable[..., Any], at: int) -> Callable[..., Any]:
    """A function of the system that meets a full disk at its n-th call."""
    count = 0

    def call(*args: Any) -> Any:
        nonlocal count
        count += 1
        if count == at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "/data/users/name")
        return works(*args)

    return call


def law_limits_are_kept_before_anything_is_copied(impl: Any) -> None:
    """W3: number and bytes of a folder, and the space of an owner, hold for what is there and what comes together."""
    with world(impl, max_bytes_per_owner=1000) as here:
        two = [here.upload("1.png", b"1" * 100), here.upload("2.png", b"2" * 100)]
        copied: list[Any] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(receiving, "copy_one", lambda *args: copied.append(args))
            for limits in ({"max_files": 2}, {"max_bytes": 231}):
                with pytest.raises(StorageError, match="allowed"):
                    here.receive(two, **limits)
            # 32 bytes are there, so two files of 484 fit and a third of 1 byte does not.
            large = [here.upload(f"l{number}.png", b"l" * 484) for number in (1, 2)]
            with pytest.raises(StorageError, match=re.escape("0.0 MB are allowed")):
                here.receive([*large, here.upload("s.png", b"s")])
            assert copied == []
        assert len(here.receive(two, max_files=3, max_bytes=232)) == 2
        here.receive([here.upload("f.png", b"f" * 768)])
        assert here.storage.used(here.alice) == 1000
        with pytest.raises(StorageError, match="Remove some"):
            here.storage.create(here.alice, "runs", "more")
        assert here.storage.create(here.bob, "runs", "more") == "more"


LAWS = (
    *(law_a_hostile_name_stays_inside_or_is_refused, law_what_is_no_name_everywhere_is_refused),
    *(law_links_lead_nowhere, law_owners_never_meet, law_only_uploads_are_received),
    *(law_no_two_names_differ_only_in_capitals, law_all_files_are_received_or_none),
    law_limits_are_kept_before_anything_is_copied,
)


@pytest.mark.parametrize("law", LAWS, ids=lambda law: law.__name__)
def test_the_storage_keeps_its_laws(law: Callable[[Any], None]) -> None:
    law(app.storage)


TITLES = {
    "Anna's dog": "anna-s-dog",
    "Größe 2": "groe-2",
    "": "photos",
    "🙂🙂": "photos",
    "CON": "con-1",
    "com1": "com1-1",
    "../../etc/passwd": "etc-passwd",
    "...": "photos",
    "x" * 300: "x" * 40,
    "犬": "photos",
    "a\0b\nc": "a-b-c",
    "-rf --": "rf",
    "\ud800": "photos",
}


@pytest.mark.parametrize("title", TITLES)
def test_any_title_gives_a_readable_name(title: str) -> None:
    """And a second folder of the same title gets a name of its own, not longer than 40 characters."""
    with world() as here:
        made = [here.storage.create(here.alice, "photos", title) for _ in range(12)]
        assert made[0] == TITLES[title]
        assert len(set(made)) == 12
        assert all(re.fullmatch("[a-z0-9-]{1,40}", name) for name in made)
        assert here.storage.names(here.alice, "photos") == [*reversed(made), "dog"]


def test_a_folder_that_is_written_into_keeps_its_place() -> None:
    with world() as here:
        here.storage.create(here.alice, "photos", "later")
        time.sleep(0.02)
        here.storage.file(here.alice, "photos", "dog", "new.png").write_bytes(b"x")
        assert here.storage.names(here.alice, "photos") == ["later", "dog"]
        here.storage.remove(here.alice, "photos", "dog")
        here.storage.create(here.alice, "photos", "dog")
        assert here.storage.names(here.alice, "photos") == ["dog", "later"]


def test_the_fence_stops_what_a_broken_storage_would_do(tmp_path: Path) -> None:
    """Before it happens: the laws ask every storage, mutants too, to write to and to remove the root of the system."""
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside, outside):
        folder.mkdir()
        (folder / "file").write_bytes(b"x")
    (inside / "way").symlink_to(outside)
    before = tree(outside)
    attempts: list[Callable[[Path], Any]] = [
        lambda folder: (folder / "new").mkdir(),
        lambda folder: (folder / "new2").touch(),
        lambda folder: (folder / "new3").write_bytes(b"y"),
        lambda folder: os.utime(folder / "file"),
        lambda folder: os.truncate(folder / "file", 0),
        lambda folder: (folder / "file").rename(folder / "other"),
        lambda folder: (folder / "other").unlink(),
        lambda folder: os.listdir(folder),
        lambda folder: list(os.walk(folder)),
        lambda folder: shutil.rmtree(folder),
    ]
    with fenced(inside, lists=True):
        for attempt in attempts:
            for folder in (outside, inside / "way"):
                with pytest.raises(AssertionError, match="fence"):
                    attempt(folder)
        for attempt in attempts:
            attempt(inside)
    assert tree(outside) == before
    assert not inside.exists()
