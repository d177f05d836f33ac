"""Wrong storages, checks and galleries: each trusts one thing that comes from outside."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import app.asked
import app.gallery
import app.storage
from app import names, places, receiving
from app.asked import Limits
from app.storage import Storage
from tests.app import test_asked, test_gallery, test_storage
from tests.mutants import Mutant, replaced


@contextmanager
def inside(offered: Any, owner: Any, **wrong: Any) -> Iterator[Any]:
    """Yield a module of the app while another part of it is wrong."""
    with replaced(owner, **wrong):
        yield offered


def by_prefix(path: Path, folder: Path) -> bool:
    """The text of one path begins with the other's: /data/u is taken for a folder above /data/u2."""
    return os.path.realpath(path).startswith(str(folder)) and not os.path.islink(path)


def as_written(path: Path) -> str:
    return os.path.normpath(path)


def everybodys(self: Any, owner: Any, kind: Any) -> Path:
    _home(self, owner, kind)
    return Path(self._users / "all" / kind)


def unchecked(self: Any, owner: Any, kind: Any, name: str) -> Path:
    return Path(self._home(owner, kind) / str(name))


def trusting_file(self: Any, owner: Any, kind: Any, name: str, *inside: str) -> Path:
    return Path(self.folder(owner, kind, name), *map(str, inside))


def straight(files: Sequence[tuple[Path, str, int]], folder: Path) -> None:
    for source, name, size in files:
        receiving.copy_one(source, folder / name, size)


def renamed_and_left(files: Sequence[tuple[Path, str, int]], folder: Path) -> None:
    """Staged, but what was moved before the disk was full stays."""
    staging = folder.with_name(".receiving-x")
    staging.mkdir()
    try:
        for source, name, size in files:
            receiving.copy_one(source, staging / name, size)
        for _, name, _ in files:
            os.rename(staging / name, folder / name)
    finally:
        for path in staging.iterdir():
            path.unlink()
        staging.rmdir()


@contextmanager
def opened_anyhow(path: Path) -> Iterator[tuple[Any, int]]:
    with os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as stream:
        yield stream, os.fstat(stream.fileno()).st_size


def lax(model: Any, values: Mapping[str, Any], limits: Limits) -> Any:
    """Numbers are read from text, as forms send them."""
    read = {
        name: float(value) if isinstance(value, str) and value.replace(".", "").isdigit() else value
        for name, value in values.items()
    }
    return _asked(model, {k: int(v) if _is_whole(v) else v for k, v in read.items()}, limits)


def _is_whole(value: object) -> bool:
    return isinstance(value, float) and value == value and value.is_integer()


def without_not_numbers(model: Any, values: Mapping[str, Any], limits: Limits) -> Any:
    """NaN, which no comparison catches, taken for the default."""
    kept = {name: 1.0 if value != value else value for name, value in values.items()}
    return _asked(model, kept, limits)


def whatever_size(model: Any, values: Mapping[str, Any], limits: Limits) -> Any:
    return _asked(model, values, Limits(limits.sizes, 10**9))


def taken_as_it_is(path: Path) -> Any:
    return app.gallery._Known({"base_model": "small"}, 4, "", ((1.0,),))


def ascending(change: Any) -> Any:
    point = _decompose(change)
    return point._replace(s=point.s.flip(0))


_home = Storage._home
_asked = app.asked.asked
_decompose = app.gallery.decompose
STORAGE, GALLERY, ASKED = app.storage, app.gallery, app.asked

MUTANTS = [
    Mutant(
        name="inside by the beginning of the text",
        law=test_storage.law_only_uploads_are_received,
        broken=lambda: inside(STORAGE, places, is_inside=by_prefix),
        why="the neighbour incoming2 begins with the same letters",
    ),
    Mutant(
        name="links of the storage followed",
        law=test_storage.law_links_lead_nowhere,
        broken=lambda: inside(STORAGE, places, real=as_written),
        why="a path that is inside as it is written may lead anywhere",
    ),
    Mutant(
        name="kind of an upload not looked at",
        law=test_storage.law_only_uploads_are_received,
        broken=lambda: inside(STORAGE, receiving, _opened=opened_anyhow),
        why="a second name of a file of somebody else lies inside too",
    ),
    Mutant(
        name="owner ignored",
        law=test_storage.law_owners_never_meet,
        broken=lambda: inside(STORAGE, Storage, _home=everybodys),
        why="all would share one folder",
    ),
    Mutant(
        name="owner not checked",
        law=test_storage.law_a_hostile_name_stays_inside_or_is_refused,
        broken=lambda: inside(
            STORAGE,
            Storage,
            _home=lambda self, owner, kind: self._users / str(owner.id) / str(kind),
        ),
        why="an id or kind of dots leads out of the folder of users",
    ),
    Mutant(
        name="folder not checked",
        law=test_storage.law_a_hostile_name_stays_inside_or_is_refused,
        broken=lambda: inside(STORAGE, Storage, folder=unchecked),
        why="a name of dots leads to other owners",
    ),
    Mutant(
        name="parts of a path not checked",
        law=test_storage.law_a_hostile_name_stays_inside_or_is_refused,
        broken=lambda: inside(STORAGE, Storage, file=trusting_file),
        why="an absolute part replaces all that stands before it",
    ),
    Mutant(
        name="devices allowed as names",
        law=test_storage.law_what_is_no_name_everywhere_is_refused,
        broken=lambda: inside(STORAGE, names, is_device=lambda name: False),
        why="con and nul.txt are no files on Windows",
    ),
    Mutant(
        name="case twins",
        law=test_storage.law_no_two_names_differ_only_in_capitals,
        broken=lambda: inside(STORAGE, names, key=lambda name: name),
        why="A.png and a.png are one file on half of all machines",
    ),
    Mutant(
        name="received one after the other",
        law=test_storage.law_all_files_are_received_or_none,
        broken=lambda: inside(STORAGE, receiving, copy_all=straight),
        why="a full disk leaves the first files there",
    ),
    Mutant(
        name="moved files left",
        law=test_storage.law_all_files_are_received_or_none,
        broken=lambda: inside(STORAGE, receiving, copy_all=renamed_and_left),
        why="the second rename may fail when the first has not",
    ),
    Mutant(
        name="quota without what is there",
        law=test_storage.law_limits_are_kept_before_anything_is_copied,
        broken=lambda: inside(STORAGE, Storage, used=lambda self, owner: 0),
        why="many small orders would fill the disk",
    ),
    Mutant(
        name="number of files not counted",
        law=test_storage.law_limits_are_kept_before_anything_is_copied,
        broken=lambda: inside(STORAGE, receiving, check_number=lambda *args: None),
        why="a million files would be received",
    ),
    Mutant(
        name="numbers read from text",
        law=test_asked.law_what_the_page_cannot_send_is_refused,
        broken=lambda: inside(ASKED, ASKED, asked=lax),
        why="what the page sends are numbers; text is somebody else's",
    ),
    Mutant(
        name="no number taken for one",
        law=test_asked.law_what_the_page_cannot_send_is_refused,
        broken=lambda: inside(ASKED, ASKED, asked=without_not_numbers),
        why="NaN as guidance draws black pictures",
    ),
    Mutant(
        name="pixels unlimited",
        law=test_asked.law_what_the_page_cannot_send_is_refused,
        broken=lambda: inside(ASKED, ASKED, asked=whatever_size),
        why="two sides that are fine alone may be too much memory together",
    ),
    Mutant(
        name="control characters let through",
        law=test_asked.law_what_the_page_cannot_send_is_refused,
        broken=lambda: inside(ASKED, ASKED, _UNWANTED=frozenset({"Cs"})),
        why="NUL ends a text for some programs and not for others",
    ),
    Mutant(
        name="upload trusted by its suffix",
        law=test_gallery.law_a_refused_upload_leaves_nothing,
        broken=lambda: inside(GALLERY, GALLERY, _examined=taken_as_it_is),
        why="a damaged file would be offered",
    ),
    Mutant(
        name="refused upload kept",
        law=test_gallery.law_a_refused_upload_leaves_nothing,
        broken=lambda: inside(GALLERY, Storage, remove=lambda *args: None),
        why="refused files would fill the disk",
    ),
    Mutant(
        name="gallery of everybody",
        law=test_gallery.law_an_adapter_of_another_is_unknown,
        broken=lambda: inside(GALLERY, Storage, _home=everybodys),
        why="trainings of others would be shown",
    ),
    Mutant(
        name="other base not told",
        law=test_gallery.law_what_cannot_be_used_says_why,
        broken=lambda: inside(GALLERY, GALLERY.Gallery, _misfit=lambda self, known: ""),
        why="the adapter would fail when it is drawn with, or draw noise",
    ),
    Mutant(
        name="smallest singular value first",
        law=test_gallery.law_a_spectrum_is_that_of_the_dense_change,
        broken=lambda: inside(GALLERY, GALLERY, decompose=ascending),
        why="the slider would cut the strongest directions",
    ),
]
