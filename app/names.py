"""Which names folders and files may have: few characters, safe on every system. No path is touched here."""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections.abc import Collection, Iterator, Sequence
from pathlib import PurePosixPath

from dreamrie.errors import DreamrieError

LONGEST_FOLDER, LONGEST_STEM = 40, 60
_FOLDER = re.compile(r"[a-z0-9](?:[a-z0-9-]{0,38}[a-z0-9])?")
# A leading dot only before a letter or digit: there are hidden files, but no "..".
_FILE = re.compile(r"\.?[A-Za-z0-9_][A-Za-z0-9._-]{0,119}")
# Devices on Windows, whatever their suffix.
_DEVICES = frozenset(
    {"con", "prn", "aux", "nul", *(f"{port}{n}" for port in ("com", "lpt") for n in range(10))}
)


class StorageError(DreamrieError):
    """A name, file or amount that the storage refuses; the message is fit for a browser."""


def is_folder_name(name: object) -> bool:
    """Whether `slug` could have made a name.

    Args:
        name: anything.

    Returns:
        True only for text of 1 to 40 of a-z 0-9 -, no hyphen at its ends, no device.
    """
    return isinstance(name, str) and bool(_FOLDER.fullmatch(name)) and not is_device(name)


def is_file_name(name: object) -> bool:
    """Whether a part of a path is safe inside a folder.

    Args:
        name: anything.

    Returns:
        True only for text of A-Z a-z 0-9 . _ - that is no way up, no device, and does not end in a dot.
    """
    if not isinstance(name, str) or not _FILE.fullmatch(name):
        return False
    return not name.endswith(".") and not is_device(name)


def is_device(name: str) -> bool:
    """Whether Windows takes a name for a device.

    Args:
        name: text.

    Returns:
        True for CON, con.txt and their like.
    """
    return name.lower().lstrip(".").split(".")[0] in _DEVICES


def slug(title: object, otherwise: str) -> str:
    """A readable folder name from any text.

    Args:
        title: text in any script; accents are dropped, what is left of the rest becomes hyphens.
        otherwise: the name where nothing is left.

    Returns:
        See `is_folder_name`.

    Raises:
        StorageError: the title is no text.
    """
    if not isinstance(title, str):
        raise StorageError("a title must be text.")
    found = _ascii(title[:300]).lower()
    found = re.sub(r"[^a-z0-9]+", "-", found)[:LONGEST_FOLDER].strip("-") or otherwise
    return f"{found}-1" if is_device(found) else found


def numbered(stem: str, longest: int = LONGEST_FOLDER) -> Iterator[str]:
    """A name, and others after it.

    Args:
        stem: the first of them.
        longest: characters; a long stem is cut for its number.

    Yields:
        stem, stem-2, stem-3, ...
    """
    yield stem
    for number in itertools.count(2):
        tail = f"-{number}"
        yield stem[: longest - len(tail)].rstrip("-") + tail


def unique_names(originals: Sequence[str], taken: Collection[str]) -> list[str]:
    """Safe names for files, so that none hides another.

    Files that differ in their suffix alone, as a photo and its caption do, go on doing so.

    Args:
        originals: names of files, of whatever characters.
        taken: names that are there.

    Returns:
        One for each, in order; no two of these and `taken` are alike in small letters.
    """
    used = {key(name) for name in taken}
    groups: dict[str, list[int]] = {}
    for place, original in enumerate(originals):
        groups.setdefault(PurePosixPath(original).stem, []).append(place)
    found = [""] * len(originals)
    stems: set[str] = set()
    for original, places in groups.items():
        endings = [PurePosixPath(originals[place]).suffix.lower() for place in places]
        for stem in numbered(_stem(original), LONGEST_STEM):
            wanted = [key(stem + ending) for ending in endings]
            if key(stem) not in stems and not used & set(wanted):
                break
        stems.add(key(stem))
        for place, ending in zip(places, endings, strict=True):
            # Two uploads of one name: the later ones get numbers of their own.
            name = next(
                f"{each}{ending}"
                for each in numbered(stem, LONGEST_STEM)
                if key(f"{each}{ending}") not in used
            )
            used.add(key(name))
            found[place] = name
    return found


def key(name: str) -> str:
    """What systems that do not tell capital letters from small ones take for one name."""
    return name.casefold()


def shown(name: str) -> str:
    """A file's name as a message may hold it: short, and of harmless characters."""
    path = PurePosixPath(name)
    return f"{_stem(path.stem)}{re.sub(r'[^A-Za-z0-9.]', '', path.suffix)[:12]}"


def _stem(original: str) -> str:
    found = re.sub(r"[^A-Za-z0-9_]+", "-", _ascii(original[:300]))[:LONGEST_STEM].strip("-")
    found = found or "file"
    return f"{found}-1" if is_device(found) else found


def _ascii(text: str) -> str:
    return unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode()
