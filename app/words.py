"""What a browser may read of an error: plain words, with the name of a file and never the place where it lies."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from dreamrie.errors import DreamrieError

BROKEN = "something went wrong inside the app; the log of the server has the details"
# An error message is a paragraph; what is longer holds something that was not meant for people.
MAX_LENGTH = 2000

# /home, ~/x, ~user/x, C:\x, \\server\x, file:///x; a slash within a word, as in owner/name or and/or, begins no path.
_BEGIN = r"(?:file://)?(?:~[\w.-]*[\\/]|[A-Za-z]:[\\/]|\\\\|/)(?![\s/])"
_NOT_INSIDE = r"(?<![\w:/\\.~-])"
# In quotes a path may hold blanks; a doubled quote ends it.
_QUOTED = re.compile(rf"(?P<quote>['\"`])(?P<path>{_BEGIN}[^\n]*?)(?P=quote)")
# Without quotes it ends at a blank, unless the next word goes on with a slash inside.
_BARE = re.compile(rf"{_NOT_INSIDE}{_BEGIN}[^\s'\"`<>|]*(?: [^\s/\\'\"`<>|]+/[^\s'\"`<>|]*)*")
_END = ".,:;!?)]}"


def without_paths(text: str, secrets: Sequence[Path] = ()) -> str:
    """Take absolute paths out of a text.

    Args:
        text: any.
        secrets: folders whose place is not to be told; with them, paths are recognized that hold blanks.

    Returns:
        The text, each path shortened to its last name.
    """
    known = sorted({name for folder in secrets for name in _spellings(folder)}, key=len)
    for name in reversed(known):
        # What stands behind the folder is a path as any other, once the blanks before it are gone.
        text = re.sub(rf"{re.escape(name)}(?![\w-])", "/…", text)
    text = _QUOTED.sub(lambda found: found["quote"] + _last(found["path"]) + found["quote"], text)
    text = _BARE.sub(lambda found: _shortened(found[0]), text)
    return text if len(text) <= MAX_LENGTH else text[: MAX_LENGTH - 1] + "…"


def plain(error: BaseException, secrets: Sequence[Path] = ()) -> str:
    """An error in words for a browser.

    Args:
        error: of any kind.
        secrets: see `without_paths`.

    Returns:
        The words of an error that was raised on purpose, without paths; of any other only that there was one.
    """
    if isinstance(error, DreamrieError):
        return without_paths(str(error), secrets) or BROKEN
    return BROKEN


def _spellings(folder: Path) -> set[str]:
    """How a folder may be written: as given, absolute, without links, and as `repr` doubles its backslashes."""
    names = {str(folder), str(folder.absolute()), str(folder.resolve())}
    # A root, or a relative "." of one letter, is in every text.
    return {form for name in names if len(name) > 2 for form in (name, name.replace("\\", "\\\\"))}


def _shortened(path: str) -> str:
    """A path without quotes, to its last name; the punctuation of the sentence stays."""
    kept = path.rstrip(_END)
    return _last(kept) + path[len(kept) :]


def _last(path: str) -> str:
    """Last name of a path; the folder of a secret itself has none."""
    name = [part for part in re.split(r"[\\/]+", path) if part][-1:]
    return "the app's folder" if not name or name[0] == "…" else name[0]
