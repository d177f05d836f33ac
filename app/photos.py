"""Photos that a user has dropped: taken in, looked through by the doctor, taken out again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from app.fresh import fresh_folder
from app.storage import Owner, Storage, StorageError
from dreamrie.diffusion.doctor import advice, diagnose

MAX_PHOTOS = 40
# What a picture is, its content says; this keeps other files out before they are looked at.
_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".tif", ".tiff", ".gif", ".ppm"})
_MAX_BYTES = 64 << 20
_EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "concepts"


@dataclass(frozen=True)
class Look:
    """What the doctor says.

    Attributes:
        photos: each with "name", "path", "size", "usable" and "findings", for `app.cards.photo_cards`.
        advice: sentences on what to do.
        usable: how many can be trained on.
    """

    photos: list[dict[str, Any]]
    advice: list[str]
    usable: int


def examples() -> list[str]:
    """Names of the example concepts whose pictures can be tried."""
    return sorted(folder.name for folder in _EXAMPLES.iterdir() if folder.is_dir())


def add(storage: Storage, owner: Owner, name: str, uploads: Sequence[str]) -> str:
    """Take photos in.

    Args:
        storage: of the app.
        owner: whose they are.
        name: of the set of photos; "": a new one.
        uploads: files that the page has received.

    Returns:
        Name of the set.

    Raises:
        StorageError: too many, too large, or no pictures.
    """
    if name:
        _receive(storage, owner, name, uploads)
    else:
        with fresh_folder(storage, owner, "photos", "photos") as name:
            _receive(storage, owner, name, uploads)
    return name


def _receive(storage: Storage, owner: Owner, name: str, uploads: Sequence[str]) -> None:
    """Take photos into a set that is there."""
    already = sum(path.is_file() for path in storage.folder(owner, "photos", name).iterdir())
    if already + len(uploads) > MAX_PHOTOS:
        raise StorageError(
            f"At most {MAX_PHOTOS} photos; {already} are there and {len(uploads)} were dropped. 3 to 20 are enough."
        )
    storage.receive(
        *(owner, "photos", name, uploads),
        max_bytes=_MAX_BYTES,
        max_files=MAX_PHOTOS,
        suffixes=_SUFFIXES,
    )


def add_example(storage: Storage, owner: Owner, concept: str) -> str:
    """Take the pictures of an example concept, captions included.

    Args:
        storage: of the app.
        owner: who tries them.
        concept: one of `examples()`.

    Returns:
        Name of the set.

    Raises:
        StorageError: there is no such concept.
    """
    if concept not in examples():
        raise StorageError(f"There is no example {concept!r}.")
    name = storage.create(owner, "photos", concept.replace("_", " "))
    for path in sorted((_EXAMPLES / concept).iterdir()):
        storage.file(owner, "photos", name, path.name).write_bytes(path.read_bytes())
    return name


def remove(storage: Storage, owner: Owner, name: str, photo: str) -> None:
    """Take one photo out.

    Args:
        storage: of the app.
        owner: whose it is.
        name: of the set.
        photo: its file name.
    """
    storage.file(owner, "photos", name, photo).unlink(missing_ok=True)


def look(storage: Storage, owner: Owner, name: str, resolution: int) -> Look:
    """Have the doctor look through a set.

    Args:
        storage: of the app.
        owner: whose it is.
        name: of the set; "": none yet.
        resolution: side of the training squares, in pixels.

    Returns:
        What was found.
    """
    if not name:
        return Look([], [], 0)
    found = diagnose(storage.folder(owner, "photos", name), resolution)
    photos = [
        {
            "name": picture.path.name,
            "path": picture.path,
            "size": picture.size,
            "usable": picture.is_usable,
            "findings": [finding.text for finding in picture.findings],
        }
        for picture in found.pictures
    ]
    steps, remarks = advice(found)
    return Look(photos, [*steps, *remarks], sum(p.is_usable for p in found.pictures))
