"""W1: text made to break paths, in every place where the app takes a name; the oracle is the system's own realpath."""

from __future__ import annotations

import string
from pathlib import Path, PurePosixPath

from hypothesis import example, given
from hypothesis import strategies as st

from app.names import StorageError, is_file_name, is_folder_name, shown, slug, unique_names
from tests.app.test_storage import check_contained, lies_inside, tree, world

# Pieces that paths are made of, on one system or another, and text of any kind between them.
PIECES = st.sampled_from(
    [
        *("..", ".", "/", "\\", "~", "\0", "%2e", "%2f", "dog", "0.png", "C:", "con", "users"),
        *("incoming", "photos", "\u2215", "\uff0f", "\uff0e", "\u202e", "\ud800", " ", "\n", "-"),
        *("$", "a" * 300),
    ]
)
HOSTILE_TEXT = st.lists(PIECES | st.text(max_size=4), max_size=6).map("".join)
FILE_NAMES = st.lists(st.text(max_size=8) | HOSTILE_TEXT, max_size=8)


@given(name=HOSTILE_TEXT)
@example(name="../../../data2/secret/key.png")
@example(name="dog/../../..")
def test_no_text_leads_out_of_an_owners_folder(name: str) -> None:
    with world() as here:
        for path in (name, f"{here.storage.incoming}/{name}", f"{here.outside}/{name}"):
            check_contained(here, path)


@given(parts=st.lists(HOSTILE_TEXT, min_size=1, max_size=4))
def test_no_parts_together_lead_out(parts: list[str]) -> None:
    """Parts that are fine alone are fine together, and one that is not spoils all."""
    with world() as here:
        before = tree(here.outside)
        try:
            found: Path | None = here.storage.file(here.alice, "uploads", "dog", *parts)
        except StorageError:
            found = None
        assert (found is not None) == all(is_file_name(part) for part in parts)
        if found is not None:
            folder = here.storage.folder(here.alice, "uploads", "dog")
            assert found == folder.joinpath(*parts)
            assert lies_inside(found, folder)
        assert tree(here.outside) == before


@given(title=HOSTILE_TEXT | st.text())
def test_every_title_gives_a_safe_name(title: str) -> None:
    name = slug(title, "photos")
    assert is_folder_name(name)
    assert set(name) <= {*string.ascii_lowercase, *string.digits, "-"}
    assert 1 <= len(name) <= 40


@given(originals=FILE_NAMES, taken=FILE_NAMES)
def test_received_names_are_safe_and_never_meet(originals: list[str], taken: list[str]) -> None:
    """Whatever files are called: no two of the new ones, and none of the old, are alike in small letters."""
    wanted = [PurePosixPath(f"x{name}.png").name for name in originals]
    # A hidden file ".png" has no suffix, so it is never received.
    wanted = [name for name in wanted if PurePosixPath(name).suffix == ".png"]
    there = [name for name in taken if is_file_name(name)]
    found = unique_names(wanted, there)
    assert len(found) == len(wanted)
    assert all(is_file_name(name) and name.endswith(".png") for name in found)
    assert len({name.casefold() for name in found}) == len(found)
    assert not {name.casefold() for name in found} & {name.casefold() for name in there}
    assert all(shown(name).isascii() and "/" not in shown(name) for name in wanted)


@given(stems=st.lists(st.text(min_size=1, max_size=6), min_size=1, max_size=5, unique=True))
def test_a_caption_keeps_the_name_of_its_photo(stems: list[str]) -> None:
    """Files that differ in their suffix alone go on doing so."""
    stems = [f"{number}{stem.replace('/', '_').rstrip('.')}" for number, stem in enumerate(stems)]
    wanted = [f"{stem}{end}" for stem in stems for end in (".png", ".txt")]
    found = unique_names(wanted, ["0.png", "1.txt"])
    pairs = zip(found[::2], found[1::2], strict=True)
    assert all(photo.removesuffix(".png") == text.removesuffix(".txt") for photo, text in pairs)
