"""What each picture of a concept shows, if it is written down: `metadata.jsonl`, or a text file beside each picture."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from dreamrie.diffusion.images import METADATA
from dreamrie.errors import ConfigError

# Stands for the instance prompt, so that captions need not repeat it.
TRIGGER = "[trigger]"


def read_captions(directory: Path, pictures: Sequence[Path], prompt: str) -> list[str] | None:
    """Read one caption for each picture.

    Args:
        directory: folder of the pictures; holds `metadata.jsonl` with lines `{"file_name": "0.png", "text": "..."}`, or
            `0.txt` beside `0.png`, or neither.
        pictures: the pictures, in the order in which captions are wanted.
        prompt: what `[trigger]` stands for.

    Returns:
        The captions; None if there are none.

    Raises:
        ConfigError: both kinds are there, a picture has none, a line names no picture or is malformed, or a caption is
            empty or not UTF-8.
    """
    table = directory / METADATA
    # A text file whose picture is missing is listed as a picture, and refused when it is decoded.
    texts = {p.name: p.with_suffix(".txt") for p in pictures if p.suffix.lower() != ".txt"}
    written = [path for path in texts.values() if path.is_file()]
    if table.is_file() and written:
        raise ConfigError(
            f"{directory} holds captions twice, in {METADATA} and in {written[0].name}. Keep one kind."
        )
    if table.is_file():
        found = _from_table(table)
    elif written:
        found = {name: _read(path) for name, path in texts.items() if path.is_file()}
    else:
        return None
    names = [path.name for path in pictures]
    missing = [name for name in names if name not in found]
    extra = sorted(set(found) - set(names))
    if missing or extra:
        raise ConfigError(
            f"{directory}: pictures without caption: {', '.join(missing) or 'none'}; captions without picture: "
            f"{', '.join(extra) or 'none'}. Every picture needs one, or none of them."
        )
    empty = [name for name in names if not found[name].strip()]
    if empty:
        raise ConfigError(f"{directory}: the caption of {empty[0]} is empty.")
    return [" ".join(found[name].replace(TRIGGER, prompt).split()) for name in names]


def _read(path: Path) -> str:
    """Text of a file, with or without a byte order mark."""
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read as text ({error}). Save it as UTF-8.") from error


def _from_table(path: Path) -> dict[str, str]:
    """Captions by file name."""
    found: dict[str, str] = {}
    # Not splitlines: JSON allows line ends of other scripts inside a text.
    for number, line in enumerate(_read(path).split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            name, text = row["file_name"], row["text"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ConfigError(
                f"{path}, line {number}: expected "
                '{"file_name": "0.png", "text": "[trigger] on grass"}, got ' + repr(line[:80])
            ) from error
        if not isinstance(name, str) or not isinstance(text, str):
            raise ConfigError(f"{path}, line {number}: file_name and text must be texts.")
        if name in found:
            raise ConfigError(f"{path}, line {number}: {name!r} stands twice.")
        found[name] = text
    return found
