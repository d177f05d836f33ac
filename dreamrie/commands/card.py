"""Write the model card of a run again: README.md in its folder.

python -m dreamrie card RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamrie.diffusion.model_card import write_card

HELP = "write README.md, the model card, into the folder of a run"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags.

    Args:
        parser: of the command.
    """
    parser.add_argument("run_folder", type=Path, metavar="RUN", help="output folder of a training")


def run(options: argparse.Namespace) -> int:
    """Do what the command line says.

    Args:
        options: parsed.

    Returns:
        0. What cannot be read or written is an error.
    """
    sys.stdout.write(f"wrote {write_card(options.run_folder)}\n")
    return 0
