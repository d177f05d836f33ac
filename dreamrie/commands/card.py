"""Write the model card of a run again: README.md in its folder.

python -m dreamrie card RUN
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from dreamrie.run_folder import is_of_texts

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
    folder: Path = options.run_folder
    # Either kind of run needs libraries that the other does without.
    if is_of_texts(folder):
        from dreamrie.llm.card import write_card
    else:
        from dreamrie.diffusion.model_card import write_card
    sys.stdout.write(f"wrote {write_card(folder)}\n")
    return 0
