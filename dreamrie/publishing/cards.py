"""The README.md of a run: where it may be written, and how text of a user is put into Markdown and YAML."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

from dreamrie.errors import AdapterError, CheckpointError, ConfigError, DreamrieError
from dreamrie.run_folder import CARD, is_own_card, write_atomic

_log = logging.getLogger(__name__)


def leave_card(folder: Path, write: Callable[[Path], Path]) -> None:
    """Write the card at the end of a training, which is not lost when that fails.

    Args:
        folder: output folder of the run.
        write: writes the card of a folder.
    """
    try:
        write(folder)
    except DreamrieError as error:
        _log.warning("The model card was not written, everything else was: %s", error)


def write_card(folder: Path, text_of: Callable[[Path], str]) -> Path:
    """Write the model card of a run.

    Args:
        folder: output folder of a run that has saved its adapter.
        text_of: the card of a folder, from what the run has recorded.

    Returns:
        Path of the card.

    Raises:
        ConfigError: the folder holds no run, its records are damaged, or a README.md of somebody else.
        CheckpointError: the card cannot be written; what was there before is intact.
    """
    path = folder / CARD
    try:
        foreign = path.exists() and not is_own_card(path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}.") from error
    if foreign:
        raise ConfigError(f"{path} was not written by dreamrie, so it is kept. Move it away.")
    try:
        text = text_of(folder)
    except (AdapterError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        reason = str(error) or type(error).__name__
        raise ConfigError(
            f"{folder} holds no finished run that a model card could be written of: {reason}"
        ) from error
    write_atomic(path, text.encode("utf-8", "replace"))
    return path


def quoted(text: str) -> str:
    """A scalar of YAML: what is not printable, and what ends or bends the quotes, as its number."""
    return '"' + "".join(_escaped(c) for c in text) + '"'


def _escaped(character: str) -> str:
    if character in '"\\':
        return f"\\{character}"
    return character if character.isprintable() else f"\\U{ord(character):08x}"


def plain(text: str) -> str:
    """One line, without characters that a terminal or a page would obey."""
    line = " ".join(text.split())
    return "".join(c for c in line if c.isprintable()).replace("<", "(").replace(">", ")")


def code(text: str) -> str:
    """Text of a user as code of Markdown."""
    return f"`{plain(text).replace('`', chr(39))}`"


def cell(value: object) -> str:
    """A cell of a table of Markdown."""
    return str(value).replace("|", "\\|")
