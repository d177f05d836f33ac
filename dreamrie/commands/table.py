"""How the commands write: aligned tables of at most 100 columns, and the same numbers as JSON."""

from __future__ import annotations

import json
import re
import textwrap
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic

COLUMNS = 100
_SHORT = (("down_blocks", "down"), ("up_blocks", "up"), ("mid_block", "mid"))
_SHORT_INSIDE = (("attentions", "att"), ("transformer_blocks", "tb"), ("resnets", "res"))
_NOTE = (
    "Here down is down_blocks, up up_blocks, mid mid_block, att attentions, tb transformer_blocks."
)


def short(layer: str, width: int = 36) -> str:
    """A layer's name that fits a column.

    Args:
        layer: path in the U-Net.
        width: columns at most; longer names lose their beginning, which says least.

    Returns:
        The long words of diffusers abbreviated; see `names_note`.
    """
    text = printable(layer)
    for word, brief in (*_SHORT, *_SHORT_INSIDE):
        text = re.sub(rf"(^|\.){word}(?=\.)", rf"\g<1>{brief}", text)
    return text if len(text) <= width else f"..{text[2 - width :]}"


def names_note(layers: Iterable[str]) -> list[str]:
    """What the abbreviations mean.

    Args:
        layers: whose names were shortened.

    Returns:
        A line, or none where no word was abbreviated.
    """
    return [_NOTE] if any(short(layer, len(layer)) != layer for layer in layers) else []


def printable(text: str) -> str:
    """Control characters in names and facts of strangers must not reach the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """Columns two apart, the first to the left and numbers to the right.

    Args:
        heads: one for each column.
        rows: as many cells each.

    Returns:
        Lines.
    """
    lines = [list(heads), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(heads))]
    return [
        "  ".join(
            cell.ljust(width) if column == 0 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    ]


def facts_table(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Names to the left, what they are beside them, long texts wrapped.

    Args:
        rows: name and text.

    Returns:
        Lines.
    """
    rows = list(rows)
    indent = max(len(name) for name, _ in rows) + 2
    lines = []
    for name, text in rows:
        parts = textwrap.wrap(printable(text), COLUMNS - indent) or [""]
        lines.append(f"{name:<{indent}}{parts[0]}".rstrip())
        lines += [" " * indent + part for part in parts[1:]]
    return lines


def wrapped(text: str) -> list[str]:
    """Lines that fit, what goes on indented.

    Args:
        text: one paragraph.

    Returns:
        Lines.
    """
    return textwrap.wrap(printable(text), COLUMNS, subsequent_indent="  ")


def percent(share: float) -> str:
    """A share with one digit, or as many as tell it from all and from nothing."""
    if 0.0 < share < 0.0005 or 0.9995 <= share < 1.0 - 1e-12:
        # A share that is not everything must not read as if it were.
        return f"{share * 100:.2e} %" if share < 0.5 else f"{min(share * 100, 99.9999):.4f} %"
    return f"{share * 100:.1f} %"


def check_json(path: Path | None) -> None:
    """Find out before the work that its findings could not be written.

    Args:
        path: of `--json`, or None.

    Raises:
        ConfigError: its folder does not exist.
    """
    if path is not None and not path.absolute().parent.is_dir():
        raise ConfigError(f"--json {path}: its folder does not exist. Create it.")


def write_json(path: Path | None, record: Any) -> None:
    """The findings for programs.

    Args:
        path: of `--json`, or None for none.
        record: what JSON can hold.

    Raises:
        ConfigError: the file cannot be written.
    """
    if path is None:
        return
    # A file name that is not UTF-8 is escaped, as JSON can.
    content = json.dumps(record, indent=2, allow_nan=False).encode("ascii")
    try:
        write_atomic(path, content + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}.") from error
