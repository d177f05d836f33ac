"""Write a base model with an adapter in its weights, as a folder that any program for diffusers loads.

python -m dreamrie merge-into-base FILE --base MODEL --output DIR [--scale 1.0] [--dtype fp16]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamrie.commands import files
from dreamrie.commands.table import short, wrapped
from dreamrie.diffusion.merging import check_merge, merge_into_base
from dreamrie.diffusion.verifying import load_base

HELP = "write a whole pipeline with an adapter in its weights"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("file", type=Path, metavar="FILE", help=files.FILE_HELP)
    parser.add_argument(
        "--base",
        required=True,
        metavar="MODEL",
        help="alias, hub id or folder, as in training; dreamrie/tiny-sd is the embedded model. It is only read",
    )
    parser.add_argument(
        "--output", type=Path, required=True, metavar="DIR", help="folder that does not exist yet"
    )
    parser.add_argument(
        "--scale", type=float, default=1.0, metavar="NUMBER", help="strength of the adapter (1.0)"
    )
    parser.add_argument(
        "--dtype", choices=files.DTYPES, help="precision of the U-Net (that of the base's file)"
    )
    parser.add_argument(
        "--other-base",
        action="store_true",
        help="the base weights need not be those that the adapter was trained on",
    )


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be read, asked for or written is an error.
    """
    check_merge(options.output, options.scale)
    files.opened(
        options.file, use_dora=True
    )  # a file that is damaged anyway need not wait for a model
    merged = merge_into_base(
        load_base(options.base),
        options.file,
        options.output,
        scale=options.scale,
        dtype=files.DTYPES[options.dtype] if options.dtype else None,
        other_base=options.other_base,
    )
    kind = next(name for name, dtype in files.DTYPES.items() if dtype == merged.dtype)
    text = (
        f"wrote {merged.folder}: {merged.layers} layers changed, U-Net in {kind}, everything else as in the base, "
        "without its filter for pictures if it had one. Rounding lost at most "
        f"{merged.largest_rounding:.1e} of a layer's change ({short(merged.worst_layer)})."
    )
    sys.stdout.write("\n".join([*wrapped(text), ""]))
    return 0
