"""Write an adapter file again for other programs; the change stays the same, to the rounding of the precision."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamrie.commands import files

HELP = "write an adapter file for other programs"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("file", type=Path, metavar="FILE", help=files.FILE_HELP)
    files.add_output(parser, to=None)


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be read or written is an error.
    """
    files.check_output(options)
    adapter = files.opened(options.file, use_dora=True)
    path = files.save(options, adapter.changes, adapter.facts, adapter.magnitudes)
    size = files.size_text(files.bytes_of(path))
    sys.stdout.write(f"wrote {path} for {options.to}, {options.dtype}, {size}\n")
    return 0
