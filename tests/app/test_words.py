"""W5: no message that reaches a browser holds an absolute path; the name of the file stays."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from app import words
from dreamrie.errors import ConfigError, ImageError

NOTHING = re.compile(r"(?!)(?P<quote>)(?P<path>)")
EVERY_SLASH = re.compile(r"\S*/\S*")

ROOT = Path("/srv/my data/dreamrie app")
CASES = {
    "posix": ("cannot read /srv/a/b/cat.png", "cannot read cat.png"),
    "sentence": ("see /srv/a/cat.png, and /srv/b.", "see cat.png, and b."),
    "colon": ("/srv/a/cat.png: not a picture", "cat.png: not a picture"),
    "brackets": ("cat (/srv/a/cat.png) is broken", "cat (cat.png) is broken"),
    "equals": ("--output_dir=/srv/a/run failed", "--output_dir=run failed"),
    "os error": (
        "[Errno 2] No such file or directory: '/srv/my cats/one cat.png'",
        "[Errno 2] No such file or directory: 'one cat.png'",
    ),
    "posix path": ("PosixPath('/srv/a b/c')", "PosixPath('c')"),
    "double quotes": ('"/srv/anna\'s/cat.png" is gone', '"cat.png" is gone'),
    "blank": ("/home/anna smith/cat.png is gone", "cat.png is gone"),
    "unicode": ("/srv/Übung/猫.png ist fort", "猫.png ist fort"),
    "home": ("~/pictures/cat.png and ~anna/x", "cat.png and x"),
    "windows": (r"C:\Users\anna\cat.png is gone", "cat.png is gone"),
    "windows slashes": ("C:/Users/anna/cat.png is gone", "cat.png is gone"),
    "windows repr": (r"'C:\\Users\\anna b\\cat.png'", "'cat.png'"),
    "share": (r"\\server\anna\cat.png is gone", "cat.png is gone"),
    "address of a file": ("file:///srv/a/cat.png", "cat.png"),
    "lines": ("bad\n  where: /srv/a/run\n  what to do: x", "bad\n  where: run\n  what to do: x"),
    "known, with blanks": (f"{ROOT}/users/a/run-1 is gone", "run-1 is gone"),
    "known itself": (f"{ROOT} is read-only", "the app's folder is read-only"),
    "known, in quotes": (f"'{ROOT}/users/a/x y.png'", "'x y.png'"),
    "one name": ("/etc", "etc"),
    "twice": ("/a/b -> /c/d", "b -> d"),
}


def law_no_absolute_path_is_told(impl: Any) -> None:
    """Of a path of any system, in quotes or not, with blanks where that can be seen, the last name stays."""
    for name, (text, expected) in CASES.items():
        assert impl.without_paths(text, [ROOT]) == expected, name


def law_other_words_stay(impl: Any) -> None:
    """Slashes that begin no path are left alone."""
    for text in (
        "owner/name and/or 1/2, 3 / 4",
        "https://example.org/a/b and lora_A/lora_B",
        "best/ holds step 200; see samples/step-000200.png",
        r"a\b and 10:30, \n",
        "what is --max_train_steps 10?",
        "",
    ):
        assert impl.without_paths(text, [ROOT]) == text


def test_paths_are_taken_out() -> None:
    """Paths of several shapes."""
    law_no_absolute_path_is_told(words)


def test_other_words_are_left_alone() -> None:
    """What only looks like a path."""
    law_other_words_stay(words)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (ConfigError("no pictures in /srv/x/photos-1"), "no pictures in photos-1"),
        (ImageError(""), words.BROKEN),
        (ValueError("no pictures in /srv/x"), words.BROKEN),
        (FileNotFoundError(2, "No such file", "/srv/x"), words.BROKEN),
        (KeyboardInterrupt(), words.BROKEN),
    ],
)
def test_only_errors_with_a_purpose_are_told(error: BaseException, told: str) -> None:
    """The words of other libraries are not for people."""
    assert words.plain(error, [ROOT]) == told


def test_a_long_message_is_cut() -> None:
    """A page of numbers is not a message."""
    text = words.plain(ConfigError("x" * 10_000))
    assert len(text) == words.MAX_LENGTH
    assert text.endswith("…")


def test_a_folder_is_known_by_every_spelling(tmp_path: Path) -> None:
    """Through a link, and relative to where the server stands."""
    place = tmp_path / "a place" / "deep"
    place.mkdir(parents=True)
    link = tmp_path / "a link"
    link.symlink_to(place)
    for spelling in (link, place):
        assert words.without_paths(f"{spelling}/x.png is bad", [link]) == "x.png is bad"
