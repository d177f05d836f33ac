"""Photos of a user: taken in, looked through, taken out; what is no photo is said to be none."""

from __future__ import annotations

from pathlib import Path

import pytest

from app import photos
from app.storage import Owner, Storage, StorageError
from tests.app.browser import CONCEPTS

PUMPKINS = sorted((CONCEPTS / "pumpkin").glob("*.png"))


@pytest.fixture
def storage(tmp_path: Path) -> Storage:
    return Storage(tmp_path / "data")


@pytest.fixture
def owner(storage: Storage) -> Owner:
    return storage.owner("k" * 20)


def uploaded(storage: Storage, name: str, content: bytes) -> str:
    """A file where the page puts uploads."""
    path = storage.incoming / name
    path.write_bytes(content)
    return str(path)


def pumpkins(storage: Storage) -> list[str]:
    return [uploaded(storage, path.name, path.read_bytes()) for path in PUMPKINS]


def test_five_photos_are_taken_in_and_found_fine(storage: Storage, owner: Owner) -> None:
    name = photos.add(storage, owner, "", pumpkins(storage))
    found = photos.look(storage, owner, name, 64)
    assert found.usable == len(found.photos) == len(PUMPKINS)
    assert [photo["size"] for photo in found.photos] == [(128, 128)] * len(PUMPKINS)
    assert [photo["path"].read_bytes() for photo in found.photos] == [
        path.read_bytes() for path in PUMPKINS
    ]


def test_more_photos_join_the_set(storage: Storage, owner: Owner) -> None:
    first, *others = pumpkins(storage)
    name = photos.add(storage, owner, "", [first])
    assert photos.add(storage, owner, name, others) == name
    assert photos.look(storage, owner, name, 64).usable == len(PUMPKINS)


def test_what_is_no_picture_is_named_and_not_counted(storage: Storage, owner: Owner) -> None:
    """The doctor says of it in words what is wrong; no path is in them."""
    bad = uploaded(storage, "holiday.png", b"no picture at all")
    name = photos.add(storage, owner, "", [*pumpkins(storage), bad])
    found = photos.look(storage, owner, name, 64)
    assert found.usable == len(PUMPKINS)
    (photo,) = [photo for photo in found.photos if not photo["usable"]]
    assert photo["name"] == "holiday.png"
    assert photo["findings"]
    assert str(storage.root) not in repr([photo["findings"], found.advice])


@pytest.mark.parametrize(
    ("file", "words"),
    [("notes.txt", "not of a kind"), ("empty.png", "is empty"), ("tool.png", "is a program")],
)
def test_a_refused_file_leaves_no_set_behind(
    storage: Storage, owner: Owner, file: str, words: str
) -> None:
    content = {"notes.txt": b"x", "empty.png": b"", "tool.png": b"\x7fELF..."}[file]
    with pytest.raises(StorageError, match=words):
        photos.add(storage, owner, "", [*pumpkins(storage), uploaded(storage, file, content)])
    assert storage.names(owner, "photos") == []


def test_a_refusal_keeps_a_set_that_was_there(storage: Storage, owner: Owner) -> None:
    name = photos.add(storage, owner, "", pumpkins(storage))
    with pytest.raises(StorageError, match="not of a kind"):
        photos.add(storage, owner, name, [uploaded(storage, "notes.txt", b"x")])
    assert photos.look(storage, owner, name, 64).usable == len(PUMPKINS)


def test_there_is_a_most(storage: Storage, owner: Owner) -> None:
    content = PUMPKINS[0].read_bytes()
    many = [uploaded(storage, f"{n}.png", content) for n in range(photos.MAX_PHOTOS)]
    name = photos.add(storage, owner, "", many)
    more = [uploaded(storage, "more.png", content)]
    with pytest.raises(
        StorageError, match=f"At most {photos.MAX_PHOTOS} photos; 40 are there and 1"
    ):
        photos.add(storage, owner, name, more)
    assert len(photos.look(storage, owner, name, 64).photos) == photos.MAX_PHOTOS


def test_one_is_taken_out_and_the_others_stay(storage: Storage, owner: Owner) -> None:
    name = photos.add(storage, owner, "", pumpkins(storage))
    photos.remove(storage, owner, name, PUMPKINS[1].name)
    left = [photo["name"] for photo in photos.look(storage, owner, name, 64).photos]
    assert left == [path.name for path in PUMPKINS if path != PUMPKINS[1]]
    for other in ("../../x", "", "/etc/passwd"):
        with pytest.raises(StorageError):
            photos.remove(storage, owner, name, other)


def test_another_owner_has_nothing_of_it(storage: Storage, owner: Owner) -> None:
    name = photos.add(storage, owner, "", pumpkins(storage))
    other = storage.owner("o" * 20)
    for act in (
        lambda: photos.look(storage, other, name, 64),
        lambda: photos.remove(storage, other, name, PUMPKINS[0].name),
        lambda: photos.add(storage, other, name, pumpkins(storage)),
    ):
        with pytest.raises(StorageError, match="you have no photos"):
            act()
    assert photos.look(storage, owner, name, 64).usable == len(PUMPKINS)


def test_every_example_can_be_tried(storage: Storage, owner: Owner) -> None:
    """All that are listed come with pictures the doctor lets through; others are refused."""
    assert "pumpkin" in photos.examples()
    for concept in photos.examples():
        name = photos.add_example(storage, owner, concept)
        assert photos.look(storage, owner, name, 64).usable >= 3, concept
    for concept in ("../app", "", "no such"):
        with pytest.raises(StorageError, match="no example"):
            photos.add_example(storage, owner, concept)


def test_no_photos_yet(storage: Storage, owner: Owner) -> None:
    found = photos.look(storage, owner, "", 64)
    assert (found.photos, found.advice, found.usable) == ([], [], 0)
