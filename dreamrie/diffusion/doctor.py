"""Look through a folder of training pictures: what can be used, what is wrong with the rest, what to do.

python -m dreamrie doctor FOLDER [--fix OUT] [--resolution 512] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import sys
import textwrap
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from dreamrie.diffusion.captions import TRIGGER, read_captions
from dreamrie.diffusion.clean_copy import check_target, copy_clean, table_rows
from dreamrie.diffusion.examine import REMARKS, Code, Examined, Finding, compare, examine
from dreamrie.diffusion.images import METADATA, Entries, sort_entries
from dreamrie.errors import ConfigError
from dreamrie.files import write_atomic

HELP = "look through a folder of training pictures and say what to do"
COLUMNS = 100
_LONGEST_NAME = 30

# What to do about each finding; %s: the names.
_ADVICE: dict[Code, str] = {
    "broken": "Remove or replace what cannot be decoded: %s.",
    "same": "Keep one of equal pictures; remove %s.",
    "small": "Take larger originals if there are any, or train at a smaller --resolution: %s.",
    "blurred": "Take sharp pictures instead, or what is learned will be soft: %s.",
    "near": "Of pictures that are nearly the same, keep the best; the others only add weight to it: %s.",
    "dark": "Make brighter, or replace: %s.",
    "bright": "Make darker, or replace: %s.",
    "transparent": "Transparent parts are learned as white (--alpha tells how else they can be treated): %s.",
    "caption": "Write the missing captions, or remove all of them: %s.",
}


class Diagnosis(NamedTuple):
    """A folder that was looked through.

    Attributes:
        directory: the folder.
        resolution: that it was judged for, in pixels.
        pictures: in the order of their names.
        captions: names of the pictures that have one.
        faults: what is wrong with the folder itself, in words.
        ignored: names of entries that are no pictures.
    """

    directory: Path
    resolution: int
    pictures: list[Examined]
    captions: frozenset[str]
    faults: list[str]
    ignored: list[str]

    @property
    def is_well(self) -> bool:
        """Every picture is usable, and nothing needs attention."""
        return bool(self.pictures) and not (
            self.faults or any(picture.needs_attention for picture in self.pictures)
        )


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("directory", type=Path, metavar="FOLDER", help="folder with pictures")
    parser.add_argument(
        "--fix",
        type=Path,
        metavar="OUT",
        help="write a clean copy into this new folder: upright sRGB PNG files and their captions, without broken files "
        "and duplicates; FOLDER itself is never changed",
    )
    parser.add_argument(
        "--resolution", type=int, default=512, help="what training will use, in pixels (512)"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the findings here")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0: all pictures can be used; 1: something needs attention.

    Raises:
        ConfigError: the resolution or a file or folder to write cannot be used.
    """
    if options.resolution < 8:
        raise ConfigError(f"--resolution must be at least 8; got {options.resolution}.")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise ConfigError(f"--json {options.json}: its folder does not exist. Create it.")
    if options.fix is not None:
        check_target(options.fix, options.directory)
    found = diagnose(options.directory, options.resolution)
    sys.stdout.write(report(found))
    if options.json is not None:
        _write_json(options.json, found)
    if options.fix is not None:
        lines = copy_clean(found.directory, found.pictures, options.fix)
        sys.stdout.write("\n".join([*_wrapped(lines), ""]))
    return 0 if found.is_well else 1


def diagnose(directory: Path, resolution: int) -> Diagnosis:
    """Look through a folder.

    Args:
        directory: the folder.
        resolution: side of the training squares, in pixels.

    Returns:
        Every picture with its findings.
    """
    entries = sort_entries(directory)
    pictures = [examine(path, resolution) for path in entries.pictures]
    captions, faults = _captions(entries, directory)
    # Of equal pictures the one that has a caption stays.
    compare(sorted(pictures, key=lambda picture: picture.path.name not in captions))
    for picture in pictures:
        # One that cannot be decoded goes anyway.
        if captions and picture.is_usable and picture.path.name not in captions:
            picture.findings.append(Finding("caption", "no caption, though others have one"))
    ignored = [f"{e.name}/" if e.is_dir() else e.name for e in entries.ignored]
    return Diagnosis(directory, resolution, pictures, captions, faults, ignored)


def report(found: Diagnosis) -> str:
    """Write the table and the summary.

    Args:
        found: by `diagnose`.

    Returns:
        Lines of at most 100 columns.
    """
    lines = _table(found) if found.pictures else []
    return "\n".join([*lines, "", *_summary(found), ""]).lstrip("\n")


def _captions(entries: Entries, directory: Path) -> tuple[frozenset[str], list[str]]:
    """Names of pictures with a caption, and what training would refuse besides missing ones."""
    faults = [f"{e.name} is not read as captions: name it {METADATA}" for e in entries.misnamed]
    texts = {p.name for p in entries.pictures if p.with_suffix(".txt") in entries.captions}
    having = texts | {row["file_name"] for row in table_rows(directory / METADATA)}
    pictures = [path for path in entries.pictures if path.name in having]
    try:
        read_captions(directory, pictures, TRIGGER)
    except ConfigError as error:
        text = str(error).removeprefix(f"{directory}: ").removeprefix(f"{directory} ")
        faults.append(f"Captions: {text}")
    return frozenset(path.name for path in pictures), faults


def _table(found: Diagnosis) -> list[str]:
    """One line a picture; what does not fit goes on below."""
    without = "missing" if found.captions else "no"
    heads = ("picture", "size", "file", "caption", "findings")
    rows = [
        (
            _shortened(picture.path.name),
            "-" if picture.size is None else "{} x {}".format(*picture.size),
            picture.kind,
            "yes" if picture.path.name in found.captions else without if picture.is_usable else "-",
            # About captions there is a column.
            "; ".join(f.text for f in picture.findings if f.code != "caption") or "ok",
        )
        for picture in found.pictures
    ]
    widths = [max(_width(row[column]) for row in (heads, *rows)) for column in range(4)]
    indent = sum(widths) + 2 * len(widths)
    lines = []
    for row in (heads, *rows):
        cells = [
            cell + " " * (size - _width(cell)) for cell, size in zip(row, widths, strict=False)
        ]
        first, *more = textwrap.wrap(_printable(row[4]), max(30, COLUMNS - indent))
        lines.append("  ".join([*cells, first]))
        lines += [" " * indent + line for line in more]
    return lines


def advice(found: Diagnosis) -> tuple[list[str], list[str]]:
    """What to do about a folder, and what need not be changed but is worth knowing.

    Args:
        found: by `diagnose`.

    Returns:
        Sentences of both kinds.
    """
    steps = [f"{fault.rstrip('.')}." for fault in found.faults]
    remarks: list[str] = []
    for code, text in _ADVICE.items():
        names = [p.path.name for p in found.pictures if p.has(frozenset({code}))]
        if names:
            (remarks if code in REMARKS else steps).append(text % ", ".join(names))
    return steps, remarks


def _summary(found: Diagnosis) -> list[str]:
    """How many can be used, and what to do."""
    usable = [picture for picture in found.pictures if picture.is_usable]
    if not found.pictures:
        lines = [f"{found.directory} holds no pictures. Put PNG, JPEG or WebP files into it."]
    else:
        lines = [f"{len(usable)} of {len(found.pictures)} pictures can be used."]
    if found.pictures and not found.captions and not found.faults:
        lines.append("No captions: the instance prompt will say it for every picture.")
    if found.ignored:
        lines.append(f"Ignored: {', '.join(found.ignored)}.")
    steps, remarks = advice(found)
    if steps:
        lines += ["What to do:", *(f"- {step}" for step in steps)]
    elif found.pictures:
        lines.append("Nothing needs to be done.")
    lines += [f"Note: {remark}" for remark in remarks]
    return _wrapped(lines)


def _wrapped(lines: Sequence[str]) -> list[str]:
    """Lines that fit, what goes on indented."""
    return [
        part
        for line in lines
        for part in textwrap.wrap(_printable(line), COLUMNS, subsequent_indent="  ")
    ]


def _write_json(path: Path, found: Diagnosis) -> None:
    """The findings for programs."""
    pictures: list[dict[str, Any]] = [
        {
            "name": picture.path.name,
            "size": picture.size,
            "kind": picture.kind,
            "sharpness": None if picture.sharpness is None else round(picture.sharpness, 1),
            "caption": picture.path.name in found.captions,
            "usable": picture.is_usable,
            "findings": [finding._asdict() for finding in picture.findings],
        }
        for picture in found.pictures
    ]
    record = {
        "folder": str(found.directory),
        "resolution": found.resolution,
        "well": found.is_well,
        "faults": found.faults,
        "ignored": found.ignored,
        "pictures": pictures,
    }
    # A file name that is not UTF-8 is escaped, as JSON can.
    content = json.dumps(record, indent=2).encode("ascii")
    try:
        write_atomic(path, content + b"\n")
    except OSError as error:
        raise ConfigError(f"--json {path} cannot be written: {error}.") from error


def _printable(text: str) -> str:
    """Control characters and bytes of another encoding in file names must not reach the terminal."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _shortened(name: str) -> str:
    """A name that fits its column; its beginning and end tell more than the middle."""
    name = _printable(name)
    for kept in range(len(name), 2, -1):
        short = (
            name if kept == len(name) else f"{name[: kept - kept // 3]}...{name[-(kept // 3) :]}"
        )
        if _width(short) <= _LONGEST_NAME:
            break
    return short


def _width(text: str) -> int:
    """Columns on a terminal, where East Asian characters take two and accents none."""
    return sum(
        0 if unicodedata.combining(c) else 1 + (unicodedata.east_asian_width(c) in "WF")
        for c in text
    )
